"""The optimisers as ONNX nodes, written once and used by both ``train.onnx`` and ``update.onnx``.

Formulas and their order are those of ``torch.optim`` (`SGD` with momentum, no dampening, no Nesterov; `Adam`;
`AdamW`) and of ``torch.nn.utils.clip_grad_norm_``. Hyper-parameters are float32 graph inputs. ``clip_norm`` 0 means
no clipping; the gradients are then untouched to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from edge_runtime.bundle.manifest import Slot
from exporters._graph import GraphBuilder, Port
from exporters.errors import UsageError

FLOAT = np.dtype(np.float32)

DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "clip_norm": 0.0},
    "adam": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0},
    "adamw": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 0.0},
}
_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_

Shapes = Mapping[str, tuple[int, ...]]


def hyper_parameters(optimizer: str, overrides: Mapping[str, float]) -> dict[str, float]:
    """Defaults of an optimiser's inputs, with overrides.

    Raises:
        UsageError: the optimiser or a name is unknown, or a value cannot be one.
    """
    if optimizer not in DEFAULTS:
        raise UsageError(f"optimizer {optimizer!r} is not known; choose one of {', '.join(DEFAULTS)}")
    known = DEFAULTS[optimizer]
    for name, value in overrides.items():
        if name not in known:
            raise UsageError(f"{optimizer} has no hyper-parameter {name!r}; it has {', '.join(known)}")
        if not (0 <= value < float("inf")):
            raise UsageError(f"hyper-parameter {name} is {value}; it must be a finite number of at least 0")
    return {name: float(overrides.get(name, value)) for name, value in known.items()}


def slots_of(optimizer: str, shapes: Shapes) -> list[Slot]:
    """The optimiser state: ``momentum.NAME``, or ``exp_avg.NAME``, ``exp_avg_sq.NAME`` and one ``step``."""
    if optimizer == "sgd":
        return [Slot(name=f"momentum.{name}", shape=shape) for name, shape in shapes.items()]
    kinds = ("exp_avg", "exp_avg_sq")
    slots = [Slot(name=f"{kind}.{name}", shape=shape) for kind in kinds for name, shape in shapes.items()]
    return [*slots, Slot(name="step", shape=())]


def add_update(builder: GraphBuilder, optimizer: str, shapes: Shapes, gradients: Mapping[str, str]) -> None:
    """Appends the optimiser to a graph and declares ``new.p.NAME`` and ``new.s.SLOT``.

    Args:
        builder: a graph whose inputs ``p.NAME`` exist or are declared here.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        shapes: shape of every trainable parameter, by name.
        gradients: the value in the graph that holds the gradient, by name.
    """
    for name, shape in shapes.items():
        builder.add_input(f"p.{name}", Port(FLOAT, shape))
    for slot in slots_of(optimizer, shapes):
        builder.add_input(f"s.{slot.name}", Port(FLOAT, slot.shape))
    for name in DEFAULTS[optimizer]:
        builder.add_input(name, Port(FLOAT, ()))
    coefficient = _clip_coefficient(builder, list(gradients.values()))
    clipped = {name: builder.op("Mul", value, coefficient) for name, value in gradients.items()}
    if optimizer == "sgd":
        _sgd(builder, shapes, clipped)
    else:
        _adam(builder, shapes, clipped, decoupled=optimizer == "adamw")


def _clip_coefficient(builder: GraphBuilder, gradients: list[str]) -> str:
    """``min(1, clip_norm / (norm + 1e-6))``, or 1 if clipping is off: then the norm is not computed either."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    result = [helper.make_tensor_value_info("coefficient", TensorProto.FLOAT, [])]
    off = helper.make_graph([helper.make_node("Constant", [], ["coefficient"], value=one)], "off", [], result)
    tiny = helper.make_tensor("tiny", TensorProto.FLOAT, [], [_CLIP_EPS])
    nodes = [
        helper.make_node("ReduceSumSquare", [gradient], [f"square{index}"], keepdims=0)
        for index, gradient in enumerate(gradients)
    ]
    nodes += [
        helper.make_node("Sum", [f"square{index}" for index in range(len(gradients))], ["square"]),
        helper.make_node("Sqrt", ["square"], ["norm"]),
        helper.make_node("Constant", [], ["tiny"], value=tiny),
        helper.make_node("Constant", [], ["one"], value=one),
        helper.make_node("Add", ["norm", "tiny"], ["divisor"]),
        helper.make_node("Div", ["clip_norm", "divisor"], ["ratio"]),
        helper.make_node("Min", ["ratio", "one"], ["coefficient"]),
    ]
    on = helper.make_graph(nodes, "on", [], result)
    wanted = builder.op("Greater", "clip_norm", builder.constant(0.0, np.float32))
    return builder.op("If", wanted, then_branch=on, else_branch=off)


