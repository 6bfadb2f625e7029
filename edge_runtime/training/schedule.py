"""Which samples make up which step: a pure function of counts, settings and seed."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import DataError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edge_runtime.training.base import Sampler, TrainSettings


def job_seed(seed: int, device: str, assignment: str) -> int:
    """128-bit seed of one job: the same on every machine, different for every device and assignment."""
    return int.from_bytes(blake2b(f"{seed}/{device}/{assignment}".encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: int) -> np.random.Generator:
    """An independent stream of random numbers per purpose: 0 for shuffling, 1 for dropout."""
    return np.random.Generator(np.random.PCG64([seed, purpose]))


def total_steps(count: int, settings: TrainSettings, *, drop: bool) -> int:
    """Steps of the whole job.

    Raises:
        DataError: no samples, or fewer than one batch where partial batches are dropped.
        TrainingError: not exactly one of epochs and steps is set.
    """
    if (settings.epochs is None) == (settings.steps is None):
        raise TrainingError("set exactly one of epochs and steps")
    if count == 0:
        raise DataError("no samples are left to train on after window and hold-out; collect more or hold out less")
    size = settings.batch_size
    if drop and count < size:
        raise DataError(
            f"{count} samples are fewer than one batch of {size}, and partial batches are dropped; collect more data "
            "or use a bundle with a smaller or dynamic batch"
        )
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return settings.epochs * (count // size if drop else -(-count // size))


def batches(
    count: int, settings: TrainSettings, *, drop: bool, sampler: Sampler | None = None
) -> Iterator[NDArray[np.integer[Any]]]:
    """Positions ``[batch]`` in ``[0, count)`` for every step; each epoch is shuffled anew. Raises like total_steps."""
    left = total_steps(count, settings, drop=drop)
    rng = generator(settings.seed, 0)
    size = settings.batch_size
    while left > 0:
        order = rng.permutation(count) if sampler is None else np.asarray(sampler(count, rng))
        stop = len(order) - len(order) % size if drop else len(order)
        if stop == 0 or order.dtype.kind not in "iu":
            raise TrainingError("the method's sampler gave no usable order of samples")
        for start in range(0, stop, size):
            if left == 0:
                break
            yield order[start : start + size]
            left -= 1
