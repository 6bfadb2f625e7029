"""Low-rank updates: what is decoded is what the encoder said, within the bytes, the same bits on every machine."""

import base64
import contextlib
import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression.base import Layout
from edge_runtime.compression.lowrank import decode_low_rank, encode_low_rank
from edge_runtime.compression.lowrank_format import read
from edge_runtime.compression.lowrank_pair import predict
from edge_runtime.compression.lowrank_parts import parts
from edge_runtime.compression.lowrank_product import GAIN_CENTRE, NORM_BITS, pair_weights, unit_scale
from edge_runtime.errors import CodecError

GOLDEN = (
    "0oeh`^f8C2++RV36zs<=xXkQox@~G;XJbe>TR+HU>O==9z>@eJB<g@;1Bym%=JchkgO}6kY<vdY2_EXbDuRa$w`;Tl6j*rT-FRIcd6j!J^rZ~?"
    "PK|#!3jOU8-nRq6YA1OIm3F2e$6*+^{(jN>E5ziTp|i`{BduDms<Ztg{h6<lOgS0vxO@vHG7um*0=08{k1xbR#(kD0_HvpO{R<F4JM4EC_LK1J"
    "@lg6k0nh6tUh<2p9YpI(OLNHm8_in$b%8b@c00u}yt^2rbx}>^Rh-d%J#IL<jpX55JP#CStc)v^eS#;Kq=FmkwgLx+#<i(N85&`V>aXJ`QwDTz"
    "+fw~Ny6y14N(X(LS?W4RzIU|;L@MZN#X=7%;Dao?D9$#+dQ}>?0@evO2ChVZ%y|i@s8Wvt0MH+W5zqht000004*vo0m9tn<J_)xd5G-8rOA`;6"
    "hr9Z&$G`vdZ+gG=e|-1L_cuvbZ@2ya|NsC0Gt+_SCX+cqOhC9H#m75N#Ckpu5EvvxFeU_m2@yhIf&d0a04W#"
)
GOLDEN_LAYOUT = ((8, 3, 5, 5), (8,), (300, 40), (300,), (10, 300), (10,), (50,))
GOLDEN_SHA256 = "95ab28ef68c66fd773f70abde08cbb54f13614fd9cfeb66a5bfad1b48e1d7865"
MLP = ((64, 40), (64,), (10, 64), (10,))
WIDE = ((600, 40), (600,), (10, 600), (10,))  # its two layers make a pair
CNN = ((8, 1, 5, 5), (8,), (16, 8, 3, 3), (16,), *MLP)
SHAPES = (
    MLP,
    CNN,
    WIDE,
    (),
    ((0,),),
    ((0, 5), (3, 0)),
    ((),),
    ((1,),),
    ((1, 300),),
    ((300, 1),),
    ((300, 2),),
    ((5000,),),
    tuple((1,) for _ in range(100)),
    ((30, 40), (30,), (7, 30)),
    ((70, 20), (70,), (66, 70), (66,)),
)


def layout_of(shapes):
    return Layout(tuple(f"t{number}" for number in range(len(shapes))), tuple(shapes))


def update_of(layout, seed=0, noise=0.1):
    """A few outer products and noise in each tensor of two dimensions."""
    rng = np.random.default_rng(seed)
    parts_of = []
    for shape in layout.shapes:
        size = math.prod(shape)
        values = noise * rng.standard_normal(size)
        if len(shape) > 1 and size:
            values += (rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, size // shape[0]))).ravel()
        parts_of.append(values)
    return (0.01 * np.concatenate([*parts_of, []])).astype(np.float32)


def model_of(layout, seed=9):
    return (0.1 * np.random.default_rng(seed).standard_normal(layout.size)).astype(np.float32)


def gradient_of(model, samples=40, seed=1):
    """Gradient of the two dense layers of WIDE over random samples: what a pair is made for."""
    rng = np.random.default_rng(seed)
    tensors = layout_of(WIDE).split(model)
    first, bias, second, last = (tensors[f"t{number}"].astype(np.float64) for number in range(4))
    x = np.abs(rng.standard_normal((4, 40)))[rng.integers(4, size=samples)] + 0.1 * rng.random((samples, 40))
    hidden = np.maximum(x @ first.T + bias, 0)
    scores = hidden @ second.T + last
    error = np.exp(scores - scores.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    error[np.arange(samples), rng.integers(3, size=samples)] -= 1
    back = (error @ second) * (hidden > 0)
    grads = (back.T @ x, back.sum(0), error.T @ hidden, error.sum(0))
    return np.concatenate([grad.ravel() for grad in grads]).astype(np.float32)


def error_of(values, decoded):
    return float(np.square(values.astype(np.float64) - decoded).sum() / np.square(values.astype(np.float64)).sum())


@pytest.mark.parametrize("shapes", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("referenced", [False, True], ids=["alone", "reference"])
@pytest.mark.parametrize("budget", [0, 1, 7, 40, 300, 5000])
def test_what_is_decoded_is_what_the_encoder_said(shapes, referenced, budget):
    """Every shape, within the bytes; the same input gives the same bytes."""
    layout = layout_of(shapes)
    values = update_of(layout)
    reference = model_of(layout) if referenced else None
    payload, said = encode_low_rank(values, layout, budget, reference)
    assert len(payload) <= budget
    decoded = decode_low_rank(payload, layout, reference)
    assert decoded.dtype == np.float32
    assert decoded.shape == (layout.size,)
    assert decoded.tobytes() == said.tobytes()
    assert encode_low_rank(values.copy(), layout, budget, reference)[0] == payload


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=4).map(tuple), max_size=6).map(tuple),
    scale=st.sampled_from([1e-44, 1e-38, 1e-20, 1e-3, 1.0, 1e20, 1e30]),
    sparsity=st.sampled_from([0.0, 0.9, 1.0]),
    budget=st.integers(0, 2000),
)
def test_any_layout_and_any_values_survive(seed, shapes, scale, sparsity, budget):
    """Denormal, huge, sparse and all-zero updates of any shape."""
    shapes = tuple(shape if math.prod(shape) <= 5000 else shape[:1] for shape in shapes)
    layout = layout_of(shapes)
    rng = np.random.default_rng(seed)
    values = (scale * rng.standard_normal(layout.size) * (rng.random(layout.size) >= sparsity)).astype(np.float32)
    payload, said = encode_low_rank(values, layout, budget, model_of(layout))
    assert len(payload) <= budget
    assert decode_low_rank(payload, layout, model_of(layout)).tobytes() == said.tobytes()
    assert np.isfinite(said).all()


