"""An agent without a worker: link, job machine and transfers of the product, and an update that was made before.

It connects, announces itself, beats and takes part in runs as :class:`edge_runtime.agent.daemon.Agent` does, so that a
coordinator cannot tell; but it trains nothing, and keeps no model and nothing on disk except the update that it offers.
Thousands of them share one loop and one process.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, Any

from edge_runtime import compression, messages, methods, topics
from edge_runtime.agent import events, jobs
from edge_runtime.agent.transfers import Downloads, Uploads
from edge_runtime.compression.container import Header, pack, unpack, update_tag
from edge_runtime.compression.pipeline import CodecSpec, encode
from edge_runtime.compression.registry import codec_class
from edge_runtime.errors import EdgeError, TransferError
from edge_runtime.messages import BlobRef, Heartbeat, Job, UpdateId, UpdateMeta
from edge_runtime.store.blobs import StoredBlob
from edge_runtime.transport.link import Link, LinkSettings
from edge_runtime.transport.transfer import ChunkPump

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from edge_runtime.compression.base import Layout
    from edge_runtime.store.spool import SpooledUpdate
    from edge_runtime.transport.loop import Loop

BLOB_LIMIT_BYTES = 500_000_000
SAMPLES = 600


class Updates:
    """The same change of a model for everybody, encoded once per codec; every update has its own bytes nevertheless.

    Args:
        folder: for the bytes of updates that are offered.
        layout: of the model.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self._layouts = {"delta": layout}
        self._encoded: dict[tuple[str, tuple[tuple[str, Any], ...], int | None], bytes] = {}

    def write(self, update: UpdateId, job: Job) -> tuple[str, BlobRef]:
        """Writes the container of an update; gives its file's name and the blob."""
        name, data = str(update).replace("/", "."), self._bound(update, job)
        (self.folder / name).write_bytes(data)
        return name, BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    def _bound(self, update: UpdateId, job: Job) -> bytes:
        key = (job.codec, tuple(sorted(job.codec_options.items())), job.byte_budget)
        if key not in self._encoded:
            import numpy as np

            layout = self._layouts["delta"]
            change = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32) * np.float32(1e-3)
            spec = CodecSpec(job.codec, job.codec_options)
            self._encoded[key] = encode(spec, {"delta": change}, self._layouts, budget_bytes=job.byte_budget).data
        data = memoryview(self._encoded[key])
        header, sections = unpack(data, self._layouts)
        bound = Header(codec=header.codec, tag=update_tag(update), base_version=job.model_version)
        alignment = codec_class(header.codec).alignment
        return pack(bound, self._layouts, [[data[start:end]] for start, end in sections.values()], alignment)


