"""The store: rows come back as they went in, two processes share it, and its schema is what the golden file says."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from coordinator import events as e
from coordinator.errors import StoreError, UnknownRunError
from coordinator.fleet import Device
from coordinator.plan import Downlink
from coordinator.rounds import step
from coordinator.run_state import RunState
from coordinator.store import Store, tables
from edge_runtime.messages import Evaluation, Heartbeat
from tests.coordinator import helpers as h

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path, synchronous="OFF")
    yield made
    made.close()


def submitted(store, plan):
    state = h.start(plan, now=5.0)
    state.run.run = store.submit(plan, state.run)
    return state


def drive(store, state, fleet, rounds):
    """Runs some rounds through the store."""

    def carry_out(effects):
        for effect in effects:
            if isinstance(effect, e.Save):
                store.save(effect.rows)
        return effects

    jobs = h.jobs(carry_out(step(state, e.Tick(10.0), fleet)))
    for round_ in range(rounds):
        for number, job in enumerate(jobs):
            carry_out(step(state, h.arrived(job, 11.0, number=100 * round_ + number, loss=1.0), fleet))
        jobs = h.jobs(carry_out(step(state, e.Aggregated(12.0, round_, h.blob(50 + round_), bytes_up=7), fleet)))
    return jobs


def test_rows_come_back_as_they_went_in(store):
    """A state rebuilt from the store equals the live one, and the recent rows are enough."""
    plan = h.plan(rounds=9, max_staleness=1, test_set="t")
    state, fleet = submitted(store, plan), h.fleet("a", "b")
    drive(store, state, fleet, 5)
    step(state, e.Evaluated(13.0, 1, Evaluation(samples=5, loss_sum=1.5, correct=2)), fleet)
    store.save([*state.unevaluated.values(), state.run])
    rows = store.load_run(state.run.run)
    rebuilt = RunState.from_rows(plan, rows)
    assert rebuilt.run == state.run
    assert rebuilt.assignments == state.assignments
    assert rebuilt.updates == state.updates
    assert len([row for row in rows if isinstance(row, e.AssignmentRow)]) < 2 * 6


def test_what_devices_hold_comes_back(store):
    """With a lossy downlink a restarted server knows the chain, and who holds which version."""
    plan = h.plan(rounds=9, max_staleness=1, downlink=Downlink(codec="raw", chain=2))
    state, fleet = h.start(plan, vector_sha256="0" * 64), h.fleet("a", "b")
    state.run.run = store.submit(plan, state.run)
    jobs = h.jobs(effects := step(state, e.Tick(10.0), fleet))
    store.save(h.one(e.Save, effects).rows)
    for round_ in range(6):
        blobs = {"down": h.blob(70 + round_, 9000), "change": h.blob(60 + round_), "vector_sha256": f"{round_:064}"}
        for number, job in enumerate(jobs):
            store.save(h.one(e.Save, step(state, h.arrived(job, 11.0, number=number), fleet)).rows)
        effects = step(state, e.Aggregated(12.0, round_, h.blob(50 + round_), **blobs), fleet)
        store.save(h.one(e.Save, effects).rows)
        jobs = h.jobs(effects)
    name = next(job.assignment for job in jobs if job.device == "b")
    store.save(h.one(e.Save, step(state, e.JobReported(13.0, "b", name, "too hot"), fleet)).rows)
    rebuilt = RunState.from_rows(plan, store.load_run(state.run.run))
    assert rebuilt.held == state.held == {"a": 5}
    assert rebuilt.changes == state.changes
    assert sorted(rebuilt.changes) == [3, 4, 5, 6]


def test_a_save_is_one_transaction(store):
    """If one row cannot be stored, none is."""
    state, fleet = submitted(store, h.plan()), h.fleet("a", "b")
    (save,) = h.of(e.Save, step(state, e.Tick(10.0), fleet))
    stranger = e.RunRow(run="other", model=h.blob(1), bundle=h.blob(1), initial_model=h.blob(1))
    with pytest.raises(StoreError, match="never submitted"):
        store.save([*save.rows, stranger])
    assert store.assignments(state.run.run, 0) == []


def test_submitting_counts_names_up(store):
    """Runs of one plan are told apart by a number; the plan comes back whole."""
    plan = h.plan(name="digits")
    first, second = submitted(store, plan), submitted(store, plan)
    assert [first.run.run, second.run.run] == ["digits-1", "digits-2"]
    assert store.run("digits-2").plan == plan
    assert [entry.row.run for entry in store.active()] == ["digits-1", "digits-2"]
    with pytest.raises(UnknownRunError, match=r"'nothing'; the latest: digits-1, digits-2"):
        store.run("nothing")


def test_verdicts_are_found_however_old(store):
    """The machine forgets updates, the store does not."""
    state, fleet = submitted(store, h.plan(rounds=9, max_staleness=0)), h.fleet("a", "b")
    drive(store, state, fleet, 4)
    (first, _) = store.counted_updates(state.run.run, 0)
    assert first.update not in state.updates
    assert store.stored_verdict(first.update).verdict == "counted"
    assert store.stored_verdict(h.UpdateId(state.run.run, "a", "r0-99", 0)) is None
    assert store.update_counts(state.run.run) == {"counted": 8}
    assert store.participants(state.run.run) == 2
    assert [row.round for row in store.rounds(state.run.run, 2)] == [2, 3]


def test_devices_come_back(store):
    """What the fleet knows is there for other processes."""
    device = Device("a", h.device("a"), 5.0, heartbeat=Heartbeat(uptime_s=1, battery_percent=40))
    store.save([device.row()])
    device.last_contact_unix_s = 6.0
    store.save([device.row()])
    assert store.devices() == [device.row()]


def test_update_blobs_are_dropped_when_decided(store):
    """Bytes of counted updates go; bytes that a pending update shares stay."""
    state, fleet = submitted(store, h.plan(rounds=9)), h.fleet("a", "b")
    state.run.model = h.blob(2)
    jobs = h.jobs(effects := step(state, e.Tick(10.0), fleet))
    store.save(h.one(e.Save, effects).rows)
    blobs = [store.blobs.put(bytes([number])) for number in range(2)]
    references = [h.BlobRef(sha256=blob.sha256, size_bytes=1) for blob in blobs]
    for job, blob in zip(jobs, references, strict=True):
        store.save(h.one(e.Save, step(state, e.UpdateArrived(11.0, h.update_id(job), blob, h.meta(job)), fleet)).rows)
    effects = step(state, e.Aggregated(12.0, 0, h.blob(50)), fleet)
    store.save(h.one(e.Save, effects).rows)
    job = h.jobs(effects)[0]
    event = e.UpdateArrived(13.0, h.update_id(job), references[0], h.meta(job))
    store.save(h.one(e.Save, step(state, event, fleet)).rows)
    assert store.drop_update_blobs(state.run.run, 1) == 1
    assert store.blobs.has(blobs[0].sha256)
    assert not store.blobs.has(blobs[1].sha256)


def test_models_that_open_assignments_were_told_of_are_needed(store):
    """As they were sent, also when the run is versions further; not by a run that has ended."""
    down, state, fleet = h.blob(77), submitted(store, h.plan(rounds=9)), h.fleet("a", "b")
    state.run.down = down
    effects = step(state, e.Tick(10.0), fleet)
    store.save(h.one(e.Save, effects).rows)
    state.run.down, state.run.version = h.blob(78), 3
    store.save([state.run])
    name = state.run.run
    assert store.is_named(down.sha256)
    assert not store.is_named(down.sha256, besides=name)
    state.run.status = "finished"
    store.save([state.run])
    assert not store.is_named(down.sha256)


def test_other_processes_changes_are_seen(tmp_path, store):
    """Its own writes are no news; a submission or a stop request of another connection is."""
    assert store.changed()
    state = submitted(store, h.plan())
    assert not store.changed()
    other = Store(tmp_path, synchronous="OFF", create=False)
    other.request_stop(state.run.run, "enough")
    assert store.changed()
    assert not store.changed()
    assert [entry.stop_reason for entry in store.active()] == ["enough"]
    state.run.round = 3
    store.save([state.run])
    assert store.run(state.run.run).stop_reason == "enough"
    other.close()


def _submit_many(folder):
    other = Store(Path(folder))
    for _ in range(10):
        other.submit(h.plan(name="same"), h.start(h.plan()).run)


def test_two_processes_write_at_once(tmp_path):
    """Both wait for one another: no name is given twice and nothing is lost."""
    Store(tmp_path).close()
    workers = [
        multiprocessing.get_context("spawn").Process(target=_submit_many, args=(str(tmp_path),)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(Store(tmp_path).runs()) == 20


def test_making_the_database_at_the_same_time_is_fine(tmp_path):
    """Server and command line may be started together on a new folder."""
    for number in range(10):
        errors, ready = [], threading.Barrier(8)

        def make(folder=tmp_path / str(number), errors=errors, ready=ready):
            ready.wait()
            try:
                Store(folder).close()
            except Exception as error:  # noqa: BLE001 - a thread's error is looked at below
                errors.append(error)

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []


def test_a_server_is_known_to_live_until_it_stops_or_falls_silent(store):
    """Seen some seconds ago means running; a clean stop is known at once, a silent death a little later."""
    assert not store.server_running(100.0)
    store.server_lives("coordinator", 100.0)
    store.server_lives("coordinator", 105.0)
    assert store.server_running(119.0)
    assert not store.server_running(121.0)
    store.server_gone("coordinator")
    assert not store.server_running(105.0)


def test_wal_and_full_synchronisation_are_on(tmp_path):
    """An acknowledged save survives a power cut."""
    made = Store(tmp_path)
    with made._engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2


def test_newer_schema_is_refused(tmp_path):
    """Older software does not touch what newer software wrote."""
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "coordinator.db") as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(StoreError, match="schema version 99, this software knows up to 5; update"):
        Store(tmp_path)


def test_an_older_schema_is_refused(tmp_path):
    """What an older version wrote is neither misread nor changed; the message says what to do."""
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "coordinator.db") as connection:
        connection.execute("UPDATE schema_version SET version = 1")
    with pytest.raises(StoreError, match=r"schema version 1, of an older .* start with another state folder"):
        Store(tmp_path)


@pytest.mark.parametrize("version", [3, 4])
def test_older_schemas_are_taken_over(tmp_path, version):
    """Runs of older versions stay and go on: their rows get the new columns' defaults, and what is new is unknown."""
    database = tmp_path / "coordinator.db"
    with sqlite3.connect(database) as connection:
        connection.executescript((GOLDEN / f"schema-{version}-sqlite.sql").read_text())
        connection.execute("INSERT INTO schema_version VALUES (?)", (version,))
        connection.execute("INSERT INTO servers VALUES ('old', 7.0)")
        connection.executescript((GOLDEN / "rows-4-sqlite.sql").read_text())
    store = Store(tmp_path, create=False)
    assert store.server_running(8.0)
    state = RunState.from_rows(store.run("old-1").plan, store.load_run("old-1"))
    assert [(row.assignment, row.role, row.sequence, row.standing) for row in state.assignments.values()] == [
        ("r0-0", "trainer", 0, False)
    ]
    assert (state.run.hyper, state.run.selector_memory, state.run.places) == ({}, {}, 0)
    assert store.ledger("old-1") == store.histories("old-1") == store.selections("old-1", 0) == []
    assert [row.heartbeat for row in store.devices()] == [None]
    fleet = h.fleet("a", "b")
    store.save(h.one(e.Save, step(state, e.DeviceJoined(20.0, "a"), fleet)).rows)
    name = submitted(store, h.plan()).run.run
    assert store.histories(name) == []
    store.close()
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(5,)]
    Store(tmp_path).close()


