"""What the energy benchmarks share: the best gauge of this machine, and the training step of a bundle to be metered."""

from __future__ import annotations

import contextlib
import json
import sys
import zipfile
from typing import TYPE_CHECKING, Any

from energy.thor.gauge import CpuGauge, MeterGauge
from energy.thor.probing import Stepper

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def best_gauge(wanted: str) -> Iterator[CpuGauge | MeterGauge]:
    """The best sensor there is, sampled by a thread; without one CPU time."""
    from energy.metering.conditions import read_conditions
    from energy.metering.meter import Meter
    from energy.metering.sampler import Sampler
    from energy.sensors.discovery import choose, discover

    ways = choose(discover(), wanted)
    if not ways:
        print("no sensor of power or energy: the cost is CPU time", file=sys.stderr, flush=True)
        yield CpuGauge()
        return
    meter = Meter(ways, conditions=read_conditions)
    try:
        with Sampler(meter):
            yield MeterGauge(meter)
    finally:
        meter.close()


def training_step(path: Path, batch: int, threads: int = 1) -> tuple[dict[str, Any], Stepper]:
    """The manifest of a bundle as plain JSON, and its ``train.onnx`` with inputs of random values."""
    with zipfile.ZipFile(path) as archive:
        manifest: dict[str, Any] = json.loads(archive.read("manifest.json"))
        data = archive.read("train.onnx")
    limits = {"y": manifest["task"]["classes"]}
    hyper = manifest["optimizer"]["hyper"]
    return manifest, Stepper(data, batch=batch, threads=threads, limits=limits, hyper=hyper, footprint=0)
