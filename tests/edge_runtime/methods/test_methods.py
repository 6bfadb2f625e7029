"""Every registered client method: neutral is FedAvg, channels are as declared, personal tensors never leave."""

from importlib.metadata import EntryPoint

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import Bundle
from edge_runtime.compression.pipeline import decode
from edge_runtime.errors import CodecError, TrainingError
from edge_runtime.methods import ClientMethod, create_method, method_class, method_names, registry
from edge_runtime.training.job import JobRunner
from tests.edge_runtime import toy_bundle
from tests.edge_runtime.toy_jobs import ToyJobs


class Forced(ClientMethod):
    """FedAvg on the gradients+update path."""

    name = "forced"

    def gradient_hook(self):
        return lambda gradient, _weights, _gradient_at: gradient


class Personal(ClientMethod):
    """Keeps its bias; counts its rounds in its memory."""

    name = "personal"

    def personal(self, _layout):
        return frozenset({"b"})

    def on_receive(self, received, layout, memory):
        memory["rounds"] = memory.get("rounds", np.zeros(1, np.float32)) + 1
        self.start = layout.split(received)["b"].copy()
        return received


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    own = {cls.name: EntryPoint(cls.name, f"{__name__}:{cls.__name__}", registry.GROUP) for cls in (Forced, Personal)}
    classes = {Forced.name: Forced, Personal.name: Personal}
    monkeypatch.setattr(registry, "_entry_points", lambda: own)
    monkeypatch.setattr(EntryPoint, "load", lambda self: classes[self.name])
    return ToyJobs(tmp_path)


def delta(jobs, state="", **job):
    return jobs.delta(done(jobs, state, **job))


def done(jobs, state="", **job):
    send_beside(jobs, job.get("method", "fedavg"))
    return JobRunner().run(msgspec.structs.replace(jobs.request(**job), state_path=state))


def send_beside(jobs, method, **vectors):
    """Writes the model, and what else the method's server sends: zeros unless given."""
    layout = jobs.bundle.layout()
    names = set(method_class(method).down_channels) - {"model"}
    beside = {name: vectors.get(name, np.zeros(layout.size, np.float32)) for name in names}
    jobs.write_model(jobs.bundle.initial_vector(), **beside)


