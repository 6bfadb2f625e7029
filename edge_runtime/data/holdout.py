"""Which samples are held out: a stable hash of each sample's identity decides, whatever else there is.

A sample stays on its side when data grows, shrinks or is shuffled, and in every run, so no run ever trains on what
another one evaluates.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from edge_runtime.data.base import Array, Keys

_PER_DIGEST = 8  # keys of 8 bytes in one 64-byte digest


def keys_of_ids(ids: Iterable[object]) -> Keys:
    """Keys uint64 of given identities: integers, strings or bytes; 7 and "7" are the same sample."""
    digests = b"".join(blake2b(_as_bytes(entry), digest_size=8).digest() for entry in ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def keys_of_content(x: Array, y: Array) -> Keys:
    """Keys uint64 of samples known by content only; x and y ``[n, ...]``. Equal samples share a side."""
    digests = bytearray()
    for sample, target in zip(np.ascontiguousarray(x), np.ascontiguousarray(y), strict=True):
        digest = blake2b(sample.tobytes(), digest_size=8)
        digest.update(target.tobytes())
        digests += digest.digest()
    return np.frombuffer(bytes(digests), "<u8").astype(np.uint64)


def keys_of_rows(source: str, start: int, stop: int) -> Keys:
    """Keys uint64 of rows ``[start, stop)`` of an append-only source, such as a file name."""
    first, last = start // _PER_DIGEST, -(-stop // _PER_DIGEST)
    name = source.encode()
    digests = b"".join(blake2b(b"%b\0%d" % (name, block), digest_size=64).digest() for block in range(first, last))
    keys = np.frombuffer(digests, "<u8").astype(np.uint64)
    return keys[start - first * _PER_DIGEST : stop - first * _PER_DIGEST]


def held_out(keys: Keys, fraction: float) -> NDArray[np.bool_]:
    """Bool per key, true for the hold-out. A larger fraction holds out the same samples and more."""
    chosen: NDArray[np.bool_] = keys < np.uint64(int(fraction * 2.0**64))
    return chosen


def _as_bytes(entry: object) -> bytes:
    return entry if isinstance(entry, bytes) else str(entry).encode()
