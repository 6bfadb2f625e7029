"""The device's durable memory: finished updates, their fate, the state of runs, and bundles that crash the worker.

SQLite in WAL mode with ``synchronous=FULL``: when :meth:`Spool.add` returns, the update survives a power cut. The
bytes of an update and the state that its run has after it (what the codec did not send, a method's memory, personal
tensors) are files in the spool folder that the worker has already made durable. One transaction makes both exist, so
that a crash leaves either all of it or none: nothing trained is lost or sent twice. A file without a row is deleted at
start, and so is the row of an update whose file is gone: its job is asked for again.

The bytes of an update stay until its verdict. What was counted is deleted; what was refused stays until the next
update of its run has taken it back (:class:`RunChange`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
from typing import TYPE_CHECKING, Literal

import msgspec

from edge_runtime.errors import StorageError
from edge_runtime.files import remove
from edge_runtime.messages import BlobRef, UpdateId, UpdateMeta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

log = logging.getLogger("edge.spool")

SCHEMA_VERSION = 2
CLOSED_KEPT = 1000  # updates with a verdict that are remembered, so that a repeated job is not trained again
RUNS_KEPT = 16  # runs whose state and refused updates are kept; a device hears of no run that it has ended
_TABLES = """
CREATE TABLE updates (
  run TEXT NOT NULL, device TEXT NOT NULL, assignment TEXT NOT NULL, sequence INTEGER NOT NULL,
  file TEXT NOT NULL, blob BLOB NOT NULL, meta BLOB NOT NULL, key TEXT NOT NULL, state TEXT NOT NULL,
  reason TEXT NOT NULL DEFAULT '', PRIMARY KEY (run, device, assignment, sequence)
);
CREATE TABLE run_states (run TEXT PRIMARY KEY, file TEXT NOT NULL);
CREATE TABLE crashes (bundle TEXT PRIMARY KEY, count INTEGER NOT NULL);
"""
_ENDED = "run has ended"  # begins a refusal after which nothing more comes of the run
_WRITTEN = re.compile(r"[0-9a-f]{16}\.(state|update)(\.[0-9]+\.tmp)?")  # of a worker's file, after its job
_ONE = "WHERE run=? AND device=? AND assignment=? AND sequence=?"

State = Literal["ready", "delivered", "counted", "refused"]


class SpooledUpdate(msgspec.Struct, kw_only=True):
    """One finished update. ``file`` lies in the spool folder while its bytes are kept; empty: they are gone.

    ``key`` names what the bytes can be taken back with if they are refused (bundle, codec, model); empty: they cannot,
    and go with any verdict.
    """

    update: UpdateId
    file: str
    blob: BlobRef
    meta: UpdateMeta
    key: str = ""
    state: State = "ready"
    reason: str = ""


class RunChange(msgspec.Struct, frozen=True):
    """What an update does to its run: ``state_file`` is the run's state from now on (empty: there is nothing to keep),
    and the refused updates in ``returned`` are part of it or of the update, or dropped.
    """

    state_file: str = ""
    returned: tuple[UpdateId, ...] = ()


class Spool:
    """Updates of this device, by id. For one thread at a time (another one than made it is fine) and one process.

    Args:
        folder: the agent's state folder.
        sweep: tidy up after a crash; not while another process has the spool open.

    Raises:
        StorageError: the folder cannot be used, the disk is full, or an older or newer version wrote the database.
    """

    def __init__(self, folder: Path, *, sweep: bool = True) -> None:
        self.folder = folder / "spool"
        self._path = folder / "spool.db"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA cache_size=-256")  # KiB: the spool is small, the agent's memory is the product
            self._create()
            if sweep:
                self._sweep()
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{self._path}: cannot be used ({error}); check the disk and the permissions") from error

    def add(self, update: SpooledUpdate, change: RunChange | None = None) -> None:
        """Makes a finished update, and what it changes of its run, durable; adding it again changes nothing.

        Args:
            update: whose file is durable already.
            change: None: the run stays as it is.
        """
        unused: list[str] = []
        with self._transaction():
            inserted = self._execute(
                "INSERT OR IGNORE INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *msgspec.structs.astuple(update.update),
                    update.file,
                    msgspec.msgpack.encode(update.blob),
                    msgspec.msgpack.encode(update.meta),
                    update.key,
                    update.state,
                    update.reason,
                ),
            ).rowcount
            if change is not None and inserted:
                unused = self._change(update.update.run, change)
        self._remove_unused(unused)

    def set_state(self, update: UpdateId, state: State, reason: str = "") -> None:
        """Notes what the coordinator said. The bytes of a counted update are deleted, those of a refused one if they
        cannot be taken back.
        """
        found = self.get(update)
        if found is None or found.state in ("counted", "refused"):  # a verdict is final
            return
        kept = state in ("ready", "delivered") or (state == "refused" and found.key)
        with self._transaction():
            self._execute(
                f"UPDATE updates SET state=?, reason=?, file=? {_ONE}",  # noqa: S608
                (state, reason, found.file if kept else "", *msgspec.structs.astuple(update)),
            )
            self._execute(
                "DELETE FROM updates WHERE state IN ('counted', 'refused') AND file='' AND rowid <= "
                "(SELECT max(rowid) FROM updates) - ?",
                (CLOSED_KEPT,),
            )
        if not kept:
            self._remove_unused([found.file])

    def get(self, update: UpdateId) -> SpooledUpdate | None:
        """The update, whatever became of it, if it is remembered."""
        rows = self._rows(_ONE, msgspec.structs.astuple(update))
        return rows[0] if rows else None

    def last_sequence(self, run: str, assignment: str) -> int | None:
        """The highest number that an update of an assignment has here, whatever became of it; None: there is none."""
        query = "SELECT max(sequence) FROM updates WHERE run=? AND assignment=?"
        found = self._execute(query, (run, assignment)).fetchone()[0]
        return None if found is None else int(found)

    def open_updates(self) -> list[SpooledUpdate]:
        """Updates without a verdict, oldest first."""
        return self._rows("WHERE state IN ('ready', 'delivered') ORDER BY rowid", ())

    def refused(self, run: str) -> list[SpooledUpdate]:
        """Refused updates of a run whose bytes are still to be taken back, oldest first."""
        return self._rows("WHERE run=? AND state='refused' AND file!='' ORDER BY rowid", (run,))

    def needed_versions(self, run: str) -> list[int]:
        """Model versions that updates of a run whose bytes are here are relative to."""
        return sorted({row.meta.model_version for row in self._rows("WHERE run=? AND file!=''", (run,))})

    def runs(self) -> set[str]:
        """Runs of which a state or the bytes of an update are kept."""
        query = "SELECT run FROM run_states UNION SELECT run FROM updates WHERE file!=''"
        return {row[0] for row in self._execute(query, ()).fetchall()}

    def path(self, update: SpooledUpdate) -> Path:
        """Where the bytes of an update lie while they are kept."""
        return self.folder / update.file

    def run_state(self, run: str) -> Path | None:
        """The file with the state of a run; None if there is nothing."""
        row = self._execute("SELECT file FROM run_states WHERE run=? AND file!=''", (run,)).fetchone()
        return None if row is None else self.folder / row[0]

    def used_bytes(self, *, without: str = "") -> int:
        """Bytes on the disk: updates that are open or were refused, and states of runs.

        Args:
            without: leaves out the state and the refused updates of this run, which its next update replaces.
        """
        query = (
            "SELECT file FROM run_states WHERE run!=? UNION "
            "SELECT file FROM updates WHERE run!=? OR state IN ('ready', 'delivered')"
        )
        return sum(self._size(file) for file in self._files(query, (without, without)))

    def make_room(self, limit_bytes: int, run: str) -> bool:
        """Whether what stays when the next update of ``run`` is here is within a limit.

        For that, other runs give up their state, with a warning in the log: first those that a verdict said have ended,
        with what was refused of them, then those that did nothing for longest. What waits for its verdict or is still
        to be sent again never goes.
        """
        excess = self.used_bytes(without=run) - limit_bytes
        for name in self._dispensable(run) if excess > 0 else ():
            before = self.used_bytes(without=run)
            with self._transaction():
                unused = self._drop_run(name)
            self._remove_unused(unused)
            freed = before - self.used_bytes(without=run)
            log.warning(
                "the state of run %s (%d bytes) is dropped for want of room: what its codec had not sent is lost",
                *(name, freed),
            )
            excess -= freed
            if excess <= 0:
                break
        return excess <= 0

    def drop_unfinished(self, run: str, assignment: str) -> None:
        """Deletes what a worker that died over a job had written before it could say so."""
        begin = f"{run}.{assignment}."
        found = [entry.name for entry in self.folder.iterdir() if entry.name.startswith(begin)]
        self._remove_unused(name for name in found if _WRITTEN.fullmatch(name, len(begin)))

    def crashed(self, bundle: str) -> int:
        """Counts one crash of the worker with this bundle (SHA-256) and gives the new count."""
        self._execute(
            "INSERT INTO crashes VALUES (?, 1) ON CONFLICT (bundle) DO UPDATE SET count = count + 1", (bundle,)
        )
        return self.crashes(bundle)

    def crashes(self, bundle: str) -> int:
        """Crashes of the worker in a row with this bundle."""
        row = self._execute("SELECT count FROM crashes WHERE bundle=?", (bundle,)).fetchone()
        return 0 if row is None else int(row[0])

    def all_crashes(self) -> dict[str, int]:
        """Crashes in a row by bundle (SHA-256)."""
        return dict(self._execute("SELECT bundle, count FROM crashes ORDER BY bundle", ()).fetchall())

    def forgive(self, bundle: str) -> None:
        """A job with this bundle ended well: its crashes are forgotten."""
        self._execute("DELETE FROM crashes WHERE bundle=?", (bundle,))

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def _change(self, run: str, change: RunChange) -> list[str]:
        """Inside a transaction; gives the files that may be unused after it."""
        unused = self._files("SELECT file FROM run_states WHERE run=?", (run,))
        self._execute("INSERT OR REPLACE INTO run_states VALUES (?, ?)", (run, change.state_file))
        for returned in change.returned:
            identity = msgspec.structs.astuple(returned)
            unused += self._files(f"SELECT file FROM updates {_ONE} AND state='refused'", identity)  # noqa: S608
            self._execute(f"UPDATE updates SET file='' {_ONE} AND state='refused'", identity)  # noqa: S608
        # Replaced rows get the highest rowid: the runs that did nothing for longest come last.
        old = self._execute(
            "SELECT run FROM run_states WHERE run NOT IN "
            "(SELECT run FROM updates WHERE state IN ('ready', 'delivered')) ORDER BY rowid DESC LIMIT -1 OFFSET ?",
            (RUNS_KEPT,),
        ).fetchall()
        for (name,) in old:
            loses = bool(self.refused(name))  # a run that ended well has nothing left to send
            dropped = self._drop_run(name)
            if dropped:
                level = logging.WARNING if loses else logging.INFO
                log.log(
                    level, "run %s did nothing for longest and is forgotten, with what its codec had not sent", name
                )
            unused += dropped
        return unused

    def _drop_run(self, run: str) -> list[str]:
        """Like :meth:`_change`: forgets the state of a run and the bytes of its updates."""
        unused = self._files("SELECT file FROM run_states WHERE run=?", (run,))
        unused += self._files("SELECT file FROM updates WHERE run=?", (run,))
        self._execute("DELETE FROM run_states WHERE run=?", (run,))
        self._execute("UPDATE updates SET file='' WHERE run=?", (run,))
        return unused

    def _dispensable(self, run: str) -> list[str]:
        """Other runs whose state may go, in that order."""
        ended, idle = [], []
        states = self._execute("SELECT run, file FROM run_states WHERE run!=? ORDER BY rowid", (run,)).fetchall()
        for name, file in states:
            kept = self._rows("WHERE run=? AND file!=''", (name,))
            if any(update.state != "refused" for update in kept):
                continue
            if any(update.reason.startswith(_ENDED) for update in kept):
                ended.append(name)
            elif file and not kept:
                idle.append(name)
        return ended + idle

    def _size(self, file: str) -> int:
        with contextlib.suppress(OSError):
            return (self.folder / file).stat().st_size
        return 0

    def _files(self, query: str, values: tuple[object, ...]) -> list[str]:
        return [row[0] for row in self._execute(query, values).fetchall() if row[0]]

    def _remove_unused(self, files: Iterable[str]) -> None:
        for file in files:
            rows = "SELECT file FROM updates WHERE file=? UNION SELECT file FROM run_states WHERE file=?"
            if file and not self._files(rows, (file, file)):
                remove(self.folder / file)

    def _rows(self, where: str, values: tuple[object, ...]) -> list[SpooledUpdate]:
        query = "SELECT run, device, assignment, sequence, file, blob, meta, key, state, reason FROM updates " + where  # noqa: S608
        return [
            SpooledUpdate(
                update=UpdateId(*row[:4]),
                file=row[4],
                blob=msgspec.msgpack.decode(row[5], type=BlobRef),
                meta=msgspec.msgpack.decode(row[6], type=UpdateMeta),
                key=row[7],
                state=row[8],
                reason=row[9],
            )
            for row in self._execute(query, values).fetchall()
        ]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE", ())
        try:
            yield
            self._execute("COMMIT", ())
        except StorageError:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back already
                self._db.execute("ROLLBACK")
            raise

    def _execute(self, query: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        try:
            return self._db.execute(query, values)
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}; free space or repair the disk, nothing was lost") from error

    def _create(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StorageError(f"{self._path}: written by a newer agent (schema {version}); update this one")
        if 0 < version < SCHEMA_VERSION:
            raise StorageError(
                f"{self._path}: written by an older agent (schema {version}), which this one does not read; let that "
                "one deliver its updates, then give this agent an empty state_dir"
            )
        if version == 0:
            self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

    def _sweep(self) -> None:
        sizes = {entry.name: entry.stat().st_size for entry in self.folder.iterdir()}
        kept = set()
        for update in self._rows("WHERE file!=''", ()):
            if sizes.get(update.file) == update.blob.size_bytes:
                kept.add(update.file)
                continue
            identity = msgspec.structs.astuple(update.update)
            if update.state == "ready":  # lost with a file system: let the job be done again
                log.error(
                    "update %s was not delivered, and its bytes are gone from the disk or cut off: what it would have "
                    "sent is lost, for the state of its run holds only the rest; its job may be done again",
                    update.update,
                )
                self._execute(f"DELETE FROM updates {_ONE}", identity)  # noqa: S608
            else:
                log.warning("the bytes of update %s (%s) are gone from the disk", update.update, update.state)
                self._execute(f"UPDATE updates SET file='' {_ONE}", identity)  # noqa: S608
        for run, file in self._execute("SELECT run, file FROM run_states WHERE file!=''", ()).fetchall():
            if file in sizes:
                kept.add(file)
            else:
                log.warning("the state of run %s is gone from the disk: its next job starts without", run)
                self._execute("UPDATE run_states SET file='' WHERE run=?", (run,))
        for name in sizes.keys() - kept:
            remove(self.folder / name)
