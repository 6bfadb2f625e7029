"""A small bundle written by hand: softmax regression with momentum, a float buffer and a counter, no torch needed."""

from __future__ import annotations

import hashlib
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import safetensors.numpy

from edge_runtime.bundle import manifest as m

if TYPE_CHECKING:
    from pathlib import Path

CLASSES, FEATURES = 3, 4
_FORWARD = """
    logits = MatMul(x, p.w)
    shifted = Add(logits, p.b)
    logp = LogSoftmax<axis=1>(shifted)
    depth = Constant<value_int=3>()
    ends = Constant<value_floats=[0.0, 1.0]>()
    hot = OneHot<axis=1>(y, depth, ends)
    picked = Mul(logp, hot)
    one = Constant<value_ints=[1]>()
    row_loss = ReduceSum<keepdims=0>(picked, one)
    negative = Neg(row_loss)
"""
_ALL = "    rows = Shape<start=0, end=1>(x)\n    count_v = Cast<to=1>(rows)\n    zero = Constant<value_ints=[0]>()\n"
_COUNT = {
    False: _ALL + "    weighted = Identity(negative)\n    count = ReduceSum<keepdims=0>(count_v)\n",
    True: _ALL + "    weighted = Mul(negative, mask)\n    count = ReduceSum<keepdims=0>(mask)\n",
}
_LOSS = "    loss_sum = ReduceSum<keepdims=0>(weighted)\n    loss = Div(loss_sum, count)\n"
_GRADIENT = """
    prob = Exp(logp)
    diff = Sub(prob, hot)
    {masked}
    d = Div(diff_m, count)
    xt = Transpose<perm=[1, 0]>(x)
    g.w = MatMul(xt, d)
    g.b = ReduceSum<keepdims=0>(d, zero)
    new.p.seen = Mul(p.seen, p.frozen)
    step = Constant<value_int=1>()
    new.p.count = Add(p.count, step)
"""
_UPDATE = """
    mw = Mul(momentum, s.w)
    new.s.w = Add(mw, g.w)
    mb = Mul(momentum, s.b)
    new.s.b = Add(mb, g.b)
    lw = Mul(lr, new.s.w)
    new.p.w = Sub(p.w, lw)
    lb = Mul(lr, new.s.b)
    new.p.b = Sub(p.b, lb)
"""
_HITS = """
    guess = ArgMax<axis=1, keepdims=0>(logp)
    equal = Equal(guess, y)
    hits = Cast<to=1>(equal)
    {masked}
    correct = ReduceSum<keepdims=0>(hits_m)
"""
_SHAPES = {"w": "float[4,3]", "b": "float[3]", "seen": "float[2]", "frozen": "float[2]", "count": "int64"}


def graph_bytes(name: str, batch: int | None = None, *, mask: bool = False) -> bytes:
    """One graph of the toy; ``batch`` fixes the batch axis."""
    n = "N" if batch is None else str(batch)
    data = [f"float[{n},4] x", f"int64[{n}] y"] + ([f"float[{n}] mask"] if mask else [])
    params = [f"{_SHAPES[key]} p.{key}" for key in ("w", "b")]
    buffers = [f"{_SHAPES[key]} p.{key}" for key in ("seen", "frozen", "count")]
    slots, hyper = ["float[4,3] s.w", "float[3] s.b"], ["float lr", "float momentum"]
    gradients = ["float[4,3] g.w", "float[3] g.b"]
    new_buffers = ["float[2] new.p.seen", "int64 new.p.count"]
    new = ["float[4,3] new.p.w", "float[3] new.p.b", "float[4,3] new.s.w", "float[3] new.s.b"]
    masked = "column = Unsqueeze(mask, one)\n    diff_m = Mul(diff, column)" if mask else "diff_m = Identity(diff)"
    forward = _FORWARD + _COUNT[mask] + _LOSS
    backward = forward + _GRADIENT.format(masked=masked)
    hits = _HITS.format(masked="hits_m = Mul(hits, mask)" if mask else "hits_m = Identity(hits)")
    inputs, outputs, body = {
        "train": ([*params, *buffers, *slots, *data, *hyper], [*new, *new_buffers, "float loss"], backward + _UPDATE),
        "gradients": ([*params, *buffers, *data], [*gradients, *new_buffers, "float loss"], backward),
        "update": ([*params, *slots, *gradients, *hyper], new, _UPDATE),
        "evaluate": ([*params, *data], ["float loss_sum", "float correct", "float count"], forward + hits),
        "predict": ([*params, data[0]], [f"float[{n},3] output"], "t = MatMul(x, p.w)\n output = Add(t, p.b)"),
    }[name]
    text = (
        f'<ir_version: 9, opset_import: ["" : 20]>\n{name} ({", ".join(inputs)}) => ({", ".join(outputs)}) {{{body}}}'
    )
    for letter in "psg":  # the text format has no dots in names
        text = text.replace(f"{letter}.", f"{letter}__")
    model = onnx.parser.parse_model(text.replace("new.", "new__"))
    for port in [*model.graph.input, *model.graph.output]:
        port.name = port.name.replace("__", ".")
    for node in model.graph.node:
        node.input[:] = [entry.replace("__", ".") for entry in node.input]
        node.output[:] = [entry.replace("__", ".") for entry in node.output]
    onnx.checker.check_model(model)
    return model.SerializeToString()


