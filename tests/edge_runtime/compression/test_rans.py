"""The entropy coder: what goes in comes out, in as many bits as the distribution says, and damage is noticed."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression.rans import (
    SCALE,
    Decoder,
    Encoder,
    Model,
    quantise_freqs,
)
from edge_runtime.compression.rans_lanes import decode_lanes, encode_lanes, lanes_for
from edge_runtime.errors import CodecError


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300).filter(any))
def test_frequencies_fill_the_scale_and_keep_every_symbol(weights):
    """All sums are 4096, and exactly the symbols with a weight stay possible."""
    freqs = quantise_freqs(weights)
    assert sum(freqs) == SCALE
    assert [freq > 0 for freq in freqs] == [weight > 0 for weight in weights]


@pytest.mark.parametrize("weights", [[], [0], [0, 0], [1, -1], [1] * 4097])
def test_impossible_tables_are_refused(weights):
    """A table from hostile bytes gives an error, not a division by zero."""
    with pytest.raises(CodecError, match="frequency table"):
        Model(weights)


OPERATION = st.one_of(
    st.tuples(st.just("symbols"), st.lists(st.integers(0, 4), max_size=40)),
    st.tuples(st.just("sole"), st.integers(0, 5)),
    st.tuples(st.just("mixed"), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), max_size=40)),
    st.tuples(
        st.just("raw"), st.integers(0, 70).flatmap(lambda w: st.tuples(st.integers(0, (1 << w) - 1), st.just(w)))
    ),
    st.tuples(
        st.just("raws"),
        st.lists(
            st.integers(0, 56).flatmap(lambda w: st.tuples(st.integers(0, (1 << w) - 1), st.just(w))), max_size=20
        ),
    ),
)
MODELS = [Model([1, 5, 100, 3000, 20]), Model([7, 7, 7, 7, 7])]
SOLE = Model([0, 9])


def write(operations):
    encoder = Encoder()
    for kind, what in operations:
        if kind == "symbols":
            encoder.symbols(MODELS[0], what)
        elif kind == "sole":
            encoder.symbols(SOLE, [1] * what)
        elif kind == "mixed":
            encoder.mixed(MODELS, [context for context, _ in what], [symbol for _, symbol in what])
        elif kind == "raw":
            encoder.raw(*what)
        else:
            encoder.raws([value for value, _ in what], [width for _, width in what])
    return encoder.finish()


def read(payload, operations):
    decoder = Decoder(payload)
    out = []
    for kind, what in operations:
        if kind == "symbols":
            out.append((kind, decoder.symbols(MODELS[0], len(what))))
        elif kind == "sole":
            out.append((kind, len(decoder.symbols(SOLE, what))))
        elif kind == "mixed":
            contexts = [context for context, _ in what]
            out.append((kind, list(zip(contexts, decoder.mixed(MODELS, contexts), strict=True))))
        elif kind == "raw":
            out.append((kind, (decoder.raw(what[1]), what[1])))
        else:
            widths = [width for _, width in what]
            out.append((kind, list(zip(decoder.raws(widths).tolist(), widths, strict=True))))
    decoder.finish()
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATION, max_size=12))
def test_any_mixture_comes_back(operations):
    """Symbols of several models, contexts and raw bits share one stream in any order."""
    assert read(write(operations), operations) == operations


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATION, min_size=1, max_size=6), st.data())
def test_damaged_streams_never_crash(operations, data):
    """Changed, cut or extended bytes give a CodecError or other symbols of the same number."""
    payload = bytearray(write(operations))
    for _ in range(data.draw(st.integers(0, 3))):
        if payload:
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    with contextlib.suppress(CodecError):
        assert len(read(bytes(payload[:cut]), operations)) == len(operations)


def test_the_stream_is_as_long_as_the_distribution_says():
    """Size is within 0.1 % and two bytes of the model's own cost, and nothing costs nothing."""
    rng = np.random.default_rng(1)
    weights = np.array([900, 300, 100, 30, 9, 3, 1])
    symbols = rng.choice(7, 20_000, p=weights / weights.sum())
    model = Model(weights.tolist())
    encoder = Encoder()
    encoder.symbols(model, symbols)
    payload = encoder.finish()
    assert len(payload) <= model.costs[symbols].sum() / 8 * 1.001 + 2
    assert Decoder(payload).symbols(model, 20_000) == symbols.tolist()
    for wrong in (payload[:-2], payload + b"\0\0", payload + b"\1"):
        decoder = Decoder(wrong)
        decoder.symbols(model, 20_000)
        with pytest.raises(CodecError, match="does not end"):
            decoder.finish()
    assert Encoder().finish() == b""


def test_symbols_outside_their_model_are_refused():
    """An excluded symbol is an error when it is written, in every way of writing."""
    excluding = Model([3, 0, 5])
    encoder = Encoder()
    encoder.symbols(excluding, [0, 2, 1])
    with pytest.raises(CodecError, match="not in its model"):
        encoder.finish()
    with pytest.raises(CodecError, match="not in its model"):
        Encoder().symbols(SOLE, [1, 0])
    with pytest.raises(CodecError, match="not in its model"):
        encode_lanes(np.array([0, 1]), excluding)


@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 2048, 5000, 200_001])
@pytest.mark.parametrize("weights", [[1], [0, 4], [5, 1], [1, 2, 3000, 80, 1], [1] * 255])
def test_lanes_bring_long_runs_back(count, weights):
    """Any number of symbols, and of the only symbol of a model, which takes no bytes."""
    rng = np.random.default_rng(count)
    p = np.array(weights) / sum(weights)
    symbols = rng.choice(len(weights), count, p=p)
    model = Model(weights)
    payload = encode_lanes(symbols, model)
    np.testing.assert_array_equal(decode_lanes(payload, model, count), symbols)
    assert len(payload) <= (model.costs[symbols].sum() / 8 * 1.002 + 6 * lanes_for(count) if count else 0)
    with pytest.raises(CodecError):
        decode_lanes(payload + b"\0\0", model, count)


def test_lanes_notice_damage():
    """A cut or changed run of lanes is refused or gives symbols of the model."""
    rng = np.random.default_rng(3)
    model = Model([5, 90, 5])
    symbols = rng.choice(3, 9000, p=[0.05, 0.9, 0.05])
    payload = encode_lanes(symbols, model)
    for cut in (0, 1, 4, 31, len(payload) - 2, len(payload) - 1):
        with pytest.raises(CodecError):
            decode_lanes(payload[:cut], model, 9000)
    refused = 0
    for _ in range(300):
        damaged = bytearray(payload)
        damaged[rng.integers(len(payload))] ^= rng.integers(1, 256)
        try:
            assert decode_lanes(bytes(damaged), model, 9000).max() < 3
        except CodecError:
            refused += 1
    assert refused > 290
