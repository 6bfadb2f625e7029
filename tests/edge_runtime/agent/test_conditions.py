"""What a device knows of itself: measured, told by a file, remembered over restarts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from edge_runtime.agent.battery import battery_wh
from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.config import AgentConfig, BrokerConfig, LimitsConfig, LinkConfig, TelemetryConfig
from edge_runtime.agent.energy_config import EnergyConfig
from edge_runtime.agent.limits import Rate
from edge_runtime.agent.telemetry_file import NOTHING, TelemetryFile, Told
from edge_runtime.data.config import DatasetConfig
from edge_runtime.messages import DECLINES, EnergyUse

if TYPE_CHECKING:
    from pathlib import Path

SHA = "0a0b0c0d" + "00" * 28
NOON = 1_798_714_800.0  # a day of December 2026 in any time zone
DAY_S = 86_400.0


class Counters:
    """What a link counted."""

    sent_bytes = received_bytes = 0


class World:
    """A device's clocks, files and link; :meth:`start` begins anew from the disk."""

    def __init__(self, folder: Path, **fields) -> None:
        self.folder, self.clock, self.monotonic, self.link = folder, NOON, 0.0, Counters()
        self.synchronised: bool | None = True
        self.told = folder / "gauges.json"
        self.tell()
        self.config = AgentConfig(
            **{
                "device": "dev",
                "state_dir": str(folder),
                "broker": BrokerConfig(url="mqtt://localhost:1"),
                "data": [DatasetConfig(name="d", path="d.npz")],
                "telemetry": TelemetryConfig(file=str(self.told)),
                **fields,
            }
        )
        self.start()

    def start(self) -> Conditions:
        self.link = Counters()
        self.now = Conditions(
            self.config,
            clock=lambda: self.clock,
            monotonic=lambda: self.monotonic,
            root=self.folder / "root",
            synchronised=lambda: self.synchronised,
        )
        return self.now

    def tell(self, **values) -> None:
        self.told.write_text(json.dumps(values))

    def passes(self, seconds: float, *, clock: float | None = None, could: bool = True) -> None:
        self.monotonic += seconds
        self.clock += seconds if clock is None else clock
        self.now.tick(self.link, could=could)


def test_the_heartbeat_says_what_is_known(tmp_path):
    """Figures of the file go before measured ones; limits, usage, rates and the battery's reserve are in it."""
    limits = LimitsConfig(
        max_temperature_c=80.0, battery_reserve_percent=20.0, joules_per_day=500.0, data_mb_per_month=10.0
    )
    world = World(tmp_path, limits=limits, link=LinkConfig(metered=True))
    world.passes(5.0)
    world.link.sent_bytes = 2_000_000
    world.passes(5.0)
    world.now.worked(SHA, 100, 2.0, EnergyUse(train_mj=40_000, other_mj=10_000, sensor="rapl"))
    world.tell(temperature_c=60.5, battery_percent=50.0, on_external_power=False, free_memory_bytes=3.5e8)
    said = world.now.heartbeat()
    assert (said.temperature_c, said.temperature_margin_c, said.free_memory_mb) == (60, 19, 350)
    assert (said.battery_percent, said.reserve_percent, said.on_external_power) == (50, 20, False)
    assert (said.bundle, said.step_us, said.step_uj) == (bytes((10, 11, 12, 13)), 20_000, 400_000)
    assert (said.data_left_mb, said.joules_left, said.link_metered) == (8, 450, True)
    assert (said.declines, said.availability_percent, said.up_kbit_s) == (0, 100, None)
    world.tell(temperature_c=81.0, step_s=0.5, step_joules=2.0, up_kbit_s=100, down_kbit_s=0, availability_percent=7)
    said = world.now.heartbeat()
    assert (said.bundle, said.step_us, said.step_uj) == (bytes((10, 11, 12, 13)), 500_000, 2_000_000)
    assert (DECLINES[said.declines], said.availability_percent) == ("heat", 7)
    assert (said.up_kbit_s, said.down_kbit_s) == (100, 0)


