"""How many bytes the update of an assignment may take. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.plan import Uplink

FLOAT_BYTES = 4
LEAST_BYTES = 64  # a container's header and some values; less is no use to any codec
LEAST_SHARE = 0.125  # of the mean budget, for a device with few samples: its buffers take what they take


def update_budget(
    uplink: Uplink, round_: int, elements: int, samples: int | None = None, mean_samples: float | None = None
) -> int | None:
    """Bytes of one encoded update, None where the codec chooses itself.

    Args:
        uplink: of the plan.
        round_: of the assignment, from 0.
        elements: float32 numbers in an update.
        samples: that the device announced; None: unknown, taken as the mean.
        mean_samples: of the fleet; None: unknown.
    """
    dense = FLOAT_BYTES * elements
    if uplink.target_ratio is not None:
        ratio = uplink.target_ratio
    elif uplink.budget_bytes is not None:
        ratio = max(1.0, dense / uplink.budget_bytes)
    else:
        return None
    budget = dense / warmed_up(ratio, round_, uplink.warmup_rounds)
    if uplink.by_samples and samples is not None and mean_samples:
        budget *= max(LEAST_SHARE, samples / mean_samples)
    if uplink.budget_bytes is not None and not uplink.by_samples and round_ >= uplink.warmup_rounds:
        return uplink.budget_bytes
    return max(LEAST_BYTES, int(budget))


def smallest_budget(uplink: Uplink, elements: int) -> int | None:
    """The least that :func:`update_budget` gives any device in any round; None where the codec chooses itself."""
    return update_budget(uplink, uplink.warmup_rounds, elements, 0, 1.0)


def warmed_up(ratio: float, round_: int, warmup_rounds: int) -> float:
    """The ratio of a round: it grows exponentially to ``ratio``, which round ``warmup_rounds`` is the first to have.

    Lin et al., "Deep Gradient Compression", ICLR 2018, section 3.3.
    """
    if round_ >= warmup_rounds:
        return ratio
    return float(ratio ** ((round_ + 1) / (warmup_rounds + 1)))


def change_budget(target_ratio: float | None, budget_bytes: int | None, elements: int) -> int | None:
    """Bytes of one change of the shared model, None where the codec chooses itself."""
    if target_ratio is not None:
        return max(LEAST_BYTES, int(FLOAT_BYTES * elements / target_ratio))
    return budget_bytes
