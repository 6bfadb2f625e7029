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
from edge_runtime.store.spool import Spool, SpooledUpdate

ROOT = Path(__file__).parents[3]


def update_id(number: int) -> UpdateId:
    return UpdateId("run", "dev", f"a{number}", 0)


def add(spool: Spool, number: int, file: str | None = None, data: bytes = b"bytes") -> SpooledUpdate:
    file = file or f"{number}.update"
    (spool.folder / file).write_bytes(data)
    blob = BlobRef(sha256=f"{number:064x}", size_bytes=len(data))
    meta = UpdateMeta(round=number, model_version=0, samples=5, steps=1)
    update = SpooledUpdate(update=update_id(number), file=file, blob=blob, meta=meta)
    spool.add(update)
    return update


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


def test_bytes_go_when_delivered_and_the_row_stays_until_the_verdict(spool):
    """Delivery frees the bytes; a verdict closes the row but it still answers for a repeated job."""
    update = add(spool, 1)
    assert spool.used_bytes() == 5
    spool.set_state(update.update, "delivered")
    assert spool.used_bytes() == 0
    assert [entry.state for entry in spool.open_updates()] == ["delivered"]
    spool.set_state(update.update, "refused", "too late")
    assert spool.open_updates() == []
    assert (spool.get(update.update).state, spool.get(update.update).reason) == ("refused", "too late")
    spool.set_state(update_id(99), "counted")


def test_two_updates_with_one_file(spool):
    """Identical content of two updates may lie in one file: it goes with the last of them, not with the first."""
    first, second = add(spool, 1, "same.update"), add(spool, 2, "same.update")
    spool.set_state(first.update, "delivered")
    assert spool.path(second).read_bytes() == b"bytes"
    spool.set_state(second.update, "delivered")
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
    """At start a file without a row goes, and a row without its whole file too, so that its job is done again."""
    spool = Spool(tmp_path)
    whole, lost, cut = add(spool, 1), add(spool, 2), add(spool, 3)
    delivered = add(spool, 4)
    spool.set_state(delivered.update, "delivered")
    spool.path(lost).unlink()
    spool.path(cut).write_bytes(b"by")
    (spool.folder / "orphan.update").write_bytes(b"x")
    spool.close()
    spool = Spool(tmp_path)
    assert [entry.update for entry in spool.open_updates()] == [whole.update, delivered.update]
    assert [entry.name for entry in spool.folder.iterdir()] == [whole.file]
    assert spool.get(lost.update) is None
    spool.close()


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
from tests.edge_runtime.store.test_spool import add
spool = Spool(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 100000):
    add(spool, number)
    os.write(1, b"%d\\n" % number)
"""


def test_every_add_that_returned_survives_kill_9(tmp_path):
    """A process that adds updates is killed four times at chance moments: nothing it had added is missing."""
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
    spool.close()