def test_equal_values_and_zeros():
    """A constant matrix is of rank one; zeros need no byte."""
    layout = layout_of(CNN)
    values = np.full(layout.size, 0.25, np.float32)
    _, decoded = encode_low_rank(values, layout, 400)
    assert error_of(values, decoded) < 5e-3
    payload, decoded = encode_low_rank(np.zeros(layout.size, np.float32), layout, 400)
    assert payload == b""
    assert not decoded.any()


@pytest.mark.parametrize("budget", [150, 300, 600, 1200])
def test_the_budget_is_used(budget):
    """At least 98 of 100 bytes where there is enough to say; more bytes, less error."""
    layout = layout_of(CNN)
    values = update_of(layout, noise=1.0)
    payload, decoded = encode_low_rank(values, layout, budget)
    assert 0.98 * budget <= len(payload) <= budget
    assert error_of(values, decoded) < error_of(values, encode_low_rank(values, layout, budget // 2)[1])


def test_better_than_dropping_components():
    """The bytes of two components as float32 give less error than the two best components."""
    layout = layout_of(((200, 100),))
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((200, 6)) * (6, 5, 4, 3, 2, 1) @ rng.standard_normal((6, 100))
    values = (matrix + 0.3 * rng.standard_normal((200, 100))).astype(np.float32).ravel()
    left, scales, right = np.linalg.svd(values.reshape(200, 100), full_matrices=False)
    dropped = (left[:, :2] * scales[:2]) @ right[:2]
    _, decoded = encode_low_rank(values, layout, 2 * 300 * 4)
    assert error_of(values, decoded) < 0.1 * error_of(values, dropped.ravel())


def test_errors_in_kernels_weigh_more():
    """Of a convolution and a dense layer with the same values, the convolution is the better kept."""
    layout = layout_of(((40, 10, 3, 3), (40, 90)))
    half = update_of(layout_of(((40, 90),)), noise=1.0)
    _, decoded = encode_low_rank(np.concatenate([half, half]), layout, 1000)
    assert error_of(half, decoded[: half.size]) < 0.9 * error_of(half, decoded[half.size :])


def test_the_model_predicts_the_update_of_two_dense_layers():
    """With the weights that both ends hold, the same bytes leave a fraction of the error."""
    layout = layout_of(WIDE)
    model = model_of(layout)
    values = gradient_of(model)
    alone = error_of(values, encode_low_rank(values, layout, 300)[1])
    payload, decoded = encode_low_rank(values, layout, 300, model)
    assert error_of(values, decoded) < 0.8 * alone
    with pytest.raises(CodecError, match="needs the model"):
        decode_low_rank(payload, layout)


def test_the_product_is_exact():
    """Decoding equals sums of Python's whole numbers, with one rounding to float64 and one to float32."""
    layout = layout_of((*WIDE, (8, 3, 5, 5), (8,)))
    model = model_of(layout)
    rng = np.random.default_rng(2)
    kernel = (rng.standard_normal((8, 2)) @ rng.standard_normal((2, 75))).ravel()
    values = np.concatenate([gradient_of(model[: layout_of(WIDE).size]), kernel, np.zeros(8)]).astype(np.float32)
    payload, decoded = encode_low_rank(values, layout, 400, model)
    content = read(payload, layout)
    (pair,) = content.pairs
    predicted = [[factor.T.tolist() for factor in both] for both in predict(pair.code, *pair_weights(layout, model)[0])]
    slow = np.zeros(layout.size, np.float32)
    for number, matrix in enumerate(parts(layout).matrices):
        terms = [
            (unit_scale(part.u) * (GAIN_CENTRE + part.gain), part.u.tolist(), part.v.tolist())
            for part in content.components[number]
        ]
        if number < 2:
            mantissa, shift = pair.gains[number]
            terms += [((128 + mantissa) << shift, *columns) for columns in zip(*predicted[number], strict=True)]
        assert terms
        scale = math.ldexp(content.step / matrix.weight, -NORM_BITS - 5)
        for row in range(matrix.rows):
            for column in range(matrix.width):
                total = sum(gain * int(u[row]) * int(v[column]) for gain, u, v in terms)
                assert abs(total) < 2**53
                at = matrix.start + row * matrix.columns + column if column < matrix.columns else matrix.bias + row
                slow[at] = np.float32(total * scale)
    assert slow.tobytes() == decoded.tobytes()


def test_yesterdays_bytes_give_the_same_bits_everywhere():
    """A stored payload with a pair, components and a chunk; made against a model of exact fractions."""
    layout = layout_of(GOLDEN_LAYOUT)
    model = ((np.arange(layout.size) * 7919 % 1009 - 504) / 4096).astype(np.float32)
    decoded = decode_low_rank(base64.b85decode(GOLDEN), layout, model)
    assert hashlib.sha256(decoded.astype("<f4").tobytes()).hexdigest() == GOLDEN_SHA256


def test_prediction_is_made_of_whole_numbers():
    """Summed in another order, the prediction has the same bits."""
    layout = layout_of(WIDE)
    model = model_of(layout)
    code = read(encode_low_rank(gradient_of(model), layout, 200, model)[0], layout).pairs[0].code
    (before, after), order = pair_weights(layout, model)[0], np.random.default_rng(3).permutation(40)
    shuffled = code._replace(inputs=code.inputs[[*order, 40]])
    plain, other = predict(code, before, after), predict(shuffled, before[:, order], after)
    np.testing.assert_array_equal(plain[0][0], other[0][0])
    np.testing.assert_array_equal(plain[1][1], other[1][1])
    for factor in (factor for pair in plain for factor in pair):
        np.testing.assert_array_equal(factor, np.rint(factor))
        assert np.abs(factor).max() <= 1024


@pytest.mark.parametrize("referenced", [False, True], ids=["alone", "reference"])
def test_damaged_bytes_give_only_codec_errors(referenced):
    """Flipped, cut, lengthened and random bytes: a CodecError or another update, nothing else."""
    layout = layout_of((*CNN[:4], *WIDE))
    reference = model_of(layout) if referenced else None
    values = update_of(layout, noise=0.01)
    if referenced:
        values[-layout_of(WIDE).size :] = gradient_of(reference[-layout_of(WIDE).size :])
    payload, _ = encode_low_rank(values, layout, 600, reference)
    assert any(read(payload, layout).pairs) == referenced
    rng = np.random.default_rng(5)
    refused = 0
    for trial in range(600):
        damaged = bytearray(payload)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        if trial % 5 == 1:
            damaged = damaged[: rng.integers(len(damaged))]
        elif trial % 5 == 2:
            damaged += rng.bytes(rng.integers(1, 9))
        elif trial % 5 == 3:
            damaged = bytearray(rng.bytes(rng.integers(0, 400)))
        try:
            decoded = decode_low_rank(bytes(damaged), layout, reference)
        except CodecError:
            refused += 1
        else:
            assert decoded.shape == (layout.size,)
            assert np.isfinite(decoded).all()
    assert refused > 400


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(SHAPES))
def test_any_bytes_give_only_codec_errors(data, shapes):
    """Bytes that no encoder wrote."""
    layout = layout_of(shapes)
    with contextlib.suppress(CodecError):
        assert decode_low_rank(data, layout, model_of(layout)).shape == (layout.size,)


def test_wrong_arguments_are_refused():
    """Sizes, values that are not finite, negative budgets, references of another model."""
    layout = layout_of(WIDE)
    values = update_of(layout)
    payload, _ = encode_low_rank(values, layout, 100)
    for bad in (values[1:], np.full(layout.size, np.nan, np.float32), np.full(layout.size, np.inf, np.float32)):
        with pytest.raises(CodecError):
            encode_low_rank(bad, layout, 100)
    with pytest.raises(CodecError, match="at least 0"):
        encode_low_rank(values, layout, -1)
    for bad in (values[1:], values.astype(np.float64), np.full(layout.size, np.nan, np.float32)):
        with pytest.raises(CodecError, match="reference"):
            encode_low_rank(values, layout, 100, bad)
        with pytest.raises(CodecError, match="reference"):
            decode_low_rank(payload, layout, bad)
