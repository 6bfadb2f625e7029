"""The spool: what it says is kept, is kept."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.errors import StorageError
from edge_runtime.messages import BlobRef, UpdateId, UpdateMeta
from edge_runtime.store import spool as spool_module
from edge_runtime.store.spool import RunChange, Spool, SpooledUpdate

ROOT = Path(__file__).parents[3]


def update_id(number: int, run: str = "run") -> UpdateId:
    return UpdateId(run, "dev", f"a{number}", 0)


def add(
    spool: Spool,
    number: int,
    file: str | None = None,
    *,
    data: bytes = b"bytes",
    key: str = "",
    change: RunChange | None = None,
    run: str = "run",
) -> SpooledUpdate:
    file = file or f"{run}-{number}.update"
    (spool.folder / file).write_bytes(data)
    blob = BlobRef(sha256=f"{number:064x}", size_bytes=len(data))
    meta = UpdateMeta(round=number, model_version=0, samples=5, steps=1)
    update = SpooledUpdate(update=update_id(number, run), file=file, blob=blob, meta=meta, key=key)
    spool.add(update, change)
    return update


def add_with_state(spool: Spool, number: int, returned: tuple[UpdateId, ...] = (), run: str = "run") -> SpooledUpdate:
    """An update that can be taken back, and the state of its run after it."""
    (spool.folder / f"{run}-{number}.state").write_bytes(b"state %d" % number)
    return add(spool, number, key="k", change=RunChange(f"{run}-{number}.state", returned), run=run)


def files(spool: Spool) -> set[str]:
    return {entry.name for entry in spool.folder.iterdir()}


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path)
    yield spool
    spool.close()


def test_update_is_remembered_over_a_restart(tmp_path):
    """An added update is there with all its fields when the spool is opened again, oldest first."""
    spool = Spool(tmp_path)
    added = [add(spool, number) for number in (3, 1, 2)]
    spool.close()
    spool = Spool(tmp_path)
    assert spool.open_updates() == added
    assert all(spool.path(update).read_bytes() == b"bytes" for update in added)
    spool.close()


def test_adding_again_changes_nothing(spool):
    """The same update twice is one row, and does not undo what the coordinator said."""
    update = add(spool, 1)
    spool.set_state(update.update, "delivered")
    spool.add(update)
    assert spool.get(update.update).state == "delivered"
    assert len(spool.open_updates()) == 1


def test_bytes_stay_until_the_verdict(spool):
    """Delivery frees nothing yet; a verdict closes the row, which still answers for a repeated job."""
    update = add(spool, 1)
    spool.set_state(update.update, "delivered")
    assert spool.used_bytes() == 5
    assert spool.path(update).read_bytes() == b"bytes"
    assert [entry.state for entry in spool.open_updates()] == ["delivered"]
    spool.set_state(update.update, "counted")
    assert (spool.open_updates(), spool.used_bytes(), files(spool)) == ([], 0, set())
    assert spool.get(update.update).state == "counted"
    spool.set_state(update_id(99), "counted")


def test_a_verdict_is_final(spool):
    """A note that could not be written in time does not undo a later one."""
    update = add(spool, 1, key="k")
    spool.set_state(update.update, "refused", "too late")
    for state in ("delivered", "counted"):
        spool.set_state(update.update, state)
    assert (spool.get(update.update).state, spool.get(update.update).reason) == ("refused", "too late")
    assert spool.path(update).exists()


def test_refused_bytes_wait_to_be_taken_back_if_they_can_be(spool):
    """Where the codec keeps what it did not send, a refused update stays until a later one has taken it back."""
    lossless, lossy = add(spool, 1), add(spool, 2, key="k")
    for update in (lossless, lossy):
        spool.set_state(update.update, "refused")
    assert [entry.update for entry in spool.refused("run")] == [lossy.update]
    assert spool.refused("other") == []
    assert files(spool) == {lossy.file}
    assert spool.used_bytes() == 5
    assert spool.used_bytes(without="run") == 0  # no reason to refuse the job that takes it back
    add_with_state(spool, 3, returned=(lossy.update,))
    assert spool.refused("run") == []
    assert spool.get(lossy.update).state == "refused"
    assert not (spool.folder / lossy.file).exists()


def test_update_and_state_of_its_run_become_one_at_once(spool):
    """The state of a run is that after its newest update; the one before goes, those of other runs stay."""
    assert spool.run_state("run") is None
    add_with_state(spool, 1)
    add_with_state(spool, 7, run="other")
    spool.set_state(update_id(1), "counted")
    add_with_state(spool, 2)
    assert spool.run_state("run").read_bytes() == b"state 2"
    assert spool.run_state("other").read_bytes() == b"state 7"
    assert "run-1.state" not in files(spool)
    add(spool, 3)  # an evaluation changes nothing
    assert spool.run_state("run").read_bytes() == b"state 2"
    add(spool, 4, change=RunChange())
    assert spool.run_state("run") is None
    assert "run-2.state" not in files(spool)


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT OR IGNORE", "INSERT OR REPLACE", "UPDATE updates", "COMMIT"])
def test_a_transaction_that_fails_changes_nothing(spool, monkeypatch, statement):
    """Wherever writing fails, update, state and what was taken back are as they were; later all of it works."""
    add_with_state(spool, 1)
    spool.set_state(update_id(1), "refused")
    db = spool._db

    class Full:
        def execute(self, query, values=()):
            if query.startswith(statement):
                raise sqlite3.OperationalError("database or disk is full")
            return db.execute(query, values)

    monkeypatch.setattr(spool, "_db", Full())
    with pytest.raises(StorageError, match="nothing was lost"):
        add_with_state(spool, 2, returned=(update_id(1),))
    monkeypatch.setattr(spool, "_db", db)
    assert spool.get(update_id(2)) is None
    assert [entry.update for entry in spool.refused("run")] == [update_id(1)]
    assert spool.run_state("run").read_bytes() == b"state 1"
    assert "run-1.update" in files(spool)
    add_with_state(spool, 2, returned=(update_id(1),))
    assert files(spool) == {"run-2.update", "run-2.state"}


def test_states_of_runs_long_gone_are_dropped(spool, monkeypatch, caplog):
    """Only so many runs are remembered; one with an update that waits for its verdict is not. The log says it."""
    monkeypatch.setattr(spool_module, "RUNS_KEPT", 2)
    waits = add_with_state(spool, 0, run="waits")
    for number in range(1, 5):
        add_with_state(spool, number, run=f"run{number}")
        spool.set_state(update_id(number, f"run{number}"), "refused")
    add_with_state(spool, 5, run="now")
    kept = {run for run in ("waits", "run1", "run2", "run3", "run4", "now") if spool.run_state(run)}
    assert kept == {"waits", "run3", "run4", "now"}
    assert [record.args for record in caplog.records] == [("run1",), ("run2",)]
    assert spool.refused("run1") == spool.refused("run2") == []
    assert spool.open_updates()[0] == waits
    assert not {name for name in files(spool) if name.startswith(("run1", "run2"))}


def test_states_and_refused_bytes_count(spool):
    """All that the spool has on the disk is in the figure that its quota is about."""
    add_with_state(spool, 1)  # 5 bytes of update, 7 of state
    add_with_state(spool, 2, run="other")
    assert spool.used_bytes() == sum(entry.stat().st_size for entry in spool.folder.iterdir()) == 24
    assert spool.used_bytes(without="run") == 17  # the open update stays when the next one comes
    spool.set_state(update_id(1), "refused")
    assert (spool.used_bytes(), spool.used_bytes(without="run")) == (24, 12)


def test_room_is_made_of_states_that_nothing_waits_for(spool, caplog):
    """Runs that a verdict said have ended go first, then those idle for longest, with a word each; never the state of
    the run that asks, or of one with an update that waits for a verdict or to be sent again."""
    for number, run in enumerate(("open", "refused", "idle", "ended", "later", "mine")):
        update = add_with_state(spool, number, run=run).update
        if run in ("refused", "ended"):
            spool.set_state(update, "refused", "run has ended: stopped" if run == "ended" else "too late")
        elif run != "open":
            spool.set_state(update, "counted")

    def left() -> list[str]:
        return [run for run in ("open", "refused", "idle", "ended", "later", "mine") if spool.run_state(run)]

    assert spool.used_bytes(without="mine") == 50
    assert spool.make_room(50, "mine")
    assert len(left()) == 6
    assert spool.make_room(49, "mine")
    assert left() == ["open", "refused", "idle", "later", "mine"]
    assert "ended-3.update" not in files(spool)
    assert spool.make_room(31, "mine")
    assert left() == ["open", "refused", "later", "mine"]
    assert not spool.make_room(23, "mine")
    assert left() == ["open", "refused", "mine"]
    assert [record.args[0] for record in caplog.records] == ["ended", "idle", "later"]
    assert [entry.update.run for entry in spool.refused("refused")] == ["refused"]
    assert spool.make_room(24, "mine")


def test_two_updates_with_one_file(spool):
    """Identical content of two updates may lie in one file: it goes with the last of them, not with the first."""
    first, second = add(spool, 1, "same.update"), add(spool, 2, "same.update")
    spool.set_state(first.update, "counted")
    assert spool.path(second).read_bytes() == b"bytes"
    spool.set_state(second.update, "counted")
    assert not spool.path(second).exists()


def test_closed_updates_are_pruned_and_open_ones_never(spool, monkeypatch):
    """Only so many closed updates are remembered; one without a verdict stays however old it is."""
    monkeypatch.setattr(spool_module, "CLOSED_KEPT", 5)
    oldest = add(spool, 0)
    for number in range(1, 20):
        spool.set_state(add(spool, number).update, "counted")
    assert spool.open_updates() == [oldest]
    assert spool.get(update_id(19)).state == spool.get(update_id(16)).state == "counted"
    assert spool.get(update_id(2)) is None


def test_orphan_files_are_swept_and_lost_files_forgotten(tmp_path):
    """At start a file without a row goes, and a row without its whole file too, so that its job is done again; but what
    the coordinator has is not done again."""
    spool = Spool(tmp_path)
    whole, lost, cut = add(spool, 1), add(spool, 2), add(spool, 3)
    delivered, refused = add(spool, 4), add(spool, 5, key="k")
    add_with_state(spool, 6)
    add_with_state(spool, 7, run="other")
    spool.set_state(delivered.update, "delivered")
    spool.set_state(refused.update, "refused")
    for update in (lost, delivered, refused):
        spool.path(update).unlink()
    spool.run_state("other").unlink()
    spool.path(cut).write_bytes(b"by")
    for orphan in ("orphan.update", "orphan.state", "orphan.state.17.tmp"):
        (spool.folder / orphan).write_bytes(b"x")
    spool.close()
    spool = Spool(tmp_path)
    opened = [entry.update for entry in spool.open_updates()]
    assert opened == [whole.update, delivered.update, update_id(6), update_id(7, "other")]
    assert files(spool) == {whole.file, "run-6.update", "run-6.state", "other-7.update"}
    assert spool.get(lost.update) is None
    assert spool.refused("run") == []
    assert (spool.run_state("run").name, spool.run_state("other")) == ("run-6.state", None)
    spool.close()


def test_a_ready_update_whose_bytes_are_gone_is_an_error_in_the_log(tmp_path, caplog):
    """The residual no longer holds what those bytes held, so this is a loss and is told as one."""
    spool = Spool(tmp_path)
    lost = add_with_state(spool, 1)
    spool.path(lost).unlink()
    spool.close()
    spool = Spool(tmp_path)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "update run/dev/a1/0 was not delivered, and its bytes are gone" in record.message
    spool.close()


def test_what_a_dead_worker_left_goes_and_nothing_else(spool):
    """Files of one job that no row names; those of rows and of jobs with longer names stay."""
    named = [f"r.a.{'0' * 16}.update", f"r.a.{'1' * 16}.state"]
    (spool.folder / named[1]).write_bytes(b"state")
    add(spool, 1, named[0], change=RunChange(named[1]), run="r")
    left = [f"r.a.{'2' * 16}.update", f"r.a.{'3' * 16}.state", f"r.a.{'4' * 16}.state.17.tmp"]
    others = [f"r.a.b.{'5' * 16}.update", f"r.ab.{'6' * 16}.state", f"q.a.{'7' * 16}.state", "empty.update"]
    for name in (*left, *others):
        (spool.folder / name).write_bytes(b"x")
    spool.drop_unfinished("r", "a")
    assert files(spool) == {*named, *others}


def test_crashes_are_counted_by_bundle_and_forgiven(tmp_path):
    """Crashes in a row survive a restart, one bundle's do not count for another, and success forgives."""
    spool = Spool(tmp_path)
    assert [spool.crashed("a"), spool.crashed("a"), spool.crashed("b")] == [1, 2, 1]
    spool.close()
    spool = Spool(tmp_path)
    assert (spool.crashes("a"), spool.crashes("b"), spool.crashes("c")) == (2, 1, 0)
    spool.forgive("a")
    assert (spool.crashes("a"), spool.crashes("b")) == (0, 1)
    spool.close()