def test_usage_and_rates_survive_a_restart(tmp_path):
    """Joules of the day, bytes of the month, rates of steps, what is expected: all of it is on disk after a job."""
    world = World(tmp_path, limits=LimitsConfig(joules_per_day=500.0))
    for _ in range(20):
        world.link.received_bytes += 50_000
        world.passes(60.0, could=False)
    world.now.up.begins(0.0, "u", 125_000)
    world.now.up.ends(1.0, "u")
    world.now.worked(SHA, 10, 5.0, EnergyUse(train_mj=100_000, radio_mj=1000))
    known = world.start().known({"d": 7})
    assert (known.joules_today, known.month_bytes) == (101.0, 1_000_000)
    assert known.rate_of(SHA) == Rate(0.5, 10.0)
    assert (known.up_kbit_s, known.samples) == (1000.0, {"d": 7})
    assert world.now.heartbeat().availability_percent == 0
    world.passes(DAY_S)
    assert world.now.known({}).joules_today == 0.0


def availability_after(world: World, off_s: float, *, before_s: float = 0.0) -> int | None:
    """What a device that could train for a day expects at this hour, after it was off.

    Its clock, which stood meanwhile, is set right ``before_s`` after the start; before that nothing synchronises it.
    """
    for _ in range(24):
        world.passes(3600.0)
    world.now.save()
    world.start()
    if before_s:
        world.synchronised = False
        world.passes(before_s)
        world.synchronised = True
    world.passes(5.0, clock=5.0 + off_s)
    return world.now.heartbeat().availability_percent


def test_the_time_that_a_device_was_off_counts_against_it(tmp_path):
    """From the last save to the start, also when the clock is set right only later; a restart costs nothing."""
    folders = [tmp_path / name for name in ("restarted", "off", "late", "never", "back")]
    for folder in folders:
        folder.mkdir()
    restarted, off, late, never, back = (World(folder) for folder in folders)
    assert availability_after(restarted, 20.0) >= 99
    assert availability_after(off, 3 * DAY_S) < 80
    assert availability_after(late, 3 * DAY_S, before_s=90.0) < 80
    never.synchronised = False
    assert availability_after(never, 3 * DAY_S) == 100
    assert availability_after(back, -3 * DAY_S) == 100


def test_clocks_that_jump_change_nothing_that_was_used(tmp_path):
    """Back a year, to 1970, and forth again, over restarts: the day's joules stay drawn."""
    world = World(tmp_path, limits=LimitsConfig(joules_per_day=50.0))
    world.passes(5.0)
    world.now.worked(SHA, 1, 1.0, EnergyUse(train_mj=60_000))
    for clock in (NOON - 365 * DAY_S, 1000.0, NOON, NOON - DAY_S):
        world.clock = clock
        world.start()
        world.passes(5.0)
        assert world.now.held().limit == "joules"


def test_what_a_doubtful_job_drew_counts_for_the_day_only(tmp_path):
    """A figure that something speaks against is no rate; where the file says what a step draws, that counts."""
    world = World(tmp_path)
    world.now.worked(SHA, 10, 5.0, EnergyUse(train_mj=100_000, doubtful=True))
    assert world.now.known({}).rate_of(SHA) == Rate(0.5, None)
    assert world.now.known({}).joules_today == 100.0
    world.tell(step_joules=2.0)
    world.now.known({})
    world.now.worked(SHA, 10, 5.0, None)
    assert world.now.known({}).joules_today == 120.0
    assert world.now.known({}).rate_of(SHA) == Rate(None, 2.0)


def test_flash_is_written_rarely(tmp_path):
    """Between jobs once an hour, or when a megabyte went over the link, and then once a minute at most."""
    world = World(tmp_path)
    file, written = tmp_path / "device.memory", []
    for _ in range(2 * 720):
        world.passes(5.0)
        if file.exists():
            written.append(world.monotonic)
            file.unlink()
    assert len(written) == 2
    world.link.sent_bytes += 5_000_000
    world.passes(5.0)
    assert not file.exists()
    world.passes(60.0)
    assert file.exists()
    assert file.stat().st_size < 1024


