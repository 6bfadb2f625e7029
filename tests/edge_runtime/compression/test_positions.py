"""Positions of sparse entries: exact, in fewer bytes than choosing them at random would take, and never outside."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression import Layout, positions
from edge_runtime.compression.rans import Decoder, Encoder
from edge_runtime.errors import CodecError

LAYOUT = Layout(("c", "b", "w", "e", "s"), ((4, 3, 5, 5), (4,), (40, 90), (0, 7), ()))


def write(indices, layout):
    encoder = Encoder()
    plan = positions.plan(np.asarray(indices, np.int64), layout)
    plan.write(encoder)
    return encoder.finish(), plan


def read(payload, layout):
    decoder = Decoder(payload)
    found = positions.read(decoder, layout)
    decoder.finish()
    return found


def log2_choose(n, k):
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, LAYOUT.size - 1)))
def test_any_set_of_positions_comes_back(chosen):
    """In the order that the plan announces, which is a permutation of what was given."""
    indices = np.array(sorted(chosen), np.int64)
    payload, plan = write(indices, LAYOUT)
    np.testing.assert_array_equal(read(payload, LAYOUT), indices[plan.order])
    assert sorted(plan.order.tolist()) == list(range(len(indices)))


@pytest.mark.parametrize("shapes", [(), ((0,),), ((),), ((1,),) * 100, ((3_000_000, 2),), ((1, 70),), ((70, 1),)])
def test_layouts_of_every_kind(shapes):
    """No, empty, single, many tiny and one large tensor; none, the last and all up to 1000 positions."""
    layout = Layout(tuple(map(str, range(len(shapes)))), shapes)
    for indices in ([], [layout.size - 1], range(min(layout.size, 1000))):
        if len(indices) <= layout.size:
            payload, plan = write(list(indices), layout)
            np.testing.assert_array_equal(np.sort(read(payload, layout)), np.array(list(indices), np.int64))
            assert len(payload) <= plan.bits / 8 + 2


def test_random_positions_cost_what_they_must():
    """Within 6 % of the information in a random choice, which has no structure to find."""
    layout = Layout(("w",), ((200, 1000),))
    for count in (200, 5000):
        indices = np.sort(np.random.default_rng(count).choice(layout.size, count, replace=False))
        payload, plan = write(indices, layout)
        assert len(payload) <= 1.06 * log2_choose(layout.size, count) / 8 + 4
        assert abs(len(payload) - plan.bits / 8) < 3


@pytest.mark.parametrize("axis", [0, 1])
def test_active_units_make_positions_cheap(axis):
    """Entries that gather in a tenth of the rows, or of the columns, cost less than two thirds of random ones."""
    rng = np.random.default_rng(5)
    mask = np.zeros((300, 300), bool)
    units = rng.choice(300, 30, replace=False)
    active = rng.random((30, 300)) < 0.25
    if axis == 0:
        mask[units] = active
    else:
        mask[:, units] = active.T
    indices = np.flatnonzero(mask)
    payload, _ = write(indices, Layout(("w",), ((300, 300),)))
    assert len(payload) <= 0.66 * log2_choose(mask.size, len(indices)) / 8


def test_untouched_tensors_cost_next_to_nothing():
    """A hundred of them take a few bits together."""
    layout = Layout(tuple(map(str, range(101))), ((64,),) * 101)
    assert len(write([5], layout)[0]) <= len(write([5], Layout(("0",), ((64,),)))[0]) + 2


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_hostile_bytes_give_positions_inside_or_an_error(payload):
    """Whatever the bytes, positions are unique and inside the layout."""
    with contextlib.suppress(CodecError):
        found = read(payload, LAYOUT)
        assert len(set(found.tolist())) == len(found) <= LAYOUT.size
        assert not len(found) or (found.min() >= 0 and found.max() < LAYOUT.size)
