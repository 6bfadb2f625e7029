"""Clipping, momentum correction and error feedback, as they act before any codec."""

import warnings

import numpy as np
import pytest

from edge_runtime.compression.base import Layout, Update
from edge_runtime.compression.pipeline import CodecSpec, check_spec, decode, encode
from edge_runtime.compression.transforms import Clip, Feedback, Momentum, Transform, chain
from edge_runtime.errors import CodecError

VALUES = np.array([3, 0, -4, 0], np.float32)
SPARSE = Update(np.array([-4], np.float32), np.array([2]), 4)


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    """A longer update is scaled down as a whole; a shorter one is not touched."""
    clipped, state = Clip(1.0).apply(VALUES, {})
    np.testing.assert_allclose(clipped, VALUES / 5, rtol=1e-6)
    assert clipped.dtype == np.float32
    assert state == {}
    assert Clip(5.0).apply(VALUES, {})[0] is VALUES


def test_clipping_survives_any_finite_values():
    """Squares of huge values do not overflow, zeros do not divide."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huge = np.full(1000, 3e38, np.float32)
        clipped, _ = Clip(2.0).apply(huge, {})
        assert Clip(1.0).apply(np.zeros(3, np.float32), {})[0].tolist() == [0, 0, 0]
        assert Clip(1.0).apply(np.empty(0, np.float32), {})[0].size == 0
    assert np.linalg.norm(clipped.astype(np.float64)) == pytest.approx(2.0, rel=1e-5)


def test_momentum_accumulates_and_starts_afresh_where_it_was_sent():
    """Deep Gradient Compression's correction with factor masking."""
    momentum = Momentum(0.5)
    first, state = momentum.apply(VALUES, {})
    np.testing.assert_array_equal(first, VALUES)
    state = momentum.sent(first, SPARSE, state)
    np.testing.assert_array_equal(state["velocity"], [3, 0, 0, 0])
    second, _ = momentum.apply(VALUES, state)
    np.testing.assert_array_equal(second, [4.5, 0, -4, 0])


def test_momentum_of_a_dense_update_goes_on():
    """Where all is sent there is nothing to mask."""
    momentum = Momentum(0.5)
    first, state = momentum.apply(VALUES, {})
    assert momentum.sent(first, Update(first), state)["velocity"] is first


def test_feedback_owes_what_was_not_sent():
    """The residual joins the next update, and is gone when all was sent."""
    feedback = Feedback()
    first, state = feedback.apply(VALUES, {})
    state = feedback.sent(first, SPARSE, state)
    np.testing.assert_array_equal(state["residual"], [3, 0, 0, 0])
    second, state = feedback.apply(VALUES, state)
    np.testing.assert_array_equal(second, [6, 0, -4, 0])
    assert feedback.sent(second, Update(second), state) == {}


def test_feedback_recovers_from_values_at_the_end_of_the_range():
    """A residual beyond float32 saturates instead of ending every later round."""
    feedback = Feedback()
    values = np.array([3e38, 1], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = feedback.sent(values, Update(-values), {})
        assert np.isfinite(state["residual"]).all()
        later, _ = feedback.apply(np.array([-3e38, 1], np.float32), state)
    assert np.isfinite(later).all()


def test_transforms_leave_their_input_alone():
    """Vectors and states are the caller's."""
    given = VALUES.copy()
    for transform in (Transform(), Clip(0.5), Momentum(0.9), Feedback()):
        state = {} if not isinstance(transform, Feedback) else {"residual": np.ones(4, np.float32)}
        kept = {key: array.copy() for key, array in state.items()}
        out, after = transform.apply(given, state)
        transform.sent(out, SPARSE, after)
        np.testing.assert_array_equal(given, VALUES)
        for key, array in kept.items():
            np.testing.assert_array_equal(state[key], array)


def test_the_chain_follows_the_options():
    """Clip, then momentum, then feedback; feedback as the codec has it unless the options say otherwise."""
    names = [transform.name for transform in chain({"clip_norm": 1, "momentum": 0.9}, feedback=True)]
    assert names == ["clip", "momentum", "feedback"]
    assert chain({}, feedback=False) == []
    assert chain({"error_feedback": False}, feedback=True) == []
    assert [transform.name for transform in chain({"error_feedback": True}, feedback=False)] == ["feedback"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"clip_norm": float("nan")}, "finite"),
        ({"clip_norm": float("inf")}, "finite"),
        ({"error_feedback": 1}, "true or false"),
        ({"momentum": "much"}, "a number"),
        ({"clip_norm": True}, "a number"),
        ({"decay": 0.1}, "no option 'decay'"),
    ],
)
def test_impossible_options_are_refused(options, reason):
    """The message names the option."""
    with pytest.raises(CodecError, match=reason):
        chain(options, feedback=True)


def test_an_update_over_the_limit_goes_in_parts():
    """What the coordinator would refuse is never sent, and all of it arrives in the end."""
    layouts = {"delta": Layout(("w", "mean"), ((400,), (8,)), frozenset({"mean"}))}
    vector = np.random.default_rng(0).standard_normal(408).astype(np.float32) * 3
    vector[400:] = 9.0
    spec, state, sums = CodecSpec("default", {"max_norm": 5.0}), {}, np.zeros(408, np.float32)
    for round_ in range(20):
        values = vector if round_ == 0 else np.zeros_like(vector)
        encoded = encode(spec, {"delta": values}, layouts, state, budget_bytes=700)
        sums += decode(encoded.data, layouts, max_norm=5.0)["delta"].vector()
        state = encoded.state
    np.testing.assert_allclose(sums, vector, atol=0.02)


def test_unbiased_random_k_does_not_go_with_feedback():
    """It would amplify what it keeps from round to round."""
    with pytest.raises(CodecError, match="diverge"):
        check_spec(CodecSpec("randomk", {"unbiased": True, "error_feedback": True}))
    check_spec(CodecSpec("randomk", {"unbiased": True}))
