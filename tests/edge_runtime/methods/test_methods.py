"""Every registered client method: neutral is FedAvg, channels are as declared, personal tensors never leave."""

from importlib.metadata import EntryPoint

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import Bundle
from edge_runtime.compression.pipeline import decode
from edge_runtime.errors import TrainingError
from edge_runtime.methods import ClientMethod, create_method, method_class, method_names, registry
from edge_runtime.training.job import JobRunner
from tests.edge_runtime import toy_bundle
from tests.edge_runtime.toy_jobs import ToyJobs


class Forced(ClientMethod):
    """FedAvg on the gradients+update path."""

    name = "forced"

    def gradient_hook(self):
        return lambda gradient, _weights: gradient


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
    return JobRunner().run(msgspec.structs.replace(jobs.request(**job), state_path=state))


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
    done = JobRunner().run(jobs.request(method=name))
    vectors = decode(jobs.read(done), dict.fromkeys(method.channels, jobs.bundle.layout()))
    assert set(vectors) == set(method.channels)


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
    changed = method.gradient_hook()(np.array([10, 20], np.float32), np.array([3, 2], np.float32))
    np.testing.assert_array_equal(changed, [11, 20])
    with pytest.raises(TrainingError, match="'mu' of method 'fedprox' is -1"):
        create_method("fedprox", {"mu": -1.0})


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
    with pytest.raises(TrainingError, match="method 'best' is unknown here; known: fedavg, fedprox"):
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
