"""The product's codec: under a budget of bytes, the family of codes with the least squared error.

First byte of the payload: the family; nothing at all is an update of zeros. Families:

* *low rank* (:mod:`edge_runtime.compression.lowrank`): an update of few steps is a sum of few outer products;
* *sparse* (:mod:`edge_runtime.compression.sparse`): few entries carry it, as of embeddings, or there are no matrices;
* *uniform* (:mod:`edge_runtime.compression.uniform`): from about a bit per entry on;
* *exact*: Zstandard or the float32 values themselves, where they fit.

A family is only tried where a bound of its error is below what another one has reached.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from edge_runtime.compression import sparse
from edge_runtime.compression.base import Codec, Encoded, Update, Value
from edge_runtime.compression.lowrank import decode_low_rank, encode_low_rank, predicts
from edge_runtime.compression.ratio import allowed_bytes
from edge_runtime.compression.uniform import decode_uniform, encode_uniform, expected_error
from edge_runtime.compression.zstd import pack_planes, unpack_planes
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edge_runtime.compression.base import Layout, Request, State, Vector

FAMILIES = ("sparse", "lowrank", "uniform", "exact")
_SPARSE, _LOW_RANK, _UNIFORM, _ZSTD, _RAW = range(5)
_EXACT_FROM = 18.0  # bits per entry from which on it is tried whether all values fit
_SMALL = 1e-3  # share of the energy below which errors do not matter, and the fastest family is taken
_UNIFORM_FROM, _SPARSE_UP_TO = 0.6, 1.0
_LEAST_ENTRY_BITS = 5  # of a sparse update, about: bounds what it can reach
_TINY = 4096  # entries up to which everything is tried: it costs nothing


class _Coded(NamedTuple):
    family: int
    payload: bytes
    update: Update
    error: float


class Default(Codec):
    """Chooses among low-rank, sparse, uniform and exact codes.

    Options: ``target_ratio``, raw bytes through those of the container (0: the budget's, or 32 without one);
    ``family``, auto or one of them; ``density`` above 0 takes the sparse family with this share of entries, and no
    budget is then heeded.
    """

    name: ClassVar[str] = "default"
    number: ClassVar[int] = 3
    keeps_budget: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Value]] = {"target_ratio": 0.0, "family": "auto", "density": 0.0}

    def __init__(self, options: Mapping[str, Value] | None = None) -> None:
        """Takes the options; raises CodecError."""
        super().__init__(options)
        self._ratio = float(self.options["target_ratio"])
        self._family = str(self.options["family"])
        self._density = float(self.options["density"])
        if self._ratio < 0:
            raise CodecError(f"codec 'default': target_ratio {self._ratio:g} must not be negative")
        if self._family not in ("auto", *FAMILIES):
            raise CodecError(f"codec 'default': family {self._family!r} is none of auto, {', '.join(FAMILIES)}")
        if not 0 <= self._density <= 1 or (self._density and self._family not in ("auto", "sparse")):
            raise CodecError(f"codec 'default': density {self._density:g} must be from 0 to 1, and is for sparse only")

    def encode(self, values: Vector, layout: Layout, state: State, request: Request) -> Encoded:
        """The payload.

        Raises:
            CodecError: the budget is below what this update needs at least; the message names it.
        """
        if not values.any():
            return Encoded(b"", _zeros(layout), state)
        if self._density:
            draft = sparse.with_density(values, layout, self._density)
            return Encoded(bytes([_SPARSE]) + draft.write(), draft.update(), state)
        room = allowed_bytes(values.size, self._ratio, request) - 1
        coder = _Coder(values, layout, room, request.reference)
        chosen = coder.best() if self._family == "auto" else coder.encode(self._family)
        if chosen is None:
            raise CodecError(f"a budget of {room + 1} bytes is too small for the family {self._family!r}")
        return Encoded(bytes([chosen.family]) + chosen.payload, chosen.update, state)

    def decode(self, payload: memoryview, layout: Layout) -> Update:
        """The update of an encoding without ``Request.reference``, sparse or dense; raises CodecError."""
        return self.decode_against(payload, layout, None)

    def decode_against(self, payload: memoryview, layout: Layout, reference: Vector | None) -> Update:
        """The update, sparse or dense; raises CodecError."""
        if not len(payload):
            return _zeros(layout)
        family, rest = payload[0], payload[1:]
        if family == _SPARSE:
            return sparse.decode(rest, layout)
        if family == _LOW_RANK:
            return Update(decode_low_rank(rest, layout, reference))
        if family == _UNIFORM:
            return Update(decode_uniform(rest, layout))
        if family == _ZSTD:
            return Update(unpack_planes(rest, np.dtype("<f4"), layout.size))
        if family == _RAW and len(rest) == 4 * layout.size:
            return Update(np.frombuffer(rest, "<f4").astype(np.float32))
        raise CodecError(f"the family {family} of an update is unknown, or its length is wrong")

    def predicts(self, payload: memoryview, layout: Layout) -> bool:
        """Only the low-rank family may."""
        return len(payload) > 0 and payload[0] == _LOW_RANK and predicts(payload[1:], layout)


class _Coder:
    """Codes ``values`` in at most ``room`` bytes."""

    def __init__(self, values: Vector, layout: Layout, room: int, reference: Vector | None) -> None:
        self._values, self._layout, self._room, self._reference = values, layout, room, reference

    def best(self) -> _Coded:
        """The code of the least error; raises CodecError if there is none."""
        values, layout, room = self._values, self._layout, self._room
        bits = 8 * max(room, 1) / values.size
        tiny = values.size <= _TINY
        if bits >= _EXACT_FROM:
            exact = self.encode("exact")
            if exact is not None:
                return exact
        best: _Coded | None = None
        dense = expected_error(values, room) if room > 0 and (tiny or bits >= _UNIFORM_FROM) else math.inf
        if tiny or (dense > _SMALL * _energy(values) and _has_matrix(layout)):
            best = self.encode("lowrank")
        if dense < math.inf and (best is None or dense < best.error):
            best = _better(best, self.encode("uniform"))
        if best is None or tiny or (bits <= _SPARSE_UP_TO and _sparse_bound(values, room) < best.error):
            try:
                best = _better(best, self.encode("sparse"))
            except CodecError as error:
                if best is None:
                    least = sparse.least_bytes(values, layout) + 1
                    raise CodecError(f"a budget of {room + 1} bytes is too small; this update needs {least}") from error
        if best is None:
            raise CodecError(f"no code of {room + 1} bytes or less was found")
        return best

    def encode(self, family: str) -> _Coded | None:
        """The update in one family; None if the room holds nothing (of sparse: raises CodecError)."""
        values, layout, room = self._values, self._layout, self._room
        if family == "sparse":
            draft = sparse.within(values, layout, room)
            return _coded(_SPARSE, draft.write(), draft.update(), values)
        if family == "exact":
            return _exact(values, room)
        try:
            if family == "lowrank":
                found = encode_low_rank(values, layout, max(0, room), self._reference)
                return _coded(_LOW_RANK, found[0], Update(found[1]), values) if found[0] else None
            uniform = encode_uniform(values, layout, max(0, room))
        except CodecError:  # values at the end of float32's range may be rounded beyond it
            return None
        return _coded(_UNIFORM, uniform[0], Update(uniform[1]), values) if uniform and uniform[0] else None


def _exact(values: Vector, room: int) -> _Coded | None:
    packed = pack_planes(np.ascontiguousarray(values, "<f4"))
    raw = 4 * values.size
    if min(len(packed), raw) > room:
        return None
    exact = Update(np.array(values, np.float32))
    if len(packed) < raw:
        return _Coded(_ZSTD, packed, exact, 0.0)
    return _Coded(_RAW, exact.values.astype("<f4").tobytes(), exact, 0.0)


def _coded(family: int, payload: bytes, update: Update, values: Vector) -> _Coded:
    rest = values.astype(np.float64)  # a difference of float32 may be infinite
    if update.indices is None:
        rest -= update.values
    else:
        rest[update.indices] -= update.values
    return _Coded(family, payload, update, float(rest @ rest))


def _better(one: _Coded | None, other: _Coded | None) -> _Coded | None:
    if one is None or other is None:
        return other if one is None else one
    return other if other.error < one.error else one


def _sparse_bound(values: Vector, room: int) -> float:
    """Squared error that a sparse update of this size stays above, about."""
    count = max(1, min(values.size, 8 * room // _LEAST_ENTRY_BITS))
    largest = sparse.Largest(values, count)
    kept = largest.top(largest.count)
    return _energy(values) - _energy(values[kept])


def _energy(values: Vector) -> float:
    wide = values.astype(np.float64)
    return float(wide @ wide)


def _has_matrix(layout: Layout) -> bool:
    return any(len(shape) > 1 and shape[0] > 1 and end - start > shape[0] for _, shape, start, end in layout.spans())


def _zeros(layout: Layout) -> Update:
    return Update(np.empty(0, np.float32), np.empty(0, np.int64), layout.size)
