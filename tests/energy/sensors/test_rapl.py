"""RAPL counters of Intel and AMD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from energy.errors import SensorError
from energy.sensors import rapl
from tests.energy import boards

if TYPE_CHECKING:
    from pathlib import Path


def total(sensor) -> float:
    return sum(value for value, rail in zip(sensor.read(), sensor.rails, strict=True) if rail.in_total)


def test_packages_and_their_memory_count_and_parts_do_not(tmp_path: Path) -> None:
    """Cores and graphics are inside the package; the second tree of the same package is not a second package."""
    (sensor,) = rapl.probe(boards.x86_intel(tmp_path, psys=False))
    assert {rail.name: rail.in_total for rail in sensor.rails} == {
        "package-0": True,
        "package-0 core": False,
        "package-0 uncore": False,
        "package-0 dram": True,
    }
    assert total(sensor) == pytest.approx(1200.0)
    assert {rail.unit for rail in sensor.rails} == {"joules"}
    assert sensor.rails[0].wraps_at == pytest.approx(262_143.32885)
    assert sensor.rails[3].wraps_at == pytest.approx(65_712.999613)
    assert (sensor.domain, *sensor.source[:3]) == ("cpu", "rapl", "package", "counter")
    assert "memory" in sensor.source.covers


def test_all_sockets_are_added(tmp_path: Path) -> None:
    """Two packages with their parts are told apart by name."""
    (sensor,) = rapl.probe(boards.x86_intel(tmp_path, sockets=2, psys=False, dram=False))
    assert [rail.name for rail in sensor.rails if rail.in_total] == ["package-0", "package-1"]
    assert total(sensor) == pytest.approx(2000.000001)
    assert "memory" not in sensor.source.covers


def test_the_platform_is_a_sensor_of_its_own(tmp_path: Path) -> None:
    """Psys holds the packages: it is the total of another sensor, of the system, with the packages beside it."""
    cpu, platform = rapl.probe(boards.x86_intel(tmp_path))
    assert "psys" not in {rail.name for rail in cpu.rails}
    assert platform.domain == "system"
    assert platform.source.sensor == "rapl-psys"
    assert [(rail.name, rail.in_total) for rail in platform.rails] == [("psys", True), ("package-0", False)]
    assert total(platform) == pytest.approx(5000.0)


def test_a_platform_counter_that_was_never_wired_is_refused(tmp_path: Path) -> None:
    """One that stays at 0 is no sensor; one that counts less than its packages is implausible, also past a wrap."""
    root = boards.x86_intel(tmp_path)
    psys, package = (root / "sys/class/powercap" / f"intel-rapl:{number}" / "energy_uj" for number in (1, 0))
    _, platform = rapl.probe(root)
    boards.write(package, 262_143_000_000)
    boards.write(psys, 262_143_000_000)
    platform.read()
    boards.write(package, 100_000_000)  # wrapped: 100.3 J more
    boards.write(psys, 140_000_000)
    platform.read()
    boards.write(package, 200_000_000)
    boards.write(psys, 150_000_000)
    with pytest.raises(SensorError, match="choose rapl") as refused:
        platform.read()
    assert refused.value.fault == "implausible"
    boards.write(psys, 0)
    assert [sensor.source.sensor for sensor in rapl.probe(root)] == ["rapl"]


def test_a_wrapped_counter_is_read_as_it_is(tmp_path: Path) -> None:
    """The rail says where it wraps, and the value after the wrap is small again."""
    root = boards.x86_intel(tmp_path, psys=False)
    (sensor,) = rapl.probe(root)
    boards.write(root / "sys/class/powercap/intel-rapl:0/energy_uj", 5_000_000)
    assert sensor.read()[0] == pytest.approx(5.0)


def test_amd_shows_the_same_tree(tmp_path: Path) -> None:
    """One package in the total, its cores beside it."""
    (sensor,) = rapl.probe(boards.x86_amd(tmp_path))
    assert total(sensor) == pytest.approx(70.0)


def test_missing_permission_names_its_cure(tmp_path: Path) -> None:
    """Only root may read since CVE-2020-8694, and the message says what to do about it."""
    root = boards.x86_intel(tmp_path)
    for path in root.glob("sys/devices/virtual/powercap/**/energy_uj"):
        path.chmod(0)
    with (
        boards.unprivileged(),
        pytest.raises(SensorError, match=r"CVE-2020-8694.*udev.*CAP_DAC_READ_SEARCH") as refused,
    ):
        rapl.probe(root)
    assert refused.value.fault == "permission"


@pytest.mark.parametrize("microjoules", [-1, 300_000_000_000_000, "x"])
def test_absurd_counters_are_refused(tmp_path: Path, microjoules: object) -> None:
    """Negative, beyond the range of the counter, no number."""
    root = boards.x86_intel(tmp_path, psys=False)
    (sensor,) = rapl.probe(root)
    boards.write(root / "sys/class/powercap/intel-rapl:0/energy_uj", microjoules)
    with pytest.raises(SensorError) as refused:
        sensor.read()
    assert refused.value.fault == "implausible"


def test_a_counter_that_counts_nothing_is_no_sensor(tmp_path: Path) -> None:
    """Some virtual machines show packages that stay at 0; parts at 0 are left out alone."""
    root = boards.x86_intel(tmp_path, psys=False)
    boards.write(root / "sys/class/powercap/intel-rapl:0/intel-rapl:0:1/energy_uj", 0)
    (sensor,) = rapl.probe(root)
    assert "package-0 uncore" not in {rail.name for rail in sensor.rails}
    boards.write(root / "sys/class/powercap/intel-rapl:0/energy_uj", 0)
    with pytest.raises(SensorError, match="virtual") as refused:
        rapl.probe(root)
    assert refused.value.fault == "unsupported"


def test_counters_that_go_away_have_vanished(tmp_path: Path) -> None:
    """The module of the kernel may be unloaded in the middle."""
    root = boards.x86_intel(tmp_path, psys=False)
    (sensor,) = rapl.probe(root)
    boards.vanish(root / "sys/devices/virtual/powercap")
    with pytest.raises(SensorError) as gone:
        sensor.read()
    assert gone.value.fault == "vanished"


def test_a_counter_without_its_range_is_refused(tmp_path: Path) -> None:
    """Who does not know where a counter wraps would lose the joules of a wrap."""
    root = boards.x86_intel(tmp_path, psys=False)
    (root / "sys/class/powercap/intel-rapl:0/max_energy_range_uj").unlink()
    with pytest.raises(SensorError, match="wraps") as refused:
        rapl.probe(root)
    assert refused.value.fault == "unsupported"
