"""The one protocol for everything that does not fit a packet, in both directions.

The receiver decides: it asks for the chunks it lacks (:class:`~edge_runtime.messages.Need`), the sender pumps them with
a window of unacknowledged packets, so that neither side ever holds more than a window in memory. A sender may push
the first time without being asked. Every chunk carries a CRC, the whole blob its SHA-256; what arrived survives the
death of either end and of the broker, and only what is missing is asked for again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import struct
import zlib
from collections import deque
from typing import TYPE_CHECKING

from edge_runtime.errors import MessageError, StorageError, TransferError
from edge_runtime.store.blobs import BlobReader, PartialBlob, indexes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from edge_runtime.messages import BlobRef
    from edge_runtime.transport.link import Link
    from edge_runtime.transport.loop import Loop, Timer

log = logging.getLogger("edge.transfer")

_CHUNK = struct.Struct("<16sII")  # first half of the blob's SHA-256, chunk number, CRC-32 of the data
CHUNK_HEADER_BYTES = _CHUNK.size
WINDOW = 16
STALL_FIRST_S = 1.0
STALL_LIMIT_S = 60.0
RANGES_LIMIT = 1000
WRONG_LIMIT = 3  # whole arrivals with a wrong hash: the sender's copy must be damaged


def pack_chunk(sha256: str, index: int, data: bytes) -> bytes:
    """One chunk packet."""
    return b"".join((_CHUNK.pack(bytes.fromhex(sha256[:32]), index, zlib.crc32(data)), data))


def unpack_chunk(payload: bytes) -> tuple[str, int, int, memoryview]:
    """(first 32 hex digits of the blob's SHA-256, chunk number, CRC-32, data) of a chunk packet.

    Raises:
        MessageError: shorter than its header.
    """
    if len(payload) < _CHUNK.size:
        raise MessageError(f"chunk packet of {len(payload)} bytes refused: its header alone has {_CHUNK.size}")
    half, index, crc = _CHUNK.unpack_from(payload)
    return half.hex(), index, crc, memoryview(payload)[_CHUNK.size :]


class _Outgoing:
    def __init__(self, key: tuple[str, str], reader: BlobReader) -> None:
        self.key = key
        self.reader = reader
        self.queue: deque[int] = deque()
        self.pending: set[int] = set()  # in the queue, or sent and not yet acknowledged


class ChunkPump:
    """Sends chunks of any number of blobs over one link, ``window`` packets unacknowledged at most."""

    def __init__(self, link: Link, window: int = WINDOW) -> None:
        self._link = link
        self._window = window
        self._in_flight = 0
        self._generation = 0  # acknowledgements of an earlier connection must not count
        self._outgoing: deque[_Outgoing] = deque()
        self._by_key: dict[tuple[str, str], _Outgoing] = {}
        self.sent_chunks = 0

    def send(self, topic: str, path: Path, blob: BlobRef, ranges: Iterable[tuple[int, int]]) -> None:
        """Queues chunks of a blob for a topic; chunks already waiting or on their way to the broker are not repeated.

        Raises:
            StorageError: the file is gone.
        """
        key = (topic, blob.sha256)
        outgoing = self._by_key.get(key)
        if outgoing is not None and outgoing.reader.blob != blob:  # the same bytes, cut anew
            self._end(outgoing)
            outgoing = None
        if outgoing is None:
            outgoing = self._by_key[key] = _Outgoing(key, BlobReader(path, blob))
        idle = not outgoing.queue
        for index in indexes(itertools.islice(ranges, RANGES_LIMIT), outgoing.reader.chunks):
            if index not in outgoing.pending:
                outgoing.pending.add(index)
                outgoing.queue.append(index)
        if not outgoing.pending:
            self._end(outgoing)
        elif idle and outgoing.queue:
            self._outgoing.append(outgoing)
        self._pump()

    def forget(self, sha256: str) -> None:
        """Stops sending a blob."""
        for key in [key for key in self._by_key if key[1] == sha256]:
            self._end(self._by_key[key])

    def reset(self) -> None:
        """Forgets everything: the connection ended, receivers will ask again."""
        self._generation += 1
        self._in_flight = 0
        for outgoing in list(self._by_key.values()):
            self._end(outgoing)

    def _end(self, outgoing: _Outgoing) -> None:
        outgoing.reader.close()
        self._by_key.pop(outgoing.key, None)
        if outgoing in self._outgoing:
            self._outgoing.remove(outgoing)

    def _pump(self) -> None:
        while self._outgoing and self._in_flight < self._window:
            outgoing = self._outgoing.popleft()
            index = outgoing.queue.popleft()
            if outgoing.queue:
                self._outgoing.append(outgoing)  # blobs take turns
            topic, sha256 = outgoing.key
            on_sent = functools.partial(self._sent, self._generation, outgoing, index)
            try:
                payload = pack_chunk(sha256, index, outgoing.reader.chunk(index))
                if not self._link.publish(topic, payload, on_sent=on_sent):
                    self._end(outgoing)  # the link is down; the receiver will ask again
                    continue
            except (MessageError, StorageError) as error:  # other blobs go on; the receiver will ask again
                log.error("blob %s cannot be sent: %s", sha256[:12], error)  # noqa: TRY400 - one line for the user
                self._end(outgoing)
                continue
            self._in_flight += 1
            self.sent_chunks += 1

    def _sent(self, generation: int, outgoing: _Outgoing, index: int) -> None:
        if generation != self._generation:
            return
        self._in_flight -= 1
        outgoing.pending.discard(index)
        if not outgoing.pending and self._by_key.get(outgoing.key) is outgoing:
            self._end(outgoing)
        self._pump()


class Incoming:
    """Receives one blob: stores chunks, asks for missing ones when nothing came for a while.

    The patience follows the pace of the link (four times the usual gap between chunks) and doubles with every request
    that stays without an answer. On a slow link the chunks asked for first may still be on their way: until one has
    arrived only a single chunk is asked for again, later one window after the other.

    Args:
        partial: where the chunks go.
        loop: for the timer.
        need: sends a request for ranges of chunks.
        complete: called once when all chunks are here; it calls ``partial.finish``.
    """

    def __init__(
        self,
        partial: PartialBlob,
        loop: Loop,
        *,
        need: Callable[[list[tuple[int, int]]], None],
        complete: Callable[[], None],
        stall_first_s: float = STALL_FIRST_S,
    ) -> None:
        self.partial = partial
        self.duplicates = 0
        self._loop = loop
        self._need, self._complete = need, complete
        self._stall_first_s = stall_first_s
        self.wrong = 0  # times all of it arrived and had the wrong hash
        self.unanswered = 0  # requests since the last new chunk
        self._gap_s: float | None = None
        self._recovering: set[int] = set()  # chunks asked for again
        self._last_chunk = self._last_sign = loop.now()
        self._patience_s = stall_first_s
        self._timer: Timer | None = loop.call_later(self._patience_s, self._check)
        self._closed = False

    @property
    def half_hash(self) -> str:
        """What a chunk packet names this blob by."""
        return self.partial.blob.sha256[:32]

    def ask(self) -> None:
        """Asks for everything missing now."""
        if self.partial.missing:
            self._need(self.partial.missing_ranges(RANGES_LIMIT))

    def _ask_again(self, chunks: int) -> None:
        ranges, left = [], chunks
        for first, count in self.partial.missing_ranges(chunks):
            ranges.append((first, min(count, left)))
            left -= ranges[-1][1]
            if not left:
                break
        self._recovering = set(indexes(ranges, self.partial.chunks))
        self._need(ranges)

    def nudge(self) -> None:
        """The sender showed itself: asks unless chunks are just coming."""
        if self._loop.now() - self._last_chunk >= self._stall_first_s:
            self._patience_s = self._stall_first_s
            self._last_sign = self._loop.now()
            self.ask()

    def add(self, index: int, crc: int, data: bytes | memoryview) -> None:
        """Takes a chunk packet.

        Raises:
            TransferError: the chunk is damaged or does not belong to the blob; it will be asked for again.
            StorageError: the disk is full.
        """
        if self._closed:
            return
        if not self.partial.add(index, crc, data):
            self.duplicates += 1
            return
        now = self._loop.now()
        gap_s = now - self._last_chunk
        self._gap_s = gap_s if self._gap_s is None else 0.8 * self._gap_s + 0.2 * gap_s
        self._last_chunk = self._last_sign = now
        self.unanswered = 0
        self._patience_s = max(self._stall_first_s, 4 * self._gap_s)
        recovered = self._recovering == {index}
        self._recovering.discard(index)
        if not self.partial.missing:
            self._complete()
        elif recovered:
            self._ask_again(WINDOW)

    def close(self, *, discard: bool = False) -> None:
        """Stops receiving; what arrived stays on disk unless ``discard``."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if discard:
            self.partial.discard()
        else:
            self.partial.close()

    def _check(self) -> None:
        idle_s = self._loop.now() - self._last_sign
        if idle_s >= self._patience_s:
            self._patience_s = max(self._patience_s, min(2 * self._patience_s, STALL_LIMIT_S))
            self._last_sign = self._loop.now()
            self.unanswered += 1
            self._ask_again(1 if self._gap_s is None else WINDOW)
            idle_s = 0.0
            if self._closed:  # whoever asks may give up
                return
        self._timer = self._loop.call_later(max(0.01, self._patience_s - idle_s), self._check)


def check_first_chunk(blob: BlobRef, first: bytes) -> tuple[int, memoryview] | None:
    """(CRC-32, data) of the chunk 0 that an offer carries, None if it carries none.

    Raises:
        TransferError: too short to be a chunk.
    """
    if not first:
        return None
    if len(first) < 4:
        raise TransferError(f"offer of blob {blob.sha256[:12]} carries a chunk of {len(first)} bytes, refused")
    return int.from_bytes(first[:4], "little"), memoryview(first)[4:]


def pack_first_chunk(reader: BlobReader) -> bytes:
    """Chunk 0 with its CRC-32, for an offer."""
    data = reader.chunk(0)
    return b"".join((zlib.crc32(data).to_bytes(4, "little"), data))
