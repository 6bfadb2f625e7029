"""A small builder for ONNX graphs: value numbering, constants, dead-code removal, deterministic bytes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterable

OPSET = 20
# The oldest IR that carries opset 20 fully; onnxruntime 1.17 and newer read it.
IR_VERSION = 9

BATCH_AXIS = "batch"


class Port(NamedTuple):
    """A graph input or output: NumPy dtype and shape; a string is the name of a dynamic axis."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class _Node(NamedTuple):
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


class GraphBuilder:
    """Collects nodes; the same operation on the same values is stored once."""

    def __init__(self) -> None:
        self.inputs: dict[str, Port] = {}
        self.outputs: dict[str, tuple[str, Port]] = {}
        self._nodes: list[_Node] = []
        self._constants: dict[str, np.ndarray[Any, Any]] = {}
        self._known: dict[Any, tuple[str, ...]] = {}
        self._transposes: dict[str, str] = {}
        self._count = 0

    def copy(self) -> GraphBuilder:
        """An independent builder with the same content; nodes and arrays are shared, as neither is ever changed."""
        twin = GraphBuilder()
        for field, value in vars(self).items():
            setattr(twin, field, copy.copy(value))
        return twin

    def with_outputs(self, names: Iterable[str]) -> GraphBuilder:
        """A copy that keeps only some outputs, and so only the inputs these need."""
        twin = self.copy()
        twin.outputs = {name: self.outputs[name] for name in names}
        return twin

    def add_input(self, name: str, port: Port) -> str:
        """Declares a graph input once and returns its name."""
        self.inputs.setdefault(name, port)
        return name

    def set_output(self, name: str, value: str, port: Port) -> None:
        """Makes ``value`` the graph output ``name``."""
        self.outputs[name] = (value, port)

    def constant(self, array: Any, dtype: Any = None) -> str:
        """Stores a constant tensor; equal constants share one initializer."""
        array = np.ascontiguousarray(np.asarray(array, dtype=dtype)).reshape(np.shape(array))
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = (self._store(array),)
        return self._known[key][0]

    def transposed_from(self, name: str) -> str | None:
        """The matrix whose transpose ``name`` is, if a Transpose node of this graph made it."""
        return self._transposes.get(name)

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns the name of that output. ``""`` is an absent optional input."""
        return self.multi(op_type, *inputs, outputs=1, **attributes)[0]

    def multi(self, op_type: str, *inputs: str, outputs: int, **attributes: Any) -> tuple[str, ...]:
        """Adds a node with several outputs."""
        attributes = {name: value for name, value in attributes.items() if value is not None}
        key = (op_type, inputs, outputs, repr(sorted(attributes.items())))
        pure = not any(isinstance(value, onnx.GraphProto) for value in attributes.values())
        if pure and key in self._known:
            return self._known[key]
        names = tuple(self._fresh("v") for _ in range(outputs))
        self._nodes.append(_Node(op_type, inputs, names, attributes))
        if pure:
            self._known[key] = names
        if op_type == "Transpose" and list(attributes["perm"]) == [1, 0]:
            self._transposes[names[0]] = inputs[0]
        return names

    def to_bytes(self, name: str) -> bytes:
        """Serialises the part of the graph that its outputs need; unused inputs are left out."""
        data: bytes = self.to_model(name).SerializeToString(deterministic=True)
        return data

    def to_model(self, name: str) -> onnx.ModelProto:
        """Builds the ONNX model, IR version 9, default domain only."""
        needed = {value for value, _ in self.outputs.values()}
        live: list[_Node] = []
        for node in reversed(self._nodes):
            if needed.intersection(node.outputs):
                live.append(node)
                needed.update(node.inputs)
                for value in node.attributes.values():
                    if isinstance(value, onnx.GraphProto):
                        needed.update(item for inner in value.node for item in inner.input)
        live.reverse()
        final, extra = self._final_names()
        nodes = [
            helper.make_node(
                node.op_type,
                [final.get(item, item) for item in node.inputs],
                _used_outputs(node, final, needed),
                **{key: _renamed(value, final) for key, value in sorted(node.attributes.items())},
            )
            for node in live
        ]
        nodes += [helper.make_node("Identity", [source], [target]) for source, target in extra]
        used = {item for node in live for item in node.inputs} | needed
        graph = helper.make_graph(
            nodes,
            name,
            [_value_info(key, port) for key, port in self.inputs.items() if key in used],
            [_value_info(key, port) for key, (_, port) in self.outputs.items()],
            [numpy_helper.from_array(array, key) for key, array in self._constants.items() if key in used],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "edge-export"
        return model

    def _final_names(self) -> tuple[dict[str, str], list[tuple[str, str]]]:
        final: dict[str, str] = {}
        extra: list[tuple[str, str]] = []
        for name, (value, _) in self.outputs.items():
            if value in self.inputs or value in self._constants:
                extra.append((value, name))
            elif value in final:
                extra.append((final[value], name))
            else:
                final[value] = name
        return final, extra

    def _store(self, array: np.ndarray[Any, Any]) -> str:
        name = self._fresh("c")
        self._constants[name] = array
        return name

    def _fresh(self, letter: str) -> str:
        self._count += 1
        return f"{letter}{self._count}"


def _used_outputs(node: _Node, final: dict[str, str], needed: set[str]) -> list[str]:
    """Output names; an optional one that nothing reads is left out, so that the runtime does not compute it."""
    optional = node.op_type in {"MaxPool", "LayerNormalization"}
    names = [final.get(item, item) if item in needed or not optional else "" for item in node.outputs]
    while names and not names[-1]:
        names.pop()
    return names


def _renamed(value: Any, final: dict[str, str]) -> Any:
    """A nested graph reads values of its parent by name, so these names change with the parent's."""
    if not isinstance(value, onnx.GraphProto):
        return value
    graph = onnx.GraphProto()
    graph.CopyFrom(value)
    for node in graph.node:
        node.input[:] = [final.get(item, item) for item in node.input]
    return graph


def _value_info(name: str, port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(port.dtype), list(port.shape))
