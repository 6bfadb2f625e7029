"""Bytes of the MQTT packets that a round takes, counted from the messages that the programs send."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.job_message import inline_limit
from edge_runtime import messages, topics
from edge_runtime.messages import BlobRef, Evaluation, UpdateId, UpdateMeta
from edge_runtime.transport.link import CHUNK_BYTES, packet_bytes
from edge_runtime.transport.transfer import CHUNK_HEADER_BYTES

if TYPE_CHECKING:
    from edge_runtime.compression.base import Layout

CRC_BYTES = 4
PUBACK_BYTES = 4  # of every PUBLISH with QoS 1, the other way
HASH = "0" * 64


def _chunks(size: int) -> int:
    return -(-size // CHUNK_BYTES)


class Wire:
    """Counts packets, with names as the programs make them."""

    def __init__(self, layout: Layout, run: str, devices: int) -> None:
        self.bytes_up = self.bytes_down = 0
        self.change_bytes = 0  # of the last change of the shared model; version 0 is in the bundle
        self._inline_limit = inline_limit(devices)
        self._run, self._bundle = run, BlobRef(sha256=HASH, size_bytes=4 * layout.size, chunk_bytes=CHUNK_BYTES - 1)
        sample = UpdateId(run, self.device(0), self.assignment(10, 0), 0)
        self.envelope_bytes = self._offer_bytes(sample, 4000, 10, 400) - 4000
        self.job_bytes = self._job_bytes(10, 4000) - 4000

    @staticmethod
    def device(number: int) -> str:
        """Name of a device."""
        return f"device-{number:02d}"

    @staticmethod
    def assignment(round_: int, number: int) -> str:
        """Name of an assignment, as the coordinator counts them."""
        return f"r{round_}-{round_ * 10 + number}"

    def update(self, update: UpdateId, data: bytes, round_: int, samples: int) -> None:
        """An update goes up, with chunks where it does not fit one packet."""
        self.bytes_up += self._offer_bytes(update, len(data), round_, samples)
        self.bytes_down += PUBACK_BYTES * (1 + _chunks(max(0, len(data) - CHUNK_BYTES)))

    def model(self, round_: int, size: int, devices: int) -> None:
        """A round's job and model go down to every device, and what answers its update; the request for it goes up."""
        sample = UpdateId(self._run, self.device(0), self.assignment(round_, 0), 0)
        topic = topics.to_device(sample.device, "message")
        done = len(messages.encode(messages.Done(update=sample)))
        verdict = len(messages.encode(messages.Verdict(update=sample, counted=True)))
        control = packet_bytes(topic, done) + packet_bytes(topic, verdict)
        self.bytes_down += devices * (self._job_bytes(round_, size) + control)
        self.bytes_up += devices * self.request_bytes(size)
        if size > self._inline_limit:
            self.bytes_down += devices * PUBACK_BYTES

    def request_bytes(self, size: int) -> int:
        """What a device sends to get a model of this size and acknowledges; the request only if no job carries it."""
        acknowledged = 3 * PUBACK_BYTES  # job, receipt, verdict
        if size <= self._inline_limit:
            return acknowledged
        acknowledged += PUBACK_BYTES * _chunks(size)
        need = messages.Need(sha256=HASH, ranges=[(0, _chunks(size))])
        return acknowledged + packet_bytes(topics.from_device(self.device(0), "message"), len(messages.encode(need)))

    def _offer_bytes(self, update: UpdateId, size: int, round_: int, samples: int) -> int:
        whole = size <= CHUNK_BYTES
        evaluation = Evaluation(samples=40, loss_sum=0.5, correct=30)
        offer = messages.UpdateOffer(
            update=update,
            blob=None if whole else BlobRef(sha256=HASH, size_bytes=size, chunk_bytes=CHUNK_BYTES - 1),
            meta=UpdateMeta(
                round=round_,
                model_version=round_,
                samples=samples,
                steps=-(-samples // 32),
                loss=0.5,
                train_ms=1000,
                encode_cpu_ms=50,
                written_bytes=9_000_000,
                evaluation=evaluation,
            ),
            first=b"",
        )
        first = min(size, CHUNK_BYTES) + CRC_BYTES
        total = packet_bytes(topics.from_device(update.device, "message"), len(messages.encode(offer)) + 3 + first)
        return total + self._chunks_bytes(topics.from_device(update.device, "chunk"), max(0, size - CHUNK_BYTES))

    def _job_bytes(self, round_: int, size: int) -> int:
        inline = size <= self._inline_limit
        blob = BlobRef(sha256=HASH, size_bytes=size, chunk_bytes=CHUNK_BYTES - 1)
        job = messages.Job(
            run=self._run,
            assignment=self.assignment(round_, 0),
            round=round_,
            model_version=round_,
            bundle=self._bundle,
            model=messages.ModelRef(base=round_, blobs=[blob] if size else [], vector_sha256=HASH),
            dataset="fashion",
            deadline_s=600.0,
            epochs=1,
            hyper={"lr": 0.1},
            codec="default",
            byte_budget=4000,
            seed=1,
        )
        total = packet_bytes(
            topics.to_device(self.device(0), "message"), len(messages.encode(job)) + (3 + size if inline else 0)
        )
        return total + (0 if inline else self._chunks_bytes(topics.blob(HASH), size))

    @staticmethod
    def _chunks_bytes(topic: str, size: int) -> int:
        sizes = [CHUNK_BYTES] * (size // CHUNK_BYTES) + ([size % CHUNK_BYTES] if size % CHUNK_BYTES else [])
        return sum(packet_bytes(topic, part + CHUNK_HEADER_BYTES) for part in sizes)
