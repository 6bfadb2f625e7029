"""From a trained model and an energy profile to a thinner model: prune, repair, compare.

The cost is what the profile's device is predicted to spend on one training step; see :mod:`exporters.pruning` for the
choice of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from energy.commands.costs import QUANTITY_NAMES, amount
from energy.thor.estimate import Estimate, Estimator
from energy.thor.layers import DEFAULT_BATCH, partition
from exporters._layers import layer_table
from exporters._losses import reference_loss
from exporters._model import inspect_model
from exporters._tuning import Samples, Tuning, fine_tune, score
from exporters.errors import UsageError
from exporters.pruning import Removal, prune_channels

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from edge_runtime.bundle.manifest import Loss
    from energy.thor.profile import Profile, Quantity

IMPORTANCE_BATCH = 64
_CLOSE = 0.01  # a share that is missed by less is not worth a line
_HALF = 0.5  # between the two classes of a binary target


@dataclass(frozen=True)
class Figures:
    """One network in numbers. ``step`` is predicted, for one training step; FLOPs are forward, per sample."""

    parameters: int
    flops: int
    step: Estimate
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Thinned:
    """The thinner network, and both in numbers. ``quantity`` is that of both steps."""

    module: nn.Module
    quantity: Quantity
    before: Figures
    after: Figures
    removals: list[Removal]


@dataclass(frozen=True)
class Task:
    """What is trained: the loss, the optimiser that a device will run, samples per step, and both sets of samples."""

    loss: Loss
    optimizer: str
    train: Samples
    test: Samples
    batch: int = DEFAULT_BATCH


def thin(
    module: nn.Module,
    example: torch.Tensor,
    task: Task,
    profile: Profile,
    *,
    share: float,
    tuning: Tuning,
    keep: tuple[str, ...] = (),
    progress: Callable[[str], None] | None = None,
) -> Thinned:
    """Prunes ``module`` until a step is predicted to cost ``share`` of what it did, and trains what is left.

    ``module`` is not changed. It teaches the thinner one (:class:`exporters._tuning.Tuning`).

    Raises:
        UsageError: the share is not between 0 and 1.
        ProfileError: the profile knows nothing of a kind of layer.
        ExportError: the share cannot be reached.
    """
    if not 0 < share < 1:
        raise UsageError(f"--share {share:g} is not between 0 and 1; 0.5 halves the cost of a step")
    say = progress or (lambda _line: None)

    estimator = Estimator(profile)

    def predicted(part: nn.Module) -> Estimate:
        return estimator.estimate(partition(description(part, example, task), task.batch))

    before = _figures(module, example, task, predicted(module))
    least = chance(task)
    if before.accuracy is not None and least is not None and before.accuracy <= least:
        say(
            f"the model is right in {before.accuracy:.0%} of the test samples before pruning, no better than chance: "
            "was it trained? What is important is judged by its weights; load trained ones with --weights"
        )
    whole = f"{amount(before.step.total, profile.quantity)} ({QUANTITY_NAMES[profile.quantity]})"
    say(f"pruning to {share:.0%} of {whole} per step")
    pruned = prune_channels(
        module,
        example,
        cost=lambda part: predicted(part).total,
        target=share * before.step.total,
        loss=lambda output, target: reference_loss(task.loss, output, target),
        batches=lambda: task.train.batches(IMPORTANCE_BATCH, tuning.seed),
        keep=keep,
        on_removal=lambda step: say(
            f"{step.layer}: {step.removed} channels less, {step.left} left, {step.cost / before.step.total:.0%}"
        ),
    )
    reached = pruned.cost_after / pruned.cost_before
    if reached < share - _CLOSE:
        say(f"ends at {reached:.0%}, below the {share:.0%} asked for: steps are of 4 channels or more")
    say(f"training what is left for {tuning.epochs} epochs")
    fine_tune(pruned.module, task.train, task.loss, tuning, teacher=module)
    after = _figures(pruned.module, example, task, predicted(pruned.module))
    return Thinned(pruned.module, profile.quantity, before, after, pruned.removals)


def chance(task: Task) -> float | None:
    """Share of right answers that says nothing: always the commonest class, and two standard errors. None: regression.

    A model with that little accuracy is untrained, or its weights were not loaded.
    """
    if task.loss == "mean_squared_error" or not len(task.test.y):
        return None
    classes = task.test.y if task.loss == "cross_entropy" else task.test.y > _HALF
    counts = torch.unique(classes, return_counts=True)[1]
    common = float(counts.max() / counts.sum())
    return min(1.0, common + 2 * (common * (1 - common) / len(task.test.y)) ** 0.5) if common < 1 else None


def description(module: nn.Module, example: torch.Tensor, task: Task) -> dict[str, Any]:
    """What the manifest of this network would say of its layers, without exporting it."""
    model = inspect_model(module, example, task.loss, None)
    shapes = {name: list(value.shape) for name, value in model.tensors().items()}
    return {
        "name": "network",
        "layers": msgspec.to_builtins(layer_table(model)),
        "parameters": [{"shape": shape, "trainable": name in model.trainable} for name, shape in shapes.items()],
        "optimizer": {"name": task.optimizer},
    }


def _figures(module: nn.Module, example: torch.Tensor, task: Task, step: Estimate) -> Figures:
    loss, accuracy = score(module, task.test, task.loss)
    layers = layer_table(inspect_model(module, example, task.loss, None))
    return Figures(
        parameters=sum(value.numel() for value in module.parameters()),
        flops=sum(layer.flops * layer.calls for layer in layers),
        step=step,
        loss=loss,
        accuracy=accuracy,
    )
