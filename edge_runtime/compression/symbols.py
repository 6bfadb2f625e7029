"""Dense runs of small symbols in few bytes: Zstandard or rANS (in lanes if it is long), whichever takes less.

Both are fast enough for a million symbols and need no more than a table beside the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.compression.rans import Decoder, Encoder, Model
from edge_runtime.compression.rans_lanes import decode_lanes, encode_lanes
from edge_runtime.compression.zstd import pack_planes, unpack_planes
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ZSTD, _RANS, _PLAIN = 0, 1, 2
_MANY = 1 << 17  # symbols from which on the coder in lanes is the faster one


def pack_symbols(symbols: NDArray[np.uint8], kinds: int) -> bytes:
    """Bytes of uint8 ``[n]``, all below ``kinds``; nothing for none."""
    if not symbols.size:
        return b""
    table = _table(np.bincount(symbols, minlength=kinds).tolist())
    coded = table + _encode(symbols, Model(_weights(table)))
    planes = pack_planes(symbols)
    return bytes([_ZSTD]) + planes if len(planes) <= len(coded) else bytes([_RANS]) + coded


def unpack_symbols(payload: memoryview, kinds: int, count: int) -> NDArray[np.uint8]:
    """The inverse, uint8 ``[count]``.

    Raises:
        CodecError: damaged, cut off, too long, or a symbol that is not below ``kinds``.
    """
    if not count:
        if len(payload):
            raise CodecError(f"{len(payload)} bytes for no numbers")
        return np.empty(0, np.uint8)
    if not len(payload):
        raise CodecError("the run of symbols is missing")
    if payload[0] in (_ZSTD, _PLAIN):
        symbols: NDArray[np.uint8]
        if payload[0] == _ZSTD:
            symbols = unpack_planes(payload[1:], np.dtype(np.uint8), count)
        elif len(payload) == 1 + count:
            symbols = np.frombuffer(payload[1:], np.uint8)
        else:
            raise CodecError(f"{len(payload) - 1} bytes for {count} symbols")
        if symbols.max() >= kinds:
            raise CodecError(f"a symbol is not among the {kinds} of the codec")
        return symbols
    if payload[0] != _RANS or len(payload) < 1 + kinds:
        raise CodecError("unknown coder, or its table is cut off")
    model = Model(_weights(bytes(payload[1 : 1 + kinds])))
    return _decode(payload[1 + kinds :], model, count).astype(np.uint8)


def _encode(symbols: NDArray[np.uint8], model: Model) -> bytes:
    if symbols.size >= _MANY:
        return encode_lanes(symbols, model)
    encoder = Encoder()
    encoder.symbols(model, symbols)
    return encoder.finish()


def _decode(payload: memoryview, model: Model, count: int) -> NDArray[np.integer[Any]]:
    if count >= _MANY:
        return decode_lanes(payload, model, count)
    decoder = Decoder(payload)
    symbols = np.array(decoder.symbols(model, count))
    decoder.finish()
    return symbols


def _table(counts: list[int]) -> bytes:
    """Counts as floats of a byte, 3 bits of mantissa; what is not 0 stays above."""
    table = bytearray()
    for count in counts:
        shift = max(0, count.bit_length() - 4)
        table.append(((shift + 1) << 3) + (count >> shift) - 8 if count >= 8 else count)
    return bytes(table)


def _weights(table: bytes) -> list[int]:
    return [byte if byte < 8 else (8 + (byte & 7)) << ((byte >> 3) - 1) for byte in table]
