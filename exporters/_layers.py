# ruff: noqa: SLF001  torch keeps the base classes of its layers private
"""The layer table: shapes, FLOPs, bytes and settings of what one training step runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from edge_runtime.bundle.manifest import Layer
from exporters._layer_settings import function_settings, is_free, module_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from exporters._model import Model

ROOT = "(root)"

_FREE = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Embedding)
_MOVES = frozenset({"cat", "stack", "getitem", "select", "narrow", "transpose", "permute", "split", "chunk", "pad"})


def layer_table(model: Model) -> list[Layer]:
    """One entry per layer, in the order of the first call; sizes and FLOPs are per sample of the forward pass.

    A module is a layer if it has no children or owns parameters itself. One that forward() never calls (its
    parameters are used directly) is listed last, with empty shapes. What runs outside of torch's own layers is listed
    by function, and the loss after all of it. A module that runs again with other shapes gets another entry.
    """
    table = _Table(model)
    handles = []
    for name, part in model.module.named_modules():
        if any(True for _ in part.children()) and not _own(part):
            handles += table.follow(name, part)
            continue
        handles += table.follow(name, part) if not _closed(part) else table.watch(name, part)
        handles.append(part.register_forward_hook(table.recorder(name)))
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # As in training, so that active dropouts are known; on copies, because BatchNorm writes its statistics.
        tensors = {name: value.clone() for name, value in model.tensors().items()}
        for name in model.trainable:
            tensors[name].requires_grad_()
        x = model.example_batch(max(1 + model.batch_statistics, len(model.example)))
        with torch.random.fork_rng(devices=[]), table:
            functional_call(model.module.train(), tensors, (x,))
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for handle in handles:
            handle.remove()
    return table.entries()


def layer_of(tensor_name: str) -> str:
    """Name in the layer table of the module that owns a parameter or buffer."""
    return tensor_name.rpartition(".")[0] or ROOT


class _Table(TorchFunctionMode):
    """Collects entries while forward() runs. ``_inside``: layers of torch that run now, whose functions are theirs."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model
        self._found: dict[str, Layer] = {}
        self._modules = {name or ROOT for name, _ in model.module.named_modules()}
        self._module_of: dict[str, str] = {}
        self._stack: list[str] = []
        self._inside = 0

    def follow(self, name: str, part: nn.Module) -> list[Any]:
        """Names the functions that this module calls itself after it."""

        def enter(_part: nn.Module, _args: Any) -> None:
            self._stack.append(name)

        def leave(_part: nn.Module, _args: Any, _result: Any) -> None:
            self._stack.pop()

        return [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]

    def watch(self, _name: str, part: nn.Module) -> list[Any]:
        """Takes the functions of this module as its own."""

        def enter(_part: nn.Module, _args: Any) -> None:
            self._inside += 1

        def leave(_part: nn.Module, _args: Any, _result: Any) -> None:
            self._inside -= 1

        return [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]

    def recorder(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook that enters a module into the table."""

        def record(part: nn.Module, args: Any, output: Any) -> None:
            with torch._C.DisableTorchFunction():
                self._enter(name or ROOT, _measure(name, part, args, output, self._model), of_module=True)

        return record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every function that forward() calls."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside:
            return result
        given, made = _tensors((args, kwargs)), _first(result)
        kind = getattr(func, "__name__", "").strip("_").removesuffix("_")
        kind = {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "truediv": "div"}.get(kind, kind)
        if given and made is not None and not is_free(kind, args, kwargs, given[0], made):
            self._enter_function(kind, args, kwargs, given, made)
        return result

    def _enter_function(
        self, kind: str, args: Any, kwargs: Any, given: Sequence[torch.Tensor], made: torch.Tensor
    ) -> None:
        settings = function_settings(kind, args, kwargs, given)
        weight = given[1] if "in_channels" in settings or "in_features" in settings else None
        size = math.prod(made.shape[1:])
        flops = 0 if kind in _MOVES else size if weight is None else 2 * size * weight[0].numel()
        prefix = f"{self._stack[-1]}." if self._stack and self._stack[-1] else ""
        entry = Layer(
            name="",
            kind=kind,
            input_shape=tuple(given[0].shape[1:]),
            output_shape=tuple(made.shape[1:]),
            flops=flops,
            parameter_bytes=0,  # counted where they are held
            activation_bytes=made.element_size() * size,
            settings=settings,
            input_gradient=any(value.requires_grad for value in given if value is not weight),
            trainable=any(value.requires_grad and value.is_leaf for value in given[1:]),
        )
        self._enter(prefix + kind, entry)

    def _enter(self, name: str, entry: Layer, *, of_module: bool = False) -> None:
        if of_module and name in self._found:
            for other in [key for key, module in self._module_of.items() if module == name]:
                if _alike(self._found[other], entry):
                    self._found[other] = _with(self._found[other], calls=self._found[other].calls + 1)
                    return
            entry = _with(entry, parameter_bytes=0)  # counted with the first shapes
        unique = name if of_module and name not in self._found else self._unique(name)
        if of_module:
            self._module_of[unique] = name
        self._found[unique] = _with(entry, name=unique)

    def _unique(self, name: str) -> str:
        taken = self._modules | set(self._found)
        number, result = 1, name
        while result in taken:
            number += 1
            result = f"{name}_{number}"
        return result

    def entries(self) -> list[Layer]:
        """The table, with what was never called, and the loss."""
        model = self._model
        for name, part in model.module.named_modules():
            key = name or ROOT
            if key not in self._found and _own(part):
                self._found[key] = _with(_measure(name, part, (), None, model), calls=0, flops=0)
            elif key in self._found and not _closed(part):
                self._found[key] = _with(self._found[key], calls=0, flops=0)
        size = model.output[0].numel()
        loss = Layer(
            name=self._unique("loss"),
            kind=model.loss,
            input_shape=tuple(model.output.shape[1:]),
            output_shape=(),
            flops=4 * size,
            parameter_bytes=0,
            activation_bytes=4,
            trainable=False,
        )
        return [*self._found.values(), loss]


def _with(layer: Layer, **changes: Any) -> Layer:
    return msgspec.structs.replace(layer, **changes)


def _alike(one: Layer, other: Layer) -> bool:
    """Whether two runs of a module cost the same."""
    neutral = {"name": "", "calls": 1, "parameter_bytes": 0}
    return _with(one, **neutral) == _with(other, **neutral)


def _closed(part: nn.Module) -> bool:
    """Whether the module is one of torch's layers, so that the functions it calls are its own."""
    composite = any(True for _ in part.children()) and not isinstance(part, nn.MultiheadAttention)
    return type(part).__module__.startswith("torch.nn.modules") and not composite


def _own(part: nn.Module) -> bool:
    tensors = (*part.parameters(recurse=False), *part.buffers(recurse=False))
    return bool(tensors)


def _measure(name: str, part: nn.Module, args: Any, output: Any, model: Model) -> Layer:
    given, result = _first(args), _first(output)
    # torch's recurrent layers and attention may have the batch as their second axis.
    batch_axis = int(getattr(part, "batch_first", True) is False and given is not None and given.dim() == 3)
    input_shape, output_shape = _shape(given, batch_axis), _shape(result, batch_axis)
    held = (*part.parameters(recurse=False), *part.buffers(recurse=False))
    prefix = f"{name}." if name else ""
    # The parameters of MultiheadAttention lie partly in a child that forward() never calls.
    inner = _closed(part)
    own = {f"{prefix}{key}" for key, _ in part.named_parameters(recurse=inner)}
    return Layer(
        name=name or ROOT,
        kind=type(part).__name__,
        input_shape=input_shape,
        output_shape=output_shape,
        flops=_flops(part, input_shape, output_shape),
        parameter_bytes=sum(value.numel() * value.element_size() for value in held),
        activation_bytes=4 * math.prod(output_shape) if result is not None else 0,
        settings=module_settings(part),
        input_gradient=given is not None and given.requires_grad,
        trainable=not own.isdisjoint(model.trainable),
    )


def _shape(value: torch.Tensor | None, batch_axis: int) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(value.shape) if axis != batch_axis) if value is not None else ()


