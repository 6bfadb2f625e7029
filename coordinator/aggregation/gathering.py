"""What a server method works with: the round's updates, decoded when asked, and the table of vectors per device."""

from __future__ import annotations

import tempfile
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from coordinator.aggregation.base import itself
from coordinator.aggregation.decoding import map_block, sum_block
from coordinator.errors import ModelError
from coordinator.model_blobs import find, mapped, put
from edge_runtime.compression.pipeline import CodecSpec, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    import numpy.typing as npt

    from coordinator.aggregation.base import Contribution, Sums, Table, Vector
    from coordinator.aggregation.decoding import Decoder, Source
    from coordinator.executors.base import Executor
    from coordinator.model_blobs import Blobs
    from edge_runtime.compression import Layout, Update
    from edge_runtime.messages import BlobRef, Role, UpdateId, UpdateMeta

T = TypeVar("T")

TASK_BYTES = 32 << 20  # of decoded vectors that one task of :meth:`StoredRound.each` makes
BLOCK = 16  # updates that are summed at a time; part of what makes a model's bits
MATRIX_IN_MEMORY_BYTES = 64 << 20
_ROW = "row"


class StoredContribution:
    """A :class:`~coordinator.aggregation.base.Contribution` whose bytes lie in a file or in memory."""

    def __init__(self, source: Source, meta: UpdateMeta, weight: float, staleness: int) -> None:
        self.source, self.meta, self.weight, self.staleness = source, meta, weight, staleness
        self.update: UpdateId = source.update
        self.role: Role = source.role


class StoredRound:
    """The :class:`~coordinator.aggregation.base.Round` of stored updates.

    Args:
        contributions: in update id order.
        decoder: of all of them.
        base: the model before, float32 ``[layout.size]``.
        members: see the protocol.
        table: of the method, if it has one.
        seed: of this round.
        executor: decodes and sums blocks of updates in other processes; None: in this one. The bits are the same.

    Raises:
        ModelError: no updates, out of order, or one without a weight above 0.
    """

    def __init__(
        self,
        contributions: Iterable[StoredContribution],
        decoder: Decoder,
        base: Vector,
        *,
        members: int = 0,
        table: BlobTable | None = None,
        seed: int = 0,
        executor: Executor | None = None,
    ) -> None:
        self._stored = list(contributions)
        last = None
        for entry in self._stored:
            if not entry.weight > 0 or (last is not None and entry.update <= last):
                raise ModelError(
                    f"update {entry.update} has no weight or is out of order; updates go in update id order"
                )
            last = entry.update
        if not self._stored:
            raise ModelError("there is no update to aggregate")
        self.contributions: Sequence[Contribution] = self._stored
        self.layout, self.base, self.members, self.seed = decoder.layout, base, members, seed
        self._table, self._decoder, self._executor = table, decoder, executor

    @property
    def table(self) -> Table:
        """Rows of the devices in the round."""
        if self._table is None:
            raise ModelError("the server method has no table; it says so by table = True")
        return self._table

    def total(self, channel: str, weight: Callable[[Contribution], float]) -> Sums:
        """See the protocol. Blocks of 16 are summed one by one, then these sums in order, wherever that happens."""
        weights = [(entry.source, weight(entry)) for entry in self._holding(channel)]
        used = [pair for pair in weights if pair[1] != 0]
        blocks = [_unzip(used[start : start + BLOCK]) for start in range(0, len(used), BLOCK)]
        total = np.zeros(self.layout.size, np.float64)
        for block in self._spread(sum_block, channel, blocks):
            total += block
        return total

    def each(self, channel: str, contributions: Sequence[Contribution], function: Callable[[Update], T]) -> Iterator[T]:
        """See the protocol."""
        stored = {entry.update: entry.source for entry in self._stored}
        sources = [stored[entry.update] for entry in contributions]
        most = 1 if self._executor is None else min(BLOCK, max(1, TASK_BYTES // (4 * self.layout.size)))
        blocks = [(sources[start : start + most], function) for start in range(0, len(sources), most)]
        for results in self._spread(map_block, channel, blocks):
            yield from results

    def matrix(self, channel: str) -> npt.NDArray[np.float32]:
        """See the protocol; in a file without a name above 64 MB."""
        holding = self._holding(channel)
        shape = (len(holding), self.layout.size)
        if 4 * shape[0] * shape[1] <= MATRIX_IN_MEMORY_BYTES:
            rows = np.empty(shape, np.float32)
        else:
            with tempfile.TemporaryFile() as file:
                rows = np.memmap(file, np.float32, "w+", shape=shape)
        for row, update in zip(rows, self.each(channel, holding, itself), strict=True):
            row[:] = update.vector()
        return rows

    def columns(self, width: int) -> Iterator[slice]:
        """See the protocol."""
        for start in range(0, self.layout.size, width):
            yield slice(start, min(start + width, self.layout.size))

    def _holding(self, channel: str) -> list[StoredContribution]:
        return [entry for entry in self._stored if channel in self._decoder.channels[entry.role]]

    def _spread(self, task: Callable[..., T], channel: str, blocks: Sequence[tuple[list[Source], Any]]) -> Iterator[T]:
        """``task(decoder, channel, sources, argument)`` of these blocks, in their order."""
        executor = self._executor if len(blocks) > 1 else None
        if executor is None:
            for sources, argument in blocks:
                yield task(self._decoder, channel, sources, argument)
            return
        running: deque[Future[T]] = deque()  # one more than can run, so that memory stays constant
        with self._decoder.portable(executor, (source for sources, _ in blocks for source in sources)) as decoder:
            try:
                for sources, argument in blocks:
                    if len(running) > executor.workers:
                        yield running.popleft().result()
                    sent = [source.portable(executor) for source in sources]
                    running.append(executor.submit(task, decoder, channel, sent, argument))
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:  # of a round that cannot be: nobody waits for them
                    future.cancel()


class BlobTable:
    """The :class:`~coordinator.aggregation.base.Table` of a method, each row a compressed blob.

    Args:
        blobs: where rows lie, and new ones go.
        rows: blobs by device.
        layout: of a row.

    ``changed`` are the rows that were put.
    """

    def __init__(self, blobs: Blobs, rows: Mapping[str, BlobRef], layout: Layout) -> None:
        self._blobs, self._rows, self._layouts = blobs, dict(rows), {_ROW: layout}
        self.changed: dict[str, BlobRef] = {}

    def get(self, device: str) -> Vector | None:
        """See the protocol.

        Raises:
            ModelError: the row is not in the store.
            CodecError: it is damaged.
        """
        blob = self._rows.get(device)
        if blob is None:
            return None
        path = find(self._blobs, blob, f"row of device {device!r} in the server method's table")
        return decode(mapped(path), self._layouts)[_ROW].vector()

    def put(self, device: str, row: Vector) -> None:
        """See the protocol; raises StorageError if the disk is full."""
        self.changed[device] = put(self._blobs, encode(CodecSpec("zstd"), {_ROW: row}, self._layouts).data)
        self._rows[device] = self.changed[device]


def _unzip(block: Sequence[tuple[Source, float]]) -> tuple[list[Source], list[float]]:
    return [source for source, _ in block], [weight for _, weight in block]
