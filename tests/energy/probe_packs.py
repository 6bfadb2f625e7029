"""A probe pack written by hand: dense layers and ReLUs as plain ONNX graphs."""

from __future__ import annotations

import hashlib
import json
import zipfile

import pytest


def graph(kind, sizes):
    """Bytes of a graph: y = x w for ``linear``, y = relu(x) for ``relu``, y = x for the empty one."""
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    inputs, outputs = sizes.get("in_channels", sizes.get("in_positions", 1)), sizes.get("out_channels", 1)
    x = helper.make_tensor_value_info("x", floats, ["batch", inputs])
    if kind == "linear":
        node = helper.make_node("MatMul", ["x", "p.w"], ["out"])
        given = [x, helper.make_tensor_value_info("p.w", floats, [inputs, outputs])]
    else:
        node = helper.make_node("Relu" if kind == "relu" else "Identity", ["x"], ["out"])
        given, outputs = [x], inputs
    made = helper.make_tensor_value_info("out", floats, ["batch", outputs])
    body = helper.make_graph([node], "probe", given, [made])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()


def write_pack(path, content, *, models=(), damage=None, **table):
    """Writes a pack of ``(role, kind, sizes)``; ``damage`` maps a file to other bytes than are listed."""
    files = {f"p{index}.onnx": graph(kind, sizes) for index, (_, kind, sizes) in enumerate(content)}
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)} for name, data in files.items()
    }
    rows = [
        {"file": name, "role": role, "kind": kind, "sizes": sizes}
        for name, (role, kind, sizes) in zip(files, content, strict=True)
    ]
    text = {"format": "edge-probes", "format_version": 1, "files": listed, "probes": rows, "models": list(models)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("probes.json", json.dumps(text | table))
        for name, data in {**files, **(damage or {})}.items():
            archive.writestr(name, data)
    return path


def dense(role, inputs, outputs):
    return role, "linear", {"in_channels": inputs, "out_channels": outputs}


def dense_pack(path, *, candidates=14, **table):
    """An empty graph, two layers of a model, and other sizes of two kinds."""
    probes = [("empty", "", {}), dense("layer", 64, 32), ("layer", "relu", {"in_positions": 512})]
    probes += [dense("candidate", 16 + 13 * index, 8 + 29 * index % 101) for index in range(candidates)]
    probes += [("candidate", "relu", {"in_positions": 100 + 173 * index}) for index in range(candidates)]
    layers = [["linear", {"in_channels": 64, "out_channels": 32}, 2], ["relu", {"in_positions": 512}, 1]]
    return write_pack(path, probes, models=[{"name": "net", "layers": layers}], **table)
