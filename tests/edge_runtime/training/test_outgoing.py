"""What leaves a job: no part of any update is lost between what was sent, what was not, and what came back."""

from __future__ import annotations

import errno
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.agent.pipe import RefusedUpdate
from edge_runtime.compression import registry
from edge_runtime.compression.pipeline import encode_model
from edge_runtime.errors import CodecError, StorageError
from edge_runtime.messages import UpdateId
from edge_runtime.store.models import HeldModels
from edge_runtime.training import outgoing
from edge_runtime.training.job import JobRunner
from edge_runtime.training.received import vector_sha256
from edge_runtime.training.state import RunState, codec_key, encode_state, load_state
from tests.edge_runtime.toy_codec import Predicting
from tests.edge_runtime.toy_jobs import ToyJobs

LOSSY = {"codec": "topk", "codec_options": {"density": 0.2}}


class Device:
    """Runs jobs one after the other as the agent does, and adds up where everything is."""

    def __init__(self, folder: Path) -> None:
        self.jobs = ToyJobs(folder)
        self.runner = JobRunner()
        self.layout = self.jobs.bundle.layout()
        self.state_path = ""
        self.refused: list[RefusedUpdate] = []
        self.counted = np.zeros(self.layout.size, np.float64)
        self.trained = np.zeros(self.layout.size, np.float64)

    def do(self, assignment: str, **job):
        request = self.jobs.request(assignment=assignment, **job)
        plain = msgspec.structs.replace(request.job, codec="raw", codec_options={}, byte_budget=None)
        self.trained += self.jobs.delta(JobRunner().run(msgspec.structs.replace(request, job=plain)))
        request = msgspec.structs.replace(request, state_path=self.state_path, refused=self.refused)
        done = self.runner.run(request)
        assert done.returned == [refused.update for refused in self.refused]
        self.state_path, self.refused = done.state_path, []
        return done

    def settle(self, assignment: str, done, *, counted: bool) -> None:
        if counted:
            self.counted += self.jobs.delta(done)
        else:
            self.refused = [
                RefusedUpdate(update=UpdateId("r", "pi", assignment, 0), path=done.path, key=done.key),
            ]

    def residual(self, **job) -> np.ndarray:
        """What the state holds back, float64 ``[layout.size]``."""
        spec = outgoing.spec_of(self.jobs.request(**job))
        path = Path(self.state_path) if self.state_path else None
        state = load_state(path, self.jobs.bundle.sha256, codec_key(self.jobs.bundle.sha256, spec)).codec
        vector = np.zeros(self.layout.size, np.float64)
        is_buffer = np.zeros(self.layout.size, bool)
        for name, _, start, end in self.layout.spans():
            is_buffer[start:end] = name in self.layout.buffers
        vector[~is_buffer] = state.get("delta.feedback.residual", 0)
        vector[is_buffer] = state.get("delta.buffers.residual", 0)
        return vector


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path)


@pytest.mark.parametrize("codec", ["topk", "int8", "int4", "sign", "stc", "eden", "randomk", "half", "powersgd"])
def test_counted_and_residual_are_all_that_was_trained(device, codec):
    """With every lossy codec, some updates counted and some refused: nothing is missing, nothing is there twice."""
    job = {"codec": codec, "codec_options": {"error_feedback": True}}
    for number, counted in enumerate((True, False, False, True, True, False)):
        done = device.do(str(number), **job)
        device.settle(str(number), done, counted=counted)
    open_ = device.jobs.delta(done)  # the last one was refused and has not been taken back yet
    np.testing.assert_allclose(device.counted + device.residual(**job) + open_, device.trained, atol=1e-5)
    done = device.do("last", **job)
    total = device.counted + device.residual(**job) + device.jobs.delta(done)
    np.testing.assert_allclose(total, device.trained, atol=1e-5)


