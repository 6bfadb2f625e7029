"""The law of :mod:`tests.test_mass` with a real agent, its worker, a real broker and kill -9 between rounds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from random import Random
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from edge_runtime import messages, topics
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import MODEL_CHANNEL, CodecSpec, decode, encode, encode_model
from edge_runtime.messages import BlobRef, Job, ModelRef, UpdateId
from edge_runtime.store.blobs import BlobStore
from edge_runtime.store.spool import Spool
from edge_runtime.training.job import JobRunner
from edge_runtime.transport.loop import Loop
from edge_runtime.transport.transfer import ChunkPump, unpack_chunk
from tests.edge_runtime.toy_jobs import ToyJobs
from tests.support.brokers import Peer, own_mosquitto, run_until
from tests.test_mass import DEVICE, RUN, left_on_device

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 9
SPEC = CodecSpec("topk", {"density": 0.2})
AGENT = """device = "dev"
state_dir = "state"
[broker]
url = "{url}"
[[data]]
name = "d"
path = "{data}"
"""


class Coordinator:
    """Sends jobs whose models are changes to what the device holds, and counts or refuses what comes."""

    def __init__(self, loop: Loop, url: str, jobs: ToyJobs) -> None:
        self.loop, self.jobs = loop, jobs
        self.layout = jobs.bundle.layout()
        self.store = BlobStore(jobs.folder / "coordinator")
        self.models = [SharedModel.start(jobs.bundle.initial_vector(), self.layout)]
        self.changes: list[bytes] = []
        self.job: Job | None = None
        self.received: dict[UpdateId, bytes] = {}
        self.verdicts: dict[UpdateId, bool] = {}
        self.wanted: dict[UpdateId, str] = {}  # hash of the bytes that were asked for
        self.versions: dict[UpdateId, int] = {}  # that updates are relative to
        self.held = 0
        self.peer = Peer(loop, url, "coord", ("fl/v1/d/+/state", "fl/v1/d/+/message", "fl/v1/d/+/chunk"))
        self.peer.handler = self.on_message
        self.pump = ChunkPump(self.peer.link)
        self.peer.up()

    def on_message(self, topic: str, payload: bytes) -> None:
        if topic.endswith("/chunk"):
            half, _, _, data = unpack_chunk(payload)
            update = next(name for name, sha256 in self.wanted.items() if sha256.startswith(half))
            self.take(update, bytes(data))
            return
        match messages.decode_from_device(payload):
            case messages.DeviceState(online=True):
                self.tell_all()
            case messages.Need(sha256=sha256, ranges=ranges):
                path = self.store.path(sha256)
                blob = BlobRef(sha256=sha256, size_bytes=path.stat().st_size)
                self.pump.send(topics.to_device(DEVICE, "chunk"), path, blob, ranges)
            case messages.UpdateOffer(update=update, blob=blob, first=first):
                if first:
                    assert blob is None  # all of it is here
                    self.take(update, first[4:])
                elif update in self.verdicts:
                    self.tell(messages.Verdict(update=update, counted=self.verdicts[update]))
                elif update not in self.received:
                    self.wanted = {update: blob.sha256}
                    self.tell(messages.Need(sha256=blob.sha256, ranges=[(0, 1)]))
            case messages.JobStatus(assignment=assignment):
                if self.job is not None and assignment == self.job.assignment:  # it may hold nothing
                    self.job = self.make_job(self.job.round, base=0)
                    self.tell(self.job)

    def take(self, update: UpdateId, data: bytes) -> None:
        assert self.received.setdefault(update, data) == data
        self.held = self.versions[update]
        self.tell(messages.Done(update=update))

    def tell(self, message: messages.FromCoordinator) -> None:
        self.peer.link.publish(topics.to_device(DEVICE, "message"), messages.encode(message))

    def tell_all(self) -> None:
        if self.job is not None:
            self.tell(self.job)

    def put(self, data: bytes) -> BlobRef:
        stored = self.store.put(data)
        return BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes)

    def make_job(self, number: int, base: int) -> Job:
        version = len(self.models) - 1
        chain = self.changes[base:version]
        self.versions[UpdateId(RUN, DEVICE, f"a{number}", 0)] = version
        return Job(
            run=RUN,
            assignment=f"a{number}",
            round=number,
            model_version=version,
            bundle=self.put(self.jobs.bundle.path.read_bytes()),
            model=ModelRef(
                base=base, blobs=[self.put(change) for change in chain], vector_sha256=self.models[-1].sha256()
            ),
            inline=chain[-1] if chain else b"",
            dataset="d",
            deadline_s=600.0,
            steps=3,
            codec=SPEC.name,
            codec_options=SPEC.options,
        )

    def next_model(self, sent: np.ndarray) -> None:
        """Whatever the verdict, the next version is another one."""
        version = len(self.models) - 1
        layouts = {MODEL_CHANNEL: self.layout}
        data = encode(CodecSpec("int8"), {MODEL_CHANNEL: sent}, layouts, base_version=version).data
        self.changes.append(data)
        self.models.append(self.models[-1].plus(decode(data, layouts)[MODEL_CHANNEL].vector()))


class Device:
    """The agent's process."""

    def __init__(self, folder: Path, url: str, data: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "agent.toml").write_text(AGENT.format(url=url, data=data))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "edge_runtime.cli", "run", "--config", str(self.folder / "agent.toml")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10) if os.environ.get("EDGE_FULL") else range(2))
