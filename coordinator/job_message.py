"""From an assignment to the message a device understands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.transfers import with_chunk_size
from edge_runtime import messages

if TYPE_CHECKING:
    from coordinator import events as e
    from coordinator.plan import Plan


def make_job(plan: Plan, run: e.RunRow, assignment: e.AssignmentRow, now: float, chunk_bytes: int) -> messages.Job:
    """The message that tells a device its assignment."""
    training = plan.training
    return messages.Job(
        run=run.run,
        assignment=assignment.assignment,
        round=assignment.round,
        model_version=assignment.version,
        bundle=with_chunk_size(run.bundle, chunk_bytes),
        model=with_chunk_size(assignment.model, chunk_bytes),
        dataset=plan.dataset,
        deadline_s=min(max(1.0, assignment.deadline_unix_s - now), plan.participation.deadline_s),
        epochs=assignment.epochs,
        steps=assignment.steps,
        batch_size=training.batch_size,
        last_batch=training.last_batch,
        hyper=training.hyper,
        method=plan.method,
        options=plan.options,
        variant=assignment.variant,
        cut=assignment.cut,
        codec=assignment.codec,
        byte_budget=assignment.byte_budget,
        evaluate=plan.evaluate_on_devices,
        holdout_fraction=training.holdout_fraction,
        max_samples=training.max_samples,
        max_age_s=training.max_age_s,
        priority=plan.priority,
        seed=plan.seed,
    )
