"""Which samples make up which step: a pure function of counts, settings and seed."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import DataError, TrainingError
from edge_runtime.training.randomness import Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edge_runtime.training.base import Sampler, TrainSettings


def job_seed(seed: int, device: str, assignment: str, sequence: int = 0) -> int:
    """128-bit seed of one job: the same on every machine, different for every device, assignment and sequence."""
    name = f"{seed}/{device}/{assignment}" + (f"/{sequence}" if sequence else "")
    return int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "little")


@dataclass(frozen=True)
class BatchRule:
    """The partial batch at the end of an epoch is dropped, or kept if it has at least ``minimum`` samples."""

    drop: bool = False
    minimum: int = 1

    def used(self, count: int, size: int) -> int:
        """How many of ``count`` samples one epoch uses."""
        rest = count % size
        return count - rest if self.drop or rest < self.minimum else count


def total_steps(count: int, settings: TrainSettings, rule: BatchRule) -> int:
    """Steps of the whole job.

    Raises:
        DataError: no samples, or fewer than one batch where partial batches are dropped.
        TrainingError: not exactly one of epochs and steps is set, or the batch size is too small.
    """
    if (settings.epochs is None) == (settings.steps is None):
        raise TrainingError("set exactly one of epochs and steps")
    size = settings.batch_size
    if size < rule.minimum:
        raise TrainingError(f"batch_size {size} is too small for this model; set at least {rule.minimum}")
    if count == 0:
        raise DataError("no samples are left to train on after window and hold-out; collect more or hold out less")
    used = rule.used(count, size)
    if used == 0:
        raise DataError(
            f"{count} samples are fewer than one batch of {size if rule.drop else rule.minimum}, and partial batches "
            "are dropped; collect more data, or use a bundle with a smaller or dynamic batch"
        )
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return settings.epochs * -(-used // size)


def samples_of(count: int, seen: int, total: int, settings: TrainSettings, rule: BatchRule) -> int:
    """How many of ``count`` samples training stands for that ended after ``seen`` samples of its ``total`` steps.

    Within the first pass it is the share that was seen, so for a job in epochs the samples themselves; from then on all
    of them. Where the whole job is shorter than a pass, the share is of what the whole job would have seen: it would
    have stood for all samples.
    """
    first_pass = min(rule.used(count, settings.batch_size), total * settings.batch_size)
    return max(1, min(count, round(count * seen / first_pass)))


def batches(
    count: int, settings: TrainSettings, rule: BatchRule, sampler: Sampler | None = None
) -> Iterator[NDArray[np.integer[Any]]]:
    """Positions ``[batch]`` in ``[0, count)`` for every step; each epoch is shuffled anew. Raises like total_steps."""
    left = total_steps(count, settings, rule)
    rng = Stream(settings.seed, "order")
    size = settings.batch_size
    while left > 0:
        order = rng.permutation(count) if sampler is None else np.asarray(sampler(count, rng))
        stop = rule.used(len(order), size)
        if stop == 0 or order.dtype.kind not in "iu":
            raise TrainingError("the method's sampler gave no usable order of samples")
        for start in range(0, stop, size):
            if left == 0:
                break
            yield order[start : start + size]
            left -= 1
