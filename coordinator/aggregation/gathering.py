"""What a server method works with: the round's updates, decoded when asked, and the table of vectors per device."""

from __future__ import annotations

import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coordinator.aggregation.decoding import sum_block
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

TASK_BYTES = 4 << 20  # of updates that travel with their task; larger ones are read from the store's folder
BLOCK = 16  # updates that are summed at a time; part of what makes a model's bits
MATRIX_IN_MEMORY_BYTES = 64 << 20
_ROW = "row"


class StoredContribution:
    """A :class:`~coordinator.aggregation.base.Contribution` whose bytes lie in a file or in memory."""

    def __init__(self, source: Source, decoder: Decoder, meta: UpdateMeta, weight: float, staleness: int) -> None:
        self.source, self.meta, self.weight, self.staleness = source, meta, weight, staleness
        self.update: UpdateId = source.update
        self.role: Role = source.role
        self._decoder = decoder

    @property
    def channels(self) -> tuple[str, ...]:
        """What it holds."""
        return self._decoder.channels[self.role]

    def decode(self) -> dict[str, Update]:
        """Its vectors by channel.

        Raises:
            CodecError: it cannot be decoded.
            ModelError: the model that it is relative to is not in the store.
        """
        return self._decoder.named(self.source)


class StoredRound:
    """The :class:`~coordinator.aggregation.base.Round` of stored updates.

    Args:
        contributions: in update id order.
        decoder: of all of them.
        base: the model before, float32 ``[layout.size]``.
        members: see the protocol.
        table: of the method, if it has one.
        seed: of this round.
        executor: sums blocks of updates in other processes; None: in this one. The bits are the same.

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
        weights = [(entry.source, weight(entry)) for entry in self._stored if channel in entry.channels]
        used = [pair for pair in weights if pair[1] != 0]
        blocks = [used[start : start + BLOCK] for start in range(0, len(used), BLOCK)]
        total = np.zeros(self.layout.size, np.float64)
        for block in self._sums(channel, blocks):
            total += block
        return total

    def matrix(self, channel: str) -> npt.NDArray[np.float32]:
        """See the protocol; in a file without a name above 64 MB."""
        holding = [entry for entry in self._stored if channel in entry.channels]
        shape = (len(holding), self.layout.size)
        if 4 * shape[0] * shape[1] <= MATRIX_IN_MEMORY_BYTES:
            rows = np.empty(shape, np.float32)
        else:
            with tempfile.TemporaryFile() as file:
                rows = np.memmap(file, np.float32, "w+", shape=shape)
        for row, entry in zip(rows, holding, strict=True):
            row[:] = entry.decode()[channel].vector()
        return rows

    def columns(self, width: int) -> Iterator[slice]:
        """See the protocol."""
        for start in range(0, self.layout.size, width):
            yield slice(start, min(start + width, self.layout.size))

    def _sums(self, channel: str, blocks: Sequence[Sequence[tuple[Source, float]]]) -> Iterator[Sums]:
        executor = self._executor if len(blocks) > 1 else None
        if executor is None:
            for block in blocks:
                yield sum_block(self._decoder, channel, *_unzip(block))
            return
        running: deque[Future[Sums]] = deque()  # one more than can run, so that memory stays constant
        for block in blocks:
            if len(running) > executor.workers:
                yield running.popleft().result()
            sources, weights = _unzip(block)
            running.append(executor.submit(sum_block, self._decoder, channel, _portable(sources), weights))
        while running:
            yield running.popleft().result()


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


def _portable(sources: list[Source]) -> list[Source]:
    """With their bytes, if these are few: a machine of a cluster may not see this one's folders."""
    paths = [source.payload for source in sources if isinstance(source.payload, Path)]
    if sum(path.stat().st_size for path in paths) > TASK_BYTES:
        return sources
    return [
        source._replace(payload=source.payload.read_bytes()) if isinstance(source.payload, Path) else source
        for source in sources
    ]