def test_a_damaged_memory_is_told_and_counted_anew(tmp_path, caplog):
    """What lies there in its place does not end the agent."""
    (tmp_path / "device.memory").write_bytes(b"\xc1\x00")
    world = World(tmp_path)
    assert "device.memory: cannot be read" in caplog.text
    assert world.now.known({}).joules_today == 0.0


@pytest.mark.parametrize(
    ("content", "told", "said"),
    [
        ('{"battery_percent": 41.5, "link_metered": false}', Told(battery_percent=41.5, link_metered=False), ""),
        ("{}", Told(), ""),
        ('{"battery_percent": 141, "temperature_c": 30}', Told(temperature_c=30), "battery_percent must be a number"),
        ('{"temperature_c": "hot"}', Told(), "temperature_c must be a number from -60 to 200"),
        ('{"link_metered": 1}', Told(), "link_metered must be true or false"),
        ('{"step_s": -1}', Told(), "step_s must be"),
        ('{"step_s": null, "volts": 5}', Told(), "'volts' is no key; known are battery_percent"),
        ("[1]", Told(), "must hold a JSON object"),
        ("{" * 5000, Told(), "is no JSON"),
        ("\xff", Told(), "is no JSON"),
        (" " * 20_000, Told(), "must hold a JSON object of 16384 bytes at most"),
    ],
)
def test_absurd_values_of_the_file_are_left_out(tmp_path, caplog, content, told, said):
    """What can be believed counts, the rest is told once."""
    path = tmp_path / "t.json"
    path.write_text(content, encoding="latin-1")
    file = TelemetryFile(str(path))
    for _ in range(3):
        assert file.read() == told
    assert len(caplog.messages) == bool(said)
    assert said in caplog.text


def test_what_is_left_out_of_the_file_is_said(tmp_path, caplog):
    """Of a file with one wrong key the others count."""
    path = tmp_path / "t.json"
    path.write_text('{"battery_percent": 141, "step_s": 1}')
    assert TelemetryFile(str(path)).read() == Told(step_s=1)
    assert "100; its other keys count, this is left out until it is right" in caplog.text


def test_a_missing_file_is_told_until_it_comes(tmp_path, caplog):
    """One warning; when the file is right and wrong again, another."""
    path = tmp_path / "t.json"
    file = TelemetryFile(str(path))
    assert file.read() == file.read() == NOTHING
    path.write_text('{"step_s": 1}')
    assert file.read() == Told(step_s=1)
    path.unlink()
    file.read()
    assert caplog.text.count("cannot be read (No such file or directory); nothing in it counts until it is right") == 2
    assert TelemetryFile(None).read() is NOTHING


@pytest.mark.parametrize(
    ("files", "capacity"),
    [
        ({"type": "Battery", "energy_full": "50000000"}, 50.0),
        ({"type": "Battery", "energy_full_design": "18500"}, 18.5),
        ({"type": "Battery", "charge_full": "5000000", "voltage_min_design": "3700000"}, 18.5),
        ({"type": "Battery", "charge_full": "5000", "voltage_now": "3700"}, 18.5),
        ({"type": "Battery", "charge_full": "5000000"}, None),
        ({"type": "Battery", "energy_full": "nonsense"}, None),
        ({"type": "Battery", "scope": "Device", "energy_full": "50000000"}, None),
        ({"type": "Mains"}, None),
    ],
)
def test_the_battery_says_what_it_holds(tmp_path, files, capacity):
    """In the kernel's units or thousandths of them; a mouse's battery does not count."""
    folder = tmp_path / "sys/class/power_supply/BAT0"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content + "\n")
    assert battery_wh(tmp_path) == (None if capacity is None else pytest.approx(capacity))


def test_the_configured_battery_goes_before_its_gauge_and_the_file_before_both(tmp_path):
    """One capacity is announced."""
    world = World(tmp_path, energy=EnergyConfig(battery_wh=20.0))
    assert world.now.battery_wh == 20.0
    world.tell(battery_wh=25.5)
    assert world.now.known({}).battery_wh == world.now.battery_wh == 25.5
