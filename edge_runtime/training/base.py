"""The trainer seam: a backend that runs a bundle's graphs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from edge_runtime.bundle import Bundle
    from edge_runtime.data.view import View
    from edge_runtime.messages import Evaluation
    from edge_runtime.training.randomness import Stream

    Vector: TypeAlias = NDArray[np.float32]
    GradientAt: TypeAlias = Callable[[Vector], Vector]
    GradientHook: TypeAlias = Callable[[Vector, Vector, GradientAt], Vector]
    Sampler: TypeAlias = Callable[[int, Stream], NDArray[np.integer[Any]]]
    OnStep: TypeAlias = Callable[[int, int, float], None]
    Stop: TypeAlias = Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and how to train; exactly one of ``epochs`` and ``steps``. ``seed`` fixes shuffling and dropout."""

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    last_batch: Literal["keep", "drop"] = "keep"
    hyper: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class TrainResult:
    """Weights after training, float32 ``[layout.size]``, and what was done; ``loss`` is the mean over all samples seen.

    ``loss_rms`` is the root of the mean of the squared losses of the batches, weighted by their samples.

    ``vector`` belongs to the trainer and is overwritten by its next call. ``samples`` is what the result stands for:
    all samples of the view. Of training that ended within its first pass (``stopped`` says why) it is the share that
    was seen, so that it weighs what a device with only these samples would.
    """

    vector: Vector
    steps: int
    samples: int
    loss: float
    train_s: float
    stopped: str = ""
    loss_rms: float | None = None


class Trainer(Protocol):
    """Runs one bundle. Not for several threads at a time."""

    name: ClassVar[str]

    def load(self, bundle: Bundle, variant: str | None = None) -> None:
        """Takes a bundle and prepares its state; graphs are loaded when they are first used.

        Raises:
            BundleError: the bundle cannot be read or lacks what training needs.
        """
        ...

    def train(
        self,
        start: Vector,
        view: View,
        settings: TrainSettings,
        *,
        gradient: GradientHook | None = None,
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
        stop: Stop | None = None,
    ) -> TrainResult:
        """Trains on ``view.train`` from the weights ``start`` (float32 ``[layout.size]``), optimiser slots at zero.

        ``stop`` is asked after every step but the last: with a reason training ends there, empty it goes on.

        Raises:
            TrainingError: an unknown hyper-parameter, or a loss or weight that is not finite.
            DataError: nothing to train on, or a bad sample.
            BundleError: a graph cannot be used.
        """
        ...

    def full_gradient(
        self,
        weights: Vector,
        view: View,
        settings: TrainSettings,
        *,
        on_step: OnStep | None = None,
        stop: Stop | None = None,
    ) -> TrainResult:
        """One pass over ``view.train`` without a step: ``vector`` is the mean gradient at ``weights``, ``steps`` is 0.

        Of ``settings`` only batches and seed count; entries of buffers are zero. A pass that ``stop`` ended stands for
        the samples that were seen. Raises like :meth:`train`.
        """
        ...

    def evaluate(
        self, weights: Vector, view: View, indices: NDArray[np.integer[Any]], batch_size: int
    ) -> Evaluation | None:
        """Sums over the samples ``indices``; None if there are none. Raises like :meth:`train`."""
        ...
