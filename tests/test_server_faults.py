"""The server goes on when its disk, database or broker fails for a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")

from benchmarks.perturbing_bundle import write_perturbing_bundle
from coordinator import run_shell
from coordinator.errors import StoreError
from coordinator.server import steady_unix_clock
from tests.support.federation import Federation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PARAMETERS = 2000


@pytest.fixture
def federation(tmp_path: Path, mosquitto_program: str) -> Iterator[Federation]:
    """A coordinator with an embedded mosquitto, and two agents with different data."""
    assert mosquitto_program
    made = Federation(tmp_path / "fleet")
    for number, device in enumerate(("a", "b")):
        x = np.full((4, 1), number, np.float32)
        made.agent(device, (x, np.zeros((4, 1), np.float32)))
    yield made
    made.close()


def _plan(folder: Path, **extra: object) -> dict[str, object]:
    write_perturbing_bundle(folder / "perturb.bundle", PARAMETERS)
    return {
        "name": "faults",
        "bundle": str(folder / "perturb.bundle"),
        "dataset": "d",
        "rounds": 3,
        "participation": {"target": 2, "minimum": 2, "deadline_s": 30.0},
        "training": {"steps": 1, "batch_size": 4},
        "evaluate_on_devices": False,
        **extra,
    }


@pytest.mark.parametrize("failing", range(1, 10))
def test_any_save_may_fail_once(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Whichever write to the database fails, the run ends well, each update counts once, and nothing is left over."""
    monkeypatch.setattr(run_shell, "DISK_RETRY_S", 0.1)
    store, calls = federation.coordinator.store, 0
    real = store.save

    def save(rows: list) -> None:
        nonlocal calls
        if any(hasattr(row, "run") or hasattr(row, "update") for row in rows):  # not the device rows
            calls += 1
            if calls == failing:
                raise StoreError("database failed: disk I/O error")
        real(rows)

    monkeypatch.setattr(store, "save", save)
    run = federation.submit(**_plan(tmp_path))
    federation.finish(run)
    assert calls > failing, "the fault never happened"
    counts = federation.store.update_counts(run)
    assert counts.get("pending", 0) == 0
    assert counts["counted"] == sum(row.updates for row in federation.store.rounds(run)) >= 6


def test_a_database_that_cannot_be_read_for_a_moment_fails_no_run(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that cannot be loaded because the database is locked is taken up later."""
    monkeypatch.setattr(run_shell, "DISK_RETRY_S", 0.1)
    store, calls = federation.coordinator.store, []
    real = store.load_run

    def load_run(run: str) -> list:
        calls.append(run)
        if len(calls) < 3:
            raise StoreError("database failed: database is locked")
        return real(run)

    monkeypatch.setattr(store, "load_run", load_run)
    federation.finish(federation.submit(**_plan(tmp_path)))
    assert len(calls) == 3


def test_the_embedded_broker_is_started_again(federation: Federation, tmp_path: Path) -> None:
    """A mosquitto that dies in the middle of a run comes back on its port, and the run ends."""
    plan = _plan(tmp_path, rounds=40)
    run = federation.submit(**plan)
    federation.until(lambda: len(federation.store.rounds(run)) >= 2, "two rounds")
    broker = federation.coordinator.connection.broker
    killed = broker.process.pid
    broker.process.kill()
    federation.finish(run)
    assert broker.process.pid != killed


@pytest.mark.parametrize("codec", ["default", "zstd", "raw"])
def test_nothing_of_an_ended_run_stays_but_its_models(federation: Federation, tmp_path: Path, codec: str) -> None:
    """The bytes of updates, changes and snapshots are gone when a run has ended, unless the plan keeps them."""
    run = federation.submit(**_plan(tmp_path, rounds=9, downlink={"codec": codec}))
    federation.finish(run)
    federation.until(lambda: not federation.coordinator.shell.runs, "the run to be put away")
    row, rounds, blobs = federation.row(run), federation.store.rounds(run), federation.store.blobs
    there = {path.name for path in blobs.folder.iterdir() if path.is_file()}
    assert {row.bundle.sha256, row.initial_model.sha256, row.model.sha256} <= there
    assert there <= {row.bundle.sha256, row.initial_model.sha256, *(entry.model.sha256 for entry in rounds)}


def test_a_run_that_ends_before_anyone_was_asked_leaves_its_initial_model(
    federation: Federation, tmp_path: Path
) -> None:
    """Alone, not as it would have been sent; an equal run that waits still has all that it needs."""
    plan = _plan(tmp_path, participation={"target": 3, "minimum": 3}, downlink={"codec": "zstd"})
    short, long = federation.submit(**plan), federation.submit(**plan)
    row, has = federation.row(short), federation.store.blobs.has
    for run, stays in ((short, True), (long, False)):
        federation.store.request_stop(run)
        federation.until(lambda: federation.row(run).status == "stopped", "the run to stop")  # noqa: B023
        federation.until(lambda: run not in federation.coordinator.shell.runs, "it to be put away")  # noqa: B023
        assert has(row.initial_model.sha256)
        assert has(row.down.sha256) == stays


def test_the_server_clock_ignores_steps_of_the_system_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are not moved by an hour when somebody sets the clock back by an hour."""
    import time

    clock = steady_unix_clock()
    before, real = clock(), time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert 0 <= clock() - before < 60


def test_old_changes_and_snapshots_are_deleted_while_a_run_goes_on(federation: Federation, tmp_path: Path) -> None:
    """The chain has its length, and whole models go when no update can be relative to them any more."""
    participation = {"target": 2, "minimum": 2, "deadline_s": 30.0, "max_staleness": 0}
    run = federation.submit(
        **_plan(tmp_path, rounds=40, participation=participation, downlink={"codec": "topk", "chain": 3})
    )
    federation.until(lambda: len(federation.store.rounds(run)) >= 12, "some rounds")
    rows, there = federation.store.rounds(run), federation.store.blobs.has
    old = [row.version for row in rows if row.version < rows[-1].version - 6]
    assert not [version for version in old if there(rows[version - 1].change.sha256)]
    assert not [version for version in old if there(rows[version - 1].down.sha256)]
    assert not [version for version in old if there(rows[version - 1].model.sha256)]
    assert there(rows[-1].change.sha256)
    federation.store.request_stop(run)
    federation.until(lambda: federation.row(run).status == "stopped", "the run to stop")
