"""ONNX translations of elementwise ATen operators."""

from __future__ import annotations

import math
from typing import Any

import torch

from exporters._converter import ONNX_TYPE, Converter, Tensor, translates
from exporters.errors import ExportError

_UNARY = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "round": "Round",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "tan": "Tan",
    "tanh": "Tanh",
}
_BINARY = {
    "div.Tensor": "Div",
    "div.Scalar": "Div",
    "maximum.default": "Max",
    "minimum.default": "Min",
    "mul.Tensor": "Mul",
    "mul.Scalar": "Mul",
    "pow.Tensor_Tensor": "Pow",
    "pow.Scalar": "Pow",
}
_COMPARE = {"eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less"}
_LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}


def _result_type(*operands: Any) -> torch.dtype:
    """Dtype in which torch compares or divides; a fake tensor of the same rank stands for each operand."""
    stand_ins = [
        torch.empty((1,) * len(item.shape), dtype=item.dtype, device="meta") if isinstance(item, Tensor) else item
        for item in operands
    ]
    stand_ins = [float(1) if isinstance(item, torch.SymFloat) else item for item in stand_ins]
    stand_ins = [1 if isinstance(item, torch.SymInt) else item for item in stand_ins]
    first, *rest = stand_ins
    for item in rest:
        first = torch.empty((), dtype=torch.result_type(first, item), device="meta") if len(rest) > 1 else first
    return torch.result_type(first, rest[-1])


def _register_unary(aten: str, onnx: str) -> None:
    @translates(f"aten.{aten}.default")
    def unary(c: Converter, x: Tensor) -> str:
        return c.op(onnx, c.cast(x, c.out().dtype))


def _register_binary(aten: str, onnx: str) -> None:
    @translates(f"aten.{aten}")
    def binary(c: Converter, a: Any, b: Any) -> str:
        dtype = c.out().dtype
        if onnx == "Mul" and dtype == torch.bool:
            return c.op("And", c.operand(a, dtype), c.operand(b, dtype))
        return c.op(onnx, c.operand(a, dtype), c.operand(b, dtype))


def _register_compare(aten: str, onnx: str) -> None:
    @translates(f"aten.{aten}.Tensor", f"aten.{aten}.Scalar")
    def compare(c: Converter, a: Any, b: Any) -> str:
        dtype = _result_type(a, b)
        if dtype == torch.bool and onnx != "Equal":
            dtype = torch.int64
        return c.op(onnx, c.operand(a, dtype), c.operand(b, dtype))


def _register_logical(aten: str, onnx: str) -> None:
    @translates(f"aten.logical_{aten}.default")
    def logical(c: Converter, a: Tensor, b: Tensor) -> str:
        return c.op(onnx, c.cast(a, torch.bool), c.cast(b, torch.bool))

    @translates(f"aten.bitwise_{aten}.Tensor", f"aten.bitwise_{aten}.Scalar")
    def bitwise(c: Converter, a: Any, b: Any) -> str:
        dtype = c.out().dtype
        kind = onnx if dtype == torch.bool else f"Bitwise{onnx}"
        return c.op(kind, c.operand(a, dtype), c.operand(b, dtype))


for _aten, _onnx in _UNARY.items():
    _register_unary(_aten, _onnx)
for _aten, _onnx in _BINARY.items():
    _register_binary(_aten, _onnx)
for _aten, _onnx in _COMPARE.items():
    _register_compare(_aten, _onnx)
for _aten, _onnx in _LOGICAL.items():
    _register_logical(_aten, _onnx)


@translates("aten.ne.Tensor", "aten.ne.Scalar")
def _not_equal(c: Converter, a: Any, b: Any) -> str:
    dtype = _result_type(a, b)
    return c.op("Not", c.op("Equal", c.operand(a, dtype), c.operand(b, dtype)))


@translates("aten.pow.Tensor_Scalar")
def _power(c: Converter, a: Tensor, exponent: Any) -> str:
    dtype = c.out().dtype
    x = c.operand(a, dtype)
    if exponent == 2:
        return c.op("Mul", x, x)
    return c.op("Pow", x, c.scalar(exponent, dtype))


