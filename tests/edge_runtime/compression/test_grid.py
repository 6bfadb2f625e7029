"""The shared model: every way to a version ends at the same bits, and a snapshot is exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression import Layout
from edge_runtime.compression.container import Header, pack
from edge_runtime.compression.grid import GRID_BITS, SharedModel
from edge_runtime.compression.pipeline import encode_model
from edge_runtime.errors import CodecError

LAYOUT = Layout(("w", "b", "mean"), ((40, 30), (40,), (40,)), frozenset({"mean"}))


def initial(seed: int = 0, layout: Layout = LAYOUT) -> np.ndarray:
    """Parameters as a network begins with them: weights, zero biases, statistics."""
    random = np.random.default_rng(seed)
    vector = random.uniform(-0.1, 0.1, layout.size).astype(np.float32)
    vector[1200:1240] = 0
    return vector


def change(seed: int, scale: float = 1e-3) -> np.ndarray:
    """One round's change."""
    return (np.random.default_rng(seed).standard_normal(LAYOUT.size) * scale).astype(np.float32)


def test_a_snapshot_and_the_chain_end_at_the_same_bits():
    """A device that came by a snapshot half-way holds what one holds that followed every change."""
    chain = SharedModel.start(initial(), LAYOUT)
    late = None
    for version in range(8):
        chain = chain.plus(change(version))
        late = SharedModel.decode(chain.encode(), LAYOUT) if version == 3 else late and late.plus(change(version))
    np.testing.assert_array_equal(late.vector, chain.vector)
    assert late.sha256() == chain.sha256()
    assert late.encode() == chain.encode()


def test_rounding_is_at_most_half_a_step_and_left_to_the_coordinator():
    """No value is further from the wanted one than half a step of its tensor."""
    vector = initial()
    shared = SharedModel.start(vector, LAYOUT)
    step = np.abs(vector[:1200]).max() * 2.0 ** (1 - GRID_BITS)
    assert np.abs(shared.vector - vector)[:1200].max() <= step / 2
    wanted = vector.astype(np.float64)
    for version in range(20):  # error feedback: what was rounded off is in the next change
        wanted += change(version, 1e-4)
        shared = shared.plus((wanted - shared.vector).astype(np.float32))
    assert np.abs(shared.vector - wanted)[:1200].max() <= step


def test_a_snapshot_takes_far_less_than_the_floats():
    """About as many bits a value as the grid has, not 32."""
    layout = Layout(("w",), ((200_000,),))
    shared = SharedModel.start(np.random.default_rng(0).uniform(-0.1, 0.1, layout.size).astype(np.float32), layout)
    assert 8 * len(shared.encode()) / layout.size < GRID_BITS + 1.5
    np.testing.assert_array_equal(SharedModel.decode(shared.encode(), layout).vector, shared.vector)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=40),
    st.lists(st.floats(-1024, 1024, width=32), min_size=40, max_size=40),
)
@settings(max_examples=150, deadline=None)
def test_any_numbers_survive(values, steps):
    """Empty, zero, denormal and huge tensors; a change that the grid cannot hold is refused by name."""
    layout = Layout(("w",), ((len(values),),))
    vector = np.array(values, np.float32)
    shared = SharedModel.start(vector, layout)
    try:
        shared = shared.plus(np.array(steps[: len(values)], np.float32))
        data = shared.encode()
    except CodecError as error:
        reason = str(error)
    else:
        np.testing.assert_array_equal(SharedModel.decode(data, layout).vector, shared.vector)
        return
    assert "grid" in reason or "float32" in reason


def test_damaged_snapshots_are_refused():
    """Never anything but a CodecError, and no value beyond the layout, also where the CRC was made right."""
    random = np.random.default_rng(0)
    good = SharedModel.start(initial(), LAYOUT).encode()
    section = good[12:-4]
    for _ in range(400):
        bad = bytearray(section)
        for _ in range(random.integers(1, 4)):
            bad[random.integers(len(bad))] = random.integers(256)
        cut = bytes(bad[: random.integers(len(bad) + 1)]) if random.random() < 0.2 else bytes(bad)
        try:
            out = SharedModel.decode(pack(Header(codec=16), {"model": LAYOUT}, [[cut]]), LAYOUT)
        except CodecError:
            continue
        assert out.vector.shape == (LAYOUT.size,)
        assert np.isfinite(out.vector).all()


def test_other_containers_and_tensors_are_refused():
    """A plain model is no snapshot, and a snapshot is of its own tensors only."""
    with pytest.raises(CodecError, match="no snapshot"):
        SharedModel.decode(encode_model(initial(), LAYOUT), LAYOUT)
    other = Layout(("w", "b", "mean"), ((30, 40), (40,), (40,)), frozenset({"mean"}))
    with pytest.raises(CodecError, match="other tensors"):
        SharedModel.decode(SharedModel.start(initial(), LAYOUT).encode(), other)


def test_zero_has_one_sign():
    """Values that round to zero from below are the zero of a snapshot: hashes are of bytes, and -0.0 has others."""
    tiny = np.full(LAYOUT.size, -1e-7, np.float32)
    shared = SharedModel.start(np.where(np.arange(LAYOUT.size) % 2, initial(), tiny).astype(np.float32), LAYOUT)
    shared = shared.plus(tiny)
    assert (shared.vector == 0).any()
    assert SharedModel.decode(shared.encode(), LAYOUT).sha256() == shared.sha256()
