"""Updates without training: for runs that look at scale, selection and recovery, not at accuracy.

An echo is a small pseudo-random vector, encoded once by the plan's own codec (per model version where the codec
predicts from the model) and bound to each update by its own container; so bytes, hashes, decoding and sums are real.
Losses are made up, falling with the version, from a different level for every device.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.simulation.tasks import Order, TrainedUpdate
from edge_runtime.compression.base import Codec
from edge_runtime.compression.container import Header, pack, unpack, update_tag
from edge_runtime.compression.pipeline import CodecSpec, encode
from edge_runtime.compression.registry import codec_class
from edge_runtime.messages import UpdateId, UpdateMeta
from edge_runtime.training.randomness import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from coordinator.simulation.training import Handle
    from edge_runtime.compression.base import Layout
    from edge_runtime.messages import BlobRef, Role
    from edge_runtime.training.base import Vector

_SCALE = 1e-4  # of one number of an echo
_KEPT = 16
_AHEAD_BYTES = 256 * 1024 * 1024  # of echoes that are made before they are due


class _Encoded(NamedTuple):
    codec: int | str
    sections: list[list[bytes | memoryview]]
    alignment: int
    size_bytes: int


class EchoTrainer:
    """See :class:`~coordinator.simulation.training.Trainer`.

    Args:
        layout: of the model.
        channels: what an update of a role holds.
        model: gives a whole model as devices hold it, for codecs that predict.
        seed: of the vector.
    """

    def __init__(
        self,
        layout: Layout,
        channels: Mapping[Role, tuple[str, ...]],
        model: Callable[[BlobRef, int], Vector],
        seed: int,
    ) -> None:
        self._layout, self._channels, self._model, self._seed = layout, channels, model, seed
        self._encoded: dict[tuple[object, ...], _Encoded] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="echo")  # hashing leaves the interpreter to others
        self._ahead_bytes = 0

    def start(self, order: Order) -> Handle:
        job = order.job
        if job.epochs is None and job.steps is None and job.role == "trainer":
            return _Echo(self, order, None)
        return _Echo(self, order, self._encode(order, dict.fromkeys(self._channels[job.role], self._layout)))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._encoded.clear()

    def begin(self, order: Order, found: _Encoded) -> Future[TrainedUpdate] | None:
        """Makes an echo ahead of its time, if not too many wait already."""
        if self._ahead_bytes + found.size_bytes > _AHEAD_BYTES:
            return None
        self._ahead_bytes += found.size_bytes
        return self._thread.submit(self.make, order, found)

    def used(self, found: _Encoded) -> None:
        """An echo that was made ahead waits no longer."""
        self._ahead_bytes -= found.size_bytes

    def make(self, order: Order, found: _Encoded | None) -> TrainedUpdate:
        """The echo of one order; without ``found`` it has no bytes, as of a job that only evaluates."""
        job = order.job
        steps = order.steps if order.stop_after is None else min(order.steps, order.stop_after)
        meta = UpdateMeta(round=job.round, model_version=job.model_version, samples=order.samples, steps=steps)
        if found is None:
            return TrainedUpdate(b"", meta, sha256(b"").hexdigest(), 0)
        layouts = dict.fromkeys(self._channels[job.role], self._layout)
        tag = update_tag(UpdateId(job.run, order.device, job.assignment, job.sequence))
        header = Header(codec=found.codec, tag=tag, base_version=job.model_version)
        loss = _loss(order.device, job.model_version)
        meta = UpdateMeta(
            round=job.round,
            model_version=job.model_version,
            samples=order.samples,
            steps=steps,
            loss=loss,
            loss_rms=loss,
            stopped=order.stopped if steps < order.steps else "",
        )
        data = pack(header, layouts, found.sections, found.alignment)
        return TrainedUpdate(data, meta, sha256(data).hexdigest(), len(data))

    def _encode(self, order: Order, layouts: Mapping[str, Layout]) -> _Encoded:
        job = order.job
        predicts = codec_class(job.codec).decode_against is not Codec.decode_against
        key = (job.codec, job.byte_budget, job.role, job.model_version if predicts else None)
        known = self._encoded.get(key)
        if known is not None:
            return known
        stream = Stream(self._seed, "echo")
        vector = ((stream.uniform(self._layout.size) - 0.5) * (2 * _SCALE)).astype(np.float32)
        data = encode(
            CodecSpec(job.codec, job.codec_options),
            dict.fromkeys(layouts, vector),
            layouts,
            budget_bytes=job.byte_budget,
            seed=self._seed,
            base_version=job.model_version,
            reference=self._model(order.model, job.model_version) if predicts else None,
        ).data
        header, places = unpack(data, layouts)
        view = memoryview(data)
        sections: list[list[bytes | memoryview]] = [[view[start:end]] for start, end in places.values()]
        found = _Encoded(header.codec, sections, codec_class(job.codec).alignment, len(data))
        while len(self._encoded) >= _KEPT:
            del self._encoded[next(iter(self._encoded))]
        self._encoded[key] = found
        return found


class _Echo:
    def __init__(self, trainer: EchoTrainer, order: Order, found: _Encoded | None) -> None:
        self._trainer, self._order, self._found = trainer, order, found
        self._future = None if found is None else trainer.begin(order, found)

    def result(self) -> TrainedUpdate:
        future = self._take()
        return self._trainer.make(self._order, self._found) if future is None else future.result()

    def cancel(self) -> None:
        future = self._take()
        if future is not None:
            future.cancel()

    def _take(self) -> Future[TrainedUpdate] | None:
        future, self._future = self._future, None
        if future is not None and self._found is not None:
            self._trainer.used(self._found)
        return future


def _loss(device: str, version: int) -> float:
    level = int.from_bytes(blake2b(device.encode(), digest_size=4).digest(), "little") / 2.0**32
    return (0.5 + 2.0 * level) / math.sqrt(1.0 + 0.1 * version)
