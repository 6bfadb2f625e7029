"""The coordinator's side of transfers: models and bundles down, once for all who need them, and updates up."""

from __future__ import annotations

import hashlib
import logging
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from coordinator.traffic import Traffic
from edge_runtime import messages, topics
from edge_runtime.errors import StorageError, TransferError
from edge_runtime.store.blobs import hash_file, indexes
from edge_runtime.transport.transfer import (
    CHUNK_HEADER_BYTES,
    RANGES_LIMIT,
    WRONG_LIMIT,
    ChunkPump,
    Incoming,
    check_first_chunk,
    unpack_chunk,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from edge_runtime.messages import BlobRef, Need, UpdateId, UpdateMeta, UpdateOffer
    from edge_runtime.store.blobs import BlobStore
    from edge_runtime.transport.link import Link
    from edge_runtime.transport.loop import Loop, Timer

log = logging.getLogger("edge.transfer")

GATHER_S = 0.05  # how long the first request for a blob waits for the other devices that were told of it,
GATHER_EACH_S = 0.001  # and for each of them: every answer goes to all that are still subscribed
GATHER_LIMIT_S = 0.5  # under the patience of a device that asks
CRC_BYTES = 4  # before the data of the chunk that an offer carries
UNANSWERED_LIMIT = 8  # requests over some minutes; a device that lives offers again by itself


@dataclass
class _Gathering:
    """Requests for one blob that will be answered by one broadcast."""

    timer: Timer
    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # by device


class Downlink:
    """Answers requests for chunks of models and bundles.

    Devices that were told of a blob ask for it at about the same time; the answer waits until all of them have asked
    (at most ``GATHER_LIMIT_S``) and goes once to the topic they share. A chunk that a single device asks for goes to
    that device alone.

    Args:
        find: path and reference of a blob by hash, None if it is not here.
        sent: called with (device, hash, topic, bytes of payload) for every chunk that a device asked for, when it goes.
    """

    def __init__(
        self,
        loop: Loop,
        link: Link,
        find: Callable[[str], tuple[Path, BlobRef] | None],
        sent: Callable[[str, str, str, int], None] | None = None,
    ) -> None:
        self._loop, self._link, self._find, self._sent = loop, link, find, sent
        self._pump = ChunkPump(link)
        self._expected: dict[str, set[str]] = {}
        self._gathering: dict[str, _Gathering] = {}

    def expect(self, device: str, *blobs: BlobRef) -> None:
        """A device was told of these blobs and may ask for them."""
        for blob in blobs:
            self._expected.setdefault(blob.sha256, set()).add(device)

    def forget(self, sha256: str) -> None:
        """The blob is no longer wanted by anyone."""
        self._expected.pop(sha256, None)
        self._pump.forget(sha256)

    def unexpect(self, device: str) -> None:
        """A device answered or went away: nobody waits for its requests any more."""
        for sha256, devices in self._expected.items():
            devices.discard(device)
            self._flush_if_complete(sha256)

    def on_need(self, device: str, need: Need) -> None:
        """A device asks for chunks."""
        if self._find(need.sha256) is None:
            message = messages.Gone(sha256=need.sha256)
            self._link.publish(topics.to_device(device, "message"), messages.encode(message))
            return
        gathering = self._gathering.get(need.sha256)
        if gathering is None:
            others = len(self._expected.get(need.sha256, ()))
            wait_s = min(GATHER_LIMIT_S, GATHER_S + GATHER_EACH_S * others)
            timer = self._loop.call_later(wait_s, lambda: self._flush(need.sha256))
            gathering = self._gathering[need.sha256] = _Gathering(timer)
        gathering.ranges[device] = [*gathering.ranges.get(device, ()), *need.ranges][:RANGES_LIMIT]
        self._flush_if_complete(need.sha256)

    def reset(self) -> None:
        """The connection ended: devices will ask again."""
        self._pump.reset()
        for gathering in self._gathering.values():
            gathering.timer.cancel()
        self._gathering.clear()

    def _flush_if_complete(self, sha256: str) -> None:
        gathering = self._gathering.get(sha256)
        if gathering is not None and self._expected.get(sha256, set()) <= gathering.ranges.keys():
            self._flush(sha256)

    def _flush(self, sha256: str) -> None:
        gathering = self._gathering.pop(sha256)
        gathering.timer.cancel()
        found = self._find(sha256)
        if found is None:
            return
        path, blob = found
        expected = self._expected.get(sha256, set())
        expected.difference_update(gathering.ranges)
        shared = topics.blob(sha256) if len(gathering.ranges) > 1 else None
        for device, ranges in gathering.ranges.items():
            topic = shared or topics.to_device(device, "chunk")
            try:
                self._pump.send(topic, path, blob, ranges)
            except StorageError as error:
                log.error("%s", error)  # noqa: TRY400 - one line for the operator
                return
            if self._sent is not None:
                for size in chunk_payloads(blob, ranges):
                    self._sent(device, sha256, topic, size)


def chunk_payloads(blob: BlobRef, ranges: Iterable[tuple[int, int]]) -> Iterable[int]:
    """Bytes of payload of each chunk packet in ``ranges`` of (first, count), each once."""
    chunks = -(-blob.size_bytes // blob.chunk_bytes)
    for index in dict.fromkeys(indexes(ranges, chunks)):
        yield CHUNK_HEADER_BYTES + min(blob.chunk_bytes, blob.size_bytes - index * blob.chunk_bytes)


@dataclass
class _Upload:
    incoming: Incoming
    updates: dict[UpdateId, UpdateMeta]


class Uplink:
    """Receives updates into a store of their own and tells when one is whole.

    Args:
        arrived: called with (update, blob, meta) when the bytes are whole; whoever says so makes them durable before.
        refused: called with (update, blob, meta, reason) when they cannot be taken.
        traffic: counts chunks that come and requests that go.
    """

    def __init__(
        self,
        loop: Loop,
        link: Link,
        *,
        arrived: Callable[[UpdateId, BlobRef, UpdateMeta], None],
        refused: Callable[[UpdateId, BlobRef, UpdateMeta, str], None],
        traffic: Traffic | None = None,
    ) -> None:
        self._loop, self._link = loop, link
        self._traffic = traffic or Traffic()
        self._arrived, self._refused = arrived, refused
        self._uploads: dict[str, _Upload] = {}  # by half hash

    def fetch(self, store: BlobStore, offer: UpdateOffer) -> None:
        """Starts or goes on receiving an offered update; the offer names its blob (:func:`named`)."""
        assert offer.blob is not None
        blob, half = offer.blob, offer.blob.sha256[:32]
        upload = self._uploads.get(half)
        if upload is not None and upload.incoming.partial.blob != blob:  # cut anew, for a link with other packets
            self._stop(half)
            upload = None
        if upload is not None:
            upload.updates[offer.update] = offer.meta  # two devices may well offer the same bytes
            if not offer.first:
                upload.incoming.nudge()
        elif _is_whole(store, blob):
            self._arrived(offer.update, blob, offer.meta)
            return
        elif len(offer.first) == CRC_BYTES + blob.size_bytes:
            self._take_whole(store, offer)
            return
        else:
            try:
                partial = store.receive(blob)
            except TransferError as error:
                self._refused(offer.update, blob, offer.meta, str(error))
                return
            except StorageError as error:
                log.error("%s; update %s stays on its device", error, offer.update)  # noqa: TRY400
                return
            incoming = Incoming(
                partial,
                self._loop,
                need=lambda ranges: self._need(half, ranges),
                complete=lambda: self._complete(half),
            )
            upload = self._uploads[half] = _Upload(incoming, {offer.update: offer.meta})
            if not offer.first:
                incoming.ask()
        self._add_first(upload, offer)
        if not upload.incoming.partial.missing and half in self._uploads:
            self._complete(half)  # all of it had arrived before a restart

    def _take_whole(self, store: BlobStore, offer: UpdateOffer) -> None:
        """The offer carries all of the update: no bookkeeping of chunks."""
        assert offer.blob is not None
        data = memoryview(offer.first)[CRC_BYTES:]
        if hashlib.sha256(data).hexdigest() != offer.blob.sha256:
            log.warning("the offer of update %s carries a damaged chunk; it will be offered again", offer.update)
            return
        try:
            store.put(data, durable=False)
        except StorageError as error:
            log.error("%s; update %s stays on its device", error, offer.update)  # noqa: TRY400
            return
        self._arrived(offer.update, offer.blob, offer.meta)

    def on_chunk(self, device: str, payload: bytes) -> None:
        """Takes a chunk packet; one of a blob that this device does not offer is ignored."""
        half, index, crc, data = unpack_chunk(payload)
        upload = self._uploads.get(half)
        run = None if upload is None else next((name.run for name in upload.updates if name.device == device), None)
        if upload is not None and run is not None:
            self._traffic.up(run, topics.from_device(device, "chunk"), len(payload))
            self._add(upload, index, (crc, data))

    def stop_run(self, run: str) -> None:
        """Stops receiving updates of a run."""
        for half, upload in list(self._uploads.items()):
            if all(update.run == run for update in upload.updates):
                del self._uploads[half]
                upload.incoming.close(discard=True)
                continue
            for update in [update for update in upload.updates if update.run == run]:
                del upload.updates[update]  # another run receives the same bytes

    def reset(self) -> None:
        """The connection ended: devices will offer again, what arrived stays."""
        for half in list(self._uploads):
            self._stop(half)

    def _stop(self, half: str) -> None:
        upload = self._uploads.pop(half, None)
        if upload is not None:
            upload.incoming.close()

    def _add_first(self, upload: _Upload, offer: UpdateOffer) -> None:
        assert offer.blob is not None
        try:
            first = check_first_chunk(offer.blob, offer.first)
        except TransferError as error:
            log.warning("%s", error)
            return
        if first is not None:
            self._add(upload, 0, first)

    def _add(self, upload: _Upload, index: int, chunk: tuple[int, memoryview]) -> None:
        try:
            upload.incoming.add(index, *chunk)
        except TransferError as error:
            log.warning("%s", error)
        except StorageError as error:
            log.error("%s; updates stay on their devices, which offer them again", error)  # noqa: TRY400
            self._stop(upload.incoming.half_hash)

    def _need(self, half: str, ranges: list[tuple[int, int]]) -> None:
        upload = self._uploads[half]
        if upload.incoming.unanswered > UNANSWERED_LIMIT:
            log.info("update %s: nothing comes, waiting for its next offer", next(iter(upload.updates)))
            self._stop(half)
            return
        need = messages.encode(messages.Need(sha256=upload.incoming.partial.blob.sha256, ranges=ranges))
        for device, run in {update.device: update.run for update in upload.updates}.items():
            topic = topics.to_device(device, "message")
            if self._link.publish(topic, need):
                self._traffic.down(run, topic, len(need))

    def _complete(self, half: str) -> None:
        upload = self._uploads[half]
        try:
            upload.incoming.partial.finish(durable=False)
        except TransferError as error:
            log.warning("%s", error)
            upload.incoming.wrong += 1
            if upload.incoming.wrong < WRONG_LIMIT:
                upload.incoming.ask()
                return
            del self._uploads[half]
            upload.incoming.close(discard=True)
            for update, meta in upload.updates.items():
                self._refused(update, upload.incoming.partial.blob, meta, f"{error}; given up")
            return
        except StorageError as error:
            log.error("%s; updates stay on their devices, which offer them again", error)  # noqa: TRY400
            self._stop(half)
            return
        del self._uploads[half]
        upload.incoming.close()
        for update, meta in upload.updates.items():
            self._arrived(update, upload.incoming.partial.blob, meta)


def _is_whole(store: BlobStore, blob: BlobRef) -> bool:
    """Whether a blob is here; one that a power cut damaged, since nothing acknowledged it yet, goes."""
    if not store.has(blob.sha256):
        return False
    try:
        if hash_file(store.path(blob.sha256)).sha256 == blob.sha256:
            return True
        log.warning("blob %s was damaged where it lay, it is received again", blob.sha256[:12])
        store.delete(blob.sha256)
    except StorageError as error:
        log.error("%s", error)  # noqa: TRY400 - one line for the operator
    return False


def named(offer: UpdateOffer) -> UpdateOffer:
    """The offer with the reference of its blob, which is made from chunk 0 where that is all of it.

    Raises:
        TransferError: neither a blob nor all of it, or the chunk is damaged.
    """
    if offer.blob is not None:
        return offer
    crc, data = int.from_bytes(offer.first[:CRC_BYTES], "little"), memoryview(offer.first)[CRC_BYTES:]
    if len(offer.first) < CRC_BYTES or zlib.crc32(data) != crc:
        raise TransferError(f"the offer of update {offer.update} carries a damaged chunk; it will be offered again")
    blob = messages.BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    if len(data) > blob.chunk_bytes:
        blob = with_chunk_size(blob, len(data))
    return msgspec.structs.replace(offer, blob=blob)


def with_chunk_size(blob: BlobRef, chunk_bytes: int) -> BlobRef:
    """The same blob, cut for a link whose packets hold ``chunk_bytes``."""
    return msgspec.structs.replace(blob, chunk_bytes=chunk_bytes)