def _put(builder: GraphBuilder, kind: str, name: str, value: str, shape: tuple[int, ...]) -> None:
    builder.set_output(f"new.{kind}.{name}", value, Port(FLOAT, shape))


def _sgd(b: GraphBuilder, shapes: Shapes, gradients: Mapping[str, str]) -> None:
    """``v = momentum*v + (g + weight_decay*p)``; ``p = p - lr*v``."""
    for name, shape in shapes.items():
        decayed = b.op("Add", gradients[name], b.op("Mul", "weight_decay", f"p.{name}"))
        velocity = b.op("Add", b.op("Mul", "momentum", f"s.momentum.{name}"), decayed)
        _put(b, "p", name, b.op("Sub", f"p.{name}", b.op("Mul", "lr", velocity)), shape)
        _put(b, "s", f"momentum.{name}", velocity, shape)


def _adam(b: GraphBuilder, shapes: Shapes, gradients: Mapping[str, str], *, decoupled: bool) -> None:
    """Adam (Kingma and Ba 2015, algorithm 1); ``decoupled``: AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    def wide(name: str) -> str:
        # The numbers near 1 lose their digits in float32: 1 - beta2^step is 0.001 at first.
        return b.op("Cast", name, to=TensorProto.DOUBLE)

    def narrow(value: str) -> str:
        return b.op("Cast", value, to=TensorProto.FLOAT)

    one, one_wide = b.constant(1.0, np.float32), b.constant(1.0, np.float64)
    step = b.op("Add", "s.step", one)
    _put(b, "s", "step", step, ())
    rests: dict[str, str] = {}
    corrections: dict[str, str] = {}
    for beta in ("beta1", "beta2"):
        rests[beta] = narrow(b.op("Sub", one_wide, wide(beta)))
        corrections[beta] = b.op("Sub", one_wide, b.op("Pow", wide(beta), wide(step)))
    step_size = narrow(b.op("Div", wide("lr"), corrections["beta1"]))
    root = narrow(b.op("Sqrt", corrections["beta2"]))
    shrink = b.op("Sub", one, b.op("Mul", "lr", "weight_decay"))
    for name, shape in shapes.items():
        value, gradient = f"p.{name}", gradients[name]
        if decoupled:
            value = b.op("Mul", value, shrink)
        else:
            gradient = b.op("Add", gradient, b.op("Mul", "weight_decay", value))
        mean, square = f"s.exp_avg.{name}", f"s.exp_avg_sq.{name}"
        mean = b.op("Add", b.op("Mul", "beta1", mean), b.op("Mul", rests["beta1"], gradient))
        squared = b.op("Mul", rests["beta2"], b.op("Mul", gradient, gradient))
        square = b.op("Add", b.op("Mul", "beta2", square), squared)
        denominator = b.op("Add", b.op("Div", b.op("Sqrt", square), root), "eps")
        change = b.op("Mul", step_size, b.op("Div", mean, denominator))
        _put(b, "p", name, b.op("Sub", value, change), shape)
        _put(b, "s", f"exp_avg.{name}", mean, shape)
        _put(b, "s", f"exp_avg_sq.{name}", square, shape)


def update_graph(optimizer: str, shapes: Shapes) -> GraphBuilder:
    """``update.onnx``: parameters, slots, gradients ``g.NAME`` and hyper-parameters to new parameters and slots."""
    builder = GraphBuilder()
    for name, shape in shapes.items():
        builder.add_input(f"p.{name}", Port(FLOAT, shape))
    gradients = {name: builder.add_input(f"g.{name}", Port(FLOAT, shape)) for name, shape in shapes.items()}
    add_update(builder, optimizer, shapes, gradients)
    return builder


def train_graph(optimizer: str, shapes: Shapes, gradients: GraphBuilder) -> GraphBuilder:
    """``train.onnx``: the gradients graph with the same optimiser behind it."""
    builder = gradients.copy()
    values = {name: builder.outputs.pop(f"g.{name}")[0] for name in shapes}
    add_update(builder, optimizer, shapes, values)
    return builder


def torch_optimizer(optimizer: str, parameters: list[Any], hyper: Mapping[str, float]) -> Any:
    """The optimiser of ``torch.optim`` with the same hyper-parameters, for the parity check."""
    import torch

    if optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["weight_decay"]
        )
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    betas = (hyper["beta1"], hyper["beta2"])
    return kind(parameters, lr=hyper["lr"], betas=betas, eps=hyper["eps"], weight_decay=hyper["weight_decay"])
