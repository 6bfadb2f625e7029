# ruff: noqa: PLR0917  signatures follow ATen schemas, whose arguments are positional
"""ONNX translations of ATen operators that make, move, select or reduce elements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exporters._converter import NUMPY, ONNX_TYPE, Converter, Tensor, same_shape, translates
from exporters.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

_END = 2**63 - 1


def _axis(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


# Constants and fills ------------------------------------------------------------------------------------------


def _filled(c: Converter, value: Any) -> str:
    out = c.out()
    if out.dtype not in ONNX_TYPE:
        raise ExportError(f"dtype {out.dtype} is not supported; use float32, int64 or bool")
    scalar = c.scalar(value, out.dtype)
    if not out.shape:
        return scalar
    return c.op("Expand", scalar, c.shape_vector(out.shape))


@translates("aten.full.default", "aten.new_full.default")
def _full(c: Converter, *args: Any, **_: Any) -> str:
    return _filled(c, args[-1])


@translates("aten.full_like.default", "aten.fill.Scalar")
def _full_like(c: Converter, _x: Tensor, value: Any, **_: Any) -> str:
    return _filled(c, value)


@translates(
    "aten.zeros.default",
    "aten.zeros_like.default",
    "aten.new_zeros.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.new_empty.default",
    "aten.empty_strided.default",
    "aten.new_empty_strided.default",
    "aten.empty_permuted.default",
)
def _zeros(c: Converter, *_: Any, **__: Any) -> str:
    return _filled(c, 0)


@translates("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")
def _ones(c: Converter, *_: Any, **__: Any) -> str:
    return _filled(c, 1)


@translates("aten.scalar_tensor.default")
def _scalar_tensor(c: Converter, value: Any, **_: Any) -> str:
    return c.scalar(value, c.out().dtype)


@translates("aten.arange.start_step", "aten.arange.start", "aten.arange.default")
def _arange(c: Converter, *args: Any, **_: Any) -> str:
    dtype = c.out().dtype
    start, end, step = {1: (0, args[0], 1), 2: (*args[:2], 1)}.get(len(args), args[:3])
    if all(isinstance(part, (int, float)) for part in (start, end, step)):
        return c.builder.constant(np.arange(start, end, step).astype(NUMPY[dtype]))
    return c.op("Range", *(c.scalar(part, dtype) for part in (start, end, step)))


# Views and moves ----------------------------------------------------------------------------------------------


@translates("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
def _view(c: Converter, x: Tensor, *_: Any) -> str:
    return c.reshape(x, c.out().shape)


@translates("aten.as_strided.default")
def _as_strided(c: Converter, x: Tensor, sizes: Sequence[Any], strides: Sequence[Any], offset: Any = None) -> str:
    expected: Any = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if stride != expected:
            raise ExportError("as_strided with gaps or overlaps; use slicing or unfold")
        expected = expected * size
    if offset or math.prod(x.shape) != expected:
        raise ExportError("as_strided of a part of a tensor; use slicing")
    return c.reshape(x, sizes)


@translates("aten.permute.default")
def _permute(c: Converter, x: Tensor, dims: Sequence[int]) -> str:
    order = [_axis(dim, len(x.shape)) for dim in dims]
    return x.name if order == sorted(order) else c.op("Transpose", x, perm=order)


@translates("aten.transpose.int")
def _transpose(c: Converter, x: Tensor, one: int, other: int) -> str:
    order = list(range(len(x.shape)))
    one, other = _axis(one, len(order)), _axis(other, len(order))
    order[one], order[other] = order[other], order[one]
    return _permute(c, x, order)


@translates("aten.t.default")
def _t(c: Converter, x: Tensor) -> str:
    return _permute(c, x, list(range(len(x.shape)))[::-1])


@translates("aten.unsqueeze.default")
def _unsqueeze(c: Converter, x: Tensor, dim: int) -> str:
    return c.op("Unsqueeze", x, c.ints(_axis(dim, len(x.shape) + 1)))


@translates("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def _squeeze(c: Converter, x: Tensor, dims: Any = None) -> str:
    if dims is None:
        dims = range(len(x.shape))
    dims = [dims] if isinstance(dims, int) else dims
    axes = [_axis(dim, len(x.shape)) for dim in dims]
    axes = [axis for axis in axes if isinstance(x.shape[axis], int) and x.shape[axis] == 1]
    return c.op("Squeeze", x, c.ints(*axes)) if axes else x.name


@translates("aten.expand.default")
def _expand(c: Converter, x: Tensor, *_: Any, **__: Any) -> str:
    return c.expand(x, c.out().shape)


@translates("aten.repeat.default")
def _repeat(c: Converter, x: Tensor, repeats: Sequence[Any]) -> str:
    extra = len(repeats) - len(x.shape)
    value = c.op("Unsqueeze", x, c.ints(*range(extra))) if extra else x.name
    return c.op("Tile", value, c.shape_vector(repeats))


@translates("aten.cat.default")
def _cat(c: Converter, tensors: Sequence[Tensor], dim: int = 0) -> str:
    out = c.out()
    parts = [c.cast(item, out.dtype) for item in tensors if tuple(item.shape) != (0,)]
    return parts[0].name if len(parts) == 1 else c.op("Concat", *parts, axis=_axis(dim, out.dim()))


@translates("aten.split.Tensor")
def _split(c: Converter, x: Tensor, size: int, dim: int = 0) -> tuple[str, ...]:
    total = x.shape[_axis(dim, len(x.shape))]
    if not isinstance(total, int):
        raise ExportError("split along the batch axis is not supported; export with batch=<a number>")
    return _split_sizes(c, x, [min(size, total - start) for start in range(0, total, size)], dim)


@translates("aten.split_with_sizes.default")
def _split_sizes(c: Converter, x: Tensor, sizes: Sequence[int], dim: int = 0) -> tuple[str, ...]:
    if len(sizes) == 1:
        return (x.name,)
    return c.multi("Split", x, c.ints(*sizes), outputs=len(sizes), axis=_axis(dim, len(x.shape)))


@translates("aten.unbind.int")
def _unbind(c: Converter, x: Tensor, dim: int = 0) -> tuple[str, ...]:
    axis = _axis(dim, len(x.shape))
    count = x.shape[axis]
    if not isinstance(count, int):
        raise ExportError("unbind along the batch axis is not supported; export with batch=<a number>")
    parts = _split_sizes(c, x, [1] * count, axis)
    return tuple(c.op("Squeeze", part, c.ints(axis)) for part in parts)


@translates("aten.slice.Tensor")
def _slice(c: Converter, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str:
    axis = _axis(dim, len(x.shape))
    start = 0 if start is None else start
    if start == 0 and step == 1 and (end is None or (isinstance(end, int) and end >= _END)):
        return x.name
    if start == 0 and step == 1 and not isinstance(end, int) and _same(end, x.shape[axis]):
        return x.name
    return c.op("Slice", x, c.dimension(start), c.dimension(_END if end is None else end), c.ints(axis), c.ints(step))


def _same(one: Any, other: Any) -> bool:
    return isinstance(other, torch.SymInt) and isinstance(one, torch.SymInt) and one.node.expr == other.node.expr


@translates("aten.select.int")
def _select(c: Converter, x: Tensor, dim: int, index: int) -> str:
    return c.op("Gather", x, c.scalar(index, torch.int64), axis=_axis(dim, len(x.shape)))


def _positions(c: Converter, x: Tensor, axis: int, start: Any, end: Any, step: int) -> str:
    size = x.shape[axis]
    if not isinstance(size, int):
        raise ExportError("writing into a slice of the batch axis is not supported; export with batch=<a number>")
    return c.builder.constant(np.arange(size)[start:end:step].astype(np.int64))


def _write_rows(c: Converter, x: Tensor, source: Tensor, axis: int, positions: str) -> str:
    """Replaces the given positions of one axis; the axis comes first for ScatterND."""
    order = [axis, *(dim for dim in range(len(x.shape)) if dim != axis)]
    inverse = [order.index(dim) for dim in range(len(order))]
    rows = c.op("Unsqueeze", positions, c.ints(1))
    if axis == 0:
        return c.op("ScatterND", x, rows, source)
    moved, update = (c.op("Transpose", item, perm=order) for item in (x, source))
    return c.op("Transpose", c.op("ScatterND", moved, rows, update), perm=inverse)


@translates("aten.slice_scatter.default")
def _slice_scatter(
    c: Converter, x: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    axis = _axis(dim, len(x.shape))
    if same_shape(x.shape, source.shape) and step == 1:
        return source.name
    if isinstance(x.shape[axis], int) and isinstance(source.shape[axis], int) and step == 1:
        # A whole axis is replaced, or a run of it: padding-free concatenation beats a scatter.
        first = range(x.shape[axis])[slice(start, None if end is None else min(end, x.shape[axis]))]
        parts = [source.name]
        if first.start > 0:
            parts.insert(0, c.op("Slice", x, c.ints(0), c.ints(first.start), c.ints(axis), c.ints(1)))
        if first.stop < x.shape[axis]:
            parts.append(c.op("Slice", x, c.ints(first.stop), c.ints(_END), c.ints(axis), c.ints(1)))
        return parts[0] if len(parts) == 1 else c.op("Concat", *parts, axis=axis)
    return _write_rows(c, x, source, axis, _positions(c, x, axis, start, end, step))


@translates("aten.select_scatter.default")
def _select_scatter(c: Converter, x: Tensor, source: Tensor, dim: int, index: int) -> str:
    axis = _axis(dim, len(x.shape))
    shape = [*x.shape[:axis], 1, *x.shape[axis + 1 :]]
    row = Tensor(c.op("Unsqueeze", source, c.ints(axis)), source.dtype, tuple(shape))
    return _slice_scatter(c, x, row, axis, index, index + 1 if index != -1 else None)


@translates("aten.flip.default")
def _flip(c: Converter, x: Tensor, dims: Sequence[int]) -> str:
    axes = [_axis(dim, len(x.shape)) for dim in dims]
    count = len(axes)
    return c.op("Slice", x, c.ints(*[-1] * count), c.ints(*[-_END] * count), c.ints(*axes), c.ints(*[-1] * count))


@translates("aten.constant_pad_nd.default")
def _pad(c: Converter, x: Tensor, pads: Sequence[int], value: float = 0) -> str:
    if not any(pads):
        return x.name
    before, after = [0] * len(x.shape), [0] * len(x.shape)
    for index in range(len(pads) // 2):
        before[-1 - index], after[-1 - index] = pads[2 * index], pads[2 * index + 1]
    return c.op("Pad", x, c.ints(*before, *after), c.scalar(value, x.dtype))


# Indexing -----------------------------------------------------------------------------------------------------


@translates("aten.index_select.default")
def _index_select(c: Converter, x: Tensor, dim: int, index: Tensor) -> str:
    return c.op("Gather", x, index, axis=_axis(dim, len(x.shape)))


@translates("aten.gather.default")
def _gather(c: Converter, x: Tensor, dim: int, index: Tensor, **_: Any) -> str:
    return c.op("GatherElements", x, index, axis=_axis(dim, len(x.shape)))


@translates("aten.scatter_add.default")
def _scatter_add(c: Converter, x: Tensor, dim: int, index: Tensor, source: Tensor) -> str:
    return c.op("ScatterElements", x, index, source, axis=_axis(dim, len(x.shape)), reduction="add")


@translates("aten.scatter.src")
def _scatter(c: Converter, x: Tensor, dim: int, index: Tensor, source: Tensor) -> str:
    return c.op("ScatterElements", x, index, source, axis=_axis(dim, len(x.shape)))


@translates("aten.scatter.value")
def _scatter_value(c: Converter, x: Tensor, dim: int, index: Tensor, value: Any) -> str:
    source = Tensor(c.scalar(value, x.dtype), x.dtype, ())
    return c.op("ScatterElements", x, index, c.expand(source, index.shape), axis=_axis(dim, len(x.shape)))


def _broadcast(*shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    rule: Any = torch.broadcast_shapes  # untyped
    return tuple(rule(*shapes))


def _leading(indices: Sequence[Tensor | None]) -> list[Tensor]:
    used = [index for index in indices if index is not None]
    if any(index is None for index in indices[: len(used)]):
        raise ExportError("indexing by several tensors that are not the first axes; reorder with transpose first")
    if any(index.dtype == torch.bool for index in used):
        raise ExportError("boolean indexing gives a size that depends on data; use torch.where instead")
    return used


def _coordinates(c: Converter, indices: Sequence[Tensor]) -> str:
    shape = _broadcast(*(tuple(index.shape) for index in indices))
    parts = [c.op("Unsqueeze", c.expand(c.cast(index, torch.int64), shape), c.ints(-1)) for index in indices]
    return parts[0] if len(parts) == 1 else c.op("Concat", *parts, axis=-1)


@translates("aten.index.Tensor", "aten._unsafe_index.Tensor")
def _index(c: Converter, x: Tensor, indices: Sequence[Tensor | None]) -> str:
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(used) == 1 and used[0][1].dtype != torch.bool:
        return c.op("Gather", x, used[0][1], axis=used[0][0])
    positions = [axis for axis, _ in used]
    if positions != list(range(positions[0], positions[0] + len(positions))):
        raise ExportError("indexing by tensors on axes that are not neighbours; reorder with transpose first")
    order = [*positions, *(axis for axis in range(len(x.shape)) if axis not in positions)]
    moved = c.op("Transpose", x, perm=order) if positions[0] else x.name
    picked = c.op("GatherND", moved, _coordinates(c, _leading([index for _, index in used])))
    if not positions[0]:
        return picked
    count = c.out().dim() - (len(x.shape) - len(positions))
    rank = c.out().dim()
    back = [*range(count, count + positions[0]), *range(count), *range(count + positions[0], rank)]
    return c.op("Transpose", picked, perm=back)


@translates("aten.index_put.default", "aten._unsafe_index_put.default")
def _index_put(
    c: Converter, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> str:
    positions = [axis for axis, index in enumerate(indices) if index is not None]
    used = _leading([indices[axis] for axis in positions])
    first = positions[0]
    if positions != list(range(first, first + len(positions))):
        raise ExportError("writing by tensors on axes that are not neighbours; reorder with transpose first")
    index_shape = _broadcast(*(tuple(index.shape) for index in used))
    order = [*positions, *(axis for axis in range(len(x.shape)) if axis not in positions)]
    count, rank = len(index_shape), len(index_shape) + len(x.shape) - len(used)
    natural = [*x.shape[:first], *index_shape, *x.shape[first + len(used) :]]
    update = c.expand(c.cast(values, x.dtype), natural)
    reduction = "add" if accumulate else None
    if first == 0:
        return c.op("ScatterND", x, _coordinates(c, used), update, reduction=reduction)
    front = [*range(first, first + count), *range(first), *range(first + count, rank)]
    moved = c.op("Transpose", x, perm=order)
    written = c.op(
        "ScatterND", moved, _coordinates(c, used), c.op("Transpose", update, perm=front), reduction=reduction
    )
    return c.op("Transpose", written, perm=[order.index(axis) for axis in range(len(order))])


# Reductions ---------------------------------------------------------------------------------------------------


def _reduce(c: Converter, onnx: str, x: Tensor, dims: Any, keepdim: bool) -> str:
    dims = [dims] if isinstance(dims, int) else dims
    if not x.shape:
        return x.name
    axes = [_axis(dim, len(x.shape)) for dim in dims] if dims else list(range(len(x.shape)))
    return c.op(onnx, x, c.ints(*axes), keepdims=int(keepdim))


@translates("aten.sum.dim_IntList", "aten.sum.default")
def _sum(c: Converter, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> str:
    return _reduce(c, "ReduceSum", c.cast(x, c.out().dtype), dims, keepdim)


@translates("aten.mean.dim", "aten.mean.default")
def _mean(c: Converter, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> str:
    return _reduce(c, "ReduceMean", c.cast(x, c.out().dtype), dims, keepdim)


@translates("aten.linalg_vector_norm.default")
def _vector_norm(c: Converter, x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> str:
    if order not in {1, 2}:
        raise ExportError(f"norm of order {order}; only 1 and 2 are supported")
    return _reduce(c, f"ReduceL{int(order)}", x, dims, keepdim)


@translates("aten.amax.default", "aten.max.default")
def _amax(c: Converter, x: Tensor, dims: Any = None, keepdim: bool = False) -> str:
    return _reduce(c, "ReduceMax", x, dims, keepdim)


@translates("aten.amin.default", "aten.min.default")
def _amin(c: Converter, x: Tensor, dims: Any = None, keepdim: bool = False) -> str:
    return _reduce(c, "ReduceMin", x, dims, keepdim)


@translates("aten.prod.dim_int", "aten.prod.default")
def _prod(c: Converter, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> str:
    return _reduce(c, "ReduceProd", c.cast(x, c.out().dtype), dims, keepdim)


@translates("aten.any.default", "aten.any.dim", "aten.any.dims")
def _any(c: Converter, x: Tensor, dims: Any = None, keepdim: bool = False) -> str:
    counts = Tensor(c.op("Cast", c.cast(x, torch.bool), to=ONNX_TYPE[torch.int64]), torch.int64, x.shape)
    return c.op("Cast", _reduce(c, "ReduceMax", counts, dims, keepdim), to=ONNX_TYPE[torch.bool])


@translates("aten.all.default", "aten.all.dim", "aten.all.dims")
def _all(c: Converter, x: Tensor, dims: Any = None, keepdim: bool = False) -> str:
    counts = Tensor(c.op("Cast", c.cast(x, torch.bool), to=ONNX_TYPE[torch.int64]), torch.int64, x.shape)
    return c.op("Cast", _reduce(c, "ReduceMin", counts, dims, keepdim), to=ONNX_TYPE[torch.bool])


@translates("aten.argmax.default")
def _argmax(c: Converter, x: Tensor, dim: int | None = None, keepdim: bool = False) -> str:
    if dim is None:
        raise ExportError("argmax over the flattened tensor; give it a dim")
    return c.op("ArgMax", x, axis=_axis(dim, len(x.shape)), keepdims=int(keepdim))


@translates("aten.argmin.default")
def _argmin(c: Converter, x: Tensor, dim: int | None = None, keepdim: bool = False) -> str:
    if dim is None:
        raise ExportError("argmin over the flattened tensor; give it a dim")
    return c.op("ArgMin", x, axis=_axis(dim, len(x.shape)), keepdims=int(keepdim))


@translates("aten.max.dim")
def _max_dim(c: Converter, x: Tensor, dim: int, keepdim: bool = False) -> tuple[str, str]:
    axis = _axis(dim, len(x.shape))
    return (
        c.op("ReduceMax", x, c.ints(axis), keepdims=int(keepdim)),
        c.op("ArgMax", x, axis=axis, keepdims=int(keepdim)),
    )


@translates("aten.min.dim")
def _min_dim(c: Converter, x: Tensor, dim: int, keepdim: bool = False) -> tuple[str, str]:
    axis = _axis(dim, len(x.shape))
    return (
        c.op("ReduceMin", x, c.ints(axis), keepdims=int(keepdim)),
        c.op("ArgMin", x, axis=axis, keepdims=int(keepdim)),
    )


def _moments(c: Converter, x: Tensor, dims: Any, correction: float, keepdim: bool) -> tuple[str, str]:
    mean = _reduce(c, "ReduceMean", x, dims, keepdim=True)
    centred = c.op("Sub", x, mean)
    square = Tensor(c.op("Mul", centred, centred), x.dtype, x.shape)
    variance = _reduce(c, "ReduceMean", square, dims, keepdim)
    if correction:
        axes = [dims] if isinstance(dims, int) else dims or range(len(x.shape))
        count: Any = 1
        for axis in axes:
            count = count * x.shape[axis]
        factor = c.op("Div", c.scalar(count, x.dtype), c.scalar(count - correction, x.dtype))
        variance = c.op("Mul", variance, factor)
    return variance, mean if keepdim else _reduce(c, "ReduceMean", x, dims, keepdim)


@translates("aten.var_mean.correction")
def _var_mean(c: Converter, x: Tensor, dims: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Any:
    return _moments(c, x, dims, 1 if correction is None else correction, keepdim)


@translates("aten.var.correction")
def _var(c: Converter, x: Tensor, dims: Any = None, *, correction: Any = 1, keepdim: bool = False) -> str:
    return _moments(c, x, dims, 1 if correction is None else correction, keepdim)[0]


@translates("aten.cumsum.default")
def _cumsum(c: Converter, x: Tensor, dim: int, **_: Any) -> str:
    return c.op("CumSum", c.cast(x, c.out().dtype), c.scalar(_axis(dim, len(x.shape)), torch.int64))


@translates("aten.topk.default")
def _topk(c: Converter, x: Tensor, k: int, dim: int = -1, largest: bool = True, ordered: bool = True) -> Any:
    axis = _axis(dim, len(x.shape))
    return c.multi("TopK", x, c.ints(k), outputs=2, axis=axis, largest=int(largest), sorted=int(ordered))


@translates("aten.sort.default")
def _sort(c: Converter, x: Tensor, dim: int = -1, descending: bool = False) -> Any:
    axis = _axis(dim, len(x.shape))
    return c.multi("TopK", x, c.dimension(x.shape[axis]), outputs=2, axis=axis, largest=int(descending), sorted=1)
