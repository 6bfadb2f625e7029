"""A simulated run and the same run with ten real agent processes give the same jobs and the same parameters.

What would depend on real time is told to the agents by the file of ``[telemetry]``: battery, link, seconds of a step.
All devices of a round are waited for, and a buffered run has one job at a time, so it does not matter which answers
first. With more of them, and in anarchic runs, the order in which updates come is one of real time.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from coordinator.plan import Downlink, Participation, Plan, Training, Uplink
from coordinator.simulation import Data, Settings, share_out, simulate
from coordinator.simulation.traces import DeviceTrace, LinkTrace, PresenceTrace, Traces
from coordinator.submission import submit
from tests.edge_runtime import toy_bundle
from tests.support.processes import Processes, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICES, ROUNDS = 10, 6
AGENT = """device = "{device}"
state_dir = "state"
[broker]
url = "{url}"
[[data]]
name = "numbers"
path = "numbers.npz"
id = "id"
[energy]
sensor = "none"
[limits]
battery_reserve_percent = 10
[telemetry]
file = "told.json"
"""


def make_traces() -> Traces:
    """Ten devices that never leave; what they draw is unknown, as it is to agents without a sensor."""
    devices = [
        DeviceTrace(
            device=f"pi-{number}",
            slowdown=1.0 + number,
            battery_wh=20.0,
            battery_percent=95.0 - 6 * number,
            reserve_percent=10.0,
            link=f"l{number}",
            presence="always",
        )
        for number in range(DEVICES)
    ]
    links = {
        f"l{number}": LinkTrace(
            name=f"l{number}",
            times_s=[0.0],
            up_kbit_s=[1000.0 + 100 * number],
            down_kbit_s=[5000.0],
            period_s=60.0,
            round_trip_s=0.01,
        )
        for number in range(DEVICES)
    }
    presences = {"always": PresenceTrace(name="always", online=[(0.0, 3600.0)], period_s=3600.0)}
    return Traces(devices=devices, links=links, presences=presences)


@pytest.fixture
def fleet(tmp_path: Path, mosquitto_program: str) -> Iterator[Processes]:
    """A broker and a coordinator."""
    made = Processes(tmp_path / "fleet", mosquitto_program)
    made.folder.mkdir()
    made.start_broker()
    made.start_coordinator()
    yield made
    made.close()


def start_agents(fleet: Processes, traces: Traces, shares, step_s: float) -> None:
    """Agents that are told what the traces say, and see the rows of their shares."""
    for number, trace in enumerate(traces.devices):
        home, rows, link = fleet.folder / trace.device, shares.of(number), traces.links[trace.link]
        home.mkdir()
        np.savez(home / "numbers.npz", x=shares.data.x[rows], y=shares.data.y[rows], id=rows)
        told = {
            "battery_percent": trace.battery_percent,
            "battery_wh": trace.battery_wh,
            "on_external_power": False,
            "free_memory_bytes": trace.memory_mb * 1e6,
            "up_kbit_s": link.up_kbit_s[0],
            "down_kbit_s": link.down_kbit_s[0],
            "step_s": step_s * trace.slowdown,
            "availability_percent": 100,
        }
        (home / "told.json").write_text(json.dumps(told))
        (home / "agent.toml").write_text(AGENT.format(device=trace.device, url=fleet.url))
        command = [sys.executable, "-m", "edge_runtime.cli", "run", "--config", str(home / "agent.toml")]
        fleet._start(trace.device, command)


PLANS = {
    "aware": Participation(selector="energy_aware", target=6, deadline_s=100.0),  # which asks for half of it at first
    "random": Participation(selector="random", target=4, deadline_s=100.0),
    # One job at a time, or which update comes first would be a matter of real time.
    "buffered": Participation(mode="buffered", selector="random", target=1, concurrency=1, deadline_s=100.0),
}


def make_plan(bundle: Path, name: str) -> Plan:
    """Codecs that keep what they did not send; or the default ones, which are lossy both ways."""
    aware = name == "aware"
    return Plan(
        name=name,
        bundle=str(bundle),
        dataset="numbers",
        rounds=ROUNDS,
        seed=7,
        participation=PLANS[name],
        # The toy's buffer doubles with every step; the grid of a lossy downlink ends at some size.
        training=Training(steps=6 if aware else 1, batch_size=8, hyper={"lr": 0.05}),
        uplink=Uplink(codec="topk", options={"density": 0.3}) if aware else Uplink(),
        downlink=Downlink(codec="raw") if aware else Downlink(),
        retain_updates="all",
    )


@pytest.mark.slow
@pytest.mark.mosquitto
def test_a_simulated_run_equals_the_real_one(tmp_path, fleet):
    """The same sequence of assignments (round, device, steps, role, version), and the same final parameters."""
    step_s = 0.002
    traces = make_traces()
    bundle = toy_bundle.write_bundle(tmp_path / "toy.bundle")
    with np.load(toy_bundle.write_data(tmp_path / "all.npz", 400)) as file:
        data = Data(file["x"], file["y"])
    shares = share_out(data, "dirichlet:0.5", DEVICES, seed=3)
    start_agents(fleet, traces, shares, step_s)
    store = fleet.store()
    wait_until(lambda: sum(row.online for row in store.devices()) == DEVICES, 60, "all agents", fleet.logs)
    wait_until(lambda: all(row.heartbeat is not None for row in store.devices()), 30, "heartbeats", fleet.logs)
    for name in PLANS:
        plan = make_plan(bundle, name)
        run = submit(store, plan)
        wait_until(lambda run=run: store.run(run).row.status != "running", 60, f"{run} to end", fleet.logs)
        row = store.run(run).row
        assert row.status == "finished", row.reason
        real = [
            (entry.round, entry.device, entry.steps, entry.role, entry.version, entry.assignment)
            for number in range(ROUNDS)
            for entry in sorted(store.assignments(run, number), key=lambda one: int(one.assignment.split("-")[1]))
        ]
        settings = Settings(step_s=step_s, told_step=True, keep_reserve=True)
        report = simulate(plan, traces, settings, shares=shares)
        simulated = [
            (job.round, job.device, job.steps, job.role, job.version, job.assignment) for job in report.assignments
        ]
        assert len(real) >= (ROUNDS if name == "buffered" else 3 * ROUNDS)
        assert simulated == real, name
        assert report.final_model_sha256 == row.model.sha256, name
    store.close()
