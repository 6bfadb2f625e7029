"""Traces a step with a symbolic or fixed batch and converts it to an ONNX graph under construction."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from exporters import _operators_elementwise, _operators_nn, _operators_shape
from exporters._converter import NUMPY, Converter, Tensor
from exporters._decompositions import decomposition_table
from exporters._graph import BATCH_AXIS, GraphBuilder, Port
from exporters._steps import Step
from exporters.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.fx import GraphModule

    from exporters._model import Model

# Importing a table registers its translations.
_TABLES = (_operators_elementwise, _operators_nn, _operators_shape)

Kind = Literal["gradients", "evaluate"]

# Stands for the batch while tracing: unlike any layer size, so that no comparison mistakes one for the other.
_BATCH_HINT = 1523

_USES = {"gradients": ("x", "y", "mask", "seed"), "evaluate": ("x", "y", "mask")}


class NotDynamicError(ExportError):
    """The batch size got fixed while tracing; the message says by what."""


class Traced(NamedTuple):
    """A graph with named outputs, and what was learned while tracing it."""

    builder: GraphBuilder
    unused: tuple[str, ...]
    dropout_streams: int


class Given(NamedTuple):
    """One input of a traced function beside its tensors: shape without the batch axis if it has one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool = True


def trace(model: Model, kind: Kind, *, batch: int | None, mask: bool) -> Traced:
    """Traces one function of ``model`` and declares its outputs on a new builder.

    ``batch`` is the fixed size, or None for a dynamic one.

    Raises:
        NotDynamicError: a dynamic batch was asked for and the model fixes it.
        ExportError: the model cannot be traced, or uses an operator without a translation.
    """
    stack: list[str] = []
    step = Step(model, stack)
    given = {
        "x": Given(tuple(model.example.shape[1:]), model.example.dtype),
        "y": Given(model.target.shape, model.target.dtype),
        "mask": Given((), torch.float32),
        "seed": Given((), torch.int64, batched=False),
    }
    uses = [name for name in _USES[kind] if name != "mask" or mask]

    def run(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values.setdefault("seed", torch.zeros((), dtype=torch.int64))
        result: dict[str, torch.Tensor] = getattr(step, kind)(values)
        return result

    model.module.train(kind == "gradients")
    inputs = {name: given[name] for name in uses}
    tensors = {f"p.{name}": value for name, value in model.tensors().items()}
    builder = trace_function(run, tensors, inputs, batch=batch, module=model.module, stack=stack, places=step.places)
    return Traced(builder, tuple(step.unused), step.streams)


def trace_function(
    function: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    tensors: Mapping[str, torch.Tensor],
    given: Mapping[str, Given],
    *,
    batch: int | None,
    module: nn.Module,
    stack: list[str],
    places: Mapping[str, str],
) -> GraphBuilder:
    """Traces a function of named tensors and declares its named outputs on a new builder.

    Args:
        function: maps all inputs by name to outputs by name; runs ``module``.
        tensors: inputs whose sizes never change.
        given: the other inputs; the first has a batch axis.
        batch: size of the batch axis; None: dynamic.
        module: watched, so that messages can name its layers.
        stack: gets the names of the layers that run.
        places: which layer called an operator first; filled by ``function``.

    Raises:
        NotDynamicError: a dynamic batch was asked for and the function fixes it.
        ExportError: it cannot be traced, or uses an operator without a translation.
    """
    symbolic = batch is None
    fake = _inputs(tensors, given, batch)
    names: list[str] = []

    def flat(*values: torch.Tensor) -> list[torch.Tensor]:
        result = function(dict(zip(fake, values, strict=True)))
        names[:] = result
        return list(result.values())

    if symbolic:
        _refuse_recurrent_dropout(module)
    with _named_layers(module, stack), _plain_kernels():
        graph = _make_graph(flat, fake, symbolic=symbolic, stack=stack)
    first = next(iter(given))
    _check_still_symbolic(fake[first], symbolic=symbolic)
    builder = GraphBuilder()
    batched = {name for name, item in given.items() if item.batched and symbolic}
    inputs = [_declare(builder, name, value, symbolic=name in batched) for name, value in fake.items()]
    converter = Converter(builder, first if symbolic else None, places)
    outputs = dict(zip(names, converter.run(graph, inputs), strict=True))
    for name, value in outputs.items():
        if name.startswith("new.p.") and value.name == name.removeprefix("new."):
            continue  # a buffer that training leaves alone
        if any(isinstance(size, torch.SymInt) for size in value.shape[1:]):
            raise NotDynamicError(f"output {name} has a batch size in more than its first axis")
        shape = tuple(BATCH_AXIS if isinstance(size, torch.SymInt) else int(size) for size in value.shape)
        builder.set_output(name, value.name, Port(NUMPY[value.dtype], shape))
    return builder


def _inputs(
    tensors: Mapping[str, torch.Tensor], given: Mapping[str, Given], batch: int | None
) -> dict[str, torch.Tensor]:
    """Fake tensors for every graph input: shapes without data."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    result: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        result[name] = mode.from_tensor(value, symbolic_context=_sizes([DimDynamic.STATIC] * value.dim()))
    size: Any = batch
    if batch is None:
        axis = torch.empty(_BATCH_HINT, device="meta")
        size = mode.from_tensor(axis, symbolic_context=_sizes([DimDynamic.DYNAMIC])).shape[0]
    with mode:
        for name, item in given.items():
            shape = (size, *item.shape) if item.batched else item.shape
            result[name] = torch.empty(shape, dtype=item.dtype)
    return result


def _sizes(kinds: list[DimDynamic]) -> StatelessSymbolicContext[Any, Any]:
    return StatelessSymbolicContext(dynamic_sizes=kinds)


def _make_graph(
    function: Callable[..., Any], fake: Mapping[str, torch.Tensor], *, symbolic: bool, stack: list[str]
) -> GraphModule:
    mode: Literal["symbolic", "fake"] = "symbolic" if symbolic else "fake"
    values = list(fake.values())
    try:
        module = make_fx(function, decomposition_table=decomposition_table(), tracing_mode=mode)(*values)
        _drop_dead_writes(module)
        if _writes_in_place(module):
            plain = torch.func.functionalize(module, remove="mutations")
            module = make_fx(plain, tracing_mode=mode)(*values)
            module.graph.eliminate_dead_code()
    except ExportError:
        raise
    except Exception as error:  # torch raises many kinds of errors for one cause: the model cannot be traced
        place = f"in layer {stack[-1] or '(root)'!r}" if stack else "outside any layer"
        reason = str(error).strip().splitlines()
        kind = NotDynamicError if symbolic else ExportError
        raise kind(
            f"tracing failed {place}: {type(error).__name__}: {reason[0] if reason else ''}; forward() must not "
            "depend on the values of tensors"
        ) from error
    return module


def _drop_dead_writes(module: GraphModule) -> None:
    """Removes dead code, and writes into copies that nothing reads, such as a counter of batches."""
    for node in reversed(module.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.users or schema is None or not schema.is_mutable:
            continue
        target = node.args[0]
        if target.target is torch.ops.aten.clone.default and list(target.users) == [node]:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _writes_in_place(module: GraphModule) -> bool:
    """Whether the graph changes a tensor in a way that the converter does not follow.

    It follows whole copies into a clone, which is how buffers are updated.
    """
    aten = torch.ops.aten
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        target = node.args[0]
        if node.target is not aten.copy_.default or target.target is not aten.clone.default:
            return True
    return False


def _refuse_recurrent_dropout(module: nn.Module) -> None:
    """torch 2.13 leaves this dropout out when it takes a recurrent layer apart for a symbolic batch."""  # noqa: D403
    for name, part in module.named_modules():
        if isinstance(part, nn.RNNBase) and part.dropout > 0 and part.num_layers > 1:
            raise NotDynamicError(f"layer {name!r} has dropout between recurrent layers, which needs a fixed batch")


def _check_still_symbolic(fake: torch.Tensor, *, symbolic: bool) -> None:
    if not symbolic:
        return
    size: Any = fake.shape[0]
    if not isinstance(size, torch.SymInt) or size.node.expr.is_number or size.node.maybe_as_int() is not None:
        raise NotDynamicError("forward() fixes the batch size, for example by int(x.shape[0]) or a fixed view")


def _declare(builder: GraphBuilder, name: str, value: torch.Tensor, *, symbolic: bool) -> Tensor:
    shape: tuple[Any, ...] = tuple(value.shape)
    port = tuple(BATCH_AXIS if symbolic and axis == 0 else int(size) for axis, size in enumerate(shape))
    builder.add_input(name, Port(NUMPY[value.dtype], port))
    return Tensor(name, value.dtype, shape)


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Fused CPU kernels off: they have no decomposition (oneDNN RNN, flash attention, the encoder's fast path)."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _named_layers(module: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keeps the names of the running modules on ``stack``, the innermost last."""
    handles = []
    for name, part in module.named_modules():

        def enter(_part: nn.Module, _args: Any, name: str = name) -> None:
            stack.append(name)

        def leave(_part: nn.Module, _args: Any, _result: Any) -> None:
            stack.pop()

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
