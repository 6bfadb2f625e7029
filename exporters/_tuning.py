"""Trains a torch module on arrays: to repair it after pruning, and to say how good it is."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from exporters._losses import hits, reference_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from edge_runtime.bundle.manifest import Loss

_SOFTNESS = 4.0  # temperature of distillation (Hinton, Vinyals, Dean 2015, section 2)
_EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Samples:
    """Inputs ``[n, ...]`` as the model takes them, preprocessed, and targets ``[n, ...]``."""

    x: torch.Tensor
    y: torch.Tensor

    def batches(self, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All samples once in an order of the seed; a last batch of one sample is left out (BatchNorm needs two)."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(size):
            if len(rows) > 1:
                yield self.x[rows], self.y[rows]


@dataclass(frozen=True)
class Tuning:
    """How to train: SGD with momentum, the learning rate falling as a cosine to 0 over all epochs.

    ``distil`` is the share of the teacher's soft answers in the loss, for cross entropy.
    """

    epochs: int
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 64
    distil: float = 0.5
    seed: int = 0


def fine_tune(
    module: nn.Module, samples: Samples, loss: Loss, tuning: Tuning, teacher: nn.Module | None = None
) -> None:
    """Trains ``module`` in place; with a teacher also towards its answers (cross entropy only)."""
    if tuning.epochs == 0:
        return
    parameters = [value for value in module.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, tuning.learning_rate, momentum=tuning.momentum, weight_decay=tuning.weight_decay
    )
    steps = tuning.epochs * math.ceil(len(samples.x) / tuning.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    guide = copy.deepcopy(teacher).eval() if teacher is not None and loss == "cross_entropy" else None
    for epoch in range(tuning.epochs):
        module.train()
        for x, y in samples.batches(tuning.batch_size, tuning.seed * 1_000_003 + epoch):
            optimizer.zero_grad()
            output = module(x)
            value = reference_loss(loss, output, y)
            if guide is not None:
                value = (1 - tuning.distil) * value + tuning.distil * _distance(output, guide(x).detach())
            value.backward()
            optimizer.step()
            schedule.step()
    module.eval()


def score(module: nn.Module, samples: Samples, loss: Loss) -> tuple[float, float | None]:
    """Mean loss, and the share of right answers (None for regression)."""
    module.eval()
    loss_sum, right, known = 0.0, 0.0, True
    with torch.no_grad():
        for x, y in zip(samples.x.split(_EVALUATION_BATCH), samples.y.split(_EVALUATION_BATCH), strict=True):
            output = module(x)
            loss_sum += len(x) * float(reference_loss(loss, output, y))
            each = hits(loss, output, y)
            known = known and each is not None
            right += 0.0 if each is None else float(each.sum())
    return loss_sum / len(samples.x), right / len(samples.x) if known else None


def _distance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of softened answers, scaled so that its gradient keeps its size."""
    soft, aim = functional.log_softmax(output / _SOFTNESS, 1), functional.log_softmax(target / _SOFTNESS, 1)
    return functional.kl_div(soft, aim, reduction="batchmean", log_target=True) * _SOFTNESS**2
