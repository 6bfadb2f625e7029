"""From an assignment to the message a device understands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coordinator.plan import is_lossless, step_bounds
from coordinator.transfers import with_chunk_size
from edge_runtime import messages

if TYPE_CHECKING:
    from coordinator import events as e
    from coordinator.plan import Plan
    from edge_runtime.compression.base import Value
    from edge_runtime.store.blobs import BlobStore

# A last blob travels inside the job, and needs no request, no subscription and no second packet of the device, if it is
# small, or if so few devices share it that sending it to each of them costs the coordinator little.
INLINE_BYTES = 8 * 1024
INLINE_LIMIT_BYTES = 64 * 1024
INLINE_ROUND_BYTES = 4 * 1024 * 1024
_ENVELOPE_BYTES = 2048  # of the smallest packet that is left to the rest of the job


def make_job(
    plan: Plan,
    run: e.RunRow,
    assignment: e.AssignmentRow,
    model: messages.ModelRef,
    *,
    now: float,
    chunk_bytes: int,
    inline: bytes = b"",
) -> messages.Job:
    """The message that tells a device its assignment; blobs are cut into chunks of ``chunk_bytes``."""
    training = plan.training
    return messages.Job(
        run=run.run,
        assignment=assignment.assignment,
        round=assignment.round,
        model_version=assignment.version,
        bundle=with_chunk_size(run.bundle, chunk_bytes),
        model=msgspec.structs.replace(model, blobs=[with_chunk_size(blob, chunk_bytes) for blob in model.blobs]),
        inline=inline,
        dataset=plan.dataset,
        deadline_s=_deadline_s(assignment.deadline_unix_s - now, plan.participation.deadline_s),
        epochs=assignment.epochs,
        steps=assignment.steps,
        batch_size=training.batch_size,
        last_batch=training.last_batch,
        hyper={**training.hyper, **run.hyper},
        method=plan.method,
        options=plan.options,
        variant=assignment.variant,
        cut=assignment.cut,
        codec=assignment.codec,
        codec_options=_codec_options(plan, assignment.codec),
        byte_budget=assignment.byte_budget,
        joule_limit=training.job_joules,
        evaluate=plan.evaluate_on_devices,
        holdout_fraction=training.holdout_fraction,
        max_samples=training.max_samples,
        max_age_s=training.max_age_s,
        priority=plan.priority,
        seed=plan.seed,
        role=assignment.role,
        sequence=assignment.sequence,
    )


def make_standing(plan: Plan, run: e.RunRow, assignment: e.AssignmentRow, *, chunk_bytes: int) -> messages.Standing:
    """The message that tells a device its standing assignment.

    Its next update has the number that it pulled and has not answered yet, else the one after the last.
    """
    least, most = step_bounds(plan)
    return messages.Standing(
        run=run.run,
        assignment=assignment.assignment,
        sequence=assignment.sequence + (not assignment.pulled),
        dataset=plan.dataset,
        bundle=with_chunk_size(run.bundle, chunk_bytes),
        min_steps=least,
        max_steps=most,
        interval_s=plan.participation.interval_s,
    )


def _deadline_s(left_s: float, whole_s: float) -> float:
    """What is left of a deadline. A job that is told again after it gets a whole one: its update may still count."""
    return min(left_s, whole_s) if left_s >= 1.0 else whole_s


def _codec_options(plan: Plan, codec: str) -> dict[str, Value]:
    """The plan's for its codec; and what keeps a device with a lossy one below the norm that is refused."""
    options = plan.uplink.options if codec == plan.uplink.codec else {}
    limit = plan.uplink.max_norm
    return options if limit is None or is_lossless(codec) else {**options, "max_norm": limit}


def inline_limit(devices: int) -> int:
    """Largest blob that travels inside the jobs of a round with so many devices, in bytes."""
    return max(INLINE_BYTES, min(INLINE_LIMIT_BYTES, INLINE_ROUND_BYTES // devices))


def inline_bytes(blobs: BlobStore, model: messages.ModelRef, chunk_bytes: int, devices: int) -> bytes:
    """The bytes of the model's last blob if they belong into the job; else none, and the device asks for them."""
    if not model.blobs or model.blobs[-1].size_bytes > min(inline_limit(devices), chunk_bytes - _ENVELOPE_BYTES):
        return b""
    try:
        return blobs.path(model.blobs[-1].sha256).read_bytes()
    except OSError:
        return b""
