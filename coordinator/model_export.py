"""Writes a trained model for use elsewhere: a plain ONNX file with the weights inside, or safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from coordinator.errors import ModelError
from edge_runtime.errors import ConfigError
from edge_runtime.files import write_durably

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from coordinator.aggregation.base import Vector
    from edge_runtime.bundle import Bundle

_FORMATS = ".onnx, .safetensors"


def check_suffix(path: Path) -> None:
    """Whether :func:`write_model` knows the format; for checks before long work.

    Raises:
        ConfigError: another suffix, or the folder does not exist.
    """
    if path.suffix not in (".onnx", ".safetensors"):
        raise ConfigError(f"{path}: the suffix {path.suffix!r} names no format; take one of {_FORMATS}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: the folder does not exist; make it first")


def write_model(bundle: Bundle, vector: Vector, path: Path) -> None:
    """Writes the model ``vector`` (float32 ``[layout.size]``) in the format that the suffix of ``path`` names.

    Raises:
        ConfigError: an unknown suffix.
        BundleError: the bundle cannot be read.
        ModelError: the package ``onnx`` is missing, or the model is too large for one ONNX file.
        StorageError: the file cannot be written.
    """
    check_suffix(path)
    if path.suffix == ".onnx":
        write_onnx(bundle, vector, path)
    else:
        write_safetensors(bundle, vector, path)


def write_onnx(bundle: Bundle, vector: Vector, path: Path) -> None:
    """``predict.onnx`` with the parameters as initializers: input ``x`` (preprocessed) to ``output``.

    Preprocessing, labels and the bundle's name stand in the file's metadata, as JSON, for who feeds it. Raises like
    :func:`write_model`.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ModelError("writing ONNX needs the package onnx; install edge-training-runtime[coordinator]") from error
    model: Any = onnx.load_model_from_string(bundle.graph("predict"))
    tensors = _tensors(bundle, vector)
    kept = []
    for entry in model.graph.input:
        if not entry.name.startswith("p."):
            kept.append(entry)
            continue
        model.graph.initializer.append(numpy_helper.from_array(tensors[entry.name[2:]], entry.name))
    del model.graph.input[:]
    model.graph.input.extend(kept)
    manifest = bundle.manifest
    notes = {
        "bundle": manifest.name,
        "labels": msgspec.json.encode(manifest.task.labels).decode(),
        "preprocessing": msgspec.json.encode({entry.name: entry.preprocessing for entry in manifest.inputs}).decode(),
    }
    for key, value in notes.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    try:
        onnx.checker.check_model(model)
        data = model.SerializeToString()
    except (ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path}: cannot be written as ONNX ({error}); write .safetensors instead") from error
    write_durably(path, data)


def write_safetensors(bundle: Bundle, vector: Vector, path: Path) -> None:
    """All parameters and buffers by their names in the model. Raises like :func:`write_model`."""
    from safetensors.numpy import save

    write_durably(path, save(_tensors(bundle, vector), metadata={"bundle": bundle.manifest.name}))


def _tensors(bundle: Bundle, vector: Vector) -> dict[str, np.ndarray[Any, Any]]:
    import numpy as np

    tensors = {**bundle.initial_tensors(), **bundle.layout().split(vector)}
    return {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
