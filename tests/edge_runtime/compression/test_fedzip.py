"""FedZip: what the paper does, in codes that can be decoded."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.compression import Layout, prefix
from edge_runtime.compression.base import Request
from edge_runtime.compression.fedzip import ENCODINGS, FedZip, claimed_bits
from edge_runtime.errors import CodecError

LAYOUT = Layout(("w1", "b1", "e", "w2", "s"), ((60, 50), (60,), (0, 3), (10, 60), ()))
VECTOR = (np.random.default_rng(2).standard_t(3, LAYOUT.size) * 1e-3).astype(np.float32)


def encode(options=None, vector=VECTOR, layout=LAYOUT):
    return FedZip(options).encode(vector, layout, {}, Request())


def decode(payload, layout=LAYOUT):
    return FedZip().decode(memoryview(payload), layout)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("clusters", [1, 2, 3, 8, 16])
def test_every_encoding_comes_back(encoding, clusters):
    """Bit for bit, with any number of clusters."""
    encoded = encode({"encoding": encoding, "clusters": clusters, "keep": 0.6})
    assert decode(encoded.payload).values.tobytes() == encoded.update.values.tobytes()


def test_the_shortest_encoding_is_the_default():
    """What is not asked for is chosen."""
    sizes = [len(encode({"encoding": encoding}).payload) for encoding in ENCODINGS]
    assert len(encode().payload) == min(sizes)


def test_a_weight_tensor_becomes_three_values_and_small_entries_one():
    """The four fifths that are dropped all get one mean, which need not be zero; biases keep their large entries."""
    tensors = LAYOUT.split(encode().update.values)
    for name in ("w1", "w2", "b1"):
        assert len(np.unique(tensors[name])) <= 3
    weights = LAYOUT.split(VECTOR)["w1"]
    dropped = np.abs(weights) < np.quantile(np.abs(weights), 0.79)
    assert len(np.unique(tensors["w1"][dropped])) == 1


def test_clusters_are_those_of_four_lloyd_iterations_over_zeros_too():
    """Worked by hand: [0 0 0 0 4 | 10] and so on, from equal steps between least and largest."""
    layout = Layout(("b",), ((7,),))
    got = encode(None, np.array([-10, -9, 0, 1, 2, 9, 10], np.float32), layout).update.values
    np.testing.assert_allclose(got, [-9.5, -9.5, 1, 1, 1, 9.5, 9.5])


def test_the_published_formulas_are_no_sizes():
    """They give less than the real codes, and for the Huffman code exactly one bit per entry of the middle cluster."""
    labels = [np.array([0] * 5 + [1] * 20 + [2] * 3), np.zeros(4, np.int64)]
    claimed = claimed_bits(labels)
    assert claimed["huffman"] == (2 * 3 + 5 + 20) + 4
    assert claimed["address"] == 27 * (3 + 5)
    clustered = [labels for labels, _ in FedZip().cluster(VECTOR, LAYOUT)]
    assert claimed_bits(clustered)["difference"] < 8 * len(encode({"encoding": "difference"}).payload)


@pytest.mark.parametrize("shapes", [(), ((0, 4),), ((),), ((1, 1),), ((1,),) * 100])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e-45, -3.4e38])
def test_degenerate_layouts_and_values(shapes, value):
    """Equal values are exact; nothing is nothing."""
    layout = Layout(tuple(map(str, range(len(shapes)))), shapes)
    vector = np.full(layout.size, value, np.float32)
    for encoding in ENCODINGS:
        encoded = encode({"encoding": encoding}, vector, layout)
        np.testing.assert_array_equal(decode(encoded.payload, layout).values, vector)


@pytest.mark.parametrize(
    "options", [{"keep": 0.0}, {"keep": 1.1}, {"clusters": 0}, {"clusters": 17}, {"encoding": "zip"}]
)
def test_impossible_options_are_refused(options):
    """Out of range is an error when the codec is made."""
    with pytest.raises(CodecError):
        FedZip(options)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_payloads_never_crash(data):
    """Flipped, cut and extended bytes give one of the errors that a codec may give, or an update of the right size."""
    payload = bytearray(encode({"encoding": data.draw(st.sampled_from(ENCODINGS))}).payload)
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, min(len(payload) - 1, 80)))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))] if data.draw(st.booleans()) else payload
    with contextlib.suppress(CodecError, IndexError, ValueError):
        assert decode(bytes(payload)).values.shape == (LAYOUT.size,)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_behind_the_update_are_refused(encoding):
    """All of a payload is used."""
    with pytest.raises(CodecError):
        decode(encode({"encoding": encoding}).payload + b"\0")


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=16))
def test_huffman_lengths_are_complete_and_near_the_entropy(counts):
    """The Kraft sum is one, and the mean length is below the entropy plus one."""
    lengths = prefix.code_lengths(counts)
    assert sum(2.0**-length for length in lengths) == 1
    share = np.array(counts) / sum(counts)
    assert share @ lengths < -(share @ np.log2(share)) + 1


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 2], [0, 1], [2, 2, 2], [1, 2, 3, 4]])
def test_huffman_codes_that_are_none_are_refused(lengths):
    """Over-full, incomplete and empty codes; among them the lengths of the published formula."""
    with pytest.raises(CodecError, match="do not fit together"):
        prefix.decode_huffman(b"\0", lengths, 3)


@given(st.lists(st.integers(1, 2**52), max_size=50))
def test_gamma_codes_come_back(numbers):
    """In 2 floor(log2 n) + 1 bits each."""
    given_ = np.array(numbers, np.int64)
    unary, rest = prefix.encode_gamma(given_)
    got, end = prefix.decode_gamma(memoryview(unary + rest + b"tail"), len(unary), len(numbers))
    np.testing.assert_array_equal(got, given_)
    assert end == len(unary) + len(rest)
    assert prefix.gamma_bits(given_) == sum(2 * number.bit_length() - 1 for number in numbers)
