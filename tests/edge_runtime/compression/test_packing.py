"""Bits and positions: whatever is packed returns, and whatever arrives is checked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression.packing import pack_positions, positions_limit, unpack_bits, unpack_positions
from edge_runtime.errors import CodecError


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(size=st.integers(1, 5000), density=st.floats(0, 1), seed=st.integers(0, 1000), front=st.booleans())
def test_any_positions_return(size, density, seed, front):
    """Uniform or clustered, none, some or all; never more bytes than the bound."""
    count = round(size * density)
    chosen = np.arange(count) if front else np.sort(np.random.default_rng(seed).permutation(size)[:count])
    packed = pack_positions(chosen.astype(np.int64), size)
    assert len(packed) <= positions_limit(count, size)
    np.testing.assert_array_equal(unpack_positions(memoryview(packed), count, size), chosen)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(payload=st.binary(max_size=40), count=st.integers(-1, 60), size=st.integers(0, 50))
def test_any_bytes_give_an_error_or_positions(payload, count, size):
    """Whatever is decoded is in order, in range, as many as announced, and written in one way only."""
    try:
        positions = unpack_positions(memoryview(payload), count, size)
    except CodecError:
        return
    assert len(positions) == count
    assert (np.diff(positions, prepend=-1) > 0).all()
    assert count == 0 or positions[-1] < size


def test_bits_behind_the_last_are_refused():
    """Two payloads never stand for the same bits."""
    assert unpack_bits(memoryview(b"\xa0"), 3).tolist() == [1, 0, 1]
    for payload, count in ((b"\xa1", 3), (b"\xa0\0", 3), (b"", 3), (b"\0", 0)):
        with pytest.raises(CodecError, match="bits"):
            unpack_bits(memoryview(payload), count)
