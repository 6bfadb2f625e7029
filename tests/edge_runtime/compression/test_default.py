"""The product's codec: the right family for every budget, and what is damaged is refused."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression import Layout, uniform
from edge_runtime.compression.base import Request
from edge_runtime.compression.default import FAMILIES, Default
from edge_runtime.compression.lowrank_codec import LowRank
from edge_runtime.errors import CodecError

LAYOUT = Layout(("w1", "b1", "w2", "s"), ((120, 150), (120,), (10, 120), ()))
SPARSE, LOW_RANK, UNIFORM, ZSTD, RAW = range(5)


def of_few_steps():
    """Outer products of sparse features and errors, and some noise."""
    rng = np.random.default_rng(4)
    parts = []
    for _, shape, start, end in LAYOUT.spans():
        if len(shape) == 2:
            left, right = rng.normal(size=(shape[0], 3)), np.maximum(rng.normal(size=(3, shape[1])), 0)
            parts.append((left @ right).reshape(-1))
        else:
            parts.append(rng.normal(size=end - start))
    return (1e-3 * np.concatenate(parts) + rng.normal(size=LAYOUT.size) * 1e-5).astype(np.float32)


def of_few_entries():
    rng = np.random.default_rng(5)
    vector = np.zeros(LAYOUT.size, np.float32)
    vector[rng.choice(LAYOUT.size, 60, replace=False)] = rng.normal(size=60)
    return vector


def of_noise():
    return np.random.default_rng(6).normal(size=LAYOUT.size).astype(np.float32)


VECTOR = of_few_steps()


def encode(options=None, vector=VECTOR, layout=LAYOUT, budget=None):
    return Default(options).encode(vector, layout, {}, Request(budget_bytes=budget))


def decode(payload, layout=LAYOUT):
    return Default().decode(memoryview(payload), layout)


def error(encoded, vector):
    return float(np.square(encoded.update.subtracted_from(vector), dtype=np.float64).sum() / np.square(vector).sum())


@pytest.mark.parametrize("vector", [of_few_steps(), of_few_entries(), of_noise()], ids=["steps", "entries", "noise"])
@pytest.mark.parametrize("ratio", [300, 100, 32, 8, 4, 1.4, 0.9])
def test_the_best_family_is_chosen_at_equal_bytes(vector, ratio):
    """No family has an error a tenth smaller that is above a thousandth, and the bytes are those allowed."""
    budget = int(vector.nbytes / ratio)
    chosen = encode(None, vector, budget=budget)
    assert len(chosen.payload) <= budget
    assert decode(chosen.payload).vector().tobytes() == chosen.update.vector().tobytes()
    best = min(single_errors(vector, budget))
    assert error(chosen, vector) <= max(1.1 * best, 1.2e-3)


def single_errors(vector, budget):
    for family in FAMILIES:
        with contextlib.suppress(CodecError):
            yield error(encode({"family": family}, vector, budget=budget), vector)


def test_each_kind_of_update_has_its_family():
    """Few outer products: low rank; few entries: sparse; a bit or more per entry: uniform; all bytes: exact."""
    assert encode(budget=800).payload[0] == LOW_RANK
    assert encode(None, of_few_entries(), budget=260).payload[0] == SPARSE
    assert encode(None, of_noise(), budget=LAYOUT.size).payload[0] == UNIFORM
    assert encode(budget=4 * LAYOUT.size).payload[0] == ZSTD
    bits = np.random.default_rng(0).integers(0, 2**32, LAYOUT.size, np.uint32).view(np.float32)
    random = np.where(np.isfinite(bits), bits, np.float32(1))
    for vector in (VECTOR, random):
        exact = encode(None, vector, budget=4 * LAYOUT.size + 1)
        assert decode(exact.payload).values.tobytes() == vector.tobytes()


def test_a_density_forces_the_sparse_family():
    """And nothing else decides about the size then."""
    encoded = encode({"density": 0.01}, budget=8)
    assert encoded.payload[0] == SPARSE
    assert len(encoded.update.indices) == round(LAYOUT.size / 100)


def test_without_budget_the_default_ratio_holds():
    """A thirty-second of the raw bytes, the container's included; a ratio asked for holds against a larger budget."""
    assert 0.95 * VECTOR.nbytes / 32 - 18 < len(encode(None, of_noise()).payload) <= VECTOR.nbytes / 32 - 18
    assert len(encode({"target_ratio": 100.0}, budget=10_000).payload) <= VECTOR.nbytes / 100
    assert len(encode({"target_ratio": 10.0}, budget=300).payload) <= 300


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_a_budget_below_the_least_names_it(budget):
    """The error says how many bytes this update needs."""
    with pytest.raises(CodecError, match=rf"{budget} bytes is too small; this update needs \d+"):
        encode(budget=budget)


