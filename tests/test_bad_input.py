"""Bad input, end to end: one clear line that names the thing and the cure, nothing lost, and everything goes on."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil
import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("onnx")

import onnx

from coordinator import background, server, submission
from coordinator.cli import main as coordinator_cli
from edge_runtime import messages, topics
from edge_runtime.bundle import Bundle
from edge_runtime.bundle.manifest import MANIFEST_NAME, PARAMETERS_NAME
from edge_runtime.cli import main as agent_cli
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.pipeline import CodecSpec, encode
from edge_runtime.messages import BlobRef, Evaluation, UpdateId, UpdateMeta, UpdateOffer
from edge_runtime.transport.paho import CallbackAPIVersion, MQTTProtocolVersion
from edge_runtime.transport.paho import client as paho
from edge_runtime.transport.transfer import pack_chunk
from tests.edge_runtime import toy_bundle
from tests.support.federation import Federation
from tests.support.processes import Processes, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.slow]
ROOT = Path(__file__).parents[1]
PLAN = """name = "run"
bundle = "toy.bundle"
dataset = "d"
rounds = 1
[participation]
target = 1
deadline_s = 60.0
[training]
epochs = 1
batch_size = 8
[uplink]
codec = "raw"
max_norm = 1000.0
[downlink]
codec = "raw"
"""


def plan(bundle: Path, **changes: Any) -> dict[str, Any]:
    """A plan for the toy."""
    fields = {
        "name": "run",
        "bundle": str(bundle),
        "dataset": "d",
        "rounds": 1,
        "participation": {"target": 1, "deadline_s": 60.0},
        "training": {"epochs": 1, "batch_size": 8},
    }
    return {**fields, **changes}


def toy_data(samples: int = 20, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Separable data of the toy's shape."""
    x = np.random.default_rng(seed).normal(size=(samples, 4)).astype(np.float32)
    return x, np.argmax(x[:, :3], axis=1).astype(np.int64)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return toy_bundle.write_bundle(tmp_path / "toy.bundle")


@pytest.fixture
def federation(tmp_path: Path, mosquitto: Any) -> Iterator[Federation]:
    with closed(tmp_path / "fed", mosquitto) as made:
        yield made


# Bundles


def external_data(graph: onnx.ModelProto) -> None:
    tensor = graph.graph.initializer.add(name="big", data_type=1, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def foreign_operator(graph: onnx.ModelProto) -> None:
    graph.opset_import.add(domain="com.evil", version=1)
    graph.graph.node[0].domain = "com.evil"


def million_nodes(graph: onnx.ModelProto) -> bytes:
    return graph.SerializeToString() + b"\x3a" + varint(8_000_000) + b"\x0a\x06\x22\x04Relu" * 1_000_000


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def with_graph(path: Path, change: Callable[[Any], bytes | None]) -> None:
    """Writes the toy with its train graph changed and the manifest right about it."""
    content = toy_bundle.files()
    graph = onnx.load_from_string(content["train.onnx"])
    changed = change(graph)
    manifest = toy_bundle.manifest(content)
    content["train.onnx"] = data = changed or graph.SerializeToString()
    entry = msgspec.structs.replace(
        manifest.files["train.onnx"], sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)
    )
    files = {**manifest.files, "train.onnx": entry}
    encoded = toy_bundle.m.encode_manifest(msgspec.structs.replace(manifest, files=files))
    toy_bundle.write_zip(path, {MANIFEST_NAME: encoded, **content})


