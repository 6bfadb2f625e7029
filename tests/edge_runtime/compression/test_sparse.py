"""The sparse codec: the largest entries, at least error for the bytes, and what is damaged is refused."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression import Layout
from edge_runtime.compression.base import Request
from edge_runtime.compression.sparse import Largest, Sparse
from edge_runtime.errors import CodecError

LAYOUT = Layout(("c1", "b1", "c2", "w1", "b", "w2"), ((8, 1, 5, 5), (8,), (16, 8, 5, 5), (120, 300), (120,), (10, 120)))


def update(seed=0, layout=LAYOUT):
    """As of training: entries gather in active rows, which share a sign."""
    rng = np.random.default_rng(seed)
    parts = []
    for _, shape, start, end in layout.spans():
        rows = shape[0] if shape else 1
        row = rng.normal(size=rows) * (rng.random(rows) < 0.4)
        values = np.abs(rng.standard_t(4, (rows, (end - start) // max(rows, 1)))) * row[:, None] * 1e-3
        parts.append((values + rng.normal(size=values.shape) * 1e-5).reshape(-1))
    return np.concatenate(parts).astype(np.float32)


VECTOR = update()


def encode(options=None, vector=VECTOR, layout=LAYOUT, budget=None):
    return Sparse(options).encode(vector, layout, {}, Request(budget_bytes=budget))


def decode(payload, layout=LAYOUT):
    return Sparse().decode(memoryview(bytes(payload)), layout)


def error(encoded, vector=VECTOR):
    return float(np.square(encoded.update.subtracted_from(vector), dtype=np.float64).sum() / np.square(vector).sum())


@pytest.mark.parametrize("options", [{"density": 0.01}, {"density": 0.2, "levels": 3}, {"levels": 40}, {}])
def test_decoding_gives_what_encoding_said(options):
    """Bit for bit, at the positions of the largest entries."""
    encoded = encode(options)
    got = decode(encoded.payload)
    np.testing.assert_array_equal(got.indices, encoded.update.indices)
    assert got.values.tobytes() == encoded.update.values.tobytes()
    count = len(got.indices)
    assert np.abs(VECTOR[got.indices]).min() >= np.sort(np.abs(VECTOR))[-count]


def test_a_density_fixes_the_number_of_entries_against_any_budget():
    """One in a hundred, rounded; the budget does not matter then."""
    assert len(encode({"density": 0.01}, budget=10).update.indices) == round(LAYOUT.size / 100)


@pytest.mark.parametrize("budget", [30, 100, 700, 3000, 7000])
def test_the_budget_is_used_and_kept(budget):
    """Between 97 % and all of it."""
    size = len(encode(budget=budget).payload)
    assert 0.97 * budget <= size <= budget


def test_the_codebook_is_chosen_for_least_error():
    """No fixed size does better by more than three hundredths at the same bytes."""
    for budget in (200, 2000):
        chosen = error(encode(budget=budget))
        assert chosen <= 1.03 * min(error(encode({"levels": levels}, budget=budget)) for levels in (2, 4, 8, 15))


def test_a_ratio_counts_the_container():
    """A ratio of 100 leaves a hundredth of the raw bytes for everything."""
    assert 0.95 * VECTOR.nbytes / 100 - 18 <= len(encode({"target_ratio": 100.0}).payload) <= VECTOR.nbytes / 100 - 18


def test_structure_is_found():
    """Positions and values of an update with active rows cost less than 0.9 of a memoryless code's bound."""
    encoded = encode({"density": 0.01, "levels": 15})
    n, k = LAYOUT.size, len(encoded.update.indices)
    counts = np.unique(encoded.update.values, return_counts=True)[1]
    positions = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    assert len(encoded.payload) < 0.9 * (positions + float(counts @ np.log2(k / counts))) / 8


@pytest.mark.parametrize("shapes", [(), ((0, 4),), ((),), ((1,),), ((1,),) * 100, ((7, 5), (), (3, 0))])
@pytest.mark.parametrize("kind", ["zeros", "equal", "denormal", "huge", "normal"])
def test_every_layout_and_value(shapes, kind):
    """Nothing, scalars, many tiny tensors; zeros cost nothing, and denormal and huge values stay finite."""
    layout = Layout(tuple(map(str, range(len(shapes)))), shapes)
    rng = np.random.default_rng(1)
    vector = {
        "zeros": np.zeros(layout.size),
        "equal": np.full(layout.size, -0.37),
        "denormal": rng.integers(-4, 5, layout.size) * 1e-45,
        "huge": rng.choice([-3.4e38, 3e38], layout.size),
        "normal": rng.normal(size=layout.size),
    }[kind].astype(np.float32)
    for options in ({}, {"density": 0.5}, {"levels": 1}):
        encoded = encode(options, vector, layout)
        got = decode(encoded.payload, layout)
        assert got.vector().tobytes() == encoded.update.vector().tobytes()
        assert np.isfinite(got.values).all()
    if kind == "zeros":
        assert len(encoded.payload) == 0
    if kind == "equal" and layout.size:
        np.testing.assert_allclose(encode({"density": 1.0}, vector, layout).update.vector(), vector, rtol=2.0**-6)


def test_equal_magnitudes_are_taken_from_the_front():
    """The choice among ties is the same everywhere."""
    vector = np.array([0, 1, -1, 2, 1, -1, 0], np.float32)
    assert [Largest(vector, 5).top(count).tolist() for count in (0, 1, 2, 4, 5)] == [
        [],
        [3],
        [1, 3],
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5],
    ]
    assert Largest(vector, 7).count == 5


def test_a_budget_below_one_entry_names_what_is_needed():
    """The error says how many bytes it takes."""
    with pytest.raises(CodecError, match=r"3 bytes is below the \d+ that one entry needs"):
        encode(budget=3)


@pytest.mark.parametrize("options", [{"density": -0.1}, {"density": 1.5}, {"levels": 65}, {"target_ratio": -2.0}])
def test_impossible_options_are_refused(options):
    """Out of range is an error when the codec is made."""
    with pytest.raises(CodecError):
        Sparse(options)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_payloads_never_crash(data):
    """Flipped, cut and random bytes give a CodecError or a finite update inside the layout."""
    payload = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))] if data.draw(st.booleans()) else payload
    with contextlib.suppress(CodecError):
        got = decode(payload)
        assert np.isfinite(got.values).all()
        assert len(np.unique(got.indices)) == len(got.indices) == len(got.values)


SAMPLE = encode({"density": 0.002, "levels": 5}).payload
