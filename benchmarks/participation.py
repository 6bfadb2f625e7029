"""Runs of the simulator for the scheduling benchmarks: in one seed all have the same fleet, data and first model."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import numpy as np

from benchmarks.fleet_traces import recorded
from benchmarks.participation_figures import Measures, Point
from benchmarks.scheduling_data import PROBLEMS, Arrays, export, split
from coordinator.plan import Plan
from coordinator.simulation.data import Data, Shares
from coordinator.simulation.running import simulate
from coordinator.simulation.settings import Settings
from coordinator.simulation.synthetic import synthetic

if TYPE_CHECKING:
    from coordinator.simulation.report import SimulationReport
    from coordinator.simulation.traces import Traces

BATCH_SIZE = 20
STEPS = 10
TARGET = 10  # updates of a round
OVER_COMMIT = 1.3
CONCURRENCY = 13
MAX_STALENESS = 5
DEADLINE_S = 3600.0
EVALUATE_EVERY = 3
_JOULES_PER_WH = 3600.0


class World(NamedTuple):
    """What the policies of one seed have in common. ``step_s`` is a step of the reference device, virtual time."""

    data: str
    dataset: str
    devices: int
    seed: int
    fleet: str
    step_s: float
    limit_s: float
    folder: str

    def file(self, name: str) -> Path:
        """Where :func:`prepare` puts something."""
        return Path(self.folder) / f"{self.dataset}-{self.seed}-{name}"


class Policy(NamedTuple):
    """Keys of a plan, merged into the common ones, and settings of the simulator that differ from the common ones."""

    plan: dict[str, Any]
    settings: dict[str, Any] | None = None


def prepare(world: World) -> World:
    """Writes bundle and test set into the world's folder."""
    problem, arrays = PROBLEMS[world.dataset], _arrays(world.data, world.dataset)
    export(problem, arrays, world.file("net.bundle"), batch_size=BATCH_SIZE, seed=world.seed)
    np.savez(world.file("test.npz"), x=arrays.x_test, y=arrays.y_test)
    return world


def run(world: World, policy: Policy) -> Measures:
    """One policy in one world that was prepared."""
    common = {"tick_s": 5.0, "device_accuracy": True}
    settings = Settings(
        seed=world.seed, step_s=world.step_s, limit_s=world.limit_s, **{**common, **(policy.settings or {})}
    )
    return measures(simulate(plan_of(world, policy.plan), fleet(world), settings, shares=_shares(world)))


def measures(report: SimulationReport) -> Measures:
    """The figures of a run."""
    points = [
        Point(version.virtual_s, version.modelled_joules.total / _JOULES_PER_WH, version.accuracy)
        for version in report.versions
        if version.accuracy is not None
    ]
    devices = report.device_reports
    return Measures(
        points=points,
        wh=report.modelled_joules.total / _JOULES_PER_WH,
        wasted_wh=report.modelled_joules.wasted / _JOULES_PER_WH,
        lost=sum(device.lost_to_battery > 0 for device in devices),
        counted=[device.counted for device in devices],
        device_accuracy=[device.final_accuracy for device in devices if device.final_accuracy is not None],
        seconds=report.virtual_s,
        versions=len(report.versions) - 1,
        device_rounds=report.trained,
    )


def plan_of(world: World, keys: dict[str, Any]) -> Plan:
    """The plan: what all policies have in common, and the keys of one."""
    common: dict[str, Any] = {
        "name": "scheduling",
        "bundle": str(world.file("net.bundle")),
        "dataset": "samples",
        "rounds": 100_000,  # virtual time ends a run
        "seed": world.seed,
        "test_set": str(world.file("test.npz")),
        "evaluate_on_devices": False,
        "evaluate_every": EVALUATE_EVERY,
        "uplink": {"codec": "raw"},
        "downlink": {"codec": "raw"},
        "participation": {
            "target": TARGET,
            "over_commit": OVER_COMMIT,
            "deadline_s": DEADLINE_S,
            "max_staleness": MAX_STALENESS,
            "attempts": 1000,
        },
        "training": {
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "hyper": {"lr": PROBLEMS[world.dataset].lr, "momentum": 0.0},
        },
    }
    for key, value in keys.items():
        common[key] = {**common[key], **value} if isinstance(common.get(key), dict) else value
    return msgspec.convert(common, Plan)


def fleet(world: World) -> Traces:
    """The devices of a seed."""
    return _traces(world.fleet, world.data, world.devices, world.seed)


@lru_cache(maxsize=8)
def _traces(kind: str, data: str, devices: int, seed: int) -> Traces:
    return synthetic(devices, seed) if kind == "synthetic" else recorded(Path(data), devices, seed)


def _shares(world: World) -> Shares:
    arrays = _arrays(world.data, world.dataset)
    rows = split(arrays, world.devices, world.seed)
    starts = np.zeros(len(rows) + 1, np.int64)
    starts[1:] = np.cumsum([len(part) for part in rows])
    used = np.concatenate(rows)
    return Shares(Data(arrays.x[used], arrays.y[used]), np.arange(len(used)), starts)


@lru_cache(maxsize=4)
def _arrays(data: str, dataset: str) -> Arrays:
    return PROBLEMS[dataset].load(Path(data))