class LightAgent:
    """One device on a loop that many share. ``updates`` None: it takes no jobs. ``answered`` counts its verdicts."""

    def __init__(self, loop: Loop, settings: LinkSettings, *, updates: Updates | None, random: Random) -> None:
        self.device = settings.client_id
        self.loop = loop
        self.answered = 0
        self._session = 0
        self._coordinator_session = ""
        self._updates = updates
        capabilities = jobs.Capabilities(
            datasets=frozenset({"noise"}),
            codecs=frozenset(compression.codec_names()),
            methods=frozenset(methods.method_names()),
            blob_limit_bytes=BLOB_LIMIT_BYTES,
        )
        self.state = jobs.AgentState.restore(self.device, capabilities, [])
        self.link = Link(
            settings,
            loop,
            topics=[topics.COORDINATOR, *(topics.to_device(self.device, leaf) for leaf in ("message", "chunk"))],
            on_message=self._on_message,
            on_up=self._on_up,
            on_down=lambda _reason: self._pump.reset(),
            random=random,
            will=(topics.from_device(self.device, "state"), self._last_will),
        )
        self._pump = ChunkPump(self.link)
        self._spool = _Spool(updates.folder if updates is not None else None)
        self._uploads = Uploads(self.device, self._spool, loop, self.link, pump=self._pump, random=random)  # type: ignore[arg-type]
        self._downloads = Downloads(
            self.device,
            _Cache(),  # type: ignore[arg-type]
            loop,
            self.link,
            on_ready=lambda sha256: self._step(events.BlobReady(loop.now(), sha256)),
            on_failed=lambda sha256, reason: self._step(events.BlobFailed(loop.now(), sha256, reason)),
        )

    def beat(self, heartbeat: Heartbeat) -> bool:
        """Sends a heartbeat; False while it is not connected."""
        topic = topics.from_device(self.device, "heartbeat")
        return self.link.publish(topic, messages.encode_heartbeat(heartbeat), retain=True)

    def stop(self) -> None:
        """Leaves as an agent that is asked to end."""
        self._downloads.close()
        for update in list(self.state.updates):
            self._uploads.close(update)
        self.link.stop((topics.from_device(self.device, "state"), self._announcement(online=False)))

    def _last_will(self) -> bytes:
        self._session += 1
        return self._announcement(online=False)

    def _announcement(self, *, online: bool) -> bytes:
        can = self.state.capabilities
        return messages.encode(
            messages.DeviceState(
                device=self.device,
                online=online,
                session=f"{self.device}-{self._session}",
                instance=self.device,
                software="light",
                platform="benchmark",
                codecs=sorted(can.codecs),
                methods=sorted(can.methods),
                backends=["onnxruntime"],
                datasets=[messages.DatasetInfo(name="noise", samples=SAMPLES)],
                limits=messages.Limits(blob_bytes=BLOB_LIMIT_BYTES, worker_memory_bytes=0),
            )
        )

    def _on_up(self) -> None:
        self.link.publish(topics.from_device(self.device, "state"), self._announcement(online=True), retain=True)
        self._downloads.on_up()
        self._step(events.Connected())

    def _on_message(self, topic: str, payload: bytes) -> None:
        if topic == topics.COORDINATOR or topic.endswith("/message"):
            self._handle(messages.decode_from_coordinator(payload))
        else:
            self._downloads.on_chunk(payload)

    def _handle(self, message: messages.FromCoordinator) -> None:
        now = self.loop.now()
        match message:
            case messages.Job() if self._updates is not None:
                known = self._spool.get(UpdateId(message.run, self.device, message.assignment, message.sequence))
                self._step(events.JobArrived(now, message, known.state if known else None, 0))
            case messages.Cancel(run=run, assignment=assignment):
                self._step(events.JobCancelled(run, assignment))
            case messages.Need() if not self._uploads.on_need(message):
                self._send(messages.Gone(sha256=message.sha256))
            case messages.Gone(sha256=sha256):
                self._downloads.on_gone(sha256)
            case messages.Done(update=update):
                self._step(events.DoneArrived(update))
            case messages.Verdict(update=update, counted=counted, reason=reason):
                self.answered += 1
                self._step(events.VerdictArrived(now, update, counted, reason))
            case messages.CoordinatorState(online=online, session=session) if online:
                before, self._coordinator_session = self._coordinator_session, session
                if before not in ("", session):
                    self._on_up()

    def _send(self, message: messages.FromDevice) -> None:
        self.link.publish(topics.from_device(self.device, "message"), messages.encode(message))

    def _step(self, event: events.Event) -> None:
        for effect in jobs.step(self.state, event):
            self._carry_out(effect)

    def _carry_out(self, effect: events.Effect) -> None:
        match effect:
            case events.FetchBlob(blob, inline):
                self._downloads.fetch(blob, inline)
            case events.StopFetch(sha256):
                self._downloads.stop(sha256)
            case events.StartTraining(job):
                self.loop.call_soon(lambda: self._trained(job))
            case events.SpoolUpdate(spooled):
                self._spool.add(spooled)
            case events.Offer(update, push):
                self._uploads.offer(update, push=push)
            case events.CloseUpdate(update, state):
                self._uploads.delivered(update)
                if state != "delivered":
                    self._uploads.close(update)
                    self._spool.remove(update)
            case events.Report(status):
                self._send(status)

    def _trained(self, job: Job) -> None:
        assert self._updates is not None
        update = UpdateId(job.run, self.device, job.assignment, job.sequence)
        meta = UpdateMeta(round=job.round, model_version=job.model_version, samples=SAMPLES, steps=job.steps or 1)
        try:
            file, blob = self._updates.write(update, job)
        except EdgeError as error:
            self._step(events.TrainingFailed(self.loop.now(), str(error)))
        else:
            self._step(events.Trained(self.loop.now(), file, blob, meta))


class _Spool:
    """What uploads need of a spool, in memory; the bytes are files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._updates: dict[UpdateId, SpooledUpdate] = {}

    def get(self, update: UpdateId) -> SpooledUpdate | None:
        return self._updates.get(update)

    def path(self, update: SpooledUpdate) -> Path:
        assert self._folder is not None
        return self._folder / update.file

    def add(self, update: SpooledUpdate) -> None:
        self._updates[update.update] = update

    def remove(self, update: UpdateId) -> None:
        known = self._updates.pop(update, None)
        if known is not None:
            self.path(known).unlink(missing_ok=True)


class _Cache:
    """What downloads need of a blob store: it knows what came and keeps none of it."""

    def __init__(self) -> None:
        self._here: set[str] = set()

    def has(self, sha256: str) -> bool:
        return sha256 in self._here

    def touch(self, sha256: str) -> None:
        """Nothing is ever evicted."""

    def put(self, data: bytes, *, durable: bool) -> StoredBlob:
        del durable
        blob = StoredBlob(hashlib.sha256(data).hexdigest(), len(data))
        self._here.add(blob.sha256)
        return blob

    def receive(self, blob: BlobRef) -> _Arriving:
        return _Arriving(blob, self._here)


class _Arriving:
    """A blob whose chunks are checked and forgotten."""

    def __init__(self, blob: BlobRef, here: set[str]) -> None:
        self.blob = blob
        self.chunks = max(1, -(-blob.size_bytes // blob.chunk_bytes))
        self._missing = set(range(self.chunks))
        self._here = here

    @property
    def missing(self) -> int:
        return len(self._missing)

    def missing_ranges(self, limit: int) -> list[tuple[int, int]]:
        whole = len(self._missing) == self.chunks
        return [(0, self.chunks)] if whole else [(index, 1) for index in sorted(self._missing)[:limit]]

    def add(self, index: int, crc: int, data: memoryview) -> bool:
        if zlib.crc32(data) != crc or not 0 <= index < self.chunks:
            raise TransferError(f"chunk {index} of blob {self.blob.sha256[:12]} is damaged, refused")
        if index not in self._missing:
            return False
        self._missing.discard(index)
        return True

    def finish(self, *, durable: bool) -> None:
        del durable
        self._here.add(self.blob.sha256)

    def close(self) -> None:
        """Nothing is open."""

    discard = close
