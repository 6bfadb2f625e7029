"""A model in place of a sensor: idle power plus a share for every busy core.

Nothing is measured here. Its joules are labelled ``modelled`` everywhere and never added to measured ones. The watts
come from ``edge-energy calibrate`` against a real sensor, or from whoever writes them into a configuration.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from energy.errors import SensorError
from energy.sensors.base import Domain, Rail, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAME = "modelled"
INTERVAL_S = 0.1


class Modelled:
    """Counts ``idle_watts`` x seconds + (``busy_watts`` - ``idle_watts``) x busy core seconds / ``cores``.

    Args:
        idle_watts, busy_watts: with no core and with all cores busy.
        utilisation: seconds that cores were busy since some start, summed over cores; must not fall.
        cores: of the machine; None: as many as it has.
        clock: monotonic seconds.
        fitted_to: what the watts were calibrated against, in words; empty if they are nominal.

    Raises:
        SensorError: watts that cannot be.
    """

    def __init__(
        self,
        idle_watts: float,
        busy_watts: float,
        utilisation: Callable[[], float],
        *,
        cores: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        fitted_to: str = "",
    ) -> None:
        if not 0 <= idle_watts <= busy_watts < 10_000:
            raise SensorError(
                "implausible",
                f"a model with {idle_watts:g} W idle and {busy_watts:g} W busy cannot be; "
                "give 0 <= idle <= busy, or run edge-energy calibrate",
            )
        self.idle_watts = idle_watts
        self.busy_watts = busy_watts
        origin = f"fitted to {fitted_to}" if fitted_to else "nominal"
        covers = f"nothing measured: {idle_watts:.3g} W idle to {busy_watts:.3g} W busy, by CPU load, {origin}"
        self.source = Source(NAME, "modelled", "modelled", covers)
        self.domain: Domain = "system"
        self.rails: tuple[Rail, ...] = (Rail(NAME, "modelled", "joules", limit_watts=max(10 * busy_watts, 1.0)),)
        self.interval_s = INTERVAL_S
        self._utilisation = utilisation
        self._cores = cores or os.cpu_count() or 1
        self._clock = clock
        self._started_s = clock()
        self._first_busy_s = utilisation()

    def read(self) -> tuple[float, ...]:
        """Modelled joules since this was made; see :class:`energy.sensors.base.Sensor`."""
        busy_s = self._utilisation() - self._first_busy_s
        rise = (self.busy_watts - self.idle_watts) / self._cores
        return (self.idle_watts * (self._clock() - self._started_s) + rise * busy_s,)

    def close(self) -> None:
        """Nothing to free."""


def machine_busy_s(root: Path = Path("/")) -> Callable[[], float]:
    """Reads busy core seconds of the whole machine from ``/proc/stat``; waiting for I/O counts as idle.

    Raises:
        SensorError: it cannot be read, now or later.
    """
    path = root / "proc/stat"
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    highest = 0.0

    def read() -> float:
        nonlocal highest
        try:
            with path.open("rb") as file:
                words = file.readline().split()
            # user nice system idle iowait irq softirq steal; guest time is in user already
            user, nice, system, _, _, irq, softirq, *_ = (int(word) for word in words[1:])
        except (OSError, ValueError, OverflowError) as error:
            raise SensorError("absent", f"{NAME}: {path} does not tell the load ({error})") from error
        highest = max(highest, (user + nice + system + irq + softirq) / ticks_per_s)  # the kernel may count back a tick
        return highest

    read()
    return read


def processes_busy_s(pids: Sequence[int], root: Path = Path("/")) -> Callable[[], float]:
    """Reads CPU seconds of these processes and of their children that ended; what ended keeps what it had used."""
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    used = dict.fromkeys(pids, 0.0)

    def read() -> float:
        for pid in used:
            try:
                text = (root / f"proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
                fields = text[text.rindex(")") + 2 :].split()
                ticks = sum(int(field) for field in fields[11:15])  # utime stime cutime cstime
            except (OSError, ValueError, IndexError):
                continue  # it ended
            used[pid] = max(used[pid], ticks / ticks_per_s)
        return sum(used.values())

    return read
