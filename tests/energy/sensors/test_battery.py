"""Batteries, and the units their drivers speak."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from energy.errors import SensorError
from energy.sensors import battery
from tests.energy import boards

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("fields", "watts"),
    [
        (boards.LAPTOP, 19.195),
        (boards.LAPTOP_CURRENT, 14.888),
        ({**boards.LAPTOP_CURRENT, "CURRENT_NOW": -1_000_000}, 14.888),
        (boards.PHONE, 1.4),
        ({**boards.PHONE, "VOLTAGE_NOW": 4000}, 1.4),
    ],
)
def test_power_in_whatever_unit(tmp_path: Path, fields: dict[str, object], watts: float) -> None:
    """Microwatts; microamperes; a negative current; milliamperes; millivolts: what the machine can draw is believed."""
    boards.battery(tmp_path, fields)
    (sensor,) = battery.probe(tmp_path)
    assert sensor.read() == pytest.approx((watts,))
    assert sensor.rails[0].unit == "watts"
    assert sensor.source[:3] == ("battery", "board", "coarse")
    assert sensor.domain == "system"
    assert (sensor.frozen_s, sensor.slow) == (300.0, True)


@pytest.mark.parametrize(
    ("fields", "watts"),
    [
        ({"CURRENT_NOW": 5000, "CHARGE_FULL": 5_000_000}, None),  # 20 mW, never 20 W
        ({"CURRENT_NOW": 5000, "CHARGE_FULL_DESIGN": 5000}, 20.0),
        ({"POWER_NOW": 20_000, "ENERGY_FULL": 42_650_000}, None),
        ({"POWER_NOW": 20_000, "ENERGY_FULL": 42_650}, 20.0),
        ({"POWER_NOW": 100_000, "ENERGY_FULL": 42_650_000}, 0.1),
        ({"POWER_NOW": 100_000, "ENERGY_FULL": 42_650}, 100.0),
        ({"POWER_NOW": 20_000}, None),
        ({"POWER_NOW": 100_000}, None),
        ({"CURRENT_NOW": 5000, "CHARGE_NOW": 4_800_000, "CHARGE_FULL": 5000}, None),
        ({"CURRENT_NOW": 5000, "CHARGE_FULL": 5000, "ENERGY_FULL": 20_000_000}, None),
    ],
)
def test_a_low_reading_settles_no_unit(tmp_path: Path, fields: dict[str, object], watts: float | None) -> None:
    """A machine at rest and one in larger units look alike: the size of the battery tells, or nothing is believed."""
    base = {"TYPE": "Battery", "STATUS": "Discharging", "VOLTAGE_NOW": 4_000_000}
    uevent = boards.battery(tmp_path, {**base, **fields})
    if watts is not None:
        (sensor,) = battery.probe(tmp_path)
        assert sensor.read() == pytest.approx((watts,))
        return
    with pytest.raises(SensorError, match="cannot be told") as refused:
        battery.probe(tmp_path)
    assert refused.value.fault == "implausible"
    key = next(iter(fields))
    boards.battery_fields(uevent, {**base, **fields, key: 3_000_000})
    (sensor,) = battery.probe(tmp_path)  # at work the unit shows
    at_work = sensor.read()[0]
    boards.battery_fields(uevent, {**base, **fields})
    assert sensor.read()[0] < at_work / 20  # and stays


@pytest.mark.parametrize(
    ("fields", "spent", "joules"),
    [
        ({"ENERGY_FULL": 42_650_000, "ENERGY_NOW": 30_000_000}, {"ENERGY_NOW": 29_990_000}, 36.0),
        ({"CHARGE_FULL": 5_000_000, "CHARGE_NOW": 4_000_000}, {"CHARGE_NOW": 3_990_000}, 144.0),
        ({"CHARGE_FULL": 5000, "CHARGE_NOW": 4000}, {"CHARGE_NOW": 3990}, 144.0),
    ],
)
def test_without_power_what_is_left_counts(tmp_path: Path, fields, spent, joules) -> None:
    """Microwatt-hours, microampere-hours and milliampere-hours become a counter of joules that only grows."""
    base = {"TYPE": "Battery", "STATUS": "Discharging", "VOLTAGE_NOW": 4_000_000, **fields}
    uevent = boards.battery(tmp_path, base)
    (sensor,) = battery.probe(tmp_path)
    assert sensor.rails[0].unit == "joules"
    assert sensor.read() == (0.0,)
    boards.battery_fields(uevent, {**base, **spent})
    assert sensor.read() == pytest.approx((joules,))
    rounding = {key: value + 1 for key, value in spent.items()}
    boards.battery_fields(uevent, {**base, **rounding})
    assert sensor.read() == pytest.approx((joules,))
    key = next(iter(spent))
    boards.battery_fields(uevent, {**base, key: fields[key.replace("NOW", "FULL")]})
    with pytest.raises(SensorError, match="holds more than before") as refused:
        sensor.read()
    assert refused.value.fault == "implausible"


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", "Unknown"])
def test_on_external_power_the_battery_says_nothing(tmp_path: Path, status: str) -> None:
    """Also when the plug goes in in the middle: no figure rather than that of the charger."""
    uevent = boards.battery(tmp_path, boards.LAPTOP)
    (sensor,) = battery.probe(tmp_path)
    boards.battery_fields(uevent, {**boards.LAPTOP, "STATUS": status})
    for attempt in (sensor.read, lambda: battery.probe(tmp_path)):
        with pytest.raises(SensorError, match="unplug") as refused:
            attempt()
        assert refused.value.fault == "unsupported"


def test_two_batteries_one_of_which_rests(tmp_path: Path) -> None:
    """The one that feeds the machine counts; the other one gives nothing now, and its share later."""
    boards.battery(tmp_path, boards.LAPTOP)
    second = boards.battery(tmp_path, {**boards.LAPTOP, "STATUS": "Not charging", "POWER_NOW": 0}, "BAT1")
    (sensor,) = battery.probe(tmp_path)
    assert sensor.read() == pytest.approx((19.195, 0.0))
    boards.battery_fields(second, {**boards.LAPTOP, "POWER_NOW": 5_000_000})
    assert sensor.read() == pytest.approx((19.195, 5.0))


def test_other_supplies_are_no_battery(tmp_path: Path) -> None:
    """Chargers, USB-C ports, mice and empty bays are left out."""
    boards.battery(tmp_path, {"TYPE": "Mains", "ONLINE": 0}, "AC")
    boards.battery(tmp_path, {"TYPE": "USB", "CURRENT_NOW": 3_000_000}, "ucsi-source-psy-1")
    boards.battery(tmp_path, {**boards.LAPTOP, "SCOPE": "Device"}, "hidpp_battery_0")
    boards.battery(tmp_path, {**boards.LAPTOP, "PRESENT": 0}, "BAT1")
    with pytest.raises(SensorError) as refused:
        battery.probe(tmp_path)
    assert refused.value.fault == "absent"


@pytest.mark.parametrize(
    "fields",
    [
        {"POWER_NOW": 5},  # 5 uW or 5 mW: neither runs a machine
        {"POWER_NOW": 9_999_999_999},
        {"CURRENT_NOW": 4_000_000_000, "VOLTAGE_NOW": 12_000_000},
        {"CURRENT_NOW": 500_000, "VOLTAGE_NOW": 12},
        {"POWER_NOW": "many"},
        {"POWER_NOW": "9" * 400},
        {"ENERGY_FULL": 10, "ENERGY_NOW": 5},
    ],
)
def test_units_that_cannot_be_told_are_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    """No guess: neither the promised unit nor a thousand times that can be true."""
    boards.battery(tmp_path, {"TYPE": "Battery", "STATUS": "Discharging", **fields})
    with pytest.raises(SensorError) as refused:
        battery.probe(tmp_path)
    assert refused.value.fault == "implausible"


@pytest.mark.parametrize(
    "fields", [{}, {"CURRENT_NOW": 500_000}, {"CHARGE_NOW": 6_200_000, "CHARGE_FULL": 6200, "VOLTAGE_NOW": 4_397_000}]
)
def test_gauges_that_tell_too_little_are_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    """Nothing but a percentage, a current without voltage, a charge and a capacity in two units."""
    boards.battery(tmp_path, {"TYPE": "Battery", "STATUS": "Discharging", "CAPACITY": 77, **fields})
    with pytest.raises(SensorError) as refused:
        battery.probe(tmp_path)
    assert refused.value.fault == "unsupported"


def test_a_battery_that_is_taken_out_has_vanished(tmp_path: Path) -> None:
    """As is a power that drops to nothing implausible."""
    uevent = boards.battery(tmp_path, boards.LAPTOP)
    (sensor,) = battery.probe(tmp_path)
    boards.battery_fields(uevent, {**boards.LAPTOP, "POWER_NOW": 0})
    with pytest.raises(SensorError) as nothing:
        sensor.read()
    assert nothing.value.fault == "implausible"
    boards.vanish(uevent.parent)
    with pytest.raises(SensorError) as gone:
        sensor.read()
    assert gone.value.fault == "vanished"
