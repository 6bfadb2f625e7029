"""FedZip: top-z sparsification and three clusters per tensor, with prefix codes.

Malekijoo et al., "FedZip: A compression framework for communication-efficient federated learning", arXiv 2102.01593:
per weight tensor the entries of the largest magnitude are kept and the others set to 0, then all entries, the zeros
too, are clustered (four Lloyd iterations from equal steps between least and largest); labels travel by Huffman code,
as a table of addresses, or as differences of addresses. The cluster of the zeros has a mean that need not be 0, so
the update is dense.

The published sizes come from formulas (:func:`claimed_bits`), two of which no decodable code reaches: codeword lengths
2, 1, 1 have a Kraft sum of 1.25, and differences without their lengths cannot be told apart. Here each is a real code:
canonical Huffman, addresses of just enough bits, Elias's gamma code of the differences.

Payload: u8 encoding; per tensor that has elements: u8 number of clusters, their float32 means, the labels. No budget is
heeded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression import prefix
from edge_runtime.compression.base import Codec, Encoded, Update, Value
from edge_runtime.compression.bits import pack_fields, unpack_fields
from edge_runtime.compression.container import read_varint, varint
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edge_runtime.compression.base import Layout, Request, State, Vector

ENCODINGS = ("huffman", "address", "difference")
_ITERATIONS = 4
_CLAIMED_ADDRESS_BITS = 27


class FedZip(Codec):
    """FedZip as published, without error feedback unless asked for.

    Options: ``keep`` the share of each weight tensor that is kept (tensors of one axis are kept whole); ``clusters``
    per tensor; ``encoding``: huffman, address, difference, or best for the shortest of them.
    """

    name: ClassVar[str] = "fedzip"
    number: ClassVar[int] = 6
    feedback: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Value]] = {"keep": 0.2, "clusters": 3, "encoding": "best"}

    def __init__(self, options: Mapping[str, Value] | None = None) -> None:
        """Takes the options; raises CodecError."""
        super().__init__(options)
        self._keep = float(self.options["keep"])
        self._clusters = int(self.options["clusters"])
        self._encoding = str(self.options["encoding"])
        if not 0 < self._keep <= 1:
            raise CodecError(f"codec 'fedzip': keep {self._keep:g} must be above 0 and at most 1")
        if not 1 <= self._clusters <= prefix.MAX_SYMBOLS:
            raise CodecError(f"codec 'fedzip': clusters {self._clusters} must be from 1 to {prefix.MAX_SYMBOLS}")
        if self._encoding not in (*ENCODINGS, "best"):
            raise CodecError(f"codec 'fedzip': encoding {self._encoding!r} is none of best, {', '.join(ENCODINGS)}")

    def cluster(self, values: Vector, layout: Layout) -> list[tuple[NDArray[np.int64], Vector]]:
        """Labels (int64 ``[n]``) and means (float32, all in use) of each tensor that has elements."""
        found = []
        for _, shape, start, end in layout.spans():
            if end > start:
                part = values[start:end]
                kept = _largest(part, self._keep) if len(shape) > 1 else part
                found.append(_cluster(kept, self._clusters))
        return found

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:  # noqa: ARG002
        """The payload, whatever the budget."""
        tensors = self.cluster(values, layout)
        encoding = self._encoding
        if encoding == "best":
            sizes = [sum(_label_bits(kind, labels) for labels, _ in tensors) for kind in ENCODINGS]
            encoding = ENCODINGS[sizes.index(min(sizes))]
        parts = [bytes([ENCODINGS.index(encoding)])]
        for labels, means in tensors:
            parts += [bytes([means.size]), means.astype("<f4").tobytes(), _encode_labels(encoding, labels)]
        return Encoded(b"".join(parts), Update(_joined([means[labels] for labels, means in tensors])), state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """The dense update; raises CodecError."""
        if not len(payload) or payload[0] >= len(ENCODINGS):
            raise CodecError("the encoding of a FedZip update is unknown")
        encoding, at = ENCODINGS[payload[0]], 1
        parts = []
        for _, _, start, end in layout.spans():
            if end == start:
                continue
            clusters = payload[at]
            means = np.frombuffer(payload[at + 1 : at + 1 + 4 * clusters], "<f4").astype(np.float32)
            if not 0 < clusters <= prefix.MAX_SYMBOLS or means.size != clusters:
                raise CodecError(f"{clusters} clusters in a tensor, or fewer means than that")
            labels, at = _decode_labels(encoding, payload, at + 1 + 4 * clusters, clusters, end - start)
            parts.append(means[labels])
        if at != len(payload):
            raise CodecError(f"{len(payload) - at} bytes follow the update")
        return Update(_joined(parts))


def claimed_bits(labels: Sequence[NDArray[np.int64]]) -> dict[str, int]:
    """Bits by the formulas of the published script, from the labels (int64 ``[n]``) of each tensor.

    These are no sizes of anything that can be decoded, and leave the means out; they are here to be set beside sizes
    that are real.
    """
    huffman = address = 0
    pairs = [0, 0, 0]
    for tensor in labels:
        counts = sorted(np.bincount(tensor, minlength=3).tolist())
        huffman += 2 * counts[0] + sum(counts[1:])
        address += _CLAIMED_ADDRESS_BITS * sum(counts[:-1])
        bits = []
        for label in range(3):
            gaps = np.diff(np.flatnonzero(tensor == label), prepend=0)
            bits.append(int(np.frexp(np.maximum(gaps, 1).astype(np.float64))[1].sum()))
        for number, (one, other) in enumerate(((0, 1), (0, 2), (1, 2))):
            pairs[number] += bits[one] + bits[other]
    return {"huffman": huffman, "address": address, "difference": min(pairs)}


def _largest(values: Vector, keep: float) -> Vector:
    magnitudes = np.abs(values)
    dropped = min(round(values.size * (1 - keep)), values.size - 1)
    kept: Vector = np.where(magnitudes >= np.partition(magnitudes, dropped)[dropped], values, np.float32(0))
    return kept


def _cluster(values: Vector, clusters: int) -> tuple[NDArray[np.int64], Vector]:
    wide = values.astype(np.float64)
    means = np.linspace(wide.min(), wide.max(), clusters)
    for _ in range(_ITERATIONS):
        labels = np.searchsorted((means[1:] + means[:-1]) / 2, wide)
        counts = np.bincount(labels, minlength=clusters)
        sums = np.bincount(labels, wide, minlength=clusters)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), means)
    used = counts > 0
    return (np.cumsum(used) - 1)[labels], means[used].astype(np.float32)


def _label_bits(encoding: str, labels: NDArray[np.int64]) -> int:
    counts = np.bincount(labels)
    if counts.size == 1:
        return 0
    if encoding == "huffman":
        return 8 * counts.size + int(counts @ prefix.code_lengths(counts.tolist()))
    if encoding == "address":
        return int(counts.sum() - counts.max()) * _address_bits(labels.size)
    others = [label for label in range(counts.size) if label != counts.argmax()]
    return sum(prefix.gamma_bits(_differences(labels, label)) for label in others)


def _encode_labels(encoding: str, labels: NDArray[np.int64]) -> bytes:
    counts = np.bincount(labels)
    if counts.size == 1:
        return b""
    if encoding == "huffman":
        lengths = prefix.code_lengths(counts.tolist())
        coded = prefix.encode_huffman(labels, lengths)
        return bytes(lengths) + varint(len(coded)) + coded
    most = int(counts.argmax())
    parts = [bytes([most])]
    for label in range(counts.size):
        if label == most:
            continue
        parts.append(varint(int(counts[label])))
        if encoding == "address":
            places = np.flatnonzero(labels == label).astype(np.uint64)
            parts.append(pack_fields(places, np.full(places.size, _address_bits(labels.size))))
        else:
            unary, rest = prefix.encode_gamma(_differences(labels, label))
            parts += [varint(len(unary)), unary, rest]
    return b"".join(parts)


def _decode_labels(
    encoding: str, payload: memoryview, at: int, clusters: int, size: int
) -> tuple[NDArray[np.uint8], int]:
    """Labels, uint8 ``[size]``, and the place behind them."""
    end = len(payload)
    if clusters == 1:
        return np.zeros(size, np.uint8), at
    if encoding == "huffman":
        lengths = list(payload[at : at + clusters])
        if len(lengths) != clusters or max(lengths) >= prefix.MAX_SYMBOLS:
            raise CodecError("the lengths of a Huffman code are cut off or too long")
        length, at = read_varint(payload, at + clusters, end, end)
        if at + length > end:
            raise CodecError("a Huffman code is cut off")
        return prefix.decode_huffman(payload[at : at + length], lengths, size), at + length
    most = payload[at]
    if most >= clusters:
        raise CodecError("the largest cluster does not exist")
    at += 1
    labels = np.full(size, most, np.uint8)
    for label in range(clusters):
        if label != most:
            places, at = _decode_places(encoding, payload, at, size)
            labels[places] = label
    return labels, at


def _decode_places(encoding: str, payload: memoryview, at: int, size: int) -> tuple[NDArray[np.int64], int]:
    """Where the entries of one cluster are in a tensor of ``size``, and the place behind them in the payload."""
    count, at = read_varint(payload, at, len(payload), size)
    if encoding == "address":
        bits = _address_bits(size)
        stop = at + (count * bits + 7) // 8
        if stop > len(payload):
            raise CodecError("a table of addresses is cut off")
        places = unpack_fields(payload[at:stop], np.full(count, bits)).astype(np.int64)
    else:
        unary, at = read_varint(payload, at, len(payload), len(payload))
        differences, taken = prefix.decode_gamma(payload[at:], unary, count)
        places, stop = np.cumsum(differences) - 1, at + taken
    if count and (places.max() >= size or places.min() < 0):
        raise CodecError("an address lies outside its tensor")
    return places, stop


def _differences(labels: NDArray[np.int64], label: int) -> NDArray[np.int64]:
    return np.diff(np.flatnonzero(labels == label), prepend=-1)


def _address_bits(size: int) -> int:
    return max(1, (size - 1).bit_length())


def _joined(parts: list[Vector]) -> Vector:
    return np.concatenate([np.empty(0, np.float32), *parts])
