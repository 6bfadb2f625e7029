"""The functions that are traced: gradients of one training step, evaluation, prediction.

Each maps named tensors to named tensors and keeps no state, so that every parameter, buffer and choice is an input of
the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from exporters import _losses
from exporters._own_operators import edge
from exporters._random import SeededDropout
from exporters.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from exporters._model import Model

Tensors = dict[str, torch.Tensor]


class Step:
    """One traceable function of a model. ``layer()`` names the module that runs, for messages."""

    def __init__(self, model: Model, stack: list[str]) -> None:
        self.model = model
        self.stack = stack
        self.places: dict[str, str] = {}
        self.unused: list[str] = []
        self.streams = 0

    def _forward(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        layer = self._layer
        with SeededDropout(values["seed"], edge.bernoulli.default, layer) as mode:
            mode.places = self.places
            output = functional_call(self.model.module, dict(tensors), (values["x"],))
        self.streams = mode.streams
        if not isinstance(output, torch.Tensor):
            raise ExportError(f"forward() returns {type(output).__name__} in training mode; return one tensor")
        return output

    def _layer(self) -> str:
        return self.stack[-1] if self.stack else ""

    def _mean_loss(self, output: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        each = _losses.per_sample(self.model.loss, output, values["y"])
        if "mask" not in values:
            return each.mean()
        mask = values["mask"]
        # An all-zero mask gives loss 0, not NaN; masks hold whole numbers, so this changes no other result.
        return (each * mask).sum() / mask.sum().clamp(min=1)

    def gradients(self, values: Tensors) -> Tensors:
        """``loss``, ``g.NAME`` and the buffers as training leaves them. The module is in training mode."""
        model = self.model
        live = {name: values[f"p.{name}"].detach().requires_grad_() for name in model.trainable}
        # BatchNorm writes its running statistics in place, so it gets copies.
        buffers = {name: values[f"p.{name}"].clone() for name in model.buffers}
        frozen = {name: values[f"p.{name}"] for name in model.frozen}
        output = self._forward({**live, **frozen, **buffers}, values)
        loss = self._mean_loss(output, values)
        if not loss.requires_grad:
            raise ExportError("the loss depends on no trainable parameter; does forward() detach or use no_grad?")
        found = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
        self.unused = [name for name, value in zip(live, found, strict=True) if value is None]
        result = {f"g.{name}": value for name, value in zip(live, found, strict=True) if value is not None}
        result.update({f"new.p.{name}": value for name, value in buffers.items() if value.is_floating_point()})
        return {**result, "loss": loss.detach()}

    def evaluate(self, values: Tensors) -> Tensors:
        """``loss_sum``, ``correct`` (classification) and ``count``, sums over the batch, and ``output``.

        The module is in evaluation mode. ``evaluate.onnx`` and ``predict.onnx`` are two parts of this trace.
        """
        output = self._forward(self._all(values), values)
        each = _losses.per_sample(self.model.loss, output, values["y"])
        mask = values.get("mask", torch.ones_like(each))
        result = {"loss_sum": (each * mask).sum() if "mask" in values else each.sum()}
        right = _losses.hits(self.model.loss, output, values["y"])
        if right is not None:
            result["correct"] = (right * mask).sum() if "mask" in values else right.sum()
        return {**result, "count": mask.sum(), "output": output}

    def _all(self, values: Tensors) -> Tensors:
        names = (*self.model.trainable, *self.model.frozen)
        return {name: values[f"p.{name}"] for name in names} | {
            name: values[f"p.{name}"].clone() for name in self.model.buffers
        }