@translates("aten.add.Tensor", "aten.add.Scalar")
def _add(c: Converter, a: Any, b: Any, alpha: Any = 1) -> str:
    dtype = c.out().dtype
    right = c.operand(b, dtype)
    if alpha != 1:
        right = c.op("Mul", right, c.scalar(alpha, dtype))
    if dtype == torch.bool:
        return c.op("Or", c.operand(a, dtype), right)
    return c.op("Add", c.operand(a, dtype), right)


@translates("aten.sub.Tensor", "aten.sub.Scalar")
def _sub(c: Converter, a: Any, b: Any, alpha: Any = 1) -> str:
    dtype = c.out().dtype
    right = c.operand(b, dtype)
    if alpha != 1:
        right = c.op("Mul", right, c.scalar(alpha, dtype))
    return c.op("Sub", c.operand(a, dtype), right)


@translates("aten.rsub.Tensor", "aten.rsub.Scalar")
def _rsub(c: Converter, a: Any, b: Any, alpha: Any = 1) -> str:
    return _sub(c, b, a, alpha)


@translates("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def _div_mode(c: Converter, a: Any, b: Any, rounding_mode: str | None = None) -> str:
    dtype = c.out().dtype
    left, right = c.operand(a, dtype), c.operand(b, dtype)
    quotient = c.op("Div", left, right)
    if rounding_mode is None or (not dtype.is_floating_point and rounding_mode == "trunc"):
        return quotient
    if rounding_mode == "floor" and dtype.is_floating_point:
        return c.op("Floor", quotient)
    if rounding_mode == "floor":
        # ONNX divides integers towards zero; the remainder with the divisor's sign makes it exact first.
        return c.op("Div", c.op("Sub", left, c.op("Mod", left, right)), right)
    return c.op("Mul", c.op("Sign", quotient), c.op("Floor", c.op("Abs", quotient)))


@translates("aten.floor_divide.default")
def _floor_divide(c: Converter, a: Any, b: Any) -> str:
    return _div_mode(c, a, b, "floor")


@translates("aten.remainder.Tensor", "aten.remainder.Scalar")
def _remainder(c: Converter, a: Any, b: Any) -> str:
    dtype = c.out().dtype
    left, right = c.operand(a, dtype), c.operand(b, dtype)
    if not dtype.is_floating_point:
        return c.op("Mod", left, right)
    return c.op("Sub", left, c.op("Mul", c.op("Floor", c.op("Div", left, right)), right))


@translates("aten.fmod.Tensor", "aten.fmod.Scalar")
def _fmod(c: Converter, a: Any, b: Any) -> str:
    dtype = c.out().dtype
    return c.op("Mod", c.operand(a, dtype), c.operand(b, dtype), fmod=1)


@translates("aten.trunc.default")
def _trunc(c: Converter, x: Tensor) -> str:
    return c.op("Mul", c.op("Sign", x), c.op("Floor", c.op("Abs", x)))


@translates("aten.rsqrt.default")
def _rsqrt(c: Converter, x: Tensor) -> str:
    return c.op("Reciprocal", c.op("Sqrt", c.cast(x, c.out().dtype)))


@translates("aten.log1p.default")
def _log1p(c: Converter, x: Tensor) -> str:
    """``log(1+x) = log(u) * x / (u-1)``, exact for small x (Higham, Accuracy and Stability, 1.14.1)."""
    one = c.scalar(1.0, x.dtype)
    u = c.op("Add", x, one)
    excess = c.op("Sub", u, one)
    small = c.op("Equal", excess, c.scalar(0.0, x.dtype))
    safe = c.op("Where", small, one, excess)
    infinite = c.op("IsInf", u)
    ratio = c.op("Where", infinite, one, c.op("Div", x, safe))
    return c.op("Where", small, x, c.op("Mul", c.op("Log", u), ratio))


@translates("aten.expm1.default")
def _expm1(c: Converter, x: Tensor) -> str:
    """``exp(x)-1 = tanh(x/2) * (exp(x)+1)``, which keeps the digits of a small x."""
    half = c.op("Tanh", c.op("Mul", x, c.scalar(0.5, x.dtype)))
    return c.op("Mul", half, c.op("Add", c.op("Exp", x), c.scalar(1.0, x.dtype)))


@translates("aten.log2.default")
def _log2(c: Converter, x: Tensor) -> str:
    return c.op("Mul", c.op("Log", x), c.scalar(1.0 / math.log(2.0), x.dtype))


@translates("aten.log10.default")
def _log10(c: Converter, x: Tensor) -> str:
    return c.op("Mul", c.op("Log", x), c.scalar(1.0 / math.log(10.0), x.dtype))


@translates("aten.gelu.default")
def _gelu(c: Converter, x: Tensor, approximate: str = "none") -> str:
    return c.op("Gelu", x, approximate=approximate)


@translates("aten.leaky_relu.default")
def _leaky_relu(c: Converter, x: Tensor, negative_slope: float = 0.01) -> str:
    return c.op("LeakyRelu", x, alpha=float(negative_slope))


@translates("aten.hardtanh.default")
def _hardtanh(c: Converter, x: Tensor, low: float = -1.0, high: float = 1.0) -> str:
    return c.op("Clip", x, c.scalar(low, x.dtype), c.scalar(high, x.dtype))


@translates("aten.clamp.default")
def _clamp(c: Converter, x: Tensor, low: Any = None, high: Any = None) -> str:
    dtype = c.out().dtype
    bounds = ["" if bound is None else c.scalar(bound, dtype) for bound in (low, high)]
    return c.op("Clip", c.cast(x, dtype), *bounds)


@translates("aten.clamp.Tensor")
def _clamp_tensor(c: Converter, x: Tensor, low: Any = None, high: Any = None) -> str:
    dtype = c.out().dtype
    value = c.cast(x, dtype).name
    if low is not None:
        value = c.op("Max", value, c.operand(low, dtype))
    return value if high is None else c.op("Min", value, c.operand(high, dtype))


@translates("aten.clamp_min.default")
def _clamp_min(c: Converter, x: Tensor, low: Any) -> str:
    return _clamp(c, x, low)


@translates("aten.clamp_max.default")
def _clamp_max(c: Converter, x: Tensor, high: Any) -> str:
    return _clamp(c, x, None, high)


@translates("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def _where(c: Converter, condition: Tensor, a: Any, b: Any) -> str:
    dtype = c.out().dtype
    return c.op("Where", c.cast(condition, torch.bool), c.operand(a, dtype), c.operand(b, dtype))


@translates("aten.logical_not.default")
def _logical_not(c: Converter, x: Tensor) -> str:
    return c.op("Not", c.cast(x, torch.bool))


@translates("aten.bitwise_not.default")
def _bitwise_not(c: Converter, x: Tensor) -> str:
    return c.op("Not" if x.dtype == torch.bool else "BitwiseNot", x)


@translates("aten.isnan.default")
def _isnan(c: Converter, x: Tensor) -> str:
    return c.op("IsNaN", x)


@translates("aten.isinf.default")
def _isinf(c: Converter, x: Tensor) -> str:
    return c.op("IsInf", x)


@translates("aten._to_copy.default", "prims.convert_element_type.default")
def _to_copy(c: Converter, x: Tensor, *_: Any, **__: Any) -> str:
    dtype = c.out().dtype
    if dtype not in ONNX_TYPE:
        raise ExportError(f"dtype {dtype} is not supported; use float32, int64 or bool")
    return c.cast(x, dtype).name


@translates(
    "aten.alias.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.lift_fresh_copy.default",
    "aten.lift_fresh.default",
)
def _same(_: Converter, x: Tensor, **__: Any) -> str:
    return x.name


@translates("aten.copy.default")
def _copy(c: Converter, x: Tensor, source: Tensor, *_: Any) -> str:
    return c.expand(c.cast(source, x.dtype), x.shape)
