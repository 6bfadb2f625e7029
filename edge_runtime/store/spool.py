"""The device's durable memory: finished updates, their fate, and bundles that crash the worker.

SQLite in WAL mode with ``synchronous=FULL``: when :meth:`Spool.add` returns, the update survives a power cut. The
bytes of an update are a file in the spool folder that the worker has already made durable; the row makes it exist. A
file without a row (the power went between the two) is deleted at start, and so is the row of a file that is gone: its
job is asked for again.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Literal

import msgspec

from edge_runtime.errors import StorageError
from edge_runtime.files import remove
from edge_runtime.messages import BlobRef, UpdateId, UpdateMeta

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION = 1
CLOSED_KEPT = 1000  # updates with a verdict that are remembered, so that a repeated job is not trained again
_TABLES = """
CREATE TABLE updates (
  run TEXT NOT NULL, device TEXT NOT NULL, assignment TEXT NOT NULL, sequence INTEGER NOT NULL,
  file TEXT NOT NULL, blob BLOB NOT NULL, meta BLOB NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (run, device, assignment, sequence)
);
CREATE TABLE crashes (bundle TEXT PRIMARY KEY, count INTEGER NOT NULL);
"""

State = Literal["ready", "delivered", "counted", "refused"]


class SpooledUpdate(msgspec.Struct, kw_only=True):
    """One finished update. ``file`` lies in the spool folder until the coordinator has the bytes."""

    update: UpdateId
    file: str
    blob: BlobRef
    meta: UpdateMeta
    state: State = "ready"
    reason: str = ""


class Spool:
    """Updates of this device, by id. For one thread at a time (another one than made it is fine) and one process.

    Args:
        folder: the agent's state folder.
        sweep: tidy up after a crash; not while another process has the spool open.

    Raises:
        StorageError: the folder cannot be used, the disk is full, or a newer version wrote the database.
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

    def add(self, update: SpooledUpdate) -> None:
        """Makes a finished update durable; adding the same update again changes nothing."""
        self._execute(
            "INSERT OR IGNORE INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *msgspec.structs.astuple(update.update),
                update.file,
                msgspec.msgpack.encode(update.blob),
                msgspec.msgpack.encode(update.meta),
                update.state,
                update.reason,
            ),
        )

    def set_state(self, update: UpdateId, state: State, reason: str = "") -> None:
        """Notes what the coordinator said; with ``delivered`` and later the bytes are deleted."""
        self._execute(
            "UPDATE updates SET state=?, reason=? WHERE run=? AND device=? AND assignment=? AND sequence=?",
            (state, reason, *msgspec.structs.astuple(update)),
        )
        found = self.get(update)
        if found is not None and state != "ready" and not self._rows("WHERE state='ready' AND file=?", (found.file,)):
            remove(self.folder / found.file)
        if state in ("counted", "refused"):
            self._execute(
                "DELETE FROM updates WHERE state IN ('counted', 'refused') AND rowid <= "
                "(SELECT max(rowid) FROM updates) - ?",
                (CLOSED_KEPT,),
            )

    def get(self, update: UpdateId) -> SpooledUpdate | None:
        """The update, whatever became of it, if it is remembered."""
        rows = self._rows("WHERE run=? AND device=? AND assignment=? AND sequence=?", msgspec.structs.astuple(update))
        return rows[0] if rows else None

    def open_updates(self) -> list[SpooledUpdate]:
        """Updates without a verdict, oldest first."""
        return self._rows("WHERE state IN ('ready', 'delivered') ORDER BY rowid", ())

    def path(self, update: SpooledUpdate) -> Path:
        """Where the bytes of an update lie while its state is ``ready``."""
        return self.folder / update.file

    def used_bytes(self) -> int:
        """Bytes of the updates that wait."""
        return sum(_size(entry) for entry in self.folder.iterdir())

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

    def _rows(self, where: str, values: tuple[object, ...]) -> list[SpooledUpdate]:
        query = "SELECT run, device, assignment, sequence, file, blob, meta, state, reason FROM updates " + where  # noqa: S608
        return [
            SpooledUpdate(
                update=UpdateId(*row[:4]),
                file=row[4],
                blob=msgspec.msgpack.decode(row[5], type=BlobRef),
                meta=msgspec.msgpack.decode(row[6], type=UpdateMeta),
                state=row[7],
                reason=row[8],
            )
            for row in self._execute(query, values).fetchall()
        ]

    def _execute(self, query: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        try:
            return self._db.execute(query, values)
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: {error}; free space or repair the disk, nothing was lost") from error

    def _create(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StorageError(f"{self._path}: written by a newer agent (schema {version}); update this one")
        if version == 0:
            self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

    def _sweep(self) -> None:
        waiting = self._rows("WHERE state='ready'", ())
        sizes = {entry.name: entry.stat().st_size for entry in self.folder.iterdir()}
        kept = set()
        for update in waiting:
            if sizes.get(update.file) != update.blob.size_bytes:  # lost with a file system: let the job be done again
                self._execute(
                    "DELETE FROM updates WHERE run=? AND device=? AND assignment=? AND sequence=?",
                    msgspec.structs.astuple(update.update),
                )
            else:
                kept.add(update.file)
        for name in sizes.keys() - kept:
            remove(self.folder / name)


def _size(path: Path) -> int:
    """Bytes of a file; 0 if a worker has just renamed it."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