def with_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = toy_bundle.files()
    manifest = json.loads(toy_bundle.m.encode_manifest(toy_bundle.manifest(content)))
    change(manifest)
    toy_bundle.write_zip(path, {MANIFEST_NAME: json.dumps(manifest).encode(), **content})


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def flipped(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        at = file.getinfo(PARAMETERS_NAME).header_offset + 200
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def newer(path: Path) -> None:
    with_manifest(path, lambda manifest: manifest.update(format_version=2))


def ten_gigabytes(path: Path) -> None:
    with_manifest(path, lambda manifest: manifest["files"][PARAMETERS_NAME].update(size_bytes=10_000_000_000))


BAD_BUNDLES = {
    "missing": (lambda path: path.unlink(), "cannot be read (No such file or directory)"),
    "truncated": (truncated, "fetch it again"),
    "wrong hash": (flipped, "damaged|SHA-256"),
    "newer format": (newer, "update"),
    "10 GB in the manifest": (ten_gigabytes, "10000000000|bytes"),
    "external data": (lambda path: with_graph(path, external_data), "export it with all data inside"),
    "foreign operator": (lambda path: with_graph(path, foreign_operator), "com.evil"),
    "a million nodes": (lambda path: with_graph(path, million_nodes), "export a smaller model"),
}


@pytest.mark.parametrize("kind", BAD_BUNDLES)
def test_bad_bundles_are_refused_at_submit(kind: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line with the file's name and what to do, no run stored, no memory taken."""
    spoil, said = BAD_BUNDLES[kind]
    spoil(toy)
    (toy.parent / "plan.toml").write_text(PLAN)
    state = ["--state", str(toy.parent / "state")]
    tracemalloc.start()
    try:
        code = coordinator_cli(["submit", str(toy.parent / "plan.toml"), *state])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    error = one_line(capsys.readouterr().err)
    assert code == 2, error
    assert str(toy) in error
    assert any(part in error for part in said.split("|")), error
    assert peak < 100e6
    assert coordinator_cli(["runs", "--json", *state]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("kind", ["missing", "truncated", "newer format"])
def test_bad_bundles_are_refused_at_inspect(kind: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``edge-export inspect`` says what is wrong in one line and does not end well."""
    from exporters.cli import main as export_cli

    BAD_BUNDLES[kind][0](toy)
    assert export_cli(["inspect", str(toy)]) in (1, 2)
    assert str(toy) in one_line(capsys.readouterr().err)


@pytest.mark.mosquitto
@pytest.mark.parametrize("kind", ["external data", "foreign operator", "wrong hash"])
def test_bad_bundles_are_refused_on_the_device(
    kind: str, federation: Federation, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a coordinator let through is refused by the device's worker, with the reason in status; the agent stays."""
    BAD_BUNDLES[kind][0](toy)
    monkeypatch.setattr(submission, "check_fit", lambda *_: None)
    if kind == "wrong hash":  # in the others the parameters are whole, and both ends must start from the same
        monkeypatch.setattr(Bundle, "initial_vector", lambda bundle: np.zeros(bundle.layout().size, np.float32))
    agent = federation.agent("pi", toy_data())
    run = federation.submit(**plan(toy, participation={"target": 1, "deadline_s": 20.0, "attempts": 1}))
    federation.until(lambda: federation.row(run).status == "failed", "the run to fail")
    reason = federation.row(run).reason
    assert "last failure, on pi: " in reason
    assert any(part in reason for part in BAD_BUNDLES[kind][1].split("|")), reason
    assert agent.state.running is None
    monkeypatch.undo()
    federation.finish(federation.submit(**plan(toy_bundle.write_bundle(toy.parent / "good.bundle"))))


@pytest.mark.mosquitto
def test_a_bundle_that_rots_on_the_server_is_not_taken(
    federation: Federation, toy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes with another hash than the job names are asked for again, then given up, and the run says why."""
    run = federation.submit(**plan(toy, participation={"target": 1, "deadline_s": 20.0, "attempts": 1}))
    federation.until(lambda: run in federation.coordinator.shell.runs, "the run to be taken up")
    flipped(federation.store.blobs.path(federation.row(run).bundle.sha256))
    federation.agent("pi", toy_data())
    federation.until(lambda: federation.row(run).status == "failed", "the run to fail")
    assert "arrived with another SHA-256, all chunks asked again; given up after 3 times" in federation.row(run).reason
    assert caplog.text.count("job run-1/r0-0 failed") == 2  # once on either side


# Data

BAD_DATA = {
    "shape": ((np.zeros((9, 5), np.float32), np.zeros(9, np.int64)), "samples of shape (5,)"),
    "dtype": ((np.full((9, 4), "a"), np.zeros(9, np.int64)), "the bundle expects float32"),
    "labels": ((np.zeros((9, 4), np.float32), np.full(9, 3)), "label 3 of sample 0 is out of range"),
    "empty": ((np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), "is empty"),
    "nan": ((np.full((9, 4), np.nan, np.float32), np.zeros(9, np.int64)), "is NaN or infinite"),
}


@pytest.mark.mosquitto
def test_bad_data_fails_the_job_with_its_reason(
    federation: Federation, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every unusable dataset is one failed job whose reason stands in status; the good device's update counts."""
    for device, (data, _) in BAD_DATA.items():
        federation.agent(device, data)
    federation.agent("good", toy_data())
    participation = {"target": 6, "minimum": 1, "deadline_s": 60.0}
    run = federation.submit(**plan(toy, participation=participation))
    federation.finish(run)
    state = ["--state", str(federation.folder / "coordinator")]
    assert coordinator_cli(["status", run, "--json", *state]) == 0
    status = json.loads(capsys.readouterr().out)
    reasons = {entry["device"]: entry["reason"] for entry in status["failures"]}
    assert status["updates"] == {"counted": 1, "refused": 0, "pending": 0}
    assert reasons.keys() == BAD_DATA.keys()
    for device, (_, said) in BAD_DATA.items():
        assert said in one_line(reasons[device])
        assert reasons[device].startswith("dataset 'd'")
    assert coordinator_cli(["status", run, *state]) == 0
    assert "nan failed: dataset 'd': x of sample" in capsys.readouterr().out


# Messages, sent by a client that is no agent


class Raw:
    """A coordinator process with its own broker, and a client that may say anything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        toy_bundle.write_bundle(folder / "toy.bundle")
        command = [sys.executable, "-m", "coordinator.cli", "serve", "--state", str(self.state)]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        path = self.state / "connection.json"
        wait_until(path.exists, 30, "the coordinator", self.text)
        given = json.loads(path.read_text())
        self.port = int(given["url"].rpartition(":")[2])
        self.password = Path(given["password_file"]).read_text()
        self.heard: list[Any] = []
        self.client = self.connect("raw", listen=True)
        self.pid = self.process.pid

    def connect(self, name: str, *, listen: bool = False) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5)
        client.username_pw_set("edge", self.password)
        client.on_message = lambda _c, _d, message: self.heard.append(messages.decode_from_coordinator(message.payload))
        ready = threading.Event()
        client.on_subscribe = lambda *_: ready.set()
        client.on_connect = lambda *_: (
            client.subscribe(topics.to_device("raw", "message"), 1) if listen else ready.set()
        )
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        assert ready.wait(10)
        return client

    def say(self, message: Any, leaf: str = "message", device: str = "raw") -> None:
        data = message if isinstance(message, bytes) else messages.encode(message)
        self.client.publish(topics.from_device(device, leaf), data, qos=1).wait_for_publish(10)

    def announce(self) -> None:
        """The device "raw" joins with the dataset "d"."""
        state = messages.DeviceState(
            device="raw",
            online=True,
            session=str(time.monotonic()),
            instance="raw",
            codecs=["raw"],
            methods=["fedavg"],
            datasets=[messages.DatasetInfo(name="d")],
        )
        self.say(state, "state")

    def job(self) -> messages.Job:
        """Submits a run and waits for the job that "raw" gets."""
        (self.folder / "plan.toml").write_text(PLAN)
        count = len(self.jobs())
        assert coordinator_cli(["submit", str(self.folder / "plan.toml"), "--state", str(self.state), "--json"]) == 0
        self.announce()
        wait_until(lambda: len(self.jobs()) > count, 20, "a job", self.text)
        return self.jobs()[-1]

    def jobs(self) -> list[messages.Job]:
        return [message for message in self.heard if isinstance(message, messages.Job)]

    def verdict(self, update: UpdateId) -> messages.Verdict:
        def found() -> list[messages.Verdict]:
            return [m for m in self.heard if isinstance(m, messages.Verdict) and m.update == update]

        wait_until(found, 20, f"a verdict for {update}", self.text)
        return found()[0]

    def offer(self, job: messages.Job, data: bytes, **changes: Any) -> UpdateOffer:
        """An offer that carries all of its bytes."""
        meta = UpdateMeta(round=job.round, model_version=job.model_version, samples=5, steps=1, loss=0.5)
        blob = BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        first = zlib.crc32(data).to_bytes(4, "little") + data
        fields = {"update": UpdateId(job.run, "raw", job.assignment, 0), "blob": blob, "meta": meta, "first": first}
        return UpdateOffer(**{**fields, **changes})

    def delta(self, job: messages.Job, *, scale: float = 1.0, **changes: Any) -> bytes:
        """An update for a job that never was before."""
        layout = Bundle.open(self.folder / "toy.bundle").layout()
        vector = np.random.default_rng().normal(scale=scale, size=layout.size).astype(np.float32)
        tag = update_tag(UpdateId(job.run, "raw", job.assignment, 0))
        fields = {"base_version": job.model_version, "tag": tag, **changes}
        return encode(CodecSpec("raw"), {"delta": vector}, {"delta": layout}, **fields).data

    def status(self, run: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "coordinator.cli", "status", run, "--json", "--state", str(self.state)],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @contextmanager
    def one_line(self, *said: str) -> Iterator[None]:
        """What happens inside leads to one line of log with these words in it, and the coordinator lives."""
        before = len(self.text().splitlines())
        yield
        wait_until(lambda: self.found(before, said), 20, f"a line with {said}", self.text)
        self.barrier()
        assert len(self.found(before, said)) == 1, self.found(before, said)
        assert "Traceback" not in self.text()

    def found(self, before: int, said: tuple[str, ...]) -> list[str]:
        lines = self.text().splitlines()[before:]
        return [line for line in lines if all(part in line for part in said)]

    def barrier(self) -> None:
        """Everything said before this was handled."""
        sha256 = os.urandom(32).hex()
        self.say(messages.Need(sha256=sha256, ranges=[(0, 1)]))
        wait_until(lambda: messages.Gone(sha256=sha256) in self.heard, 20, "an answer", self.text)
        assert self.process.poll() is None

    def close(self) -> None:
        self.client.loop_stop()
        self.client.disconnect()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, mosquitto_program: str) -> Iterator[Raw]:
    del mosquitto_program
    made = Raw(tmp_path_factory.mktemp("raw"))
    yield made
    made.close()


@pytest.mark.mosquitto
def test_nan_in_an_update_is_refused_and_told(raw: Raw) -> None:
    """The update gets its verdict, the log one line, and status the reason why the job brought nothing."""
    job = raw.job()
    body = raw.delta(job)[:-8] + np.float32("nan").tobytes()
    offer = raw.offer(job, body + zlib.crc32(body).to_bytes(4, "little"))
    with raw.one_line("update", str(offer.update), "refused"):
        raw.say(offer)
        verdict = raw.verdict(offer.update)
    assert not verdict.counted
    assert "NaN" in verdict.reason
    assert raw.status(job.run)["failures"] == [
        {"device": "raw", "round": 0, "reason": verdict.reason, "declined": False}
    ]
    coordinator_cli(["stop", job.run, "--state", str(raw.state)])


@pytest.mark.mosquitto
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tag": 77}, "the bytes are those of another update"),
        ({"base_version": 5}, "relative to model version 5, expected 0"),
        ({"scale": 1e6}, "above the plan's max_norm = 1000"),
    ],
)
def test_updates_of_other_devices_versions_or_sizes_are_refused(raw: Raw, changes: dict[str, Any], said: str) -> None:
    """A replayed update, one of another model, and a step longer than the plan allows reach no model."""
    job = raw.job()
    offer = raw.offer(job, raw.delta(job, **changes))
    with raw.one_line("update", str(offer.update), said):
        raw.say(offer)
        assert not raw.verdict(offer.update).counted
    coordinator_cli(["stop", job.run, "--state", str(raw.state)])


IMPLAUSIBLE = {
    "samples": UpdateMeta(round=0, model_version=0, samples=1 << 63, steps=1),
    "written bytes": UpdateMeta(round=0, model_version=0, samples=5, steps=1, written_bytes=1 << 63),
}


@pytest.mark.mosquitto
@pytest.mark.parametrize("kind", IMPLAUSIBLE)
def test_figures_that_cannot_be_are_refused(raw: Raw, kind: str) -> None:
    """2**63 samples must reach neither the model nor the database, which could not be read again."""
    job = raw.job()
    offer = raw.offer(job, raw.delta(job), meta=IMPLAUSIBLE[kind])
    with raw.one_line("update", str(offer.update), "refused"):
        raw.say(offer)
        assert not raw.verdict(offer.update).counted
    assert len(raw.status(job.run)["failures"]) == 1
    coordinator_cli(["stop", job.run, "--state", str(raw.state)])


UNBELIEVABLE = {
    "loss": UpdateMeta(round=0, model_version=0, samples=5, steps=1, loss=float("nan")),
    "infinite loss": UpdateMeta(round=0, model_version=0, samples=5, steps=1, loss=float("inf")),
    "evaluation": UpdateMeta(
        round=0, model_version=0, samples=5, steps=1, evaluation=Evaluation(samples=1, loss_sum=float("nan"))
    ),
}


@pytest.mark.mosquitto
@pytest.mark.parametrize("kind", UNBELIEVABLE)
def test_losses_that_cannot_be_are_unknown(raw: Raw, kind: str) -> None:
    """They reach no record, and the database can be read again; the update, which is sound, counts."""
    job = raw.job()
    offer = raw.offer(job, raw.delta(job), meta=UNBELIEVABLE[kind])
    with raw.one_line("device raw", job.run, "taken as unknown"):
        raw.say(offer)
        assert raw.verdict(offer.update).counted
    status = raw.status(job.run)
    assert (status["status"], status["train_loss"], status["device_accuracy"]) == ("finished", None, None)
    assert [entry["device_loss"] for entry in status["history"]] == [None]


def state_of(device: str) -> messages.DeviceState:
    return messages.DeviceState(device=device, online=True, session="s", instance="i")


def bare_offer(**changes: Any) -> UpdateOffer:
    meta = UpdateMeta(round=0, model_version=0, samples=5, steps=1)
    fields = {"update": UpdateId("nowhere-1", "raw", "r0-0", 0), "blob": BlobRef(sha256="ab" * 32, size_bytes=99)}
    return UpdateOffer(**{**fields, "meta": meta, **changes})


def packed(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


BAD_MESSAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "unknown run": (bare_offer(), ("nowhere-1/raw/r0-0/0 refused", "no such run")),
    "another's update": (bare_offer(update=UpdateId("run-1", "other", "r0-0", 0)), ("'raw' offers", "'other'")),
    "huge sequence": (bare_offer(update=UpdateId("run-1", "raw", "r0-0", (1 << 64) - 1)), ("sequence",)),
    "another's state": (state_of("other"), ("'raw' announces itself as 'other'",)),
    "noise": (b"\xc1\x00\xff" * 20, ("d/raw/message: message refused",)),
    "nothing of ours": (packed(v=1, t="evil"), ("message refused", "evil")),
    "wrong type of a field": (packed(v=1, t="need", sha256=7, ranges=[]), ("message refused", "$.sha256")),
    "no UTF-8": (b"\x82\xa1v\x01\xa1t\xa6\xff\xff\xff\xff\xff\xff", ("message refused",)),
    "nested 100,000 deep": (b"\x83\xa1v\x01\xa1t\xa6status\xa1q" + b"\x91" * 100_000 + b"\xc0", ("message refused",)),
    "other schema version": (packed(v=9, t="need"), ("schema version 9", "update the older side")),
    "oversize": (packed(v=1, t="status", reason="a" * 125_000), ("bytes refused: the limit is 120000",)),
}


@pytest.mark.mosquitto
@pytest.mark.parametrize("kind", BAD_MESSAGES)
def test_bad_messages_cost_one_line(raw: Raw, kind: str) -> None:
    """The log names the sender's topic or update and what is wrong; the coordinator answers the next message."""
    message, said = BAD_MESSAGES[kind]
    with raw.one_line(*said):
        raw.say(message)


@pytest.mark.mosquitto
@pytest.mark.parametrize("payload", [b"\xc1\x00", packed(v=1), b"\x95\x01\xfb" + b"\x00" * 8, bytes(500)])
def test_bad_heartbeats_cost_one_line(raw: Raw, payload: bytes) -> None:
    """Noise, another shape, a wrong type, too long: the line names the device's topic."""
    with raw.one_line("d/raw/heartbeat: heartbeat"):
        raw.say(payload, leaf="heartbeat")


@pytest.mark.mosquitto
def test_updates_of_unknown_devices_are_refused(raw: Raw) -> None:
    """A stranger that never announced itself cannot deliver for another device, and gets a verdict."""
    job = raw.job()
    stranger = UpdateId(job.run, "stranger", job.assignment, 0)
    with raw.one_line(f"update {stranger} refused: this assignment belongs to device raw"):
        raw.say(raw.offer(job, raw.delta(job), update=stranger), device="stranger")
    assert raw.status(job.run)["updates"] == {"counted": 0, "refused": 0, "pending": 0}
    offer = raw.offer(job, raw.delta(job))
    raw.say(offer)
    assert raw.verdict(offer.update).counted


@pytest.mark.mosquitto
def test_an_update_counts_once_however_often_it_comes(raw: Raw) -> None:
    """Offers before and after the verdict, and chunks that nobody asked for, change nothing."""
    job = raw.job()
    offer = raw.offer(job, raw.delta(job))
    for _ in range(3):
        raw.say(offer)
    assert raw.verdict(offer.update).counted
    for _ in range(3):
        raw.say(offer)
        raw.say(pack_chunk(offer.blob.sha256, 0, offer.first[4:]), "chunk")
    raw.barrier()
    assert raw.status(job.run)["updates"] == {"counted": 1, "refused": 0, "pending": 0}


@pytest.mark.mosquitto
def test_bad_chunks_are_refused_and_asked_again(raw: Raw) -> None:
    """A wrong CRC, a wrong length, a number that is not there and half a header: one line each, then the good one."""
    job = raw.job()
    data = raw.delta(job)
    offer = raw.offer(job, data, first=b"")
    raw.say(offer)
    wait_until(lambda: any(getattr(m, "sha256", "") == offer.blob.sha256 for m in raw.heard), 20, "the request")
    good = pack_chunk(offer.blob.sha256, 0, data)
    with raw.one_line("is damaged (CRC), refused"):
        raw.say(good[:-1] + bytes([good[-1] ^ 1]), "chunk")
    with raw.one_line("bytes, refused"):
        raw.say(pack_chunk(offer.blob.sha256, 0, data[:-1]), "chunk")
    with raw.one_line("chunk 1000 refused"):
        raw.say(pack_chunk(offer.blob.sha256, 1000, data), "chunk")
    with raw.one_line("chunk packet of 7 bytes refused"):
        raw.say(good[:7], "chunk")
    raw.say(good, "chunk")
    assert raw.verdict(offer.update).counted


@pytest.mark.mosquitto
def test_an_offer_that_is_all_of_its_update_is_checked(raw: Raw) -> None:
    """Without a hash to compare with, the CRC decides; the good offer that follows counts."""
    job = raw.job()
    offer = raw.offer(job, raw.delta(job), blob=None)
    with raw.one_line("the offer of update", str(offer.update), "carries a damaged chunk"):
        raw.say(msgspec.structs.replace(offer, first=offer.first[:-1] + bytes([offer.first[-1] ^ 1])))
    raw.say(offer)
    assert raw.verdict(offer.update).counted


@pytest.mark.mosquitto
def test_giants_do_not_fill_the_memory(raw: Raw) -> None:
    """An update of 10 GB is refused before it is fetched, and packets of 40 MB do not reach the coordinator."""
    job = raw.job()
    memory = psutil.Process(raw.pid).memory_info().rss
    giant = BlobRef(sha256="cd" * 32, size_bytes=10_000_000_000)
    offer = raw.offer(job, b"", blob=giant, first=b"")
    with raw.one_line(str(offer.update), "10000000000 bytes refused"):
        raw.say(offer)
        assert not raw.verdict(offer.update).counted
    for number in range(3):
        gone = threading.Event()
        client = raw.connect(f"giant-{number}")
        client.on_disconnect = lambda *_, gone=gone: gone.set()
        client.publish(topics.from_device("raw", "message"), bytes(40_000_000), qos=1)
        assert gone.wait(20)
        client.loop_stop()
    raw.barrier()
    assert psutil.Process(raw.pid).memory_info().rss - memory < 30e6
    assert list((raw.state / "blobs" / "partial").iterdir()) == []
    coordinator_cli(["stop", job.run, "--state", str(raw.state)])


@pytest.mark.mosquitto
def test_a_model_offered_as_an_update_does_not_vanish(raw: Raw) -> None:
    """Refusing an "update" whose bytes are the run's model or bundle must not delete that model or bundle."""
    job = raw.job()
    for number, blob in enumerate((*job.model.blobs, job.bundle)):
        size = blob.size_bytes
        update = UpdateId(job.run, "raw", job.assignment, number)
        raw.say(raw.offer(job, b"", blob=BlobRef(sha256=blob.sha256, size_bytes=size), update=update, first=b""))
        assert not raw.verdict(update).counted
    assert all((raw.state / "blobs" / blob.sha256).exists() for blob in (*job.model.blobs, job.bundle))
    coordinator_cli(["stop", job.run, "--state", str(raw.state)])


JOB = messages.Job(
    run="x-1",
    assignment="r0-0",
    round=0,
    model_version=0,
    bundle=BlobRef(sha256="cd" * 32, size_bytes=10_000_000_000),
    model=messages.ModelRef(blobs=[BlobRef(sha256="ab" * 32, size_bytes=100)]),
    dataset="d",
    deadline_s=60.0,
    epochs=1,
)
BAD_FOR_AGENTS: dict[str, tuple[bytes, str, str]] = {
    "noise": (b"\xc1\x00\xff" * 20, "message", "message refused"),
    "not for devices": (messages.encode(state_of("x")), "message", "message refused: Invalid value 'state'"),
    "no UTF-8": (b"\x82\xa1v\x01\xa1t\xa6\xff\xff\xff\xff\xff\xff", "message", "message refused"),
    "nested": (b"\x83\xa1v\x01\xa1t\xa3job\xa1q" + b"\x91" * 100_000 + b"\xc0", "message", "message refused"),
    "other schema version": (packed(v=9, t="job"), "message", "schema version 9"),
    "half a chunk header": (bytes(7), "chunk", "chunk packet of 7 bytes refused"),
    "bundle of 10 GB": (messages.encode(JOB), "message", "rejected: blob of 10000000000 bytes is over this device's"),
}


@pytest.mark.mosquitto
def test_agents_refuse_bad_messages_too(federation: Federation, toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each costs a line in the agent's log, and the device then trains as if nothing had been."""
    agent = federation.agent("pi", toy_data())
    federation.until(lambda: federation.coordinator.link.is_up and agent.link.is_up, "both links")
    for kind, (data, leaf, said) in BAD_FOR_AGENTS.items():
        caplog.clear()
        federation.coordinator.link.publish(topics.to_device("pi", leaf), data)
        federation.until(lambda: said in caplog.text, f"a line about {kind}")  # noqa: B023
        assert len([record for record in caplog.records if record.name == "edge.agent"]) == 1
    federation.finish(federation.submit(**plan(toy)))


# Disks


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[bool], None]]:
    """A file system of its own; the function it gives fills or frees it. Skips where it cannot be mounted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    filler = folder / "filler"

    def full(yes: bool) -> None:
        if not yes:
            filler.unlink()
            return
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    try:
        yield full
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.mosquitto
def test_disk_full_at_the_coordinator(
    tmp_path: Path, mosquitto: Any, toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With no room left it says so and goes on serving; with room again the run ends and no update was lost."""
    for module in (background, server):
        monkeypatch.setattr(module, "DISK_RETRY_S", 0.2)
    (tmp_path / "plan.toml").write_text(PLAN)
    with small_disk(tmp_path / "fed" / "coordinator", 4) as full, closed(tmp_path / "fed", mosquitto) as fed:
        for device in ("a", "b"):
            fed.agent(device, toy_data(), hold=True)
        given = plan(toy, rounds=4, participation={"target": 2, "minimum": 2, "deadline_s": 30.0})
        run = fed.submit(**given, retain_updates="all")
        state = ["--state", str(fed.store.folder)]
        for version in range(4):
            fed.until(lambda: len(fed.held) == 2, "updates")
            full(True)
            done = command("submit", str(tmp_path / "plan.toml"), *state)
            assert (done.returncode, done.stdout) == (1, "")
            assert "; free space" in one_line(done.stderr)
            caplog.clear()
            pump(fed)
            fed.until(lambda: "no space left" in caplog.text or "is full" in caplog.text, "a line about it")
            for _ in range(20):
                fed.loop.step(0.02)
            assert fed.row(run).version == version
            full(False)
            while fed.row(run).version == version:
                for agent in fed.agents.values():  # as they do by themselves, only sooner
                    for update in list(agent.state.updates):
                        agent.uploads.offer(update, push=False)
                pump(fed)
                for _ in range(10):
                    fed.loop.step(0.02)
        fed.finish(run)
        assert fed.store.update_counts(run) == {"counted": 8}
        assert command("verify", run, *state).returncode == 0


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``edge-coordinator ARGUMENTS`` in a process of its own."""
    line = [sys.executable, "-m", "coordinator.cli", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


@contextmanager
def closed(folder: Path, broker: Any) -> Iterator[Federation]:
    made = Federation(folder, broker)
    try:
        yield made
    finally:
        made.close()


def pump(fed: Federation) -> None:
    """Lets all held offers go."""
    for device in list(fed.held):
        fed.held.pop(device)()


@pytest.mark.mosquitto
def test_disk_full_at_the_agent(tmp_path: Path, mosquitto: Any, toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job that finds no room fails with that reason; the agent stays, and the next attempt succeeds."""
    with small_disk(tmp_path / "fed" / "pi" / "state", 2) as full, closed(tmp_path / "fed", mosquitto) as fed:
        agent = fed.agent("pi", toy_data())
        fed.until(lambda: agent.link.is_up, "the link")
        full(True)
        run = fed.submit(**plan(toy, participation={"target": 1, "deadline_s": 2.0, "attempts": 30}))
        fed.until(lambda: "no space left on the device; free space" in caplog.text, "the reason")
        assert agent.link.is_up
        full(False)
        fed.finish(run)


# Processes that start in the wrong order, or twice


@pytest.mark.mosquitto
def test_broker_that_comes_last(tmp_path: Path, mosquitto_program: str) -> None:
    """Coordinator and agent started without a broker say so once, wait, and work when it comes."""
    fleet = Processes(tmp_path, mosquitto_program)
    toy_bundle.write_bundle(tmp_path / "toy.bundle")
    (tmp_path / "plan.toml").write_text(PLAN.replace('"d"', '"numbers"'))
    try:
        fleet.start_coordinator()
        fleet.start_agent("pi", *toy_data())
        for name in ("coordinator", "pi"):
            log = tmp_path / f"{name}.log"
            wait_until(lambda log=log: "link down: cannot connect to" in log.read_text(), 20, "a line", fleet.logs)
        run = fleet.command("submit", str(tmp_path / "plan.toml"))["run"]
        fleet.start_broker()
        store = fleet.store()
        wait_until(lambda: store.run(run).row.status == "finished", 60, "the run to end", fleet.logs)
        store.close()
        for name in ("coordinator", "pi"):
            warnings = [line for line in (tmp_path / f"{name}.log").read_text().splitlines() if "WARNING" in line]
            assert len([line for line in warnings if "cannot connect" in line]) == 1
    finally:
        fleet.close()


@pytest.mark.mosquitto
def test_two_agents_with_one_state_folder(tmp_path: Path, mosquitto: Any) -> None:
    """The second process ends at once with exit code 2 and one line; the first works on."""
    with closed(tmp_path / "fed", mosquitto) as fed:
        agent = fed.agent("pi", toy_data())
        config = f'device = "pi"\nstate_dir = "state"\n[broker]\nurl = "{fed.connection["url"]}"\n'
        path = tmp_path / "fed" / "pi" / "agent.toml"
        path.write_text(config + '[[data]]\nname = "d"\npath = "data.npz"\n')
        command = [sys.executable, "-m", "edge_runtime.cli", "run", "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2
        assert "another agent runs on this state_dir; stop it" in one_line(done.stderr)
        fed.until(lambda: agent.link.is_up, "the first agent")


@pytest.mark.mosquitto
def test_two_agents_with_one_name(
    federation: Federation, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each side says it once, with the cure, and status shows the conflict."""
    for home in ("pi", "twin"):
        federation.agent("pi", toy_data(), home=federation.folder / home)
    said = ("two agents use the name 'pi'", "is another agent running as device 'pi'? Give each device its own name")
    federation.until(lambda: all(text in caplog.text for text in said), "both lines")
    for _ in range(100):
        federation.loop.step(0.02)
    assert caplog.text.count(said[0]) == 1
    assert caplog.text.count(said[1]) <= 2  # one by each of the two
    state = ["--state", str(federation.folder / "coordinator")]

    def conflict() -> str:
        assert coordinator_cli(["devices", "--json", *state]) == 0
        return json.loads(capsys.readouterr().out)[0]["conflict"]

    federation.until(conflict, "the conflict in status")
    assert "give one of them another name" in conflict()


@pytest.mark.mosquitto
def test_clocks_years_off_do_not_matter_without_tls(federation: Federation, toy: Path) -> None:
    """Devices that believe in 1970 and 2090 take part; deadlines on the wire are durations."""
    federation.agent("past", toy_data(), clock=lambda: 0.0)
    federation.agent("future", toy_data(), clock=lambda: 3.8e9)
    federation.finish(federation.submit(**plan(toy, participation={"target": 2, "minimum": 2, "deadline_s": 60.0})))


def test_a_clock_that_was_never_set_waits_before_tls(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With mqtts an agent whose clock stands in 1970 says what it waits for, and does not connect."""
    (tmp_path / "agent.toml").write_text(AGENT.replace("mqtt://localhost:1883", "mqtts://localhost:1"))
    script = (
        "import time, logging, sys\nfrom pathlib import Path\nlogging.basicConfig(level=20)\n"
        "from edge_runtime import Agent, load_agent_config\n"
        "agent = Agent(load_agent_config(Path(sys.argv[1])), clock=lambda: 0.0)\n"
        "agent.loop.call_later(0.5, agent.stop)\nagent.run()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "agent.toml")]
    subprocess.run(command, check=True, timeout=60)
    log = capfd.readouterr().err
    assert log.count("the clock says 1970-01-01: waiting for time synchronisation") == 1
    assert "cannot connect" not in log


# Configuration

AGENT = """device = "pi"
state_dir = "state"
[broker]
url = "mqtt://localhost:1883"
[[data]]
name = "d"
path = "d.npz"
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('device = "pi"', 'device = "pi"\ndevcie = 1', "devcie"),
        ('name = "d"', 'name = "d"\npth = 1', "pth"),
        ('device = "pi"', "device = 7", "device is a whole number, but must be text in quotes"),
        ("[broker]", "[limits]\nworker_threads = 0\n[broker]", "worker_threads"),
        ('device = "pi"', "device = ", "not valid TOML"),
        ("mqtt://localhost", "mqtt://far.example", "use mqtts://"),
    ],
)
def test_agents_name_the_wrong_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    """``edge-agent run``: exit code 2 and one line with the key."""
    (tmp_path / "agent.toml").write_text(AGENT.replace(old, new))
    assert agent_cli(["run", "--config", str(tmp_path / "agent.toml")]) == 2
    assert said in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rounds = 1", "rounds = 1\nruonds = 2", "ruonds"),
        ("target = 1", "target = 1\nminimun = 2", "minimun"),
        ("rounds = 1", 'rounds = "many"', "rounds is text in quotes, but must be a whole number"),
        ("epochs = 1", "epochs = 0", "training.epochs must be a whole number >= 1"),
        ("epochs = 1", "", "exactly one of training.epochs and training.steps"),
        ("rounds = 1", "rounds =", "not valid TOML"),
    ],
)
def test_plans_name_the_wrong_key(toy: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str) -> None:
    """``edge-coordinator submit``: exit code 2 and one line with the key."""
    path = toy.parent / "plan.toml"
    path.write_text(PLAN.replace(old, new))
    assert coordinator_cli(["submit", str(path), "--state", str(toy.parent / "state")]) == 2
    error = one_line(capsys.readouterr().err)
    assert said in error
    assert str(path) in error


# Workers


@pytest.mark.mosquitto
@pytest.mark.parametrize("limit_mb", [160, 300])
def test_a_job_that_needs_too_much_memory_fails_alone(federation: Federation, toy: Path, limit_mb: int) -> None:
    """The worker's limit ends the job with a reason that says so; the agent stays and does a smaller one."""
    agent = federation.agent("pi", toy_data(1_500_000), worker_memory_mb=limit_mb)
    rules = {"target": 1, "deadline_s": 20.0, "attempts": 1}
    training = {"epochs": 1, "batch_size": 1_500_000}
    run = federation.submit(**plan(toy, participation=rules, training=training))
    federation.until(lambda: federation.row(run).status == "failed", "the run to fail")
    reason = federation.row(run).reason
    assert "out of memory; lower the batch size or raise limits.worker_memory_mb" in reason, reason
    assert agent.link.is_up
    federation.finish(federation.submit(**plan(toy, training={"steps": 2, "batch_size": 8})))


@pytest.mark.mosquitto
def test_a_bundle_that_crashes_the_worker_is_put_in_quarantine(
    federation: Federation, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After three crashes the device refuses it, status says so, and another bundle still trains there."""
    agent = federation.agent("pi", toy_data())
    rules = {"target": 1, "deadline_s": 1.0, "attempts": 30}
    run = federation.submit(**plan(toy, participation=rules, training={"steps": 100_000_000, "batch_size": 8}))
    killed: set[int] = set()
    while len(killed) < 3:
        federation.until(lambda: agent.state.running is not None and agent.supervisor.pid not in killed, "a worker")
        assert agent.supervisor.pid is not None
        killed.add(agent.supervisor.pid)
        os.kill(agent.supervisor.pid, signal.SIGKILL)
        federation.until(lambda: agent.state.running is None, "the job to fail")
    state = ["--state", str(federation.folder / "coordinator")]

    def failures() -> str:
        assert coordinator_cli(["status", run, "--json", *state]) == 0
        return str(json.loads(capsys.readouterr().out)["failures"])

    federation.until(lambda: "crashed the worker 3 times and is in quarantine" in failures(), "quarantine in status")
    assert "most likely for lack of memory" in failures()
    other = toy_bundle.write_bundle(toy.parent / "other.bundle", name="other")
    federation.finish(federation.submit(**plan(other)))
    federation.until(lambda: federation.row(run).status == "failed", "the run to fail")
    assert "quarantine" in federation.row(run).reason


# Code


def test_nothing_received_is_unpickled_or_executed() -> None:
    """No module of the product imports a pickling module or calls what executes or unpickles."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    found = []
    for package in ("coordinator", "edge_runtime", "energy", "exporters"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [entry.name.partition(".")[0] for entry in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [(node.module or "").partition(".")[0]]
                elif isinstance(node, ast.Call):
                    found += [f"{path.name}:{node.lineno}"] if _executes(node) else []
                found += [f"{path.name}:{node.lineno}" for name in names if name in modules]
    assert found == []


def _executes(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in ("eval", "exec", "compile")
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return False
    if function.value.id == "np" and function.attr == "load":
        allowed = [entry.value for entry in call.keywords if entry.arg == "allow_pickle"]
        return not (len(allowed) == 1 and isinstance(allowed[0], ast.Constant) and allowed[0].value is False)
    return (function.value.id, function.attr) in {("torch", "load"), ("yaml", "load")}


def one_line(text: str) -> str:
    """The text without its line end; fails if it is not exactly one line."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]
