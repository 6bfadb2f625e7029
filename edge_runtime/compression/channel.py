"""One channel of an update on its way through transforms and codec, with its buffers apart.

Buffers (running statistics, counters) do not go through a lossy codec: they travel dense in front of its payload, as
float16 with a power of two per tensor, and error feedback covers the rounding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.compression.base import Request, Update
from edge_runtime.compression.half import from_half, to_half
from edge_runtime.compression.transforms import LARGEST, Limit, Transform
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.compression.base import Codec, Layout, State, Vector


class Channel:
    """Encodes and decodes the section of one channel.

    Args:
        name: of the channel, for messages and for the names of its state.
        layout: of its vector.
        codec: of the values that are no buffers; of all if it loses nothing.
        transforms: before the codec, in order.
    """

    def __init__(self, name: str, layout: Layout, codec: Codec, transforms: list[Transform]) -> None:
        self._name, self._layout, self._codec, self._transforms = name, layout, codec, transforms
        self._split = bool(layout.buffers) and not codec.lossless
        self._trained = layout.only(buffers=False) if self._split else layout
        self._buffers = layout.only(buffers=True)

    def encode(
        self, vector: Vector, before: State, after: State, request: Request
    ) -> tuple[list[bytes | memoryview], Update]:
        """The parts of the section and what they decode to; puts the new state into ``after``."""
        section: list[bytes | memoryview] = []
        values, buffers, budget = vector, None, request.budget_bytes
        if self._split:
            values = self._layout.take(vector, buffers=False)
            head, buffers = self._encode_buffers(self._layout.take(vector, buffers=True), before, after)
            section.append(head)
            if budget is not None:
                budget -= len(head)
        states = []
        for transform in self._transforms:
            values, state = transform.apply(values, self._take(before, transform.name, values.size))
            check_finite(f"channel {self._name!r} after {transform.name!r}", values, self._trained)
            states.append((transform, values, state))
        own = self._take(before, "codec", None) or self._codec.init(self._trained)
        asked = Request(
            budget_bytes=None if budget is None else max(0, budget),
            seed=request.seed,
            reference=self._reference(request.reference),
        )
        payload, update, own = self._codec.encode(values, self._trained, own, asked)
        self._put(after, "codec", own)
        for transform, given, state in states:
            self._put(after, transform.name, transform.sent(given, update, state))
        section.append(payload)
        return section, self._joined(update, buffers)

    def decode(self, section: memoryview, reference: Vector | None, max_norm: float = math.inf) -> Update:
        """The inverse of ``encode``; raises CodecError for an L2 norm above ``max_norm``, of buffers or of the rest."""
        start, buffers = 0, None
        if self._split:
            buffers, start = self._decode_buffers(section)
        update = self._codec.decode_against(section[start:], self._trained, self._reference(reference))
        count = self._trained.size if update.indices is None else len(update.indices)
        if update.size != self._trained.size or update.values.shape != (count,) or update.values.dtype != np.float32:
            raise CodecError(f"codec {self._codec.name!r} gave {update.values.dtype} {update.values.shape}")
        if not _is_finite(update.values):
            check_finite("it", update.vector(), self._trained)
        if max_norm < math.inf:
            for part in self._parts(update, buffers):
                norm = part.norm()
                if not norm <= max_norm:
                    raise CodecError(f"an L2 norm of {norm:.4g} is above the plan's max_norm = {max_norm:g}")
        return self._joined(update, buffers)

    def predicts(self, section: memoryview) -> bool:
        """Whether decoding the section needs the reference that it was encoded with."""
        start = self._decode_buffers(section)[1] if self._split else 0
        return self._codec.predicts(section[start:], self._trained)

    def give_back(self, vector: Vector, state: State) -> None:
        """Adds ``vector``, float32 ``[layout.size]``, to the residual in ``state``."""
        parts = [("feedback", vector)]
        if self._split:
            parts = [
                ("feedback", self._layout.take(vector, buffers=False)),
                ("buffers", self._layout.take(vector, buffers=True)),
            ]
        for owner, part in parts:
            kept = self._take(state, owner, part.size)
            with np.errstate(over="ignore"):
                total = kept["residual"] + part if kept else part.copy()
            self._put(state, owner, {"residual": np.clip(total, -LARGEST, LARGEST, out=total)})

    def _reference(self, reference: Vector | None) -> Vector | None:
        """Without buffers; None for a channel of another size."""
        if reference is None or reference.shape != (self._layout.size,):
            return None
        return self._layout.take(reference, buffers=False) if self._split else reference

    def _parts(self, update: Update, buffers: Vector | None) -> list[Update]:
        """What is trained, and the buffers."""
        if buffers is not None:
            return [update, Update(buffers)]
        if not self._layout.buffers:
            return [update]
        return [Update(self._layout.take(update.vector(), buffers=kind)) for kind in (False, True)]

    def _encode_buffers(self, buffers: Vector, before: State, after: State) -> tuple[bytes, Vector]:
        """An int8 exponent per tensor, then float16; and what that decodes to."""
        feedback = any(transform.name == "feedback" for transform in self._transforms)
        if feedback:
            kept = self._take(before, "buffers", buffers.size)
            buffers = np.clip(buffers + kept["residual"], -LARGEST, LARGEST) if kept else buffers
        limited = buffers
        for transform in self._transforms:
            if isinstance(transform, Limit):
                limited, _ = transform.apply(buffers, {})
        exponents, halves = np.zeros(len(self._buffers.names), np.int8), np.empty(buffers.size, "<f2")
        sent = np.empty(buffers.size, np.float32)
        for tensor, (_, _, start, end) in enumerate(self._buffers.spans()):
            exponents[tensor], halves[start:end] = to_half(limited[start:end])
            sent[start:end] = from_half(int(exponents[tensor]), halves[start:end])
        if feedback and (buffers != sent).any():
            self._put(after, "buffers", {"residual": buffers - sent})
        return exponents.tobytes() + halves.tobytes(), sent

    def _decode_buffers(self, section: memoryview) -> tuple[Vector, int]:
        tensors, count = len(self._buffers.names), self._buffers.size
        stop = tensors + 2 * count
        if stop > len(section):
            raise CodecError("buffers are cut off")
        exponents = np.frombuffer(section[:tensors], np.int8).tolist()
        halves = np.frombuffer(section[tensors:stop], "<f2")
        vector = np.empty(count, np.float32)
        for exponent, (_, _, start, end) in zip(exponents, self._buffers.spans(), strict=True):
            vector[start:end] = from_half(exponent, halves[start:end])
        check_finite("it", vector, self._buffers)
        return vector, stop

    def _joined(self, update: Update, buffers: Vector | None) -> Update:
        if buffers is None:
            return update
        if update.indices is None:
            return Update(self._layout.join(update.values, buffers))
        trained, rows = self._positions(update.indices)
        indices = np.concatenate([trained, rows])
        return Update(np.concatenate([update.values, buffers]), indices, self._layout.size)

    def _positions(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where entries of what is trained lie in the whole vector, and where the buffers do."""
        ends, shifts, rows, passed = [], [], [np.empty(0, np.int64)], 0
        for name, _, start, end in self._layout.spans():
            if name in self._layout.buffers:
                rows.append(np.arange(start, end))
                passed += end - start
            else:
                ends.append(end - passed)
                shifts.append(passed)
        tensor = np.searchsorted(np.array(ends, np.int64), indices, side="right")
        return indices + np.array([*shifts, 0], np.int64)[tensor], np.concatenate(rows)

    def _take(self, state: State, owner: str, size: int | None) -> State:
        prefix = f"{self._name}.{owner}."
        found = {key[len(prefix) :]: array for key, array in state.items() if key.startswith(prefix)}
        if size is not None and any(array.shape != (size,) for array in found.values()):
            raise CodecError(f"the state of {owner!r} is of another model; a change of bundle starts without state")
        return found

    def _put(self, state: State, owner: str, arrays: State) -> None:
        state.update({f"{self._name}.{owner}.{key}": array for key, array in arrays.items()})


def check_finite(kind: str, vector: Vector, layout: Layout) -> None:
    """Refuses NaN and infinity.

    Raises:
        CodecError: names ``kind`` and the first tensor of the layout that holds such a value.
    """
    if _is_finite(vector):
        return
    for name, tensor in layout.split(vector).items():
        if not _is_finite(tensor):
            raise CodecError(f"{kind} holds a NaN or infinite value in tensor {name!r}")


def _is_finite(array: NDArray[np.float32]) -> bool:
    return array.size == 0 or (math.isfinite(array.min()) and math.isfinite(array.max()))
