"""Every codec, by the same suite: what the receiver decodes is what the sender knows it sent, and nothing is lost."""

import os
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression import Layout, codec_names
from edge_runtime.compression.pipeline import CodecSpec, check_spec, decode, encode
from edge_runtime.compression.registry import codec_class
from edge_runtime.errors import CodecError

CODECS = codec_names()
LOSSLESS = [name for name in CODECS if codec_class(name).lossless]
LOSSY = [name for name in CODECS if not codec_class(name).lossless]
NO_RATE_CONTROL = {"raw", "zstd", "half", "int8", "int4", "sign", "eden", "fedzip"}
KEEPS_BUDGETS = [name for name in CODECS if name not in NO_RATE_CONTROL]
SLOW = {"default", "fedzip", "lowrank", "sparse"}

MODEL = Layout(
    ("conv", "bias", "mean", "fc", "count"), ((8, 3, 3, 3), (8,), (8,), (40, 24), ()), frozenset({"mean", "count"})
)
MODELS = {"delta": MODEL}


def update(layout=MODEL, seed=0, scale=1e-2):
    return {"delta": (np.random.default_rng(seed).standard_t(3, layout.size) * scale).astype(np.float32)}


def bits(vector):
    return np.ascontiguousarray(vector, "<f4").view("<u4")


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, one in left.items():
        other = right[name]
        assert one.size == other.size
        assert (one.indices is None) == (other.indices is None)
        assert one.vector().dtype == np.float32
        np.testing.assert_array_equal(bits(one.vector()), bits(other.vector()))


def round_trip(codec, vectors, layouts, state=None, options=None, **arguments):
    """Encodes and decodes, and checks what holds for every codec and every input."""
    encoded = encode(CodecSpec(codec, options or {}), vectors, layouts, state, **arguments)
    decoded = decode(encoded.data, layouts)
    assert_same_bits(decoded, encoded.updates)
    for name, layout in layouts.items():
        assert decoded[name].vector().shape == (layout.size,)
        assert np.isfinite(decoded[name].vector()).all()
        indices = decoded[name].indices
        if indices is not None:
            assert indices.dtype == np.int64
            assert len(np.unique(indices)) == len(indices) == len(decoded[name].values)
        if codec in LOSSLESS:
            np.testing.assert_array_equal(bits(decoded[name].vector()), bits(vectors[name]))
    return encoded


@pytest.mark.parametrize("codec", CODECS)
def test_the_receiver_gets_what_the_sender_knows_it_sent(codec):
    """Decoded and encoded updates agree bit for bit, over rounds that carry state."""
    state = None
    for number in range(4):
        state = round_trip(codec, update(seed=number), MODELS, state, seed=number).state


@pytest.mark.parametrize("codec", CODECS)
def test_a_model_that_both_ends_hold_may_be_given(codec):
    """Codecs may predict from it; those that do not are not disturbed."""
    model = update(seed=8, scale=1)["delta"]
    encoded = encode(CodecSpec(codec), update(), MODELS, reference=model)
    assert_same_bits(decode(encoded.data, MODELS, reference=model), encoded.updates)


@pytest.mark.parametrize("codec", CODECS)
def test_equal_input_gives_equal_bytes(codec):
    """Vectors, state and seed decide everything: a repeated encoding is the same, state included."""
    first = encode(CodecSpec(codec), update(), MODELS, seed=5)
    second = encode(CodecSpec(codec), update(), MODELS, seed=5)
    assert first.data == second.data
    again = [encode(CodecSpec(codec), update(seed=1), MODELS, first.state, seed=6) for _ in range(2)]
    assert again[0].data == again[1].data
    assert again[0].state.keys() == again[1].state.keys()
    for key, array in again[0].state.items():
        np.testing.assert_array_equal(array, again[1].state[key])


@pytest.mark.parametrize("codec", CODECS)
def test_state_is_plain_arrays_that_survive_storage(codec, tmp_path):
    """A device that stops between two rounds goes on as if it had not."""
    state = encode(CodecSpec(codec), update(), MODELS).state
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as stored:
        restored = {key: stored[key] for key in stored.files}
    straight = encode(CodecSpec(codec), update(seed=1), MODELS, state)
    assert encode(CodecSpec(codec), update(seed=1), MODELS, restored).data == straight.data


