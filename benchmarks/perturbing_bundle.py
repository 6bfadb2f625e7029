"""A bundle whose "training" only perturbs its parameters: for measuring everything around training.

It goes through the whole device path (verification, onnxruntime, IOBinding, codec, spool) like any other bundle; the
new parameters differ from the old ones everywhere, so nothing can be saved by sending equal content.
"""

from __future__ import annotations

import hashlib
import zipfile
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.bundle.manifest import (
    MANIFEST_NAME,
    PARAMETERS_NAME,
    Batch,
    FileEntry,
    Graph,
    Input,
    Manifest,
    Optimizer,
    Parameter,
    Task,
    encode_manifest,
)

if TYPE_CHECKING:
    from pathlib import Path


def write_perturbing_bundle(path: Path, parameters: int) -> None:
    """Writes a bundle with one parameter ``w``, float32 ``[parameters]``; step: ``0.999 w + lr (mean(x) + i % 7)``."""
    from safetensors.numpy import save

    weights = np.random.default_rng(0).standard_normal(parameters).astype(np.float32)
    files = {PARAMETERS_NAME: save({"w": weights}), "train.onnx": _train_graph(parameters)}
    manifest = Manifest(
        name="perturb",
        task=Task(loss="mean_squared_error"),
        inputs=[Input(name="x", dtype="float32", shape=(1,))],
        target=Input(name="y", dtype="float32", shape=(1,)),
        batch=Batch(mode="dynamic"),
        parameters=[
            Parameter(name="w", shape=(parameters,), dtype="float32", trainable=True, buffer=False, layer="perturb")
        ],
        optimizer=Optimizer(name="sgd", hyper={"lr": 0.001}),
        graphs={
            "train": Graph(file="train.onnx", inputs=["p.w", "x", "y", "lr"], outputs=["new.p.w", "loss"]),
        },
        files={
            name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
            for name, data in files.items()
        },
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as bundle:
        bundle.writestr(MANIFEST_NAME, encode_manifest(manifest))
        for name, data in files.items():
            bundle.writestr(name, data)


def _train_graph(parameters: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    number = TensorProto.FLOAT
    pattern = numpy_helper.from_array((np.arange(parameters) % 7).astype(np.float32), "pattern")
    decay = numpy_helper.from_array(np.array(0.999, np.float32), "decay")
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x"], ["mean_x"], keepdims=0),
            helper.make_node("ReduceMean", ["y"], ["mean_y"], keepdims=0),
            helper.make_node("Add", ["pattern", "mean_x"], ["shifted"]),
            helper.make_node("Mul", ["shifted", "lr"], ["change"]),
            helper.make_node("Mul", ["p.w", "decay"], ["kept"]),
            helper.make_node("Add", ["kept", "change"], ["new.p.w"]),
            helper.make_node("Sub", ["mean_x", "mean_y"], ["loss"]),
        ],
        "perturb",
        [
            helper.make_tensor_value_info("p.w", number, [parameters]),
            helper.make_tensor_value_info("x", number, ["batch", 1]),
            helper.make_tensor_value_info("y", number, ["batch", 1]),
            helper.make_tensor_value_info("lr", number, []),
        ],
        [
            helper.make_tensor_value_info("new.p.w", number, [parameters]),
            helper.make_tensor_value_info("loss", number, []),
        ],
        [pattern, decay],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    data: bytes = model.SerializeToString()
    return data