def tensors() -> dict[str, np.ndarray]:
    """Initial tensors of the toy."""
    rng = np.random.default_rng(5)
    return {
        "w": (rng.normal(size=(4, 3)) * 0.1).astype(np.float32),
        "b": np.zeros(3, np.float32),
        "seen": np.ones(2, np.float32),
        "frozen": np.array([0.5, 2.0], np.float32),
        "count": np.array(7, np.int64),
    }


def files(batch: int | None = None, *, mask: bool = False) -> dict[str, bytes]:
    """Content of the bundle's files but the manifest."""
    result = {f"{name}.onnx": graph_bytes(name, batch, mask=mask) for name in m.GRAPHS}
    result[m.PARAMETERS_NAME] = safetensors.numpy.save(tensors())
    return result


def manifest(content: dict[str, bytes], batch: int | None = None, *, mask: bool = False, **changes: Any) -> m.Manifest:
    """The manifest for these files."""
    graphs = {}
    for name in m.GRAPHS:
        model = onnx.load_from_string(content[f"{name}.onnx"])
        inputs, outputs = ([port.name for port in ports] for ports in (model.graph.input, model.graph.output))
        graphs[name] = m.Graph(file=f"{name}.onnx", inputs=inputs, outputs=outputs)
    kinds = {"w": (True, False), "b": (True, False), "seen": (False, True), "frozen": (False, False)}
    table = [
        m.Parameter(
            name=name,
            shape=tensor.shape,
            dtype=str(tensor.dtype),
            trainable=kinds.get(name, (False, True))[0],
            buffer=kinds.get(name, (False, True))[1],
            layer="l",
        )
        for name, tensor in tensors().items()
    ]
    fields: dict[str, Any] = {
        "name": "toy",
        "task": m.Task(loss="cross_entropy", classes=CLASSES),
        "inputs": [m.Input(name="x", dtype="float32", shape=(FEATURES,))],
        "target": m.Input(name="y", dtype="int64", shape=()),
        "batch": m.Batch(mode="dynamic" if batch is None else "fixed", size=batch, mask=mask),
        "parameters": table,
        "optimizer": m.Optimizer(
            name="sgd",
            hyper={"lr": 0.1, "momentum": 0.9},
            slots=[m.Slot(name="w", shape=(4, 3)), m.Slot(name="b", shape=(3,))],
        ),
        "graphs": graphs,
        "files": {name: m.FileEntry(sha256=sha256(data), size_bytes=len(data)) for name, data in content.items()},
    }
    return m.Manifest(**{**fields, **changes})


def write_bundle(path: Path, batch: int | None = None, *, mask: bool = False, **changes: Any) -> Path:
    """Writes the toy as a zip; ``changes`` replace fields of the manifest."""
    content = files(batch, mask=mask)
    return write_zip(
        path, {m.MANIFEST_NAME: m.encode_manifest(manifest(content, batch, mask=mask, **changes)), **content}
    )


def write_zip(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Writes any files as a zip."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return path


def write_data(path: Path, samples: int = 60, seed: int = 1) -> Path:
    """Separable data of the toy's shape."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, FEATURES)).astype(np.float32)
    y = np.argmax(x[:, :CLASSES], axis=1).astype(np.int64)
    np.savez(path, x=x, y=y, t=np.arange(samples, dtype=np.float64), id=np.arange(samples))
    return path


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()
