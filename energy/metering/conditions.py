"""Under which conditions a machine works: temperature, throttling, clocks, power mode.

Two figures are comparable only if these were the same. Most of it is read from files; a Raspberry Pi's firmware is
asked with ``vcgencmd``, and a Jetson's power mode with ``nvpmodel`` where its files do not tell.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.errors import SensorError
from energy.sensors import nvml
from energy.sensors._files import board_model, look, look_number, run_command
from energy.temperature import hottest_c

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Run = Callable[[Sequence[str]], str]

_NOW = {1 << 0: "under-voltage", 1 << 1: "clock capped", 1 << 2: "throttled", 1 << 3: "soft temperature limit"}
_PI_EVENTS = {16: "under_voltage", 17: "clock_capped", 18: "throttled", 19: "soft_temperature_limit"}
_COOLING = re.compile(r"^(thermal-)?(cpu|gpu|dev)freq|throttle|^processor|^cpu|^gpu", re.IGNORECASE)
_GPU = re.compile(r"gpu|gv11b|ga10b|gb10b|gp10b|gm20b", re.IGNORECASE)


class Conditions(NamedTuple):
    """What was read at one moment.

    Attributes:
        temperature_c: of the hottest plausible zone; None where none can be read.
        throttled: causes that slow the machine down now, in words; None where it cannot tell.
        events: counters since boot that grow with each event of throttling, under-voltage or over-current; the flags of
            a Raspberry Pi for "has occurred" are 0 or 1.
        clocks_hz: of each group of CPU cores and of the GPU.
        power_mode: name of the Jetson power mode, else the governor of the CPU clocks.
    """

    temperature_c: float | None
    throttled: tuple[str, ...] | None
    events: dict[str, int]
    clocks_hz: dict[str, int]
    power_mode: str | None


def read_conditions(root: Path = Path("/"), *, run: Run | None = None, library: Any = None) -> Conditions:
    """Reads all of it once, below ``root``; what cannot be read is None or missing, and nothing is raised.

    ``run`` executes a command and gives its output; commands of this machine are run only for its own root.
    ``library`` stands in for ``pynvml``.
    """
    if run is None and root == Path("/"):
        run = run_command
    causes, told = _cooling(root)
    events = _over_current(root) | _intel_events(root)
    bits = _pi_bits(root, run)
    if bits is not None:
        told = True
        causes += [cause for bit, cause in _NOW.items() if bits & bit]
        events |= {f"pi_{name}": bits >> position & 1 for position, name in _PI_EVENTS.items()}
    cards, card_clocks = _cards(root, library)
    if cards is not None:
        told = True
        causes += cards
    return Conditions(
        temperature_c=hottest_c(root),
        throttled=tuple(dict.fromkeys(causes)) if told else None,
        events=events,
        clocks_hz=_clocks(root) | card_clocks,
        power_mode=_power_mode(root, run),
    )


def _cooling(root: Path) -> tuple[list[str], bool]:
    """Cooling devices that slow something down now, fans left out, and whether there is one that could."""
    causes: list[str] = []
    told = False
    for device in sorted(root.glob("sys/class/thermal/cooling_device*")):
        kind = look(device / "type") or ""
        state = look_number(device / "cur_state")
        if _COOLING.search(kind) and "fan" not in kind.lower() and state is not None:
            told = True
            if state > 0:
                causes.append(f"{kind} slowed down (step {state})")
    for chip in _hwmon(root, "rpi_volt"):
        alarm = look_number(chip / "in0_lcrit_alarm")
        told = told or alarm is not None
        if alarm:
            causes.append("under-voltage")
    return causes, told


def _over_current(root: Path) -> dict[str, int]:
    """Counters of a Jetson: oc1 under-voltage, oc2 mean over-current, oc3 instant over-current."""
    counts = {}
    for chip in _hwmon(root, "soctherm_oc"):
        for path in sorted(chip.glob("oc*_event_cnt")):
            count = look_number(path)
            if count is not None:
                counts[path.name] = count
    return counts


def _intel_events(root: Path) -> dict[str, int]:
    """How often an Intel package got too hot; every core of a package shows the same counter."""
    paths = root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/package_throttle_count")
    counts = [count for count in map(look_number, paths) if count is not None]
    return {"package_throttle_count": max(counts)} if counts else {}


def _pi_bits(root: Path, run: Run | None) -> int | None:
    if run is None or "Raspberry Pi" not in board_model(root):
        return None
    try:
        answer = run(("vcgencmd", "get_throttled"))
    except OSError:  # not installed, or not allowed: the sensor says so
        return None
    found = re.search(r"throttled=(0x[0-9a-fA-F]+)", answer)
    return int(found[1], 16) if found else None


def _cards(root: Path, library: Any) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    try:
        return nvml.throttling(library if library is not None else nvml.started(root))
    except SensorError:
        return None, {}


def _clocks(root: Path) -> dict[str, int]:
    clocks = {}
    for policy in sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*")):
        kilohertz = look_number(policy / "scaling_cur_freq")
        if kilohertz is not None:
            clocks[policy.name] = kilohertz * 1000
    for device in sorted(root.glob("sys/class/devfreq/*")):
        hertz = look_number(device / "cur_freq") if _GPU.search(device.name) else None
        if hertz is not None:
            clocks.setdefault("gpu", hertz)
    return clocks


def _power_mode(root: Path, run: Run | None) -> str | None:
    table = look(root / "etc/nvpmodel.conf")
    status = look(root / "var/lib/nvpmodel/status")
    if table is not None or status is not None:
        number = re.search(r"pmode:\s*(\d+)", status or "")
        names = {int(mode): name for mode, name in re.findall(r"POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", table or "")}
        if number and int(number[1]) in names:
            return str(names[int(number[1])])
        asked = _asked_mode(run)
        if asked:
            return asked
    governors = {look(policy / "scaling_governor") for policy in root.glob("sys/devices/system/cpu/cpufreq/policy*")}
    return ", ".join(sorted(governor for governor in governors if governor)) or None


def _asked_mode(run: Run | None) -> str | None:
    if run is None:
        return None
    try:
        found = re.search(r"NV Power Mode:\s*(\S+)", run(("nvpmodel", "-q")))
    except OSError:
        return None
    return found[1] if found else None


def _hwmon(root: Path, *names: str) -> Iterator[Path]:
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        if look(folder / "name") in names:
            yield folder
