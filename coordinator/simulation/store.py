"""What the coordinator's database and blob folder hold, for one simulated run: in memory.

A crash of the simulated coordinator loses everything but this, so a recovery from it is the real one.
"""

from __future__ import annotations

import copy
from hashlib import sha256
from typing import TYPE_CHECKING

from coordinator import events as e
from coordinator.errors import CoordinatorError
from coordinator.ledger import LedgerRow
from edge_runtime.store.blobs import BlobStore, StoredBlob

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from edge_runtime.messages import UpdateId


class BrokenRuleError(CoordinatorError):
    """A simulated run did what must never happen."""


class MemoryBlobs(BlobStore):
    """Blobs as files, best in a file system in memory: nothing is synced, what is there is known by heart."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._known: set[str] = set()

    def has(self, sha: str) -> bool:
        return sha in self._known

    def put(self, data: bytes | memoryview, *, durable: bool = True) -> StoredBlob:  # noqa: ARG002
        name = sha256(data).hexdigest()
        self.put_named(name, data)
        return StoredBlob(name, memoryview(data).nbytes)

    def put_named(self, name: str, data: bytes | memoryview | Path) -> None:
        """Stores bytes whose hash is known, or a file of this file system that will not change."""
        if name in self._known:
            return
        if isinstance(data, (bytes, memoryview)):
            self.path(name).write_bytes(data)
        else:
            self.path(name).hardlink_to(data)
        self._known.add(name)

    def delete(self, sha: str) -> None:
        if sha in self._known:
            self._known.discard(sha)
            self.path(sha).unlink(missing_ok=True)


class MemoryStore:
    """The rows of one run by their keys, as far as anything reads them again; those of selections and jobs' joules are
    not kept. Rows given to :meth:`save` are its own from then on.
    """

    def __init__(self, blobs: MemoryBlobs) -> None:
        self.blobs = blobs
        self.run: e.RunRow | None = None
        self.updates: dict[UpdateId, e.UpdateRow] = {}
        self.round_rows: dict[int, e.RoundRow] = {}
        self._assignments: dict[str, e.AssignmentRow] = {}
        self._others: dict[tuple[type, str], e.Row] = {}
        self._counted: dict[int, list[UpdateId]] = {}
        self._refused: list[UpdateId] = []

    def save(self, rows: Iterable[e.Row]) -> None:
        """Takes rows in.

        Raises:
            BrokenRuleError: a verdict changed, or a round.
        """
        for row in rows:
            match row:
                case e.UpdateRow():
                    self._save_update(row)
                case e.AssignmentRow():
                    self._assignments[row.assignment] = row
                case e.RunRow():
                    self.run = row
                case e.RoundRow():
                    before = self.round_rows.get(row.round)
                    if before is not None and before.model != row.model:
                        raise BrokenRuleError(f"round {row.round + 1} was closed twice, with different models")
                    self.round_rows[row.round] = row
                case e.HoldingRow() | e.HistoryRow() | e.TableRow():
                    self._others[type(row), row.device] = row
                case LedgerRow() | e.SelectionRow() | e.DeviceRow():
                    pass

    def _save_update(self, row: e.UpdateRow) -> None:
        before = self.updates.get(row.update)
        if before is not None and before.verdict != "pending" and before != row:
            raise BrokenRuleError(f"update {row.update} was {before.verdict}, and then {row.verdict}")
        self.updates[row.update] = row
        if row.verdict == "counted" and row.counted_round is not None:
            self._counted.setdefault(row.counted_round, []).append(row.update)
        elif row.verdict == "refused":
            self._refused.append(row.update)

    def load_run(self, run: str) -> list[e.Row]:  # noqa: ARG002
        """Copies of all rows, as a new process reads them."""
        kept: list[e.Row] = [] if self.run is None else [self.run]
        kept += [*self._assignments.values(), *self.updates.values(), *self.round_rows.values()]
        kept += self._others.values()
        return [copy.copy(row) for row in kept]

    def stored_verdict(self, update: UpdateId) -> e.UpdateRow | None:
        """What became of an update."""
        return self.updates.get(update)

    def rounds(self, run: str, first: int = 0) -> list[e.RoundRow]:  # noqa: ARG002
        """Closed rounds in order."""
        last = max(self.round_rows, default=-1)
        return [self.round_rows[number] for number in range(first, last + 1) if number in self.round_rows]

    def counted_updates(self, run: str, round_: int) -> list[e.UpdateRow]:  # noqa: ARG002
        """The updates of a round's model, in update id order."""
        return sorted((self.updates[name] for name in self._counted.get(round_, ())), key=lambda row: row.update)

    def assignments(self, run: str, round_: int) -> list[e.AssignmentRow]:  # noqa: ARG002
        """The assignments that a round made, in the order of their numbers."""
        return [row for row in self._assignments.values() if row.round == round_]

    def all_assignments(self) -> Iterable[e.AssignmentRow]:
        """Those of the run, in the order of their numbers."""
        return self._assignments.values()

    def drop_update_blobs(self, run: str, before_round: int) -> int:  # noqa: ARG002
        """Deletes the bytes of refused updates, and of those counted in the two rounds before ``before_round``."""
        names = [name for round_ in (before_round - 2, before_round - 1) for name in self._counted.get(round_, ())]
        names += self._refused
        self._refused = []
        for name in names:
            self.blobs.delete(self.updates[name].blob.sha256)
        return len(names)

    def is_named(self, sha: str, *, besides: str = "") -> bool:  # noqa: ARG002
        """Whether another run needs a blob; there is none."""
        return False