def test_newer_schema_is_refused(tmp_path):
    """A database that a newer agent wrote is not touched, and the error says what to do."""
    Spool(tmp_path).close()
    database = sqlite3.connect(tmp_path / "spool.db")
    database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(StorageError, match=r"newer agent \(schema 99\); update this one"):
        Spool(tmp_path)


def test_older_schema_is_refused(tmp_path):
    """A folder of an older agent is not touched, and the error says what to do."""
    Spool(tmp_path).close()
    database = sqlite3.connect(tmp_path / "spool.db")
    database.execute("PRAGMA user_version=1")
    database.close()
    with pytest.raises(StorageError, match=r"older agent \(schema 1\).*give this agent an empty state_dir"):
        Spool(tmp_path)


def test_damaged_database_is_named(tmp_path):
    """A file that is no database gives one clear error."""
    (tmp_path / "spool.db").write_bytes(b"no database at all, but longer than a header" * 100)
    with pytest.raises(StorageError, match=r"spool\.db"):
        Spool(tmp_path)


def test_full_disk_is_a_storage_error(spool, monkeypatch):
    """When SQLite cannot write, the error says that nothing was lost; later the same add works."""
    db = spool._db

    class Full:
        def execute(self, *_args):
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(spool, "_db", Full())
    with pytest.raises(StorageError, match="nothing was lost"):
        add(spool, 1)
    monkeypatch.setattr(spool, "_db", db)
    add(spool, 1)
    assert len(spool.open_updates()) == 1


WRITER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from edge_runtime.store.spool import Spool
from tests.edge_runtime.store.test_spool import add_with_state
spool = Spool(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 100000):
    add_with_state(spool, number)
    os.write(1, b"%d\\n" % number)
"""


def test_every_add_that_returned_survives_kill_9(tmp_path):
    """A process that adds updates is killed four times at chance moments: nothing it had added is missing, and the
    state of the run is that after the newest update."""
    said: list[int] = []
    for stop_after in (1, 7, 20, 33):
        start = said[-1] + 2 if said else 0
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(start), str(ROOT)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        said += [int(child.stdout.readline()) for _ in range(stop_after)]
        os.kill(child.pid, signal.SIGKILL)
        said += [int(line) for line in child.stdout.read().split(b"\n")[:-1]]
        child.wait()
        child.stdout.close()
    spool = Spool(tmp_path)
    kept = {entry.update.assignment for entry in spool.open_updates()}
    assert {f"a{number}" for number in said} <= kept
    assert all(spool.path(entry).read_bytes() == b"bytes" for entry in spool.open_updates())
    newest = spool.open_updates()[-1].update.assignment.removeprefix("a")
    assert spool.run_state("run").read_bytes() == b"state " + newest.encode()
    spool.close()
