"""Writes a bundle: one stored zip with the same bytes for the same content."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy

from edge_runtime.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, encode_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

# The earliest time a zip can hold; a bundle's bytes must not depend on when it was made.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644


def parameters_file(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialises parameters and buffers as safetensors, by name."""
    arrays = {name: np.ascontiguousarray(value.numpy()).reshape(value.shape) for name, value in tensors.items()}
    return safetensors.numpy.save(arrays)


def file_entries(files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Size and SHA-256 of each file, as the manifest lists them."""
    return {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) for name, data in files.items()
    }


def write_bundle(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> int:
    """Writes the bundle and returns its size in bytes; an older file at ``path`` is replaced in one step."""
    return write_archive(path, {MANIFEST_NAME: encode_manifest(manifest), **files}, zipfile.ZIP_STORED)


def write_archive(path: Path, files: Mapping[str, bytes], compression: int) -> int:
    """Writes a zip with the same bytes for the same content, in one step; returns its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w", compression) as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.compress_type = compression
                entry.external_attr = _MODE << 16
                entry.create_system = 3
                archive.writestr(entry, data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path.stat().st_size
