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
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import decode, decode_model
from edge_runtime.messages import UpdateId
from tests.support.processes import Processes, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.store import Store
    from edge_runtime.compression import Layout

DEVICES = [f"device-{number}" for number in range(4)]
ROUNDS = 10
KILLS = 8
PARAMETERS = 200_000
SEEDS = range(20) if os.environ.get("EDGE_FULL") else range(5)
LOSSLESS_SEED = 4  # the others lose bits both ways, as the product does by default
PLAN = """name = "once"
bundle = "perturb.bundle"
dataset = "numbers"
rounds = {rounds}
evaluate_on_devices = false
retain_updates = "all"
{tables}
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
    tables = '[uplink]\ncodec = "zstd"\n[downlink]\ncodec = "zstd"' if seed == LOSSLESS_SEED else ""
    (tmp_path / "plan.toml").write_text(PLAN.format(rounds=ROUNDS, tables=tables))
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
        wait_until(lambda: store.run(run).row.status != "running", 240, "the run to end", fleet.logs)
        assert store.run(run).row.status == "finished", (store.run(run).row, killed)
        wait_until(lambda: not _open_updates(fleet), 40, "a verdict for every finished update", fleet.logs)
        store.close()
        assert fleet.command("verify", run)["run"] == run
    finally:
        fleet.close()
    _check_database(fleet, run)
    _check_verdicts_of_devices(fleet)
    _check_model(fleet, run)
    if seed != LOSSLESS_SEED:
        _check_shared_models(fleet, run)


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
    held = _models_of_devices(store, run, layout)
    for row in store.rounds(run):
        total, weights = np.zeros(layout.size, np.float64), 0.0
        for update in store.counted_updates(run, row.round):
            version = update.meta.model_version
            data = store.blobs.path(update.blob.sha256).read_bytes()
            delta = decode(data, {"delta": layout}, base_version=version, reference=held[version])["delta"].vector()
            weight = update.meta.samples * (1 + row.round - version) ** -0.5
            assert weight == update.weight
            total += delta.astype(np.float64) * weight
            weights += weight
        model = (model + total * (1 / weights)).astype(np.float32)
        stored = decode_model(store.blobs.path(row.model.sha256).read_bytes(), layout)
        assert np.array_equal(model, stored), f"round {row.round}"
    store.close()


def _models_of_devices(store: Store, run: str, layout: Layout) -> dict[int, np.ndarray]:
    """What devices trained on, by version."""
    row = store.run(run).row
    initial = decode_model(store.blobs.path(row.initial_model.sha256).read_bytes(), layout)
    if row.vector_sha256 is None:
        models = {entry.version: entry.model for entry in store.rounds(run)}
        later = {v: decode_model(store.blobs.path(blob.sha256).read_bytes(), layout) for v, blob in models.items()}
        return {0: initial, **later}
    snapshots = {entry.version: store.blobs.path(entry.down.sha256).read_bytes() for entry in store.rounds(run)}
    later = {version: SharedModel.decode(data, layout).vector for version, data in snapshots.items()}
    return {0: SharedModel.start(initial, layout).vector, **later}


def _check_shared_models(fleet: Processes, run: str) -> None:
    """Each version of the shared model that a device keeps is, bit for bit, the server's."""
    store = fleet.store()
    layout = Bundle.open(store.blobs.path(store.run(run).row.bundle.sha256)).layout()
    hashes, seen = {row.version: row.vector_sha256 for row in store.rounds(run)}, 0
    for device in DEVICES:
        for path in (fleet.folder / device / "state" / "models" / run).glob("*.model"):
            seen += 1
            assert SharedModel.decode(path.read_bytes(), layout).sha256() == hashes[int(path.stem)], path
    assert seen >= len(DEVICES)
    store.close()