def test_a_refused_update_that_needs_its_model_finds_it(device, monkeypatch):
    """What was predicted from the model that was trained can be taken back after other models came."""
    monkeypatch.setitem(registry._loaded, "predicting", Predicting)
    done = device.do("a", codec="predicting", model_version=4)
    device.settle("a", done, counted=False)
    refused = msgspec.structs.replace(device.jobs.request(codec="predicting"), refused=device.refused)
    sha256 = vector_sha256(device.jobs.bundle.initial_vector())
    before = outgoing.reference(refused, 4, sha256, device.jobs.bundle, device.layout)
    np.testing.assert_array_equal(before, device.jobs.bundle.initial_vector())
    device.jobs.write_model(device.jobs.bundle.initial_vector() + np.float32(1))
    held = device.jobs.folder / "models" / "r"
    assert [path.name for path in held.iterdir()] == ["4.model"]
    done = device.do("b", codec="predicting", model_version=5)
    sent = outgoing.decode(
        device.jobs.read(done),
        {"delta": device.layout},
        reference=device.jobs.bundle.initial_vector() + np.float32(1),
    )["delta"].vector()
    np.testing.assert_allclose(device.residual(codec="predicting") + sent, device.trained, atol=1e-2)  # buffers: half


def test_an_anchor_takes_a_refused_update_back_and_leaves_it_for_the_next(device, monkeypatch):
    """A gradient is no step, so nothing refused goes into it; the model that came with more is found again."""
    monkeypatch.setitem(registry._loaded, "predicting", Predicting)
    zeros = np.zeros(device.layout.size, np.float32)
    device.jobs.write_model(device.jobs.bundle.initial_vector(), anchor=zeros)
    job = {"codec": "predicting", "method": "fedamd"}
    device.settle("a", device.do("a", **job, model_version=4), counted=False)
    trained = device.trained.copy()
    anchor = JobRunner().run(
        msgspec.structs.replace(
            device.jobs.request(**job, assignment="b", role="anchor"),
            state_path=device.state_path,
            refused=device.refused,
        )
    )
    assert anchor.returned == [refused.update for refused in device.refused]
    assert anchor.key == ""
    device.state_path, device.refused = anchor.state_path, []
    np.testing.assert_allclose(device.residual(codec="predicting"), trained, atol=1e-2)  # buffers: half


@pytest.mark.parametrize("predicts", [False, True])
def test_only_bytes_that_need_the_model_keep_it(device, monkeypatch, predicts):
    """A codec that may predict does not always: most updates decode by themselves, and no model is written for them."""
    durable = []
    monkeypatch.setattr(HeldModels, "make_durable", lambda _self, run, version: durable.append((run, version)))
    monkeypatch.setattr(Predicting, "predicts", lambda *_: predicts)
    monkeypatch.setitem(registry._loaded, "predicting", Predicting)
    done = device.do("a", codec="predicting", model_version=4)
    assert durable == ([("r", 4)] if predicts else [])
    assert (device.jobs.folder / "models").exists() == predicts
    assert done.key.endswith(vector_sha256(device.jobs.bundle.initial_vector())) == predicts
    assert done.key


def test_the_default_codec_keeps_no_model_for_updates_that_decode_without(device):
    """Those of a small model are not predicted."""
    done = device.do("a", codec="default")
    device.jobs.delta(done)
    assert not (device.jobs.folder / "models").exists()