def test_reports_of_selections_are_kept_for_a_hundred_rounds(store):
    """Older ones go with the next selection of their run; those of other runs stay."""
    first, second = submitted(store, h.plan()).run.run, submitted(store, h.plan()).run.run
    for number, (run, round_) in enumerate([(first, 0), (second, 0), (first, 1), (first, 1), (first, 100)]):
        row = e.SelectionRow(run=run, number=number, round=round_, attempt=0, at_unix_s=1.0, report=b"\x00report")
        store.save([row])
    assert store.selections(first, 0) == []
    assert [row.number for row in store.selections(first, 1)] == [2, 3]
    assert store.selections(second, 0)[0].report == b"\x00report"


def test_looking_makes_no_state(tmp_path):
    """A typing error in --state is told, not turned into an empty database."""
    with pytest.raises(StoreError, match="holds no coordinator state"):
        Store(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()


def test_damaged_database_is_told(tmp_path):
    """Garbage instead of a database is one clear line."""
    (tmp_path / "coordinator.db").write_bytes(b"garbage " * 1000)
    with pytest.raises(StoreError, match="database failed"):
        Store(tmp_path)


@pytest.mark.parametrize(("name", "dialect"), [("sqlite", sqlite.dialect()), ("postgresql", postgresql.dialect())])
def test_schema_is_golden(name, dialect):
    """The tables of schema version 5; a change needs a new version."""
    parts = []
    for table in tables.metadata.sorted_tables:
        parts.append(str(CreateTable(table).compile(dialect=dialect)).strip())
        parts += [
            str(CreateIndex(index).compile(dialect=dialect))
            for index in sorted(table.indexes, key=lambda index: index.name)
        ]
    text = "".join(f"{' '.join(part.split())};\n" for part in parts)
    assert text == (GOLDEN / f"schema-{name}.sql").read_text()


def test_rows_of_a_methods_table_are_kept_until_they_are_replaced(store):
    """The garbage collection leaves them, of every run that goes on; the newest one of a device comes back."""
    state, other = submitted(store, h.plan()), submitted(store, h.plan())
    name = state.run.run
    for number in (71, 72):
        store.save([e.TableRow(run=name, device="a", blob=h.blob(number), round=number)])
    assert store.is_named(h.blob(72).sha256)
    assert not store.is_named(h.blob(71).sha256)
    assert not store.is_named(h.blob(72).sha256, besides=name)
    rebuilt = RunState.from_rows(state.plan, store.load_run(name))
    assert {device: row.blob for device, row in rebuilt.table.items()} == {"a": h.blob(72)}
    assert store.load_run(other.run.run)[-1] == store.run(other.run.run).row
    state.run.status = "finished"
    store.save([state.run])
    assert not store.is_named(h.blob(72).sha256)


def test_open_standing_assignments_are_loaded_however_old(store):
    """A device may hold one for weeks; closed ones of old versions stay where they are."""
    state = submitted(store, h.plan(mode="anarchic", max_staleness=0))
    state.run.version = state.run.round = 50
    rows = [
        e.AssignmentRow(
            run=state.run.run,
            assignment=f"r0-{number}",
            device=device,
            round=0,
            version=0,
            model=h.blob(2),
            deadline_unix_s=9.0,
            assigned_unix_s=1.0,
            status=status,
            standing=True,
            sequence=3,
        )
        for number, (device, status) in enumerate([("a", "open"), ("b", "cancelled")])
    ]
    store.save([state.run, *rows])
    rebuilt = RunState.from_rows(state.plan, store.load_run(state.run.run))
    assert list(rebuilt.assignments.values()) == rows[:1]
    assert store.open_assignments(state.run.run) == 1
