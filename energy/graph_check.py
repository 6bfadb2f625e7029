"""Looks an ONNX graph over before onnxruntime may load it, without onnx or protobuf.

A walk over the raw wire format, bounded in memory, nodes, fields and depth. It refuses what a graph from elsewhere
must not do on a device: read other files (external data), use operators outside the standard (which may come from a
loaded library), or be so large that loading alone hurts. What the walk does not know it skips by its length; a known
field with an unexpected encoding is refused, so that no reader can understand the file differently. Bundles and probe
packs are looked over by the same walk.
"""

from __future__ import annotations

from typing import NamedTuple

from energy.errors import ProfileError

STANDARD_DOMAINS = (b"", b"ai.onnx")

# Fields of onnx.proto that matter: number -> a message to enter (a key of this table), or what to check.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {13: "external", 14: "location"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 9: "opset", 10: "domain", 11: "attribute"},
    "opset": {1: "domain"},
}


class GraphError(ProfileError):
    """A graph that onnxruntime may not load."""


class GraphLimits(NamedTuple):
    """What a graph may hold: nodes with all nested graphs and functions, protobuf fields, nesting of messages."""

    max_nodes: int = 20_000
    max_fields: int = 1_000_000
    max_depth: int = 24


DEFAULT_LIMITS = GraphLimits()


class GraphSummary(NamedTuple):
    """What the walk counted."""

    nodes: int
    fields: int


def check_graph(data: bytes | memoryview, *, limits: GraphLimits = DEFAULT_LIMITS) -> GraphSummary:
    """Checks a serialised ONNX ``ModelProto`` and counts what is in it.

    Raises:
        GraphError: external data, an operator domain other than the standard one, too many nodes or fields, nesting
            too deep, or bytes that are no ONNX model.
    """
    walk = _Walk(data, limits)
    walk.run()
    if walk.graphs == 0:
        raise GraphError("graph file holds no graph; is it an ONNX model?")
    return GraphSummary(walk.nodes, walk.fields)


class _Walk:
    """The messages that are open (where each ends, what it is) and the counts; it never recurses."""

    def __init__(self, data: bytes | memoryview, limits: GraphLimits) -> None:
        self.data, self.limits = data, limits
        self.nodes = self.fields = self.graphs = 0
        self.stack: list[tuple[int, str]] = [(len(data), "model")]

    def run(self) -> None:
        data, stack, at = self.data, self.stack, 0
        while stack:
            end, message = stack[-1]
            if at == end:
                stack.pop()
                continue
            self.fields += 1
            if self.fields > self.limits.max_fields:
                raise GraphError(f"graph has more than {self.limits.max_fields} fields; export a smaller model")
            key, at = _short_varint(data, at, end)
            what = _FIELDS[message].get(key >> 3)
            if key < 8:
                raise _malformed(f"field number 0 at byte {at}")
            if key & 7 == 2:
                length, at = _short_varint(data, at, end)
                if at + length > end:
                    raise _malformed(f"a field of {length} bytes does not fit at byte {at}")
                if what is not None and what in _FIELDS:
                    self.enter(what, at + length)
                else:
                    if what is not None:
                        _refuse(what, bytes(data[at : at + min(length, 80)]))
                    at += length
            else:
                at = _skip_number(data, at, end, key & 7, what)

    def enter(self, what: str, end: int) -> None:
        self.nodes += what == "node"
        self.graphs += what == "graph"
        if self.nodes > self.limits.max_nodes:
            raise GraphError(f"graph has more than {self.limits.max_nodes} nodes; export a smaller model")
        if len(self.stack) >= self.limits.max_depth:
            raise GraphError(f"graph nests deeper than {self.limits.max_depth} messages; export a simpler model")
        self.stack.append((end, what))


def _skip_number(data: bytes | memoryview, at: int, end: int, wire: int, what: str | None) -> int:
    if what not in (None, "location"):
        raise _malformed(f"a {what} at byte {at} has the wrong encoding")
    if wire == 0:
        value, at = _varint(data, at, end)
        if what is not None and value != 0:
            raise GraphError("graph refers to external data; export it with all data inside")
        return at
    at += {1: 8, 5: 4}.get(wire, end + 1)
    if at > end or what is not None:
        raise _malformed(f"wire type {wire} at byte {min(at, end)}")
    return at


def _refuse(what: str, content: bytes) -> None:
    """Raises for a length-delimited field that may not be there, or for a domain that is not standard."""
    if what == "external":
        raise GraphError("graph refers to external data; export it with all data inside")
    if what == "training":
        raise GraphError("graph carries training_info, which is not used here; export it without")
    if what != "domain":
        raise _malformed(f"a {what} has the wrong encoding")
    if content not in STANDARD_DOMAINS:
        raise GraphError(
            f"graph uses operators of domain {content.decode('ascii', 'replace')!r}; only standard ONNX operators are "
            "allowed, export it without custom operators or functions"
        )


def _varint(data: bytes | memoryview, at: int, end: int) -> tuple[int, int]:
    if at >= end:
        raise _malformed(f"a number is cut off at byte {end}")
    byte = data[at]
    at += 1
    if byte < 0x80:
        return byte, at
    value, shift = byte & 0x7F, 7
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise _malformed(f"a number at byte {at} is cut off or too long")


def _short_varint(data: bytes | memoryview, at: int, end: int) -> tuple[int, int]:
    """A tag or a length, which protobuf keeps in 32 bits: what it would cut off or pad is refused, not guessed."""
    value, after = _varint(data, at, end)
    if value >= 1 << 31 or (after - at > 1 and data[after - 1] == 0):
        raise _malformed(f"a tag or length at byte {at} has more bytes than it needs")
    return value, after


def _malformed(detail: str) -> GraphError:
    return GraphError(f"graph is no valid ONNX model ({detail}); export the bundle again")