def test_a_refused_update_whose_model_is_gone_is_dropped_with_a_word(device, monkeypatch, caplog):
    """The run goes on; the log says what was lost."""
    monkeypatch.setitem(registry._loaded, "predicting", Predicting)
    device.settle("a", device.do("a", codec="predicting"), counted=False)
    (device.jobs.folder / "models" / "r" / "4.model").unlink()
    device.do("b", codec="predicting", model_version=5)
    assert "update r/pi/a/0 was refused and cannot be sent again: model version 4 of run 'r'" in caplog.text


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.with_name("other").replace(path)])
def test_bytes_predicted_from_another_model_are_not_decoded(device, monkeypatch, caplog, damage):
    """Without a shared model, version 0 is not what the bundle's grid gives, and a file may be that of another run: the
    numbers that would come out look right, but nothing of them gets into the residual."""
    monkeypatch.setitem(registry._loaded, "predicting", Predicting)
    start = device.jobs.bundle.initial_vector() + np.float32(0.001)  # off the grid
    device.jobs.write_model(start)
    device.settle("a", device.do("a", codec="predicting", model_version=0), counted=False)
    held = device.jobs.folder / "models" / "r" / "0.model"
    held.with_name("other").write_bytes(encode_model(device.jobs.bundle.initial_vector(), device.layout))
    damage(held)
    device.trained = device.residual(codec="predicting")
    done = device.do("b", codec="predicting", model_version=5)
    assert "refused and cannot be sent again: model version 0 of run 'r' is not here as it was then" in caplog.text
    sent = outgoing.decode(device.jobs.read(done), {"delta": device.layout}, reference=start)["delta"].vector()
    np.testing.assert_allclose(device.residual(codec="predicting") + sent, device.trained, atol=1e-3)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"half"), Path.unlink])
def test_a_refused_update_that_is_damaged_is_dropped_with_a_word(device, caplog, damage):
    """Bytes that rotted where they lay cost themselves, not the run."""
    done = device.do("a", **LOSSY)
    device.settle("a", done, counted=False)
    damage(Path(done.path))
    device.do("b", **LOSSY)
    assert "was refused and cannot be sent again" in caplog.text


def test_bytes_of_another_update_are_not_taken_back(device, caplog):
    """The tag inside says whose they are."""
    done = device.do("a", **LOSSY)
    device.settle("b", done, counted=False)
    device.do("c", **LOSSY)
    assert "those of another update" in caplog.text


def test_lossless_codecs_and_those_without_feedback_keep_nothing(device):
    """There is no state to write, and a refused update cannot be taken back."""
    for job in ({}, {"codec": "zstd"}, {"codec": "topk", "codec_options": {"error_feedback": False}}):
        done = device.do("a", **job)
        assert (done.state_path, done.key) == ("", "")
        assert done.meta.written_bytes == done.size_bytes


def test_another_codec_starts_clean_and_a_method_keeps_its_memory(device):
    """With another codec, option or bundle the residual and what was refused are dropped."""
    done = device.do("a", **LOSSY)
    device.settle("a", done, counted=False)
    assert done.meta.written_bytes == done.size_bytes + Path(done.state_path).stat().st_size
    assert device.residual(**LOSSY).any()
    other = {"codec": "topk", "codec_options": {"density": 0.25}}
    assert not device.residual(**other).any()
    (device.jobs.folder / "alone").mkdir()
    alone = Device(device.jobs.folder / "alone")
    np.testing.assert_array_equal(device.jobs.delta(device.do("b", **other)), alone.jobs.delta(alone.do("b", **other)))


def test_state_survives_and_belongs_to_bundle_and_codec(tmp_path):
    """Arrays of any type come back as they were; another bundle drops all of it, another codec its own part."""
    state = RunState(
        codec={"q": np.arange(6, dtype=np.int16).reshape(2, 3), "empty": np.zeros(0, np.float32)},
        memory={"m": np.float32([1, 2])},
        personal={"p": np.float32([[3]])},
    )
    path = tmp_path / "s"
    path.write_bytes(encode_state(state, "bundle", "key"))
    loaded = load_state(path, "bundle", "key")
    for kind in ("codec", "memory", "personal"):
        for name, array in getattr(state, kind).items():
            found = getattr(loaded, kind)[name]
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found, array)
    loaded.memory["m"] += 1  # a method may work on it in place
    other = load_state(path, "bundle", "other key")
    assert (other.codec, set(other.memory), set(other.personal)) == ({}, {"m"}, {"p"})
    assert not load_state(path, "other bundle", "key")
    assert not load_state(None, "bundle", "key")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:30] + b"x" + path.read_bytes()[31:]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xc0" + zlib.crc32(b"\xc0").to_bytes(4, "little")),
        Path.unlink,
    ],
)
def test_a_damaged_state_costs_itself_and_not_the_run(device, caplog, damage):
    """The log names the file and what is lost; the next job does not start from what rotted, but it is done."""
    device.do("a", **LOSSY)
    assert device.residual(**LOSSY).any()
    damage(Path(device.state_path))
    lost = device.state_path
    device.trained[:] = 0
    done = device.do("b", **LOSSY)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.message.startswith(f"{lost}: ")
    assert "lost are the residual" in record.message
    assert device.state_path != lost
    np.testing.assert_allclose(device.jobs.delta(done) + device.residual(**LOSSY), device.trained, atol=1e-5)


