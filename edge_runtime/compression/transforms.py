"""What happens to an update before it is encoded: clipping, momentum correction, error feedback.

A transform is pure and keeps its state in named arrays, as optax does: ``apply`` gives the vector to hand on, and
``sent`` learns what the codec really sent of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edge_runtime.compression.base import Value, check_options
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edge_runtime.compression.base import State, Update, Vector

LARGEST = np.finfo(np.float32).max


class Transform:
    """Base; passes everything through. ``layout`` plays no part: transforms see vectors without buffers."""

    name: ClassVar[str]

    def apply(self, values: Vector, state: State) -> tuple[Vector, State]:
        """The vector to hand on, float32 of the same size, and the new state; ``state`` is empty at the start."""
        return values, state

    def sent(self, values: Vector, update: Update, state: State) -> State:  # noqa: ARG002
        """The state after ``update`` was sent for ``values``, which is what ``apply`` gave."""
        return state


class Clip(Transform):
    """Scales the update down to an L2 norm of at most ``norm``."""

    name: ClassVar[str] = "clip"

    def __init__(self, norm: float) -> None:
        if not norm > 0:
            raise CodecError(f"option 'clip_norm' is {norm}; it must be above 0, or left out")
        self._norm = norm

    def apply(self, values: Vector, state: State) -> tuple[Vector, State]:
        """The clipped vector."""
        norm = float(np.sqrt(np.square(values, dtype=np.float64).sum()))
        return (values if norm <= self._norm else (values * (self._norm / norm)).astype(np.float32)), state


class Momentum(Transform):
    """Momentum correction with factor masking: what was sent starts afresh.

    Lin et al., "Deep Gradient Compression", ICLR 2018, sections 3.1 and 3.2: ``u = momentum * u + update``.
    """

    name: ClassVar[str] = "momentum"

    def __init__(self, momentum: float) -> None:
        if not 0 <= momentum < 1:
            raise CodecError(f"option 'momentum' is {momentum}; it must be at least 0 and below 1")
        self._momentum = np.float32(momentum)

    def apply(self, values: Vector, state: State) -> tuple[Vector, State]:
        """``momentum * velocity + values``, which is the new velocity."""
        velocity = state.get("velocity")
        with np.errstate(over="ignore"):
            out = values if velocity is None else (velocity * self._momentum + values).astype(np.float32)
        return out, {"velocity": out}

    def sent(self, values: Vector, update: Update, state: State) -> State:  # noqa: ARG002
        """Velocity zero where a sparse update was sent."""
        if update.indices is None:
            return state
        velocity = state["velocity"].copy()
        velocity[update.indices] = 0
        return {"velocity": velocity}


class Feedback(Transform):
    """Error feedback: what was not sent is added to the next update.

    Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Stich et al., "Sparsified SGD with memory",
    NeurIPS 2018.
    """

    name: ClassVar[str] = "feedback"

    def apply(self, values: Vector, state: State) -> tuple[Vector, State]:
        """``values + residual``; a sum beyond float32 is infinite, and refused by the pipeline."""
        residual = state.get("residual")
        with np.errstate(over="ignore"):
            return (values if residual is None else (values + residual).astype(np.float32)), state

    def sent(self, values: Vector, update: Update, state: State) -> State:  # noqa: ARG002
        """The new residual; what is beyond float32 saturates, so that one absurd round does not end all others."""
        with np.errstate(over="ignore"):
            residual = update.subtracted_from(values)
        np.clip(residual, -LARGEST, LARGEST, out=residual)
        return {"residual": residual} if residual.any() else {}


class Limit(Transform):
    """Keeps what is sent below the L2 norm that the coordinator refuses; with feedback the rest goes in later updates.

    A code may come out a little longer than what went in, so some room is left.
    """

    name: ClassVar[str] = "limit"

    def __init__(self, norm: float) -> None:
        if not norm > 0:
            raise CodecError(f"option 'max_norm' is {norm}; it must be above 0, or left out")
        self._clip = Clip(0.95 * norm)

    def apply(self, values: Vector, state: State) -> tuple[Vector, State]:
        """The vector, scaled down if need be."""
        return self._clip.apply(values, state)


OPTIONS: Mapping[str, Value] = {"clip_norm": 0.0, "momentum": 0.0, "error_feedback": True, "max_norm": 0.0}


def chain(options: Mapping[str, Value], *, feedback: bool) -> list[Transform]:
    """The transforms that the options (a subset of ``OPTIONS``) ask for, in the order of their application.

    Args:
        options: those given.
        feedback: whether error feedback is on where the options do not say.

    Raises:
        CodecError: an option of the wrong type or range.
    """
    values = check_options("compression", options, {**OPTIONS, "error_feedback": feedback})
    transforms: list[Transform] = []
    if values["clip_norm"] != 0:
        transforms.append(Clip(float(values["clip_norm"])))
    if values["momentum"] != 0:
        transforms.append(Momentum(float(values["momentum"])))
    if values["error_feedback"]:
        transforms.append(Feedback())
    if values["max_norm"] != 0:
        transforms.append(Limit(float(values["max_norm"])))
    return transforms
