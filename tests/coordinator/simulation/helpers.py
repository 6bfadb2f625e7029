"""Short ways to make plans and traces of simulations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coordinator.plan import Downlink, Participation, Plan, Training, Uplink
from coordinator.simulation import Data, share_out
from coordinator.simulation.traces import DeviceTrace, LinkTrace, PresenceTrace, Traces
from tests.edge_runtime import toy_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.simulation import Shares


def plan(folder: Path, **changes: Any) -> Plan:
    """A plan of the toy bundle; participation's keys may be given at the top."""
    path = folder / "toy.bundle"
    if not path.exists():
        toy_bundle.write_bundle(path)
    rules: dict[str, Any] = {"target": 4, "deadline_s": 600.0}
    rules |= {key: changes.pop(key) for key in list(changes) if key in Participation.__struct_fields__}
    values: dict[str, Any] = {
        "name": "toy",
        "bundle": str(path),
        "dataset": "d",
        "rounds": 4,
        "participation": Participation(**rules),
        "training": Training(steps=3, batch_size=8, hyper={"lr": 0.05}),
        "uplink": Uplink(codec="raw"),
        "downlink": Downlink(codec="raw"),
    }
    return Plan(**{**values, **changes})


def shares(folder: Path, devices: int, samples: int = 400) -> Shares:
    """Toy data, shared out with skewed labels."""
    with np.load(toy_bundle.write_data(folder / "all.npz", samples)) as file:
        data = Data(file["x"], file["y"])
    return share_out(data, "dirichlet:0.5", devices, seed=3)


def device(name: str = "pi", **changes: Any) -> DeviceTrace:
    return DeviceTrace(**{"device": name, "link": "fast", "presence": "always", **changes})


def traces(*devices: DeviceTrace, **spans: Any) -> Traces:
    """These devices, with a link that takes no time; ``spans`` are presences by name: ``online`` and ``charging``."""
    fast = LinkTrace(name="fast", times_s=[0.0], up_kbit_s=[1e9], down_kbit_s=[1e9], period_s=60.0)
    presences = {"always": PresenceTrace(name="always", online=[(0.0, 100_000.0)], period_s=100_000.0)}
    for name, (online, charging) in spans.items():
        presences[name] = PresenceTrace(name=name, online=online, charging=charging, period_s=100_000.0)
    return Traces(devices=list(devices), links={"fast": fast}, presences=presences)