def _first(value: Any) -> torch.Tensor | None:
    if isinstance(value, (tuple, list)):
        return _first(value[0]) if value else None
    return value if isinstance(value, torch.Tensor) else None


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (tuple, list)):
        return [item for part in value for item in _tensors(part)]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [value] if isinstance(value, torch.Tensor) else []


def _flops(part: Any, given: tuple[int, ...], result: tuple[int, ...]) -> int:  # noqa: PLR0911  one case per kind
    """Two per multiply-add; the usual counts, without index arithmetic."""
    size = math.prod(result)
    if isinstance(part, nn.modules.conv._ConvNd):
        per_value = 2 * (part.in_channels // part.groups) * math.prod(part.kernel_size)
        if part.transposed:
            return math.prod(given) * 2 * (part.out_channels // part.groups) * math.prod(part.kernel_size)
        return size * (per_value + (part.bias is not None))
    if isinstance(part, nn.Linear):
        return size * (2 * part.in_features + (part.bias is not None))
    if isinstance(part, nn.MultiheadAttention):
        length, width = (given[0], given[-1]) if len(given) > 1 else (1, given[-1] if given else 0)
        return 8 * length * width * width + 4 * length * length * width
    if isinstance(part, nn.RNNBase):
        steps = math.prod(given[:-1])
        return 2 * steps * sum(value.numel() for value in part.parameters(recurse=False) if value.dim() > 1)
    if isinstance(part, (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)):
        kernel: Any = part.kernel_size
        rank = len(result) - 1
        window: int = kernel**rank if isinstance(kernel, int) else math.prod(kernel)
        return size * window
    if isinstance(part, nn.modules.pooling._AdaptiveAvgPoolNd):
        return math.prod(given)
    if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
        return 4 * size
    if isinstance(part, _FREE) or any(True for _ in part.children()) or not result:
        return 0
    return size
