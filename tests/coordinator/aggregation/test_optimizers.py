"""Server optimisers: neutral options are plain steps, the formula of each, and buffers go past them."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation import OPTIMIZERS, create_optimizer
from coordinator.errors import ModelError, PluginError
from coordinator.plan import Training
from edge_runtime.compression import Layout
from tests.coordinator.aggregation.rounds import Server, plan_of, sent_by, vectors

NEUTRAL = {
    "sgd": {},
    "momentum": {"momentum": 0.0},
    "adam": {"beta1": 0.0, "beta2": 1.0, "tau": 0.5, "lr": 1.0},
    "yogi": {"beta1": 0.0, "beta2": 1.0, "tau": 0.5, "lr": 1.0},
    "fedhyper_g": {"rate": 0.0},
    "fedhyper_sl": {"rate": 0.0, "client_lr": 0.05},
}


def plan_with(optimizer, options=None, **changes):
    return plan_of(server_optimizer=optimizer, server_optimizer_options=options or {}, **changes)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_neutral_options_are_plain_steps_bit_for_bit(tmp_path, name):
    """Three rounds of FedAvg, with an optimiser that adds nothing."""
    plain, own = Server(tmp_path / "plain", plan_of()), Server(tmp_path / "own", plan_with(name, NEUTRAL[name]))
    for number in range(3):
        sent = sent_by(vectors(4, number))
        plain.round(sent)
        own.round(sent)
    assert own.model().tobytes() == plain.model().tobytes()


def test_momentum_adds_up(tmp_path):
    """Two rounds of the same change: the second step is (1 + momentum) times the first."""
    server = Server(tmp_path, plan_with("momentum", {"momentum": 0.5, "lr": 0.1}))
    sent = sent_by(vectors(1))
    first, second = server.round(sent), server.round(sent)
    np.testing.assert_allclose(first, 0.1 * sent[0].vector, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(second, 1.5 * first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_adaptive_steps_follow_their_formulas(name):
    """Three steps against the algorithm as printed, number by number."""
    options = {"lr": 0.3, "tau": 0.01, "beta1": 0.8, "beta2": 0.7}
    optimizer = OPTIMIZERS.create(name, options)
    base, state = np.zeros(5, np.float32), optimizer.init(5)
    mean, square, expected = np.zeros(5), np.full(5, 1e-4), np.zeros(5)
    for number in range(3):
        change = np.random.default_rng(number).normal(size=5)
        mean = 0.8 * mean + 0.2 * change
        if name == "adam":
            square = 0.7 * square + 0.3 * change**2
        else:
            square = square - 0.3 * change**2 * np.sign(square - change**2)
        expected = expected + 0.3 * mean / (np.sqrt(square) + 0.01)
        base, state, hyper = optimizer.apply(base, change, state)
        assert hyper == {}
    np.testing.assert_allclose(base, expected, rtol=1e-5)


def test_fedhyper_g_grows_its_rate_while_rounds_agree():
    """By the inner product, within its bounds, or by the cosine."""
    for normalised in (0.0, 1.0):
        optimizer = OPTIMIZERS.create("fedhyper_g", {"normalised": normalised, "rate": 0.5})
        base, state, change, rate = np.zeros(4, np.float32), optimizer.init(4), np.array([0.0, 2.0, 0.0, 1.0]), 1.0
        for number in range(12):
            before = base.copy()
            base, state, _ = optimizer.apply(base, change, state)
            if number:
                rate = min(5.0, rate + 0.5 * (1.0 if normalised else 5.0))
            np.testing.assert_allclose(base - before, rate * change, rtol=1e-4)
        for _ in range(30):
            change = -change
            base, state, _ = optimizer.apply(base, change, state)
        assert state["lr"][0] == 0.2


def test_fedhyper_sl_sets_the_learning_rate_of_the_next_jobs(tmp_path):
    """It goes up while rounds agree, and stays between its bounds whatever comes."""
    plan = plan_with("fedhyper_sl", {"normalised": 1.0}, training=Training(epochs=1, hyper={"lr": 0.02}))
    server, sent, rates = Server(tmp_path, plan), sent_by(vectors(2)), []
    for number in range(8):
        factor = 1.0 if number < 6 else -1.0
        server.round([entry._replace(vector=entry.vector * np.float32(factor)) for entry in sent])
        rates.append(server.made.hyper["lr"])
    np.testing.assert_allclose(rates, [0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1, 0.1])
    optimizer = OPTIMIZERS.create("fedhyper_sl", {"client_lr": 0.05})
    _, state, hyper = optimizer.apply(np.zeros(2, np.float32), np.array([1e200, 1.0]), optimizer.init(2))
    _, _, hyper = optimizer.apply(np.zeros(2, np.float32), np.array([-1e200, 1.0]), state)
    assert 0.001 <= hyper["lr"] <= 0.1


def test_fedhyper_sl_needs_to_know_the_rate_it_starts_from():
    """From the plan's training.hyper.lr, or as an option; the error says so."""
    with pytest.raises(PluginError, match=r"client_lr is missing; give it, or lr in \[training.hyper\]"):
        create_optimizer(plan_with("fedhyper_sl"))
    with pytest.raises(PluginError, match=r"client_lr is 5, outside of least = 0.001 to most = 0.1"):
        create_optimizer(plan_with("fedhyper_sl", {"client_lr": 5.0}))


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_running_statistics_go_past_the_optimiser(tmp_path, name):
    """They become the mean of what the devices saw, and nothing of them is in the optimiser's state."""
    layout = Layout(("w", "running_var"), ((4,), (3,)), frozenset({"running_var"}))
    options = {"client_lr": 0.05} if name == "fedhyper_sl" else {}
    server = Server(tmp_path, plan_with(name, options), layout)
    for _ in range(3):
        server.round(sent_by([np.full(layout.size, -0.1, np.float32)] * 2))
    seen = layout.split(server.model())["running_var"] - layout.split(server.base)["running_var"]
    np.testing.assert_allclose(seen, -0.3, rtol=1e-4)
    for key in ("optimizer.velocity", "optimizer.mean", "optimizer.before"):
        assert not server.state().get(key, np.zeros(layout.size))[4:].any()


def test_models_that_are_not_finite_are_refused(tmp_path):
    """With what to do."""
    server = Server(tmp_path, plan_with("sgd", {"lr": 1e39}))
    with pytest.raises(ModelError, match="holds NaN or infinite values; lower the learning rates"):
        server.round(sent_by(vectors(2)))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("adam", {"beta2": 1.5}, "beta2 is 1.5, it must be 0 to 1"),
        ("momentum", {"momentum": 1.0}, "momentum is 1, it must be 0 to 0.9999"),
        ("sgd", {"rate": 1.0}, "unknown rate; it takes lr"),
        ("nobody", {}, "no server optimizer is called 'nobody'; there are: adam, fedhyper_g"),
    ],
)
def test_options_are_checked(name, options, reason):
    """By name."""
    with pytest.raises(PluginError, match=reason):
        OPTIMIZERS.create(name, options)
