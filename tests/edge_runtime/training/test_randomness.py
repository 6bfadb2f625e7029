"""Random numbers: the same everywhere and for ever, and random enough."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.training.randomness import Stream


def test_the_numbers_never_change():
    """A replayed run must shuffle as it did; these values are part of the contract."""
    assert Stream(7, "order").permutation(10).tolist() == [8, 7, 6, 1, 5, 9, 2, 3, 0, 4]
    assert Stream(7, "order").bits(2).tolist() == [17943360100426504464, 9114602840845010428]
    assert Stream(1 << 127).integer(1000) == 935


def test_splitmix_is_the_published_one():
    """The first output for the counter 0 is known."""
    stream = Stream(0)
    stream._counter = 0
    assert stream.bits(3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.lists(st.integers(0, 50), max_size=6))
def test_pieces_are_the_whole(sizes):
    """A stream goes on where it stopped."""
    pieces, whole = Stream(3), Stream(3)
    got = [value for size in sizes for value in pieces.bits(size).tolist()]
    assert got == whole.bits(sum(sizes)).tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutations_hold_every_number_once(count):
    """No sample is lost or doubled."""
    assert sorted(Stream(1).permutation(count).tolist()) == list(range(count))


def test_numbers_are_spread_evenly():
    """Means, places and streams look random."""
    uniform = Stream(1).uniform(100_000)
    assert abs(uniform.mean() - 0.5) < 0.005
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.02
    firsts = np.bincount([Stream(seed).permutation(4)[0] for seed in range(2000)])
    assert (abs(firsts - 500) < 100).all()
    assert len({Stream(seed, purpose).integer(1 << 32) for seed in range(50) for purpose in "ab"}) == 100


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="numpy 1 imports all of itself")
def test_training_does_not_import_numpy_random():
    """Its 6.5 MB stay free on the device."""
    code = "import sys, edge_runtime.training.job; assert 'numpy.random' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
