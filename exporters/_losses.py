"""The losses a bundle can train, per sample, so that a mask can leave samples out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from exporters.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_runtime.bundle.manifest import Loss

LOSSES: tuple[Loss, ...] = ("cross_entropy", "binary_cross_entropy_with_logits", "mean_squared_error")


class Target(NamedTuple):
    """dtype and shape (without the batch axis) of ``y``, and the number of classes for cross entropy."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    classes: int | None


def target_of(loss: Loss, output: torch.Tensor) -> Target:
    """What ``y`` must be for a model with this output (``[batch, ...]``).

    Raises:
        UsageError: the loss is unknown, or the output does not fit it.
    """
    if loss not in LOSSES:
        raise UsageError(f"loss {loss!r} is not known; choose one of {', '.join(LOSSES)}")
    shape = tuple(output.shape[1:])
    if loss != "cross_entropy":
        return Target(torch.float32, shape, None)
    if not shape or shape[0] < 2:
        raise UsageError(
            f"cross_entropy needs logits [batch, classes, ...], the model returns {tuple(output.shape)}; "
            "use binary_cross_entropy_with_logits for one logit, mean_squared_error for values"
        )
    return Target(torch.int64, shape[1:], shape[0])


def per_sample(loss: Loss, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Loss of each sample, ``[batch]``: the mean over everything but the batch axis, as torch's losses take it."""
    if loss == "cross_entropy":
        # Gathered, not multiplied by a one-hot: a label outside the classes fails loudly in onnxruntime as well.
        log_probability = functional.log_softmax(output, 1)
        each = -log_probability.gather(1, target.unsqueeze(1)).squeeze(1)
    elif loss == "binary_cross_entropy_with_logits":
        each = output.clamp(min=0) - output * target + torch.log1p(torch.exp(-output.abs()))
    else:
        each = (output - target) * (output - target)
    return each if each.dim() == 1 else each.flatten(1).mean(1)


def hits(loss: Loss, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Share of right answers of each sample, ``[batch]`` float32; None for regression.

    A binary answer is right when the logit is above 0 exactly where the target is above 0.5.
    """
    if loss == "mean_squared_error":
        return None
    right = output.argmax(1) == target if loss == "cross_entropy" else (output > 0) == (target > 0.5)
    each = right.to(torch.float32)
    return each if each.dim() == 1 else each.flatten(1).mean(1)


def reference_loss(loss: Loss, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same loss by torch's own function: mean over the batch."""
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "cross_entropy": functional.cross_entropy,
        "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
        "mean_squared_error": functional.mse_loss,
    }
    return functions[loss](output, target)
