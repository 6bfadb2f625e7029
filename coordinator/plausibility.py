"""What a device says about its update, before it may reach a model or the database."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.messages import UpdateMeta

LARGEST_NUMBER = 1 << 53  # of samples or a sequence: what a float64 weight and every database still hold exactly
LARGEST_LOSS = 1e100
LARGEST_COST = 1 << 45  # milliseconds or bytes of one update; sums of many fit a database


def implausible(meta: UpdateMeta) -> str:
    """Why what a device says about its update cannot be true; empty if it can."""
    if meta.samples > LARGEST_NUMBER:
        return f"claims {meta.samples} samples"
    evaluation = meta.evaluation
    losses = [meta.loss] + ([] if evaluation is None else [evaluation.loss_sum])
    wrong = [value for value in losses if value is not None and not abs(value) <= LARGEST_LOSS]
    if wrong:
        return f"reports a loss of {wrong[0]}"
    costs = max(meta.train_ms, meta.encode_cpu_ms, meta.written_bytes)
    if costs > LARGEST_COST:
        return f"reports {costs} milliseconds or written bytes"
    if evaluation is not None and max(evaluation.samples, evaluation.correct or 0) > LARGEST_NUMBER:
        return f"claims an evaluation of {evaluation.samples} samples"
    return ""
