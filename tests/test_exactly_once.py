"""Everything is killed at random moments, and still every update counts exactly once."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")

from benchmarks.perturbing_bundle import write_perturbing_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.compression import decode
from edge_runtime.messages import UpdateId
from tests.support.processes import Processes, wait_until

if TYPE_CHECKING:
    from pathlib import Path

DEVICES = [f"device-{number}" for number in range(4)]
ROUNDS = 10
KILLS = 8
PARAMETERS = 200_000
SEEDS = range(20) if os.environ.get("EDGE_FULL") else range(5)
PLAN = f"""name = "once"
bundle = "perturb.bundle"
dataset = "numbers"
rounds = {ROUNDS}
evaluate_on_devices = false
retain_updates = "all"
[participation]
target = 3
minimum = 2
over_commit = 1.3
deadline_s = 6.0
attempts = 50
[training]
steps = 2500
batch_size = 4
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_kills_lose_and_double_nothing(tmp_path: Path, mosquitto_program: str, seed: int) -> None:
    """With agents, workers, coordinator and broker killed at random, the run ends and each update counts once."""
    print(f"schedule seed {seed}")
    random = Random(seed)
    write_perturbing_bundle(tmp_path / "perturb.bundle", PARAMETERS)
    (tmp_path / "plan.toml").write_text(PLAN)
    fleet = Processes(tmp_path, mosquitto_program)
    try:
        fleet.start_broker()
        fleet.start_coordinator()
        for number, device in enumerate(DEVICES):
            x = np.random.default_rng(number).standard_normal((4 + number, 1)).astype(np.float32)
            fleet.start_agent(device, x, np.zeros_like(x))
        run = fleet.command("submit", str(tmp_path / "plan.toml"))["run"]
        killed = _kill_at_random(fleet, run, random)
        store = fleet.store()
        wait_until(lambda: store.run(run).row.status != "running", 90, "the run to end", fleet.logs)
        assert store.run(run).row.status == "finished", (store.run(run).row, killed)
        wait_until(lambda: not _open_updates(fleet), 40, "a verdict for every finished update", fleet.logs)
        store.close()
        assert fleet.command("verify", run)["run"] == run
    finally:
        fleet.close()
    _check_database(fleet, run)
    _check_verdicts_of_devices(fleet)
    _check_model(fleet, run)


def _kill_at_random(fleet: Processes, run: str, random: Random) -> list[str]:
    """Kills and restarts each kind of process twice, in random order, unless the run ends before; gives the victims."""
    victims, store = [], fleet.store()
    order = ["coordinator", "broker", "agent", "worker"] * (KILLS // 4)
    random.shuffle(order)
    for victim in order:
        time.sleep(random.uniform(0.1, 0.9))
        if store.run(run).row.status != "running":
            break
        device = random.choice(DEVICES)
        if victim == "worker":
            wait_until(lambda: _kill_a_worker(fleet), 30, "a worker to kill", fleet.logs)
            victims.append("worker")
            continue
        name = device if victim == "agent" else victim
        fleet.kill(name)
        time.sleep(random.uniform(0.0, 0.4))
        fleet.restart(name)
        victims.append(name)
    store.close()
    print(f"killed {victims}")
    assert len(victims) >= KILLS - 2, f"the run was over after {victims}: make it longer"
    return victims


def _kill_a_worker(fleet: Processes) -> bool:
    for device in DEVICES:
        worker = fleet.worker_of(device)
        if worker is not None:
            worker.kill()
            return True
    return False


def _open_updates(fleet: Processes) -> list[tuple]:
    found = []
    for device in DEVICES:
        with closing(sqlite3.connect(fleet.folder / device / "state" / "spool.db")) as spool:
            found += spool.execute("SELECT * FROM updates WHERE state IN ('ready', 'delivered')").fetchall()
    return found


def _check_database(fleet: Processes, run: str) -> None:
    """No update is left without a verdict, and the counted ones are those that the rounds say."""
    store = fleet.store()
    counts, rounds = store.update_counts(run), store.rounds(run)
    assert counts.get("pending", 0) == 0
    assert len(rounds) == ROUNDS
    assert sum(row.updates for row in rounds) == counts["counted"]
    taken = [update.update for row in rounds for update in store.counted_updates(run, row.round)]
    assert len(taken) == len(set(taken)) == counts["counted"]
    assignments = [(update.device, update.assignment) for update in taken]
    assert len(assignments) == len(set(assignments)), "an assignment counted twice"
    store.close()


def _check_verdicts_of_devices(fleet: Processes) -> None:
    """What a device was told is what the coordinator did."""
    store = fleet.store()
    told = 0
    for device in DEVICES:
        with closing(sqlite3.connect(fleet.folder / device / "state" / "spool.db")) as spool:
            rows = spool.execute("SELECT run, device, assignment, sequence, state FROM updates").fetchall()
        for *update, state in rows:
            stored = store.stored_verdict(UpdateId(*update))
            verdict = "refused" if stored is None else stored.verdict  # never received: refused as unknown
            assert state == verdict, (update, state, stored)
            told += 1
    assert told >= ROUNDS * 2
    store.close()


def _check_model(fleet: Processes, run: str) -> None:
    """The final model equals, bit for bit, the one computed here from the stored updates."""
    store = fleet.store()
    bundle = Bundle.open(store.blobs.path(store.run(run).row.bundle.sha256))
    layout = bundle.layout()
    model = bundle.initial_vector()
    for row in store.rounds(run):
        total, weights = np.zeros(layout.size, np.float64), 0.0
        for update in store.counted_updates(run, row.round):
            delta = decode(store.blobs.path(update.blob.sha256).read_bytes(), {"delta": layout})["delta"]
            staleness = row.round - update.meta.model_version
            weight = update.meta.samples * (1 + staleness) ** -0.5
            assert weight == update.weight
            total += delta.astype(np.float64) * weight
            weights += weight
        model = (model + total * (1 / weights)).astype(np.float32)
        stored = decode(store.blobs.path(row.model.sha256).read_bytes(), {"model": layout})["model"]
        assert np.array_equal(model, stored), f"round {row.round}"
    store.close()