def test_counted_and_residual_are_the_sum_of_all_updates(tmp_path: Path, mosquitto_program: str, seed: int) -> None:
    """Nine rounds with lossy changes both ways, verdicts by chance, and kill -9 while it trains, before the verdict,
    between rounds: what was trained, computed anew here, is what was counted and what is held back."""
    print(f"schedule seed {seed}")
    random, jobs, loop = Random(seed), ToyJobs(tmp_path), Loop()
    device = None
    with own_mosquitto(mosquitto_program, tmp_path) as broker:
        coordinator = Coordinator(loop, broker.url, jobs)
        device = Device(tmp_path / "device", broker.url, jobs.data)
        device.start()
        try:
            trained = _rounds(coordinator, device, random)
        finally:
            device.kill()
            coordinator.peer.link.stop()
            loop.close()
    spool = Spool(tmp_path / "device" / "state")

    def decoded(data: bytes, update: UpdateId) -> np.ndarray:
        return decode(data, {"delta": coordinator.layout}, tag=update_tag(update))["delta"].vector().astype(np.float64)

    counted = [update for update, taken in coordinator.verdicts.items() if taken]
    assert 0 < len(counted) < ROUNDS
    total = left_on_device(spool, jobs.bundle, SPEC, coordinator.verdicts, decoded)
    for update in counted:
        total += decoded(coordinator.received[update], update)
    np.testing.assert_allclose(total, trained, atol=1e-4)
    assert {row.state for row in spool._rows("WHERE run=?", (RUN,))} == {"counted", "refused"}
    spool.close()


def _rounds(coordinator: Coordinator, device: Device, random: Random) -> np.ndarray:
    """Plays all rounds; gives the sum of what was trained, float64 ``[layout.size]``."""
    loop, trained = coordinator.loop, np.zeros(coordinator.layout.size)

    def again(chance: float) -> None:
        if random.random() < chance:
            device.kill()
            device.start()

    for number in range(ROUNDS):
        update = UpdateId(RUN, DEVICE, f"a{number}", 0)
        coordinator.job = coordinator.make_job(number, coordinator.held)
        coordinator.tell_all()
        for _ in range(random.randrange(3)):
            loop.step(0.05)
        again(0.3)  # while it fetches or trains, or before the job arrived
        run_until(loop, lambda update=update: update in coordinator.received, 60.0, f"for {update}")
        trained += _trained_here(coordinator)
        coordinator.job = None
        again(0.3)  # before the verdict
        coordinator.verdicts[update] = random.random() < 0.5 if 0 < number < ROUNDS - 1 else number == 0
        coordinator.tell(messages.Verdict(update=update, counted=coordinator.verdicts[update]))
        again(0.3)  # it may not have heard
        coordinator.next_model(np.float32(0.1) * trained.astype(np.float32))
    spool = Spool(device.folder / "state", sweep=False)
    run_until(loop, lambda: not spool.open_updates(), 60.0, "for all verdicts to be heard")
    spool.close()
    return trained


def _trained_here(coordinator: Coordinator) -> np.ndarray:
    """The update of the current job before it was encoded: training is deterministic."""
    jobs, job = coordinator.jobs, coordinator.job
    jobs.model.unlink(missing_ok=True)
    jobs.model.write_bytes(encode_model(coordinator.models[job.model_version].vector, coordinator.layout))
    request = jobs.request()
    plain = msgspec.structs.replace(job, model=request.job.model, codec="raw", codec_options={})
    request = msgspec.structs.replace(request, job=plain, device=DEVICE, models_folder="")
    return jobs.delta(JobRunner().run(request)).astype(np.float64)