def test_a_state_that_cannot_be_read_for_now_is_not_given_up(tmp_path, monkeypatch):
    """Too many open files, or permissions, are no loss: the job fails, and a later one finds the state."""
    path = tmp_path / "s"
    path.write_bytes(encode_state(RunState(memory={"m": np.float32([1])}), "bundle", "key"))

    def refuse(_path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(StorageError, match="Too many open files"):
            load_state(path, "bundle", "key")
    assert load_state(path, "bundle", "key").memory["m"] == [1]


def test_key_names_bundle_codec_and_options():
    """The order of options does not matter, everything else does."""
    spec = outgoing.CodecSpec
    keys = [
        codec_key("b", spec("topk")),
        codec_key("c", spec("topk")),
        codec_key("b", spec("int8")),
        codec_key("b", spec("topk", {"density": 0.1, "momentum": 0.5})),
        codec_key("b", spec("topk", {"density": 0.2, "momentum": 0.5})),
    ]
    assert len(set(keys)) == len(keys)
    assert codec_key("b", spec("topk", {"momentum": 0.5, "density": 0.1})) == keys[3]


def test_a_full_disk_leaves_neither_update_nor_state(device, monkeypatch):
    """If the second of the two files cannot be written, the first one goes too."""
    real = outgoing.write_durably

    def full(path, data):
        if path.suffix == ".update":
            raise StorageError(f"{path}: no space left on the device")
        real(path, data)

    monkeypatch.setattr(outgoing, "write_durably", full)
    with pytest.raises(StorageError, match="no space left"):
        device.runner.run(device.jobs.request(**LOSSY))
    assert list(device.jobs.out.iterdir()) == []


def test_unknown_options_and_budgets_that_cannot_be_kept_are_told(device):
    """Before anything is trained, or when it is encoded; no file is left."""
    with pytest.raises(CodecError, match="codec 'topk' has no option 'densety'; it has density"):
        device.runner.run(device.jobs.request(codec="topk", codec_options={"densety": 0.1}))
    with pytest.raises(CodecError, match="is 'much', expected a number"):
        device.runner.run(device.jobs.request(codec="topk", codec_options={"density": "much"}))
    with pytest.raises(CodecError, match="but 3 are allowed"):
        device.runner.run(device.jobs.request(codec="zstd", byte_budget=3))
    assert list(device.jobs.out.iterdir()) == []


@pytest.mark.parametrize("codec", ["topk", "default"])
def test_a_byte_budget_is_kept_and_nothing_is_lost_for_it(device, codec):
    """What does not fit into the budget is held back for the next update."""
    for number, budget in enumerate((60, 45, None, 60)):
        done = device.do(str(number), codec=codec, byte_budget=budget)
        assert budget is None or done.size_bytes <= budget
        sent = outgoing.decode(
            device.jobs.read(done), {"delta": device.layout}, reference=device.jobs.bundle.initial_vector()
        )
        device.counted += sent["delta"].vector()
    np.testing.assert_allclose(device.counted + device.residual(codec=codec), device.trained, atol=1e-5)
    assert device.residual(codec=codec).any()
