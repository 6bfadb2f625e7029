"""The agent's side of transfers: fetching bundles and models, and offering updates until they are done."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import msgspec

from edge_runtime import messages, topics
from edge_runtime.agent.rates import Throughput
from edge_runtime.errors import EdgeError, StorageError, TransferError
from edge_runtime.store.blobs import BlobReader, BlobStore, hash_file
from edge_runtime.transport.transfer import WRONG_LIMIT, ChunkPump, Incoming, pack_first_chunk, unpack_chunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from edge_runtime.messages import BlobRef, Need, UpdateId
    from edge_runtime.store.spool import Spool, SpooledUpdate
    from edge_runtime.transport.link import Link
    from edge_runtime.transport.loop import Loop, Timer

log = logging.getLogger("edge.transfer")

OFFER_FIRST_S = 5.0
OFFER_LIMIT_S = 300.0
DISK_RETRY_S = 30.0
OPEN_LIMIT = 32  # blobs that are received at a time: each takes two file descriptors, and a chain may be long


class Downloads:
    """Fetches blobs that jobs name, over the topic they share with all devices that need them.

    Args:
        on_ready: called with the hash of a blob that is whole on disk.
        on_failed: called with the hash and the reason when a blob cannot be had.
        rate: learns what the link carries.
    """

    def __init__(
        self,
        device: str,
        cache: BlobStore,
        loop: Loop,
        link: Link,
        *,
        on_ready: Callable[[str], None],
        on_failed: Callable[[str, str], None],
        rate: Throughput | None = None,
    ) -> None:
        self._device, self._cache, self._loop, self._link = device, cache, loop, link
        self._rate = rate or Throughput()
        self._on_ready, self._on_failed = on_ready, on_failed
        self._incoming: dict[str, Incoming] = {}  # by half hash
        self._queue: dict[str, BlobRef] = {}  # by half hash, those whose turn is still to come
        self._trusted: set[str] = set()  # verified by this process; what lay there before may have seen a power cut

    @property
    def open(self) -> set[str]:
        """Hashes of the blobs that are being fetched."""
        return {incoming.partial.blob.sha256 for incoming in self._incoming.values()}

    def fetch(self, blob: BlobRef, inline: bytes = b"") -> None:
        """Starts or goes on fetching; answers at once when the blob is here, or all of it was in the message."""
        if inline and not self._cache.has(blob.sha256):
            self._take_inline(blob, inline)
        if self._is_cached(blob.sha256):
            self._cache.touch(blob.sha256)
            self._loop.call_soon(lambda: self._on_ready(blob.sha256))
            return
        known = self._incoming.get(blob.sha256[:32])
        if known is not None and known.partial.blob == blob:
            return
        if known is not None:  # cut anew, for a broker that takes smaller packets
            self._end(blob.sha256)
        if len(self._incoming) >= OPEN_LIMIT:
            self._queue[blob.sha256[:32]] = blob
            return
        try:
            partial = self._cache.receive(blob)
        except EdgeError as error:
            reason = str(error)
            self._loop.call_soon(lambda: self._on_failed(blob.sha256, reason))
            return
        incoming = Incoming(
            partial,
            self._loop,
            need=lambda ranges: self._need(blob.sha256, ranges),
            complete=lambda: self._complete(blob),
        )
        self._incoming[incoming.half_hash] = incoming
        to_come = min(blob.size_bytes, partial.missing * blob.chunk_bytes)
        self._rate.begins(self._loop.now(), incoming.half_hash, to_come)
        self._ask(incoming)
        if not partial.missing:  # all of it had arrived before a restart
            self._loop.call_soon(lambda: self._complete(blob))

    def stop(self, sha256: str) -> None:
        """Stops fetching; what arrived stays for the next time."""
        self._queue.pop(sha256[:32], None)
        self._end(sha256)
        while self._queue and len(self._incoming) < OPEN_LIMIT:
            self.fetch(self._queue.pop(next(iter(self._queue))))

    def on_chunk(self, payload: bytes) -> None:
        """Takes a chunk packet; one that belongs to no open blob is ignored."""
        half, index, crc, data = unpack_chunk(payload)
        incoming = self._incoming.get(half)
        if incoming is None:
            return
        try:
            incoming.add(index, crc, data)
        except TransferError as error:
            log.warning("%s", error)
        except StorageError as error:
            self._fail(incoming.partial.blob.sha256, str(error))

    def on_gone(self, sha256: str) -> None:
        """The coordinator no longer has this blob."""
        if sha256[:32] in self._incoming:
            self._fail(sha256, f"the coordinator no longer has blob {sha256[:12]}")

    def on_up(self) -> None:
        """The link stands again: subscribe and ask for what is missing."""
        for incoming in list(self._incoming.values()):
            self._ask(incoming)

    def close(self) -> None:
        """Stops all fetching."""
        for incoming in self._incoming.values():
            incoming.close()
        self._incoming.clear()
        self._queue.clear()

    def _end(self, sha256: str) -> None:
        incoming = self._incoming.pop(sha256[:32], None)
        if incoming is not None:
            if incoming.partial.missing:
                self._rate.stops()
            self._link.unsubscribe(topics.blob(sha256))
            incoming.close()

    def _take_inline(self, blob: BlobRef, data: bytes) -> None:
        """Puts what the message brought into the cache; where that fails the blob is fetched like any other."""
        if len(data) != blob.size_bytes or hashlib.sha256(data).hexdigest() != blob.sha256:
            log.warning("blob %s in a job's message is damaged, fetching it", blob.sha256[:12])
            return
        try:
            self._cache.put(data, durable=False)
        except StorageError as error:
            log.warning("%s", error)
            return
        self._trusted.add(blob.sha256)

    def _ask(self, incoming: Incoming) -> None:
        # The request follows the subscription on one connection, so no broker can answer before it is subscribed.
        self._link.subscribe(topics.blob(incoming.partial.blob.sha256))
        incoming.ask()

    def _need(self, sha256: str, ranges: list[tuple[int, int]]) -> None:
        message = messages.Need(sha256=sha256, ranges=ranges)
        self._link.publish(topics.from_device(self._device, "message"), messages.encode(message))

    def _complete(self, blob: BlobRef) -> None:
        incoming = self._incoming.get(blob.sha256[:32])
        if incoming is None or incoming.partial.missing:
            return
        try:
            incoming.partial.finish(durable=False)  # a cached blob that a power cut damages is fetched again
        except TransferError as error:
            log.warning("%s", error)
            incoming.wrong += 1
            if incoming.wrong >= WRONG_LIMIT:
                self._fail(blob.sha256, f"{error}; given up after {WRONG_LIMIT} times")
            else:
                incoming.ask()
            return
        except StorageError as error:
            self._fail(blob.sha256, str(error))
            return
        self._trusted.add(blob.sha256)
        self._rate.ends(self._loop.now(), blob.sha256[:32])
        self.stop(blob.sha256)
        self._on_ready(blob.sha256)

    def _is_cached(self, sha256: str) -> bool:
        if not self._cache.has(sha256):
            return False
        if sha256 not in self._trusted:
            if hash_file(self._cache.path(sha256)).sha256 != sha256:
                log.warning("cached blob %s is damaged, fetching it again", sha256[:12])
                self._cache.delete(sha256)
                return False
            self._trusted.add(sha256)
        return True

    def _fail(self, sha256: str, reason: str) -> None:
        self.stop(sha256)
        self._on_failed(sha256, reason)


class Uploads:
    """Offers updates until the coordinator has spoken, and sends the chunks it asks for.

    Where chunk 0 is all of an update, the first offer carries it and leaves hash and size to the receiver. ``rate``
    learns what the link carries: an update is under way until the coordinator says that it has all of it.
    """

    def __init__(
        self,
        device: str,
        spool: Spool,
        loop: Loop,
        link: Link,
        *,
        pump: ChunkPump,
        random: Random,
        rate: Throughput | None = None,
    ) -> None:
        self._device, self._spool, self._loop, self._link = device, spool, loop, link
        self._pump, self._random = pump, random
        self._rate = rate or Throughput()
        self._waiting: dict[UpdateId, tuple[Timer, float]] = {}

    def offer(self, update: UpdateId, *, push: bool, wait_s: float = OFFER_FIRST_S) -> None:
        """Offers an update now and again, ever more rarely, until :meth:`close`."""
        self.close(update)
        timer = self._loop.call_later(
            wait_s * self._random.uniform(0.8, 1.2),
            lambda: self.offer(update, push=False, wait_s=min(2 * wait_s, OFFER_LIMIT_S)),
        )
        self._waiting[update] = (timer, wait_s)
        spooled = self._spool.get(update)
        if spooled is None or not self._link.is_up:
            return
        blob = self._cut(spooled.blob)
        first = b""
        try:
            if push and spooled.state == "ready":
                reader = BlobReader(self._spool.path(spooled), blob)
                first = pack_first_chunk(reader)
                reader.close()
            whole = bool(first) and blob.size_bytes <= blob.chunk_bytes
            message = messages.UpdateOffer(update=update, blob=None if whole else blob, meta=spooled.meta, first=first)
            self._link.publish(topics.from_device(self._device, "message"), messages.encode(message))
            if first:
                self._rate.begins(self._loop.now(), update, blob.size_bytes)
        except EdgeError as error:
            log.error("update %s cannot be offered: %s", update, error)  # noqa: TRY400 - one line for the user
            return
        if first and blob.size_bytes > blob.chunk_bytes:
            self._send(spooled, [(1, 1 << 30)])

    def on_need(self, need: Need) -> bool:
        """Sends chunks of an update; False if no update has this hash."""
        for update in list(self._waiting):
            spooled = self._spool.get(update)
            if spooled is not None and spooled.blob.sha256 == need.sha256:  # also after "done": a restored coordinator
                self.postpone(update)
                self._send(spooled, need.ranges)
                return True
        return False

    def postpone(self, update: UpdateId) -> None:
        """The coordinator is at work on this update: offer it again only after a fresh pause."""
        timer, wait_s = self._waiting[update]
        timer.cancel()
        again = self._loop.call_later(
            wait_s, lambda: self.offer(update, push=False, wait_s=min(2 * wait_s, OFFER_LIMIT_S))
        )
        self._waiting[update] = (again, wait_s)

    def close(self, update: UpdateId) -> None:
        """Stops offering."""
        entry = self._waiting.pop(update, None)
        if entry is not None:
            entry[0].cancel()

    def delivered(self, update: UpdateId) -> None:
        """The coordinator has the bytes: stop sending them, go on waiting for the verdict."""
        self._rate.ends(self._loop.now(), update)
        spooled = self._spool.get(update)
        if spooled is not None:
            self._pump.forget(spooled.blob.sha256)

    def _cut(self, blob: BlobRef) -> BlobRef:
        """The blob in chunks that this broker takes: it may have been made while another one, or none, was there."""
        if blob.chunk_bytes <= self._link.chunk_bytes:
            return blob
        return msgspec.structs.replace(blob, chunk_bytes=self._link.chunk_bytes)

    def _send(self, spooled: SpooledUpdate, ranges: list[tuple[int, int]]) -> None:
        topic = topics.from_device(self._device, "chunk")
        try:
            self._pump.send(topic, self._spool.path(spooled), self._cut(spooled.blob), ranges)
        except StorageError as error:
            log.error("update %s cannot be sent: %s", spooled.update, error)  # noqa: TRY400 - one line for the user
