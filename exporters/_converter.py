"""Walks a traced FX graph of ATen operators and emits ONNX nodes through the operator tables.

Sizes are ints, or expressions in one symbol (the batch). An expression becomes a few integer nodes on ``Shape(x)``;
a reshape with one symbolic size needs none, because it can say -1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.fx import GraphModule, Node

from exporters.errors import ExportError

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

    from exporters._graph import GraphBuilder

NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.bool: np.dtype(np.bool_),
    torch.uint8: np.dtype(np.uint8),
}
ONNX_TYPE = {torch.float32: 1, torch.uint8: 2, torch.int32: 6, torch.int64: 7, torch.bool: 9, torch.float64: 11}

Size = Any  # int or torch.SymInt


class Tensor(NamedTuple):
    """A value of the graph under construction."""

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]


Translator = Callable[..., Any]
Function = TypeVar("Function", bound=Translator)
TRANSLATORS: dict[str, Translator] = {}


def translates(*names: str) -> Callable[[Function], Function]:
    """Registers the translation of ATen operators, by names such as ``aten.add.Tensor``."""

    def register(function: Function) -> Function:
        for name in names:
            TRANSLATORS[name] = function
        return function

    return register


class Converter:
    """Translates one traced graph into a `GraphBuilder`."""

    def __init__(self, builder: GraphBuilder, batch_of: str | None, places: Mapping[str, str] | None = None) -> None:
        """Starts a conversion.

        Args:
            builder: takes the nodes.
            batch_of: the graph input whose first axis is the symbolic batch; None if every size is fixed.
            places: the layer that first called an operator, by the operator's name, for messages.
        """
        self.builder = builder
        self.result: torch.Tensor | tuple[Any, ...] | None = None
        self.calls = 0
        self._batch_of = batch_of
        self._places = places or {}

    def run(self, module: GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Emits every node and returns the values of the traced function's flat outputs."""
        env: dict[Node, Any] = {}
        waiting = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(waiting)
            elif node.op == "get_attr":
                env[node] = self._attribute(module, str(node.target))
            elif node.op == "output":
                return [self._resolve(item, env) for item in node.args[0]]
            else:
                self._emit(node, env)
        raise ExportError("the traced graph has no output; does the model return a tensor?")

    def _emit(self, node: Node, env: dict[Any, Any]) -> None:
        value: Any = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            env[node] = value  # its expression is all that is needed
            return
        name = str(node.target)
        if name == "<built-in function getitem>":
            env[node] = env[node.args[0]][node.args[1]]
            return
        if name == "aten.copy_.default":
            self._overwrite(node, env)
            return
        translator = TRANSLATORS.get(name)
        if translator is None:
            raise ExportError(
                f"operator {name} ({self._place(name)}) has no ONNX translation here; replace it in the model by other "
                "torch functions, or freeze the layer if it is only needed backwards"
            )
        args = self._resolve(node.args, env)
        kwargs = {key: self._resolve(item, env) for key, item in node.kwargs.items()}
        self.result = value
        try:
            made = translator(self, *args, **kwargs)
        except ExportError as error:
            raise ExportError(f"{error} (operator {name}, {self._place(name)})") from error
        if isinstance(made, tuple):
            env[node] = tuple(
                None if part is None or meta is None else _tensor(part, meta)
                for part, meta in zip(made, value, strict=False)
            )
        else:
            env[node] = _tensor(made, value)

    def _place(self, operator: str) -> str:
        packet = operator.rpartition(".")[0]
        layer = self._places.get(packet, self._places.get(packet.removesuffix("_backward")))
        return f"layer {layer!r}" if layer else "outside any layer"

    def _overwrite(self, node: Node, env: dict[Any, Any]) -> None:
        target, source = node.args[0], node.args[1]
        new = self.cast(self._resolve(source, env), node.meta["val"].dtype)
        env[target] = env[node] = Tensor(self.expand(new, node.meta["val"].shape), new.dtype, node.meta["val"].shape)

    def _attribute(self, module: GraphModule, target: str) -> Tensor:
        value: Any = module
        for part in target.split("."):
            value = getattr(value, part)
        if not isinstance(value, torch.Tensor):
            raise ExportError(f"the model holds {target} of type {type(value).__name__}; only tensors can be exported")
        array = value.detach().cpu().numpy()
        return Tensor(self.builder.constant(array), value.dtype, tuple(value.shape))

    def _resolve(self, item: Any, env: Mapping[Node, Any]) -> Any:
        if isinstance(item, Node):
            return env[item]
        if isinstance(item, (list, tuple)):
            return [self._resolve(part, env) for part in item]
        return item

    # Building blocks for the translations ---------------------------------------------------------------------

    def op(self, op_type: str, *inputs: Tensor | str, **attributes: Any) -> str:
        """One node with one output."""
        return self.builder.op(op_type, *map(_name, inputs), **attributes)

    def multi(self, op_type: str, *inputs: Tensor | str, outputs: int, **attributes: Any) -> tuple[str, ...]:
        """One node with several outputs."""
        return self.builder.multi(op_type, *map(_name, inputs), outputs=outputs, **attributes)

    def out(self) -> torch.Tensor:
        """Fake result of the operator in translation: its dtype and shape."""
        if not isinstance(self.result, torch.Tensor):
            raise ExportError("operator returns no single tensor")
        return self.result

    def ints(self, *values: int) -> str:
        """Constant int64 vector."""
        return self.builder.constant(np.asarray(values, np.int64))

    def scalar(self, value: Any, dtype: torch.dtype) -> str:
        """A number, possibly an expression in the batch size, as a scalar of ``dtype``."""
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            expression = value.node.expr
            if not expression.is_number:
                vector = self._expression(expression, real=dtype.is_floating_point)
                kind = torch.float64 if dtype.is_floating_point else torch.int64
                flat = self.op("Squeeze", vector, self.ints(0))
                return flat if kind == dtype else self.op("Cast", flat, to=ONNX_TYPE[dtype])
            value = float(expression) if dtype.is_floating_point else int(expression)
        return self.builder.constant(np.asarray(value, NUMPY[dtype]))

    def operand(self, value: Any, dtype: torch.dtype) -> str:
        """A tensor cast to ``dtype``, or a number as a scalar of it."""
        return self.cast(value, dtype).name if isinstance(value, Tensor) else self.scalar(value, dtype)

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Casts where the types differ."""
        if value.dtype == dtype:
            return value
        if dtype not in ONNX_TYPE:
            raise ExportError(f"dtype {dtype} is not supported; use float32, int64 or bool")
        return Tensor(self.op("Cast", value, to=ONNX_TYPE[dtype]), dtype, value.shape)

    def shape_vector(self, sizes: Sequence[Size], *, reshape: bool = False) -> str:
        """Sizes as an int64 vector. In a reshape one symbolic size is written as -1."""
        fixed = [None if _is_symbolic(size) else int(size) for size in sizes]
        unknown = fixed.count(None)
        if unknown == 0 or (reshape and unknown == 1 and 0 not in fixed):
            return self.ints(*(-1 if size is None else size for size in fixed))
        return self.op("Concat", *(self.dimension(size) for size in sizes), axis=0)

    def dimension(self, size: Size) -> str:
        """One size as an int64 vector of length 1."""
        return self._expression(size.node.expr, real=False) if _is_symbolic(size) else self.ints(int(size))

    def reshape(self, value: Tensor | str, sizes: Sequence[Size]) -> str:
        """Reshapes, leaving out a reshape to the same shape."""
        if isinstance(value, Tensor) and same_shape(value.shape, sizes):
            return value.name
        return self.op("Reshape", value, self.shape_vector(sizes, reshape=True))

    def expand(self, value: Tensor, sizes: Sequence[Size]) -> str:
        """Broadcasts to ``sizes``, leaving out what changes nothing."""
        if same_shape(value.shape, sizes):
            return value.name
        return self.op("Expand", value, self.shape_vector(sizes))

    def producer_transpose(self, value: Tensor) -> str | None:
        """The matrix of which ``value`` is the transpose, if it was just transposed."""
        return self.builder.transposed_from(value.name)

    def _expression(self, expression: sympy.Expr, *, real: bool) -> str:
        """Emits an expression in the batch size, as int64 or (``real``) float64, in a vector of length 1."""
        kind = np.float64 if real else np.int64
        if expression.is_number:
            return self.builder.constant(np.asarray([float(expression) if real else int(expression)], kind))
        if expression.is_Symbol:
            if self._batch_of is None:
                raise ExportError("a size depends on something else than the batch; use fixed sizes in forward()")
            size = self.op("Shape", self._batch_of, start=0, end=1)
            return self.op("Cast", size, to=ONNX_TYPE[torch.float64]) if real else size
        name = type(expression).__name__
        if name == "IntTrueDiv" or (name in {"ToFloat", "FloatTrueDiv"}):
            real = True
        operator = _SIZE_OPERATORS.get(name)
        if name == "ToFloat":
            return self._expression(expression.args[0], real=True)
        if name == "Pow" and expression.args[1].is_number:
            exponent = int(expression.args[1])
            base = self._expression(expression.args[0], real=real)
            if exponent < 0 and real:
                return self.op("Div", self.builder.constant(np.asarray([1.0], kind)), base)
            return functools.reduce(lambda a, b: self.op("Mul", a, b), [base] * exponent)
        if operator is None:
            raise ExportError(f"a size depends on the batch through {name}; export with batch=<a number>")
        parts = [self._expression(part, real=real) for part in expression.args]
        return functools.reduce(lambda a, b: self.op(operator, a, b), parts)


_SIZE_OPERATORS = {
    "Add": "Add",
    "Mul": "Mul",
    "FloorDiv": "Div",
    "CleanDiv": "Div",
    "IntTrueDiv": "Div",
    "FloatTrueDiv": "Div",
    "Mod": "Mod",
    "PythonMod": "Mod",
    "Max": "Max",
    "Min": "Min",
}


def same_shape(one: Sequence[Size], other: Sequence[Size]) -> bool:
    """Whether two shapes are equal for every batch size."""
    return len(one) == len(other) and all(_key(a) == _key(b) for a, b in zip(one, other, strict=True))


def _key(size: Size) -> Any:
    return size.node.expr if _is_symbolic(size) else int(size)


def _is_symbolic(size: Size) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _tensor(name: Any, meta: torch.Tensor) -> Tensor:
    return name if isinstance(name, Tensor) else Tensor(name, meta.dtype, tuple(meta.shape))


def _name(value: Tensor | str) -> str:
    return value.name if isinstance(value, Tensor) else value