SHAPES = st.lists(
    st.sampled_from([(), (0,), (1,), (2,), (7,), (3, 5), (0, 4), (20, 30), (6, 3, 3, 3), (1, 50), (50, 1), (300,)]),
    max_size=5,
)
LAYOUTS = SHAPES.map(lambda shapes: Layout(tuple(f"t{at}" for at in range(len(shapes))), tuple(shapes))) | st.just(
    Layout(tuple(f"t{at}" for at in range(100)), ((1,),) * 100)
)
FILLS = {
    "normal": lambda dice, size: dice.normal(size=size),
    "small": lambda dice, size: dice.normal(size=size) * 1e-12,
    "heavy": lambda dice, size: dice.standard_cauchy(size),
    "zeros": lambda _dice, size: np.zeros(size),
    "negative zeros": lambda _dice, size: np.full(size, -0.0),
    "equal": lambda _dice, size: np.full(size, -0.37),
    "one": lambda dice, size: np.where(np.arange(size) == dice.integers(max(1, size)), 2.5, 0),
    "denormal": lambda dice, size: dice.integers(-190, 191, size) * 2.0**-149,
    "huge": lambda dice, size: dice.choice([-3e38, 3e38, 1e38, 0], size),
    "largest": lambda _dice, size: np.full(size, np.finfo(np.float32).max),
    "wide": lambda dice, size: dice.choice([-1, 1], size) * 10.0 ** dice.uniform(-44, 38, size),
    "levels": lambda dice, size: dice.integers(-2, 3, size) * 0.25,
}


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(layout=LAYOUTS, fill=st.sampled_from(sorted(FILLS)), seed=st.integers(0, 2**32))
def test_any_layout_and_any_values_survive(codec, layout, fill, seed):
    """No number of tensors, no shape and no range of values is a special case, nor does any give a warning."""
    layouts = {"delta": layout}
    values = FILLS[fill](np.random.default_rng(seed), layout.size).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        round_trip(codec, {"delta": values}, layouts, seed=seed)


@pytest.mark.parametrize("fill", sorted(FILLS))
@pytest.mark.parametrize("codec", CODECS)
def test_every_kind_of_values_survives_in_a_model(codec, fill):
    """Each kind of values meets each codec at least once, for a model with matrices, and with buffers."""
    values = FILLS[fill](np.random.default_rng(3), MODEL.size).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        round_trip(codec, {"delta": values}, MODELS, seed=3)


@pytest.mark.parametrize("codec", CODECS)
def test_five_million_values_survive(codec):
    """A large model is no special case."""
    if codec in SLOW and not os.environ.get("EDGE_FULL"):
        pytest.skip("takes its time; runs with EDGE_FULL=1")
    layout = Layout(("matrix", "bias", "rest"), ((2000, 2400), (2000,), (198_000,)))
    round_trip(codec, update(layout), {"delta": layout})


@pytest.mark.parametrize("codec", CODECS)
def test_several_channels_keep_apart(codec):
    """Methods may send more than one vector; each is decoded with its own layout, and has its own state."""
    layouts = {"delta": MODEL, "control": Layout(("c", "m"), ((30, 20), (7,)), frozenset({"m"}))}
    vectors = update() | {"control": np.random.default_rng(9).normal(size=607).astype(np.float32)}
    first = round_trip(codec, vectors, layouts)
    round_trip(codec, vectors, layouts, first.state)
    alone = encode(CodecSpec(codec), update(), MODELS)
    np.testing.assert_array_equal(alone.updates["delta"].vector(), first.updates["delta"].vector())


@pytest.mark.parametrize("codec", LOSSY)
def test_buffers_travel_dense_with_every_lossy_codec(codec):
    """Running statistics arrive whole, as float16 at worst, whatever the codec does to the rest."""
    vectors = update()
    sent = round_trip(codec, vectors, MODELS).updates["delta"]
    if sent.indices is not None:
        assert set(range(224, 232)) | {1192} <= set(sent.indices.tolist())
    given_, got = MODEL.split(vectors["delta"]), MODEL.split(sent.vector())
    for name in MODEL.buffers:
        np.testing.assert_array_equal(got[name], given_[name].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("codec", LOSSY)
def test_error_feedback_loses_nothing(codec):
    """What ten rounds sent and what is still owed add up to what was given, buffers included."""
    given_, sent, state, largest = np.zeros(MODEL.size), np.zeros(MODEL.size), None, 0.0
    for number in range(10):
        vectors = update(seed=number)
        encoded = round_trip(codec, vectors, MODELS, state, {"error_feedback": True}, seed=number)
        given_ += vectors["delta"]
        encoded.updates["delta"].add_to(sent, 1.0)
        state = encoded.state
        largest = max(largest, float(np.abs(encoded.updates["delta"].vector()).max()))
    names = [name for name, _, start, end in MODEL.spans() for _ in range(end - start)]
    is_buffer = np.array([name in MODEL.buffers for name in names])
    owed = np.zeros(MODEL.size)
    owed[~is_buffer] = state.get("delta.feedback.residual", 0)
    owed[is_buffer] = state.get("delta.buffers.residual", 0)
    assert np.abs(owed).max() > 0
    largest = max(largest, float(np.abs(owed).max()))
    np.testing.assert_allclose(sent + owed, given_, rtol=0, atol=10 * 2.0**-23 * 4 * largest)


@pytest.mark.parametrize("codec", LOSSY)
def test_without_error_feedback_no_residual_is_kept(codec):
    """A device that is short of storage can do without."""
    assert not any(
        "residual" in key for key in encode(CodecSpec(codec, {"error_feedback": False}), update(), MODELS).state
    )


@pytest.mark.parametrize("codec", KEEPS_BUDGETS)
def test_a_budget_is_kept_to_and_used(codec):
    """More bytes are never sent than are allowed, and more allowed bytes give a smaller error."""
    layouts = {"delta": Layout(("w", "b", "m"), ((120, 80), (120,), (3,)), frozenset({"m"}))}
    vectors = update(layouts["delta"])
    errors = []
    for budget in (900, 2000, 6000):
        encoded = round_trip(codec, vectors, layouts, budget_bytes=budget)
        assert len(encoded.data) <= budget
        errors.append(float(np.square(encoded.updates["delta"].vector() - vectors["delta"]).sum()))
    assert errors[2] < errors[0]
    assert all(after <= before for before, after in pairwise(errors))


@pytest.mark.parametrize("codec", CODECS)
def test_an_impossible_budget_is_refused(codec):
    """Ten bytes hold no update of a thousand values; the sender says so instead of sending more."""
    with pytest.raises(CodecError, match=r"budget|bytes"):
        encode(CodecSpec(codec), update(), MODELS, budget_bytes=10)


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_and_extension_is_refused(codec):
    """A container cut off anywhere, or with bytes behind, never decodes."""
    layouts = {"delta": Layout(("w", "m"), ((4, 5), (2,)), frozenset({"m"}))}
    data = encode(CodecSpec(codec), update(layouts["delta"]), layouts).data
    for length in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:length], layouts)
    for more in (b"\0", b"\0\0\0\0", data):
        with pytest.raises(CodecError):
            decode(data + more, layouts)