def test_an_update_of_zeros_costs_nothing():
    """Not even the byte of the family."""
    for vector in (np.zeros(LAYOUT.size, np.float32), np.full(LAYOUT.size, -0.0, np.float32)):
        encoded = encode(None, vector, budget=0)
        assert len(encoded.payload) == 0
        assert not decode(b"").vector().any()


@pytest.mark.parametrize("shapes", [(), ((0, 4),), ((),), ((1,),), ((1,),) * 100, ((7, 5), (), (3, 0)), ((300, 40),)])
@pytest.mark.parametrize("kind", ["equal", "denormal", "huge", "normal"])
@pytest.mark.parametrize("family", ["auto", "uniform"])
def test_every_layout_and_value(shapes, kind, family):
    """Nothing, scalars, many tiny tensors, denormal and huge values, at every budget that can be kept."""
    layout = Layout(tuple(map(str, range(len(shapes)))), shapes)
    rng = np.random.default_rng(1)
    vector = {
        "equal": np.full(layout.size, -0.37),
        "denormal": rng.integers(-4, 5, layout.size) * 1e-45,
        "huge": rng.choice([-3.4e38, 3e38], layout.size),
        "normal": rng.normal(size=layout.size),
    }[kind].astype(np.float32)
    for budget in (None, 25, 4 * layout.size + 25):
        with contextlib.suppress(CodecError):
            encoded = encode({"family": family}, vector, layout, budget)
            assert budget is None or len(encoded.payload) <= budget
            got = decode(encoded.payload, layout)
            assert got.vector().tobytes() == encoded.update.vector().tobytes()
            assert np.isfinite(got.values).all()
            if budget and budget > 25 and family == "auto":
                np.testing.assert_array_equal(got.vector(), vector)


@pytest.mark.parametrize("ratio", [2, 4, 8, 16])
def test_uniform_quantisation_is_near_the_rate_of_noise(ratio):
    """For Gaussian noise within 0.35 bits of the rate-distortion function, and the budget is used."""
    vector = np.random.default_rng(3).normal(size=40_000).astype(np.float32)
    layout = Layout(("w", "b"), ((195, 200), (1000,)))
    budget = vector.nbytes // ratio
    payload, got = uniform.encode_uniform(vector, layout, budget)
    assert 0.97 * budget <= len(payload) <= budget
    rate = 8 * len(payload) / vector.size
    assert rate - 0.5 * np.log2(1 / np.mean(np.square(vector - got, dtype=np.float64))) < 0.35


@pytest.mark.parametrize(
    "options", [{"family": "zip"}, {"target_ratio": -1.0}, {"density": 2.0}, {"density": 0.1, "family": "lowrank"}]
)
def test_impossible_options_are_refused(options):
    """Out of range is an error when the codec is made."""
    with pytest.raises(CodecError):
        Default(options)
    with pytest.raises(CodecError):
        LowRank({"target_ratio": -1.0})


SAMPLES = [encode({"family": family}, budget=900).payload for family in ("sparse", "lowrank", "uniform")]
SAMPLES.append(encode({"family": "exact"}, budget=4 * LAYOUT.size + 1).payload)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_damaged_payloads_never_crash(data):
    """Flipped, cut and extended bytes of every family give an error that a codec may give, or an update that fits."""
    payload = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, min(len(payload) - 1, 200)))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))] if data.draw(st.booleans()) else payload
    with contextlib.suppress(CodecError, ValueError, LookupError, ArithmeticError):
        got = decode(bytes(payload))
        assert got.size == LAYOUT.size
        assert got.vector().shape == (LAYOUT.size,)


@pytest.mark.parametrize("sample", SAMPLES, ids=["sparse", "lowrank", "uniform", "exact"])
def test_bytes_behind_the_update_are_refused(sample):
    """All of a payload is used."""
    with pytest.raises(CodecError):
        decode(sample + b"\0")
