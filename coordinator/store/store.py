"""The store: what the round machine saves, what the command line asks, and nothing in memory.

One process serves the runs; others (the command line) submit, stop and look. They share only this database. A
``Store`` is used by one thread; a row that was saved is on disk when ``save`` returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import sqlalchemy as sa

from coordinator.errors import StoreError
from coordinator.events import RunRow, SelectionRow, UpdateRow
from coordinator.store import rows as convert
from coordinator.store import tables
from coordinator.store.database import open_database, translated, upsert
from coordinator.store.queries import Queries
from edge_runtime.files import storage_error
from edge_runtime.store.blobs import BlobStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coordinator.events import Row
    from coordinator.plan import Plan
    from coordinator.store.queries import StoredRun
    from edge_runtime.messages import UpdateId

_DATABASE = "coordinator.db"
HEARTBEAT_S = 5.0  # how often a server says that it lives
SELECTION_ROUNDS_KEPT = 100


class Store(Queries):
    """State of a coordinator in ``folder``: ``coordinator.db`` and ``blobs/``.

    Args:
        folder: made if missing, unless ``create`` is false.
        url: database elsewhere, as ``postgresql+psycopg://...``; blobs stay in the folder.
        synchronous: SQLite's; FULL survives a power cut, OFF is for tests and simulation.
        create: false for commands that only look.

    Raises:
        StoreError: no state there (``create`` false), not usable, or written by newer or older software.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        *,
        synchronous: Literal["FULL", "NORMAL", "OFF"] = "FULL",
        create: bool = True,
    ) -> None:
        self.folder = folder
        if not create and url is None and not (folder / _DATABASE).is_file():
            raise StoreError(f"{folder}: holds no coordinator state; name the right folder with --state")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        self._engine = open_database(url or f"sqlite:///{folder / _DATABASE}", synchronous)
        self._where = str(folder)
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._upserts = {kind: upsert(self._engine, entry.table) for kind, entry in convert.BY_KIND.items()}
        self._server_lives = upsert(self._engine, tables.servers)
        runs = tables.runs
        names = [name for name in RunRow.__struct_fields__ if name != "run"]
        self._update_run = (
            sa.update(runs)
            .where(runs.c.run == sa.bindparam("run_"))
            .values({name: sa.bindparam(name) for name in names})
        )
        self._data_version = -1  # the first look is news
        self.blobs = BlobStore(folder / "blobs")

    def close(self) -> None:
        """Closes the database."""
        self._engine.dispose()

    # What the server does
    def save(self, rows: Sequence[Row]) -> None:
        """Stores rows (insert or replace) in one transaction; on disk when it returns.

        Raises:
            StoreError: the disk is full, the database locked for long, or a run row was never submitted.
        """
        batches: dict[type, list[dict[str, Any]]] = {}
        for row in rows:
            kind = type(row)
            batches.setdefault(kind, []).append(convert.BY_KIND[kind].columns(row))
        with translated(self._where), self._engine.begin() as connection:
            for kind, batch in batches.items():
                if kind is SelectionRow:
                    _forget_selections(connection, batch)
                if kind is not RunRow:
                    connection.execute(self._upserts[kind], batch)
                    continue
                for values in batch:
                    name = values.pop("run")
                    done = connection.execute(self._update_run, {**values, "run_": name})
                    if done.rowcount != 1:
                        raise StoreError(f"{self._where}: run {name!r} was never submitted here")

    def server_lives(self, name: str, now: float) -> None:
        """Notes that a server takes care of the runs; to be repeated every ``HEARTBEAT_S``."""
        with translated(self._where), self._engine.begin() as connection:
            connection.execute(self._server_lives, {"server": name, "last_seen_unix_s": now})

    def server_gone(self, name: str) -> None:
        """Notes that a server has stopped."""
        servers = tables.servers
        with translated(self._where), self._engine.begin() as connection:
            connection.execute(sa.delete(servers).where(servers.c.server == name))

    def changed(self) -> bool:
        """Whether another process may have written since the last call; cheap enough for every tick."""
        if not self._sqlite:
            return True
        before, self._data_version = self._data_version, self._read_data_version()
        return before != self._data_version

    def active(self) -> list[StoredRun]:
        """Runs that have not ended, in order of submission."""
        return self._runs(tables.runs.c.status == "running")

    def load_run(self, run: str) -> list[Row]:
        """All rows that :meth:`coordinator.run_state.RunState.from_rows` needs: those of recent versions.

        Raises:
            UnknownRunError: no such run.
        """
        stored = self.run(run)
        oldest = stored.row.version - stored.plan.participation.max_staleness - 1
        a, u, held, t = tables.assignments, tables.updates, tables.holdings, tables.method_table
        recent = (a.c.run == run) & ((a.c.version >= oldest) | (a.c.status == "open"))
        names = sa.select(a.c.assignment).where(recent)
        assignments = self._select(sa.select(a).where(recent))
        updates = self._select(sa.select(u).where(u.c.run == run, u.c.assignment.in_(names)))
        return [
            stored.row,
            *(convert.ASSIGNMENTS.row(entry) for entry in assignments),
            *(convert.UPDATES.row(entry) for entry in updates),
            *(convert.HOLDINGS.row(entry) for entry in self._select(sa.select(held).where(held.c.run == run))),
            *self.histories(run),
            *(convert.TABLE.row(entry) for entry in self._select(sa.select(t).where(t.c.run == run))),
            *self.rounds(run),
        ]

    def stored_verdict(self, update: UpdateId) -> UpdateRow | None:
        """The stored row of an update, however old; None if it never came."""
        u = tables.updates
        found = self._select(
            sa.select(u).where(
                u.c.run == update.run,
                u.c.device == update.device,
                u.c.assignment == update.assignment,
                u.c.sequence == update.sequence,
            )
        )
        return convert.UPDATES.row(found[0]) if found else None

    def drop_update_blobs(self, run: str, before_round: int) -> int:
        """Deletes the bytes of refused updates, and of those counted in the two rounds before ``before_round``.

        Called after every round, that is all of them; two, since a crash may have skipped one call. Bytes that an
        undecided update of any run shares are kept. Returns how many blobs were deleted.
        """
        u = tables.updates
        other = u.alias()
        waiting = sa.exists().where(other.c.sha256 == u.c.sha256, other.c.verdict == "pending")
        counted = (u.c.counted_round < before_round) & (u.c.counted_round >= before_round - 2)
        decided = sa.select(u.c.sha256, u.c.verdict).where(
            u.c.run == run, u.c.verdict != "pending", sa.or_(counted, u.c.counted_round.is_(None)), ~waiting
        )
        there = {row["sha256"]: row["verdict"] for row in self._select(decided) if self.blobs.has(row["sha256"])}
        # What was offered and refused may have been no update at all, but a model or a bundle.
        there = {name: verdict for name, verdict in there.items() if verdict == "counted" or not self.is_named(name)}
        try:
            for name in there:
                self.blobs.delete(name)
        except OSError as error:
            raise storage_error(self.blobs.folder, error) from error
        return len(there)

    def is_named(self, sha256: str, *, besides: str = "") -> bool:
        """Whether a blob is needed: by an undecided update, or by a run other than ``besides``.

        A run needs its bundle, its test set and its recent models; as long as it goes on, also as they were sent, and
        the changes that lead to them.
        """
        u, a = tables.updates, tables.assignments
        waiting = sa.select(u.c.sha256).where(u.c.sha256 == sha256, u.c.verdict == "pending").limit(1)
        if self._select(waiting) or self._is_named_by_runs(sha256, besides) or self._is_in_table(sha256, besides):
            return True
        for stored in self.active():
            if stored.row.run == besides:
                continue
            recent = stored.row.version - stored.plan.participation.max_staleness - 1
            told = (a.c.run == stored.row.run) & (a.c.version >= recent) & a.c.model.like(f"%{sha256}%")
            if self._select(sa.select(a.c.run).where(told).limit(1)):
                return True
            kept = stored.plan.participation.max_staleness + 2 + stored.plan.downlink.chain
            for row in self.rounds(stored.row.run, first=max(0, stored.row.version - kept)):
                blobs = (row.model, row.down, row.change, row.method_state)
                if any(blob is not None and blob.sha256 == sha256 for blob in blobs):
                    return True
        return False

    def _is_named_by_runs(self, sha256: str, besides: str = "") -> bool:
        r = tables.runs
        blobs = (r.c.bundle, r.c.test_set, r.c.model, r.c.initial_model, r.c.method_state, r.c.initial_method_state)
        pattern = f"%{sha256}%"
        sent = (r.c.status == "running") & r.c.down.like(pattern)
        named = sa.or_(sent, *(column.like(pattern) for column in blobs))
        return bool(self._select(sa.select(r.c.run).where(r.c.run != besides, named).limit(1)))

    def _is_in_table(self, sha256: str, besides: str) -> bool:
        """Whether a run that goes on has it in the table of its server method."""
        t, r = tables.method_table, tables.runs
        goes_on = sa.exists().where(r.c.run == t.c.run, r.c.status == "running")
        return bool(self._select(sa.select(t.c.run).where(t.c.sha256 == sha256, t.c.run != besides, goes_on).limit(1)))

    # What the command line does
    def submit(self, plan: Plan, row: RunRow) -> str:
        """Stores a new run and returns its name: the plan's, with a number behind it. ``row.run`` is replaced.

        Raises:
            StoreError: the database cannot be written.
        """
        text = msgspec.json.encode(plan).decode()
        taken = len(self._select(sa.select(tables.runs.c.run).where(tables.runs.c.run.like(f"{plan.name[:56]}-%"))))
        for number in range(taken + 1, taken + 1000):
            name = f"{plan.name[:56]}-{number}"
            values = convert.RUNS.columns(msgspec.structs.replace(row, run=name))
            try:
                with translated(self._where), self._engine.begin() as connection:
                    connection.execute(sa.insert(tables.runs).values(plan=text, **values))
            except StoreError as error:
                if not isinstance(error.__cause__, sa.exc.IntegrityError):
                    raise
            else:
                return name
        raise StoreError(f"{self._where}: no free name for a run of plan {plan.name!r}")

    def request_stop(self, run: str, reason: str = "stopped by the user") -> None:
        """Asks the server to end a run.

        Raises:
            UnknownRunError: no such run.
        """
        self.run(run)
        runs = tables.runs
        with translated(self._where), self._engine.begin() as connection:
            connection.execute(sa.update(runs).where(runs.c.run == run).values(stop_reason=reason))

    def _read_data_version(self) -> int:
        if not self._sqlite:
            return 0
        with translated(self._where), self._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            return int(driver.execute("PRAGMA data_version").fetchone()[0])


def _forget_selections(connection: sa.Connection, batch: list[dict[str, Any]]) -> None:
    """Reports of selections are large: only those of the last rounds are kept."""
    t = tables.selections
    for run, round_ in {(values["run"], values["round"]) for values in batch}:
        connection.execute(sa.delete(t).where(t.c.run == run, t.c.round <= round_ - SELECTION_ROUNDS_KEPT))