@pytest.mark.parametrize("codec", CODECS)
def test_another_base_update_manifest_or_channel_is_refused(codec):
    """Values are believed only for the tensors, the model version and the update that they are of."""
    data = encode(CodecSpec(codec), update(), MODELS, base_version=7, tag=99).data
    assert decode(data, MODELS, base_version=7, tag=99).keys() == {"delta"}
    for wrong in ({"base_version": 8}, {"base_version": 0}, {"tag": 98}, {"tag": 0}):
        with pytest.raises(CodecError, match=r"model version 7, expected|another update"):
            decode(data, MODELS, **wrong)
    renamed = Layout(("conv", "bias", "mean", "fc", "steps"), MODEL.shapes, frozenset({"mean", "steps"}))
    reshaped = Layout(MODEL.names, (*MODEL.shapes[:3], (24, 40), ()), MODEL.buffers)
    trained = Layout(MODEL.names, MODEL.shapes, frozenset({"mean"}))
    for layouts in ({"delta": renamed}, {"delta": reshaped}, {"delta": trained}, {"model": MODEL}):
        with pytest.raises(CodecError, match="other tensors"):
            decode(data, layouts)


@pytest.mark.parametrize("codec", CODECS)
def test_a_norm_above_the_limit_is_refused(codec):
    """No single update can outweigh all others."""
    encoded = encode(CodecSpec(codec), update(), MODELS)
    norm = encoded.updates["delta"].norm()
    assert decode(encoded.data, MODELS, max_norm=norm * 1.01)
    with pytest.raises(CodecError, match="L2 norm"):
        decode(encoded.data, MODELS, max_norm=norm / 1.5)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_the_tensor(codec, value):
    """The sender finds NaN and infinity before they leave."""
    vectors = update()
    vectors["delta"][240] = value
    with pytest.raises(CodecError, match="NaN or infinite value in tensor 'fc'"):
        encode(CodecSpec(codec), vectors, MODELS)


@pytest.mark.parametrize("codec", CODECS)
def test_state_of_another_model_is_refused(codec):
    """A changed bundle cannot mix old residuals into new tensors without anybody noticing."""
    state = encode(CodecSpec(codec), update(), MODELS).state
    if not state:
        return
    other = Layout(("conv", "fc"), ((9, 3, 3, 3), (50, 25)))
    with pytest.raises(CodecError, match="another model"):
        encode(CodecSpec(codec), update(other), {"delta": other}, state)


@pytest.mark.parametrize("codec", CODECS)
def test_options_are_checked_before_a_round_begins(codec):
    """A plan with a misspelt or mistyped option fails when it is read, not on the devices."""
    check_spec(CodecSpec(codec))
    with pytest.raises(CodecError, match="no option 'desnity'"):
        check_spec(CodecSpec(codec, {"desnity": 0.1}))
    for key, default in codec_class(codec).defaults.items():
        check_spec(CodecSpec(codec, {key: default}))
        with pytest.raises(CodecError, match=key):
            check_spec(CodecSpec(codec, {key: [] if isinstance(default, str) else "many"}))
