"""The check of ONNX graphs: standard graphs pass, everything that reaches outside or is too large is refused."""

import contextlib
import time
import tracemalloc

import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge_runtime.bundle import check_graph
from edge_runtime.bundle.graph_check import GraphLimits
from edge_runtime.errors import BundleError
from tests.edge_runtime import toy_bundle

VALID = toy_bundle.graph_bytes("train")


def model(nodes=(), *, initializers=(), domain="", **extra):
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(list(nodes), "g", [y], [y], initializer=list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, 20)], **extra)


def external(name="t"):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    return tensor


def nested(inside, depth=1):
    for _ in range(depth):
        graph = helper.make_graph([inside], "inner", [], [])
        inside = helper.make_node("If", ["y"], ["z"], then_branch=graph, else_branch=graph)
    return inside


@pytest.mark.parametrize("name", ["train", "gradients", "update", "evaluate", "predict"])
def test_standard_graphs_pass(name):
    """Every graph of a real bundle passes, and its nodes are counted."""
    data = toy_bundle.graph_bytes(name)
    assert check_graph(data).nodes == len(onnx.load_from_string(data).graph.node)


def test_nested_graphs_are_counted():
    """Nodes in branches count like all others."""
    inside = helper.make_node("Relu", ["y"], ["z"])
    assert check_graph(model([nested(inside, 2)]).SerializeToString()).nodes == 1 + 2 + 4


CONSTANT = helper.make_node("Constant", [], ["c"], value=external())
SPARSE = helper.make_sparse_tensor(external(), helper.make_tensor("i", TensorProto.INT64, [1], [0]), [1])
WITH_SPARSE = model()
WITH_SPARSE.graph.sparse_initializer.append(SPARSE)
WITH_LISTED = model([helper.make_node("Relu", ["y"], ["z"])])
WITH_LISTED.graph.node[0].attribute.append(helper.make_attribute("t", [external()]))
ONLY_LOCATION = TensorProto(name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
ONLY_DATA = TensorProto(name="t", data_type=1, dims=[1])
ONLY_DATA.external_data.add(key="location", value="x")
FUNCTION = helper.make_function("", "F", ["a"], ["b"], [CONSTANT], [helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    "bad",
    [
        model(initializers=[external()]),
        model(initializers=[ONLY_LOCATION]),
        model(initializers=[ONLY_DATA]),
        model([CONSTANT]),
        model([nested(CONSTANT, 3)]),
        WITH_SPARSE,
        WITH_LISTED,
        model(functions=[FUNCTION]),
    ],
)
def test_external_data_is_refused_wherever_it_hides(bad):
    """onnxruntime would open files named by the graph."""
    with pytest.raises(BundleError, match="external data"):
        check_graph(bad.SerializeToString())


CUSTOM = helper.make_node("Inverse", ["y"], ["z"], domain="com.microsoft")


@pytest.mark.parametrize(
    "bad",
    [
        model([CUSTOM]),
        model([nested(CUSTOM, 2)]),
        model(domain="com.microsoft"),
        model(domain="ai.onnx.ml"),
        model(functions=[helper.make_function("my", "F", ["a"], ["b"], [], [helper.make_opsetid("", 20)])]),
        model(functions=[helper.make_function("", "F", ["a"], ["b"], [CUSTOM], [helper.make_opsetid("", 20)])]),
        model(functions=[helper.make_function("", "F", ["a"], ["b"], [], [helper.make_opsetid("my", 20)])]),
    ],
)
def test_operators_outside_the_standard_are_refused(bad):
    """Custom operators may run code that came from elsewhere."""
    with pytest.raises(BundleError, match="only standard ONNX operators"):
        check_graph(bad.SerializeToString())


def test_training_info_is_refused():
    """It could hold a second graph that nobody looks at."""
    bad = model()
    bad.training_info.add()
    with pytest.raises(BundleError, match="training_info"):
        check_graph(bad.SerializeToString())


def test_a_million_nodes_are_refused_fast_and_in_little_memory():
    """The walk stops early and builds nothing."""
    node = helper.make_node("Relu", ["y"], ["z"]).SerializeToString()
    body = (b"\x0a" + bytes([len(node)]) + node) * 1_000_000
    length, value = b"", len(body)
    while value >= 128:
        length, value = length + bytes([value & 127 | 128]), value >> 7
    data = b"\x3a" + length + bytes([value]) + body
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(BundleError, match="more than 20000 nodes"):
        check_graph(data)
    taken, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 3
    assert peak < 100_000


def test_deep_nesting_and_many_fields_are_refused():
    """Neither recursion nor a flood of small fields gets through."""
    deep = model([nested(helper.make_node("Relu", ["y"], ["z"]), 9)]).SerializeToString()
    with pytest.raises(BundleError, match="nests deeper"):
        check_graph(deep)
    with pytest.raises(BundleError, match="more than 20 fields"):
        check_graph(VALID, limits=GraphLimits(max_fields=20))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x3a",
        b"\x3a\x05",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x38\x01",  # graph as a number
        b"\x3b\x3c",  # groups
        b"\x3a\x02\x0a\x05",  # node longer than its graph
        b"\x3a\x04\x2a\x02\x72\x00",  # data_location as bytes
    ],
)
def test_malformed_models_are_refused(data):
    """Broken wire format gives a clear line."""
    with pytest.raises(BundleError, match=r"no valid ONNX model|holds no graph"):
        check_graph(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@example(b"\x3a\x00")
def test_random_bytes_never_crash(data):
    """Whatever arrives, the answer is yes or a BundleError."""
    with contextlib.suppress(BundleError):
        check_graph(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_graphs_never_crash(data):
    """Bytes changed, cut out or put into a valid graph never do more than fail."""
    bytes_ = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(bytes_) - 1))
        cut = data.draw(st.integers(0, 3))
        bytes_[at : at + cut] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(BundleError):
        check_graph(bytes(bytes_))


def _varint(value, size=0):
    out = bytearray()
    while value >= 0x80 or len(out) + 1 < size:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize(
    "tag", [_varint(7 << 3 | 2 | 1 << 32), _varint(7 << 3 | 2, size=3), _varint(7 << 3 | 2, size=5)]
)
def test_tags_that_readers_may_cut_off_differently_are_refused(tag):
    """protobuf keeps 32 bits of a tag: one with more bits, or padded, could hide a field from the walk."""
    node = helper.make_node("Gelu", ["y"], ["z"], domain="com.microsoft").SerializeToString()
    graph = b"\x0a" + _varint(len(node)) + node
    with pytest.raises(BundleError, match="more bytes than it needs"):
        check_graph(tag + _varint(len(graph)) + graph)


def test_padded_lengths_are_refused():
    """A length in more bytes than it needs is no valid model here."""
    graph = helper.make_node("Relu", ["y"], ["z"]).SerializeToString()
    with pytest.raises(BundleError, match="more bytes than it needs"):
        check_graph(b"\x3a" + _varint(len(graph), size=4) + graph)
