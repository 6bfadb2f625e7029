"""Numbers of an evaluation that people read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.messages import Evaluation


def accuracy(evaluation: Evaluation | None) -> float | None:
    """Share of correct samples, None where it was not measured or the task has no classes."""
    if evaluation is None or evaluation.correct is None or not evaluation.samples:
        return None
    return evaluation.correct / evaluation.samples


def mean_loss(evaluation: Evaluation | None) -> float | None:
    """Loss per sample, None where it was not measured."""
    return evaluation.loss_sum / evaluation.samples if evaluation is not None and evaluation.samples else None