@pytest.mark.parametrize("name", method_names())
def test_neutral_options_are_fedavg(jobs, name):
    """Bit for bit on the gradients+update path, and within 1e-6 of the fused step."""
    neutral = dict(method_class(name).neutral)
    one = {"epochs": None, "steps": 1}
    fused = delta(jobs, method="fedavg", **one)
    np.testing.assert_allclose(delta(jobs, method=name, options=neutral, **one), fused, atol=1e-6)
    hook = create_method(name, neutral).gradient_hook()
    if hook is not None:
        np.testing.assert_array_equal(delta(jobs, method=name, options=neutral), delta(jobs, method="forced"))
    np.testing.assert_allclose(delta(jobs, method=name, options=neutral), delta(jobs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", method_names())
def test_methods_send_the_channels_they_declare(jobs, name):
    """The update holds exactly the declared channels, each of the model's layout."""
    method = method_class(name)
    for role, channels in {"trainer": method.channels, **method.roles}.items():
        sent = jobs.read(done(jobs, method=name, role=role))
        assert set(decode(sent, dict.fromkeys(channels, jobs.bundle.layout()))) == set(channels)


@pytest.mark.parametrize("name", method_names())
def test_options_are_checked_by_name(name):
    """A misspelt or impossible hyper-parameter is refused."""
    with pytest.raises(TrainingError, match=f"method '{name}' has no option 'strenght'"):
        create_method(name, {"strenght": 1.0})
    for option in method_class(name).defaults:
        with pytest.raises(TrainingError, match="give a finite number"):
            create_method(name, {option: float("inf")})


def test_fedprox_follows_its_equation(jobs):
    """Each step adds mu * (w - received) to the gradient; a strong pull keeps weights near."""
    free, pulled = delta(jobs), delta(jobs, method="fedprox", options={"mu": 5.0})
    assert np.abs(pulled[:15]).max() < 0.3 * np.abs(free[:15]).max()
    one = {"epochs": None, "steps": 1}
    np.testing.assert_allclose(delta(jobs, method="fedprox", options={"mu": 5.0}, **one), delta(jobs, **one), atol=1e-6)
    method = create_method("fedprox", {"mu": 0.5})
    received = np.array([1, 2], np.float32)
    method.on_receive(received, jobs.bundle.layout(), {})
    changed = method.gradient_hook()(np.array([10, 20], np.float32), np.array([3, 2], np.float32), None)
    np.testing.assert_array_equal(changed, [11, 20])
    with pytest.raises(TrainingError, match="'mu' of method 'fedprox' is -1"):
        create_method("fedprox", {"mu": -1.0})


def gradient_at(jobs, weights):
    """Over all samples, by one plain step from there."""
    jobs.write_model(weights)
    one = {"epochs": None, "steps": 1, "batch_size": 60, "hyper": {"lr": 1.0, "momentum": 0.0}}
    change = jobs.delta(JobRunner().run(jobs.request(**one))).copy()
    change[15:] = 0
    return -change


def test_fedamd_miners_follow_the_anchors_mean(jobs):
    """Against the algorithm with one batch of all samples: g grows by the difference of two gradients."""
    start, anchor = jobs.bundle.initial_vector(), np.linspace(-1, 1, jobs.bundle.layout().size, dtype=np.float32)
    anchor[15:] = 0
    weights, direction, before = start.copy(), anchor.copy(), None
    for _ in range(3):
        if before is not None:
            direction = direction - gradient_at(jobs, before) + gradient_at(jobs, weights)
        before, weights = weights, weights - np.float32(0.05) * direction
    send_beside(jobs, "fedamd", anchor=anchor)
    job = {"epochs": None, "steps": 3, "batch_size": 60, "hyper": {"lr": 0.05, "momentum": 0.0}}
    found = jobs.delta(JobRunner().run(jobs.request(method="fedamd", **job)))
    np.testing.assert_allclose(found[:15], (weights - start)[:15], rtol=1e-3, atol=1e-5)


def test_fedamd_anchors_send_the_gradient_of_what_they_received(jobs):
    """One pass, no steps, and nothing of the codec's residual is taken or left."""
    sent = done(jobs, method="fedamd", role="anchor", epochs=None)
    expected = gradient_at(jobs, jobs.bundle.initial_vector())
    np.testing.assert_allclose(jobs.delta(sent, "anchor"), expected, rtol=1e-4, atol=1e-6)
    assert (sent.meta.steps, sent.meta.samples) == (0, 60)
    assert sent.meta.loss_rms >= sent.meta.loss
    lossy = {"method": "fedamd", "codec": "topk", "codec_options": {"density": 0.3, "momentum": 0.5}}
    first = done(jobs, **lossy)
    assert first.state_path
    between = done(jobs, first.state_path, role="anchor", **lossy)
    assert between.key == ""
    after_both, after_first = (
        jobs.read(done(jobs, state, assignment="b", **lossy)) for state in (between.state_path, first.state_path)
    )
    assert after_both == after_first


def test_methods_without_a_role_refuse_it_by_name(jobs):
    """Before anything is read or trained."""
    with pytest.raises(TrainingError, match="method 'fedprox' has no role 'anchor'; only trainers can be asked"):
        done(jobs, method="fedprox", role="anchor")


def test_what_comes_with_the_model_must_be_what_the_method_wants(jobs):
    """A plain model is not enough for FedAMD, and more than a model is not FedAvg's."""
    jobs.write_model(jobs.bundle.initial_vector())
    with pytest.raises(CodecError, match="made for other tensors"):
        JobRunner().run(jobs.request(method="fedamd"))
    send_beside(jobs, "fedamd")
    with pytest.raises(CodecError, match="made for other tensors"):
        JobRunner().run(jobs.request())


def test_personal_tensors_stay_and_continue(jobs):
    """What is personal is zero in the update, is kept on the device, and is where the next round starts."""
    before = done(jobs, method="personal")
    first = jobs.bundle.layout().split(jobs.delta(before))
    assert (first["b"] == 0).all()
    assert (first["w"] != 0).any()
    seen = []
    original = Personal.on_finish

    def spy(self, received, trained, layout, memory):
        seen.append((self.start, memory["rounds"][0], layout.split(trained)["b"]))
        return original(self, received, trained, layout, memory)

    Personal.on_finish = spy
    try:
        delta(jobs, before.state_path, method="personal", assignment="second")
    finally:
        Personal.on_finish = original
    start, rounds, trained = seen[0]
    assert (start != 0).any()
    assert rounds == 2
    assert (trained == 0).all()


def test_a_job_done_again_starts_from_the_same_state(jobs):
    """If an update is lost and its job comes again, it gives the same bytes."""
    before = done(jobs, method="personal", assignment="first").state_path
    second = done(jobs, before, method="personal", assignment="second")
    again = delta(jobs, before, method="personal", assignment="second")
    np.testing.assert_array_equal(again, jobs.delta(second))
    third = delta(jobs, second.state_path, method="personal", assignment="second")
    assert (third != again).any()


def test_unknown_methods_list_the_known():
    """A job for a method that is not installed is refused with those that are."""
    with pytest.raises(TrainingError, match="method 'best' is unknown here; known: fedamd, fedavg, fedprox"):
        create_method("best")


def test_a_method_that_breaks_its_word_is_refused(jobs, monkeypatch):
    """Channels that were not declared never leave."""
    monkeypatch.setattr(Forced, "channels", ("delta", "extra"))
    with pytest.raises(TrainingError, match=r"sends \['delta'\], but declares \['delta', 'extra'\]"):
        JobRunner().run(jobs.request(method="forced"))
    monkeypatch.setattr(Personal, "personal", lambda *_: frozenset({"none"}))
    with pytest.raises(TrainingError, match="keeps 'none' personal, which the model lacks"):
        JobRunner().run(jobs.request(method="personal"))


def test_the_toy_is_a_bundle(jobs):
    """The helper itself."""
    assert Bundle.open(jobs.bundle.path).layout().names == ("w", "b", "seen")
    assert toy_bundle.CLASSES == 3
