# ruff: noqa: SLF001  torch keeps the base class of BatchNorm private
"""What the exporter knows about a torch module: its tensors by role, its input, output and target."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from exporters._losses import Target, target_of
from exporters.errors import ExportError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edge_runtime.bundle.manifest import Loss

_FLOATS_MESSAGE = "parameters must be float32; call module.float() before exporting"


@dataclass(frozen=True)
class Model:
    """A private copy of the user's module. Names are those of ``named_parameters`` and ``named_buffers``."""

    module: nn.Module
    example: torch.Tensor
    output: torch.Tensor
    loss: Loss
    target: Target
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer, in the order of the parameter table."""
        named: list[tuple[str, torch.Tensor]] = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {name: value.detach() for name, value in named}

    def without(self, names: Iterable[str]) -> Model:
        """The same model with some parameters frozen."""
        dropped = set(names)
        order = [name for name, _ in self.module.named_parameters()]
        return dataclasses.replace(
            self,
            trainable=tuple(name for name in self.trainable if name not in dropped),
            frozen=tuple(name for name in order if name in dropped or name in self.frozen),
        )

    @property
    def batch_statistics(self) -> bool:
        """Whether training normalises over the batch, so that padding would change the result."""
        return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.module.modules())

    def example_batch(self, size: int) -> torch.Tensor:
        """The example input, repeated or cut to ``size`` samples."""
        repeats = -(-size // len(self.example))
        return self.example.repeat(repeats, *[1] * (self.example.dim() - 1))[:size].clone()


def inspect_model(
    module: nn.Module,
    example_input: Any,
    loss: Loss,
    trainable: Callable[[str], bool] | Iterable[str] | None,
) -> Model:
    """Copies and checks a module.

    Raises:
        UsageError: wrong input or loss.
        ExportError: the module holds something that cannot be trained on a device.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, got {type(module).__name__}")
    module = copy.deepcopy(module).cpu()
    example = _example(example_input)
    for name, part in module.named_modules():
        _check_layer(name, part)
    for name, value in module.named_parameters():
        if value.dtype != torch.float32:
            raise ExportError(f"parameter {name} is {value.dtype}; {_FLOATS_MESSAGE}")
    for name, buffer in module.named_buffers():
        if buffer.dtype not in {torch.float32, torch.int64, torch.bool}:
            raise ExportError(f"buffer {name} is {buffer.dtype}; buffers must be float32, int64 or bool")
    output = _output(module, example)
    chosen = _chosen(module, trainable)
    if not chosen:
        raise UsageError("no parameter is trainable; check requires_grad and trainable")
    return Model(
        module=module,
        example=example,
        output=output,
        loss=loss,
        target=target_of(loss, output),
        trainable=tuple(name for name, _ in module.named_parameters() if name in chosen),
        frozen=tuple(name for name, _ in module.named_parameters() if name not in chosen),
        buffers=tuple(name for name, _ in module.named_buffers()),
    )


def _example(example_input: Any) -> torch.Tensor:
    if isinstance(example_input, (np.ndarray, np.generic)):
        example_input = torch.from_numpy(np.array(example_input))
    if not isinstance(example_input, torch.Tensor):
        kind = type(example_input).__name__
        raise UsageError(f"example_input must be one tensor or NumPy array with a batch axis, got {kind}")
    if example_input.dim() < 1 or len(example_input) < 1:
        raise UsageError("example_input needs a batch axis with at least one sample")
    dtype = torch.float32 if example_input.is_floating_point() else torch.int64
    return example_input.detach().cpu().to(dtype)


def _check_layer(name: str, part: nn.Module) -> None:
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        if part.momentum is None and part.track_running_stats:
            raise ExportError(
                f"layer {name!r} is BatchNorm with momentum=None (a cumulative average over all batches ever seen); "
                "set a momentum such as 0.1"
            )
        if isinstance(part, nn.SyncBatchNorm):
            raise ExportError(f"layer {name!r} is SyncBatchNorm, which needs a process group; use BatchNorm")
    if isinstance(part, (nn.modules.lazy.LazyModuleMixin,)) and part.has_uninitialized_params():
        raise ExportError(f"layer {name!r} has no parameters yet; run the module once before exporting")
    if hasattr(part, "parametrizations"):
        raise ExportError(
            f"layer {name!r} is parametrised; call torch.nn.utils.parametrize.remove_parametrizations on it first"
        )


def _output(module: nn.Module, example: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        try:
            output = module.eval()(example)
        except Exception as error:  # any failure of user code is reported as such
            raise UsageError(f"module(example_input) failed: {type(error).__name__}: {error}") from error
    if not isinstance(output, torch.Tensor):
        raise ExportError(f"forward() returns {type(output).__name__}; return one tensor of logits or values")
    if output.dtype != torch.float32:
        raise ExportError(f"forward() returns {output.dtype}; return float32 logits or values")
    if output.dim() < 1 or len(output) != len(example):
        raise ExportError(
            f"forward() returns shape {tuple(output.shape)} for a batch of {len(example)}; the first axis must be "
            "the batch"
        )
    return output


def _chosen(module: nn.Module, trainable: Callable[[str], bool] | Iterable[str] | None) -> set[str]:
    names = {name for name, _ in module.named_parameters()}
    if trainable is None:
        return {name for name, value in module.named_parameters() if value.requires_grad}
    if callable(trainable):
        return {name for name in names if trainable(name)}
    prefixes = [trainable] if isinstance(trainable, str) else list(trainable)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise UsageError(f"no parameter starts with {prefix!r}; the model has {', '.join(sorted(names))}")
    return {name for name in names if any(name.startswith(prefix) for prefix in prefixes)}
