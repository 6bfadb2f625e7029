"""One layer as a training step of its own: forward, and backward from a gradient that comes in.

What is computed backwards is that of the entry's kind: the gradient of the input, of the weights, both or neither.
Graph inputs: ``x`` (``x2`` for a second operand), ``gy`` the gradient of the output, ``y`` the targets of a loss,
``seed`` for dropout, and ``p.NAME``. Outputs: what a whole step would use further on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.func import functional_call

from energy.thor.layers import canonical
from exporters import _losses, _optimizers
from exporters._graph import GraphBuilder, Port
from exporters._own_operators import edge
from exporters._probe_layers import build, input_shape
from exporters._random import SeededDropout
from exporters._trace import Given, NotDynamicError, trace_function

if TYPE_CHECKING:
    from torch import nn

    from energy.thor.layers import Entry

Tensors = dict[str, torch.Tensor]

# Tensors of one size that an optimiser's probe updates: in a model there are many, so what a run costs is shared.
_TENSORS = 8
_FEW_TENSORS = 2
_LARGE = 65536


class ProbeGraph(NamedTuple):
    """``runs``: how often the layer is in it. ``batch``: the only size it takes; None: any. ``limits``: integer inputs
    must stay below these. ``output_shape``: of the layer, without the batch axis.
    """

    builder: GraphBuilder
    runs: int
    batch: int | None
    limits: dict[str, int]
    output_shape: tuple[int, ...]


def layer_graph(entry: Entry, batch: int) -> ProbeGraph | None:
    """Traces a layer of a table alone; None if there is no module for its kind. ``batch``: if it must be fixed.

    Raises:
        ExportError: it cannot be traced.
    """
    kind = canonical(entry["kind"])
    if kind == "bias":
        return _bias_graph(entry)
    if kind in _losses.LOSSES:
        return _loss_graph(entry, kind, batch)
    module = build(entry)
    if module is None:
        return None
    shape = input_shape(entry)
    integers = kind == "embedding"
    operands = getattr(module, "operands", 1)
    example = torch.zeros((2, *shape), dtype=torch.int64) if integers else torch.randn(2, *shape)
    names = ["x", "x2"][:operands]
    with torch.no_grad():
        output = module.train()(*[example] * operands)
    given = {name: Given(shape, example.dtype) for name in names}
    given["gy"] = Given(tuple(output.shape[1:]), torch.float32)
    if kind == "add" and operands == 2:
        given["gz"] = Given(shape, torch.float32)
    if kind.startswith("dropout"):
        given["seed"] = Given((), torch.int64, batched=False)
    step = _LayerStep(module, names, entry, integers=integers)
    limits = {"x": int(entry["settings"]["num_embeddings"])} if integers else {}
    try:
        return ProbeGraph(step.trace(given, None), 1, None, limits, tuple(output.shape[1:]))
    except NotDynamicError:
        return ProbeGraph(step.trace(given, batch), 1, batch, limits, tuple(output.shape[1:]))


class _LayerStep:
    def __init__(self, module: nn.Module, names: list[str], entry: Entry, *, integers: bool) -> None:
        self._module = module
        self._names = names
        self._input_gradient = bool(entry.get("input_gradient", True)) and not integers
        self._trainable = bool(entry.get("trainable", True))
        self._stack: list[str] = []
        self._places: dict[str, str] = {}

    def trace(self, given: dict[str, Given], batch: int | None) -> GraphBuilder:
        module = self._module
        tensors = {f"p.{name}": value.detach() for name, value in [*module.named_parameters(), *module.named_buffers()]}
        return trace_function(
            self._run, tensors, given, batch=batch, module=module, stack=self._stack, places=self._places
        )

    def _run(self, values: Tensors) -> Tensors:
        module = self._module
        parameters = {name: values[f"p.{name}"].detach() for name, _ in module.named_parameters()}
        buffers = {name: values[f"p.{name}"].clone() for name, _ in module.named_buffers()}
        inputs = [values[name].detach() for name in self._names]
        wanted: Tensors = {}
        if self._input_gradient:
            wanted |= {f"g{name}": value.requires_grad_() for name, value in zip(self._names, inputs, strict=True)}
        if self._trainable:
            wanted |= {f"g.{name}": value.requires_grad_() for name, value in parameters.items()}
        seed = values.get("seed", torch.zeros((), dtype=torch.int64))
        with SeededDropout(seed, edge.bernoulli.default, lambda: "") as mode:
            mode.places = self._places
            output = functional_call(module, {**parameters, **buffers}, tuple(inputs))
        result = {f"new.p.{name}": value for name, value in buffers.items() if value.is_floating_point()}
        if wanted:
            found = torch.autograd.grad(output, list(wanted.values()), values["gy"], allow_unused=True)
            result |= {name: value for name, value in zip(wanted, found, strict=True) if value is not None}
        if "gz" in values:
            # Where two branches meet again they once parted: there the gradients of both are added.
            result = {name: value for name, value in result.items() if name not in {"gx", "gx2"}}
            result["gx"] = values["gy"] + values["gz"]
        return {**result, "out": output.detach()}


def _bias_graph(entry: Entry) -> ProbeGraph:
    """The gradient of a convolution's bias; adding it is part of the convolution."""
    shape = tuple(entry["input_shape"])

    def run(values: Tensors) -> Tensors:
        gradient = values["gy"]
        return {"g.bias": gradient.sum([0, *range(2, gradient.dim())])}

    given = {"gy": Given(shape, torch.float32)}
    builder = trace_function(run, {}, given, batch=None, module=torch.nn.Identity(), stack=[], places={})
    return ProbeGraph(builder, 1, None, {}, shape)


def _loss_graph(entry: Entry, kind: str, batch: int) -> ProbeGraph:
    shape = tuple(entry["input_shape"])
    target = _losses.target_of(kind, torch.zeros(2, *shape))  # type: ignore[arg-type]

    def run(values: Tensors) -> Tensors:
        x = values["x"].detach().requires_grad_()
        loss = _losses.per_sample(kind, x, values["y"]).mean()  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, [x])
        return {"loss": loss.detach(), "gx": gradient}

    given = {"x": Given(shape, torch.float32), "y": Given(target.shape, target.dtype)}
    limits = {"y": target.classes} if target.classes else {}
    module = torch.nn.Identity()
    try:
        builder = trace_function(run, {}, given, batch=None, module=module, stack=[], places={})
        return ProbeGraph(builder, 1, None, limits, ())
    except NotDynamicError:
        builder = trace_function(run, {}, given, batch=batch, module=module, stack=[], places={})
        return ProbeGraph(builder, 1, batch, limits, ())


def optimizer_graph(name: str, elements: int) -> ProbeGraph:
    """Several tensors of one size, updated as in ``train.onnx``."""
    count = _TENSORS if elements <= _LARGE else _FEW_TENSORS
    shapes = {f"w{index}": (elements,) for index in range(count)}
    return ProbeGraph(_optimizers.update_graph(name, shapes), count, None, {}, (elements,))


def empty_graph() -> GraphBuilder:
    """A graph that does nothing: what a run costs by itself."""
    builder = GraphBuilder()
    port = Port(np.dtype(np.float32), (1,))
    builder.set_output("out", builder.add_input("x", port), port)
    return builder
