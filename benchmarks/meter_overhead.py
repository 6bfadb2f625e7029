"""What the meter costs, and whether it is right: CPU and memory at 10 and 100 Hz, and recorded power played back.

    python -m benchmarks.meter_overhead

``overhead``: a process of its own samples a tree of sensor files made for it (INA3221 with three rails, RAPL with two
packages) from the meter's thread, with one window open and conditions read, while this process moves the values. CPU
is that of the whole process, memory what it holds above a bare interpreter.

``replay``: power of training on an AGX Orin, recorded at 20 Hz on four rails, is written into such a tree on a clock of
its own, and the Jetson sensor is sampled at 10 Hz. The error is against the trapezoid over all recorded samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.report import MB, parser, print_report

if TYPE_CHECKING:
    import argparse

ROOT = Path(__file__).resolve().parents[1]
TRACES = "energy/amazingdd_agx_orin_power"
RATES_HZ = (10.0, 100.0)
AGX_RAILS = (
    ("1-0040", 1, "VDD_GPU_SOC"),
    ("1-0040", 2, "VDD_CPU_CV"),
    ("1-0040", 3, "VIN_SYS_5V0"),
    ("1-0041", 2, "VDDQ"),
)
NANO_RAILS = (("1-0040", 1, "VDD_IN"), ("1-0040", 2, "VDD_CPU_GPU_CV"), ("1-0040", 3, "VDD_SOC"))
MILLIVOLTS = 1000  # so that milliamperes are milliwatts


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    if options.child:
        return _child(options)
    for name in ("child", "root", "rate"):
        delattr(options, name)  # of the measuring process
    results = [overhead(sensor, rate_hz, options.seconds) for sensor in ("jetson", "rapl") for rate_hz in RATES_HZ]
    traces = sorted((options.data / TRACES).glob("*.csv"))
    if not traces:
        print(f"{options.data / TRACES} has no traces: nothing is played back", file=sys.stderr)
    results += [replay(trace) for trace in traces]
    print_report("meter_overhead", options, results)
    return 0


def overhead(sensor: str, rate_hz: float, seconds: float) -> dict[str, Any]:
    """One process that samples one sensor, while its values change."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        files = jetson_tree(root, NANO_RAILS) if sensor == "jetson" else rapl_tree(root)
        arguments = ["--child", sensor, "--root", name, "--rate", str(rate_hz), "--seconds", str(seconds)]
        command = [sys.executable, "-m", "benchmarks.meter_overhead", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            step = 0
            while child.poll() is None:
                step += 1
                for number, file in enumerate(files):
                    _put(file, step * 250_000 if sensor == "rapl" else 2000 + number + step % 50)
                time.sleep(0.05)
            assert child.stdout is not None
            measured: dict[str, Any] = json.loads(child.stdout.read())
    return {"case": "overhead", "sensor": sensor, "rate_hz": rate_hz, **measured}


def _child(options: argparse.Namespace) -> int:
    process = psutil.Process()
    bare = process.memory_info().rss  # numpy is not here; psutil, argparse and json are
    from energy.metering.conditions import read_conditions
    from energy.metering.meter import Meter
    from energy.metering.sampler import Sampler
    from energy.sensors.discovery import choose, discover

    root = Path(options.root)
    ways = choose(discover(root), options.child)
    for sensor in ways[0]:
        sensor.interval_s = 1.0 / options.rate  # else the meter leaves out readings that bring nothing new
    meter = Meter(ways, conditions=lambda: read_conditions(root))
    with Sampler(meter, 1.0 / options.rate):
        window = meter.open("all")
        cpu_s, began_s = time.process_time(), time.perf_counter()
        time.sleep(options.seconds)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
        measurement = window.close()
    assert measurement.joules, measurement.problems
    rss = process.memory_info().rss
    print(
        json.dumps(
            {
                "seconds": round(wall_s, 2),
                "samples": measurement.samples,
                "cpu_percent_of_a_core": round(100 * cpu_s / wall_s, 3),
                "us_per_sample": round(1e6 * cpu_s / measurement.samples, 1),
                "rss_mb": round(rss / MB, 2),
                "rss_above_interpreter_mb": round((rss - bare) / MB, 2),
            }
        )
    )
    return 0


def replay(trace: Path) -> dict[str, Any]:
    """One recording through the Jetson sensor at 10 Hz."""
    from energy.metering.meter import Meter
    from energy.sensors import jetson

    rows = read_trace(trace)
    at = [row[0] for row in rows]
    whole = sum(0.5 * (sum(a[1:]) + sum(b[1:])) * 1e-3 * (b[0] - a[0]) for a, b in pairwise(rows))
    with tempfile.TemporaryDirectory() as name:
        files = jetson_tree(Path(name), AGX_RAILS)
        now = [at[0]]
        _put_row(files, rows[0])
        meter = Meter([jetson.probe(Path(name))], clock=lambda: now[0])
        window = meter.open(trace.stem)
        place = 0
        while now[0] < at[-1]:
            now[0] = min(now[0] + 0.1, at[-1])
            while place + 1 < len(rows) and at[place + 1] <= now[0]:
                place += 1
            _put_row(files, rows[place])
            meter.sample()
        measurement = window.close()
        meter.close()
    assert measurement.joules is not None, measurement.problems
    return {
        "case": "replay",
        "sensor": "jetson",
        "rate_hz": 10.0,
        "trace": trace.stem,
        "seconds": round(measurement.seconds, 2),
        "samples": measurement.samples,
        "joules": round(measurement.joules, 2),
        "full_rate_joules": round(whole, 2),
        "relative_error": round(measurement.joules / whole - 1, 6),
        "half_width_joules": None if measurement.half_width_joules is None else round(measurement.half_width_joules, 2),
        "problems": len(measurement.problems),
    }


def read_trace(path: Path) -> list[tuple[float, ...]]:
    """Seconds and milliwatts of the rails; the footer has another number of columns."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        cells = line.split(",")
        if len(cells) == 1 + len(AGX_RAILS):
            rows.append(tuple(float(cell) for cell in cells))
    return rows


def jetson_tree(root: Path, rails: tuple[tuple[str, int, str], ...]) -> list[int]:
    """An INA3221 tree as JetPack 5 and later show it; gives descriptors of the currents."""
    files = []
    for address, channel, label in rails:
        chip = root / f"sys/bus/i2c/drivers/ina3221/{address}/hwmon/hwmon{address[-1]}"
        chip.mkdir(parents=True, exist_ok=True)
        (chip / "name").write_text("ina3221\n")
        (chip / f"in{channel}_label").write_text(f"{label}\n")
        (chip / f"in{channel}_input").write_text(f"{MILLIVOLTS}\n")
        files.append(_file(chip / f"curr{channel}_input", 2000))
    return files


def rapl_tree(root: Path) -> list[int]:
    """Two packages; gives descriptors of their counters."""
    files = []
    for number in (0, 1):
        zone = root / f"sys/class/powercap/intel-rapl:{number}"
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"package-{number}\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
        files.append(_file(zone / "energy_uj", 1_000_000))
    return files


def _file(path: Path, value: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _put(descriptor, value)
    return descriptor


def _put(descriptor: int, value: int) -> None:
    os.pwrite(descriptor, b"%-15d\n" % value, 0)  # of one length, so that a reader never sees half a number


def _put_row(files: list[int], row: tuple[float, ...]) -> None:
    for file, milliwatts in zip(files, row[1:], strict=True):
        _put(file, round(milliwatts))


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--seconds", type=float, default=30.0, help="of every overhead run")
    result.add_argument("--child", default="", help="the measuring process, started by this program itself")
    result.add_argument("--root", default="/", help="tree of the measuring process")
    result.add_argument("--rate", type=float, default=10.0, help="samples per second of the measuring process")
    return result


if __name__ == "__main__":
    sys.exit(main())
