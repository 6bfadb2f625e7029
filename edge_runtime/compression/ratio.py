"""How many bytes a codec may spend when it is asked for a ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.compression.base import Request

DEFAULT_RATIO = 32.0
"""Raw float32 bytes through those of the whole container, where neither ratio nor budget is given."""

_CONTAINER_BYTES = 18
_LEAST_BYTES = 64  # where no budget is given: a model of few numbers is not worth a ratio


def allowed_bytes(size: int, target_ratio: float, request: Request) -> int:
    """Most bytes of the payload of ``size`` numbers; with a budget and a ratio (above 0), the smaller of both."""
    if request.budget_bytes is not None and not target_ratio:
        return request.budget_bytes
    wanted = max(_LEAST_BYTES, int(4 * size / (target_ratio or DEFAULT_RATIO)) - _CONTAINER_BYTES)
    return wanted if request.budget_bytes is None else min(wanted, request.budget_bytes)
