"""The modelled sensor."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from energy.errors import SensorError
from energy.metering.meter import Meter
from energy.sensors.modelled import Modelled, machine_busy_s, processes_busy_s
from tests.energy.meter_tools import Clock, pass_time

if TYPE_CHECKING:
    from pathlib import Path


def test_joules_follow_time_and_busy_cores() -> None:
    """Idle watts for every second, and a core's share for every busy core second; all of it labelled."""
    clock = Clock()
    busy = [7.0]
    meter = Meter([[Modelled(3.0, 11.0, lambda: busy[0], cores=4, clock=clock)]], clock=clock)
    with meter.open("job") as window:
        pass_time(meter, clock, 10.0)
        busy[0] += 20.0
        clock.now += 10.0
    result = window.close()
    assert result.joules == pytest.approx(20 * 3 + 20 * 2)
    assert result.half_width_joules is None
    assert result.source is not None
    assert (result.source.scope, result.source.quality) == ("modelled", "modelled")
    assert "nothing measured" in result.source.covers


@pytest.mark.parametrize("watts", [(-1.0, 5.0), (5.0, 3.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_watts_that_cannot_be_are_refused(watts: tuple[float, float]) -> None:
    """A model needs 0 <= idle <= busy."""
    with pytest.raises(SensorError, match="idle"):
        Modelled(*watts, lambda: 0.0)


def test_load_of_the_machine_comes_from_proc_stat(tmp_path: Path) -> None:
    """User, system and interrupts are busy; idle, waiting for I/O and guests (in user already) are not."""
    (tmp_path / "proc").mkdir()
    stat = tmp_path / "proc" / "stat"
    stat.write_text("cpu  100 20 30 900 50 4 6 0 40 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    busy_s = machine_busy_s(tmp_path)
    assert busy_s() == pytest.approx(160 / os.sysconf("SC_CLK_TCK"))
    stat.unlink()
    with pytest.raises(SensorError, match="proc/stat"):
        busy_s()


def test_load_of_processes_keeps_what_ended_ones_used() -> None:
    """The CPU seconds of a process do not vanish with it."""
    load = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass"
    code = f"{load}\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        busy_s = processes_busy_s([child.pid])
        assert child.stdout is not None
        child.stdout.readline()
        used = busy_s()
        assert used >= 0.09
        child.communicate(b"\n")
    assert busy_s() == used
    before, start = machine_busy_s()(), time.monotonic()
    assert machine_busy_s()() >= before
    assert time.monotonic() - start < 10
