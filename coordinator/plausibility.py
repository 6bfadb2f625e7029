"""What a device says about its update: what cannot be true refuses it, or is taken as unknown, and is said once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from coordinator.ledger import LARGEST_WATTS
from coordinator.wording import counted

if TYPE_CHECKING:
    from edge_runtime.messages import Evaluation, UpdateMeta

LARGEST_NUMBER = 1 << 53  # of a sequence: what a float64 and every database still hold exactly
LARGEST_SAMPLES = 1_000_000_000  # of one update; nothing that trains on a device has more
LARGEST_LOSS = 1e6  # per sample; beyond it a model has diverged, and means that hold it would say nothing
LARGEST_COST = 1 << 45  # milliseconds or bytes of one update; sums of many fit a database
FASTEST_STEPS_PER_S = 1e6
SLOWEST_STEP_S = 86_400.0


class Believed(NamedTuple):
    """What is believed of an update's training; None: not said, or not believed. ``doubts`` tells that in words."""

    samples: int | None
    loss_rms: float | None
    step_s: float | None
    step_j: float | None
    doubts: tuple[str, ...]


def implausible(meta: UpdateMeta, steps: int | None = None) -> str:
    """Why what a device says about its update cannot be true, so that it cannot count; empty if it can.

    ``steps`` are those that it was asked for; None: it was given epochs, whose steps only the device can count.
    """
    if meta.samples > LARGEST_SAMPLES:
        return f"claims {meta.samples} samples"
    if steps is not None and meta.steps > steps:
        return f"claims {counted(meta.steps, 'step')} where {steps} were asked for"
    costs = max(meta.steps, meta.train_ms, meta.encode_cpu_ms, meta.written_bytes)
    if costs > LARGEST_COST:
        return f"reports {costs} steps, milliseconds or written bytes"
    return ""


def trusted(meta: UpdateMeta) -> UpdateMeta:
    """The same, with losses and evaluations that cannot be true taken as unknown; the update counts all the same."""
    loss, loss_rms, evaluation, doubts = _losses(meta)
    return msgspec.structs.replace(meta, loss=loss, loss_rms=loss_rms, evaluation=evaluation) if doubts else meta


def _losses(meta: UpdateMeta) -> tuple[float | None, float | None, Evaluation | None, list[str]]:
    """Loss, ``loss_rms`` and evaluation as they are believed, and what is not, in words."""
    doubts = []
    loss, loss_rms, evaluation = meta.loss, meta.loss_rms, meta.evaluation
    if loss is not None and not abs(loss) <= LARGEST_LOSS:  # NaN, too
        doubts.append(f"a loss of {loss:g}")
        loss = None
    if loss_rms is not None and not 0 <= loss_rms <= LARGEST_LOSS:
        doubts.append(f"a root mean squared loss of {loss_rms:g}")
        loss_rms = None
    doubt = "" if evaluation is None else _doubt(evaluation)
    if doubt:
        doubts.append(doubt)
        evaluation = None
    return loss, loss_rms, evaluation, doubts


def _doubt(evaluation: Evaluation) -> str:
    samples, correct, loss_sum = evaluation.samples, evaluation.correct, evaluation.loss_sum
    if samples > LARGEST_SAMPLES:
        return f"an evaluation of {samples} samples"
    if correct is not None and correct > samples:
        return f"{correct} correct of {counted(samples, 'sample')}"
    if not abs(loss_sum) <= LARGEST_LOSS * samples:
        return f"a sum of losses of {loss_sum:g} over {counted(samples, 'sample')}"
    return ""


def believed(meta: UpdateMeta, *, steps: int | None, elapsed_s: float) -> Believed:
    """What a selector may hear of an update: figures that cannot be true are unknown, never numbers.

    ``steps`` are those asked for, None for epochs; ``elapsed_s`` is the longest that the job can have taken.
    """
    _, loss_rms, _, doubts = _losses(meta)
    samples: int | None = meta.samples
    if meta.samples > LARGEST_SAMPLES:
        samples = None
        doubts.append(f"{meta.samples} samples")
    count = meta.steps
    if steps is not None and count > steps:
        doubts.append(f"{counted(count, 'step')} of {steps}")
        count = 0
    step_s = step_j = None
    if count and meta.train_ms:
        step_s = meta.train_ms / 1000 / count
        if not 1 / FASTEST_STEPS_PER_S <= step_s <= SLOWEST_STEP_S:
            doubts.append(f"{counted(count, 'step')} in {meta.train_ms / 1000:g} s")
            step_s = None
    drawn_mj = None if meta.energy is None else meta.energy.train_mj
    if count and drawn_mj is not None:
        step_j = drawn_mj / 1000 / count
        if not (math.isfinite(step_j) and drawn_mj / 1000 <= LARGEST_WATTS * elapsed_s):
            doubts.append(f"{drawn_mj / 1000:.3g} J in {elapsed_s:.0f} s")
            step_j = None
    return Believed(samples, loss_rms, step_s, step_j, tuple(doubts))
