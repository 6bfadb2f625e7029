"""Reads a bundle and believes nothing: every file is checked against the manifest before it is used.

A bundle is a zip whose entries are stored, not deflated, or a folder with the same files. Sizes come from the manifest
only, and a stored entry cannot be larger than the zip itself, so a hostile file cannot make a device allocate more.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import zipfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.bundle.graph_check import DEFAULT_LIMITS, GraphLimits, check_graph
from edge_runtime.bundle.manifest import MANIFEST_NAME, PARAMETERS_NAME, Graph, Manifest, decode_manifest
from edge_runtime.compression.base import Layout
from edge_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

MANIFEST_LIMIT_BYTES = 8 << 20
MAX_FILES = 1000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,4}")
_END = struct.Struct("<4s4H2LH")  # the zip's end record
_FALL_BACK = ("evaluate", "predict")  # a variant trains differently, what it predicts may be the model's own graph


class Bundle:
    """An opened bundle. Files are read and verified when they are asked for; nothing is kept in memory."""

    def __init__(self, path: Path, manifest: Manifest, manifest_sha256: str) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.manifest = manifest
        self._manifest_sha256 = manifest_sha256

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens a zip or a folder and checks its manifest and table of contents.

        Raises:
            BundleError: not there, not a zip, damaged, deflated or unlisted entries, or a manifest that is refused.
        """
        path = Path(path)
        try:
            data = _read_folder(path, MANIFEST_NAME, None) if path.is_dir() else _open_zip(path)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the bundle again") from error
        try:
            manifest = decode_manifest(data)
            _check_files(manifest)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error
        bundle = cls(path, manifest, hashlib.sha256(data).hexdigest())
        bundle._check_contents()
        return bundle

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the zip; of the manifest, which holds the hash of every file, for a folder."""
        if self.path.is_dir():
            return self._manifest_sha256
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        """Bytes of one file, verified: size first, then SHA-256.

        Raises:
            BundleError: not in the manifest, missing, of another size, or of another content.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: has no file {name!r}; export the bundle again with what is needed")
        try:
            if self.path.is_dir():
                data = _read_folder(self.path, name, entry.size_bytes)
            else:
                with zipfile.ZipFile(self.path) as file:
                    data = _read_entry(file, self.path, name, entry.size_bytes)
        except OSError as error:
            raise BundleError(f"{self.path}: {name}: cannot be read ({error.strerror})") from error
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise BundleError(f"{self.path}: {name}: is damaged ({error}); fetch the bundle again") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{self.path}: {name}: does not match its SHA-256; fetch the bundle again")
        return data

    def graph_entry(self, name: str, variant: str | None = None) -> Graph:
        """The manifest's entry of a graph, of a variant or of the model itself.

        Raises:
            BundleError: no such variant or graph; the message lists those there are.
        """
        graphs = self.manifest.graphs
        if variant is not None:
            table = {entry.name: entry.graphs for entry in self.manifest.variants}
            if variant not in table:
                raise BundleError(f"{self.path}: has no variant {variant!r}; it has {', '.join(table) or 'none'}")
            if name in table[variant] or name not in _FALL_BACK:
                graphs = table[variant]
        if name not in graphs:
            place = "" if variant is None else f" in variant {variant!r}"
            raise BundleError(f"{self.path}: has no graph {name!r}{place}; it has {', '.join(graphs) or 'none'}")
        return graphs[name]

    def graph(self, name: str, variant: str | None = None, *, limits: GraphLimits = DEFAULT_LIMITS) -> bytes:
        """Bytes of a graph, verified and looked over by :func:`check_graph`.

        Raises:
            BundleError: see :meth:`graph_entry`, :meth:`read` and :func:`check_graph`.
        """
        return self._checked(self.graph_entry(name, variant).file, limits)

    def _checked(self, file: str, limits: GraphLimits) -> bytes:
        data = self.read(file)
        try:
            check_graph(data, limits=limits)
        except BundleError as error:
            raise BundleError(f"{self.path}: {file}: {error}") from error
        return data

    def verify(self) -> None:
        """Reads and checks everything: hashes of all files, all graphs, all tensors.

        Raises:
            BundleError: the first thing that is wrong.
        """
        for name in self.manifest.files:
            self.read(name)
        self.initial_tensors()
        tables = [self.manifest.graphs]
        tables += [variant.graphs for variant in self.manifest.variants]
        tables += [cut.graphs for cut in self.manifest.cuts]
        for file in sorted({graph.file for table in tables for graph in table.values()}):
            self._checked(file, DEFAULT_LIMITS)

    def initial_tensors(self) -> dict[str, np.ndarray]:
        """Initial parameters and buffers by name, with the shapes and dtypes of the parameter table.

        Raises:
            BundleError: the file does not hold exactly the tensors of the table, or a value is NaN or infinite.
        """
        import numpy as np
        import safetensors
        import safetensors.numpy

        where = f"{self.path}: {PARAMETERS_NAME}"
        try:
            tensors: dict[str, np.ndarray] = safetensors.numpy.load(self.read(PARAMETERS_NAME))
        except (safetensors.SafetensorError, LookupError, ValueError, TypeError) as error:
            raise BundleError(f"{where}: cannot be read ({error}); export the bundle again") from error
        extra = tensors.keys() - {parameter.name for parameter in self.manifest.parameters}
        if extra:
            raise BundleError(f"{where}: holds {min(extra)!r}, which the manifest does not list")
        for parameter in self.manifest.parameters:
            tensor = tensors.get(parameter.name)
            if tensor is None:
                raise BundleError(f"{where}: lacks {parameter.name!r}; export the bundle again")
            if tensor.shape != parameter.shape or tensor.dtype != np.dtype(parameter.dtype):
                raise BundleError(
                    f"{where}: {parameter.name!r} is {tensor.dtype} {tensor.shape}, the manifest says "
                    f"{parameter.dtype} {parameter.shape}; export the bundle again"
                )
            if parameter.dtype == "float32" and not np.isfinite(tensor).all():
                raise BundleError(f"{where}: {parameter.name!r} holds a NaN or infinite value")
        return {parameter.name: tensors[parameter.name] for parameter in self.manifest.parameters}

    def layout(self) -> Layout:
        """The vector that travels: trainable parameters and float32 buffers, in the order of the parameter table.

        Frozen parameters and buffers of other types stay as they are in the bundle.
        """
        return layout_of(self.manifest)

    def initial_vector(self) -> np.ndarray:
        """The initial model as one vector, float32 ``[layout().size]``; raises like :meth:`initial_tensors`."""
        return self.layout().flatten(self.initial_tensors())

    def _check_contents(self) -> None:
        if self.path.is_dir():
            missing = [name for name in self.manifest.files if not (self.path / name).is_file()]
        else:
            with zipfile.ZipFile(self.path) as file:
                present = {info.filename for info in file.infolist()}
            unlisted = present - {MANIFEST_NAME} - self.manifest.files.keys()
            if unlisted:
                raise BundleError(f"{self.path}: holds {min(unlisted)!r}, which its manifest does not list")
            missing = [name for name in self.manifest.files if name not in present]
        if missing:
            raise BundleError(f"{self.path}: file {missing[0]!r} is missing; fetch or export the bundle again")


def layout_of(manifest: Manifest) -> Layout:
    """See :meth:`Bundle.layout`."""
    travels = [
        parameter
        for parameter in manifest.parameters
        if parameter.dtype == "float32" and (parameter.trainable or parameter.buffer)
    ]
    return Layout(
        tuple(entry.name for entry in travels),
        tuple(entry.shape for entry in travels),
        frozenset(entry.name for entry in travels if entry.buffer),
    )


def _check_files(manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise BundleError(f"{MANIFEST_NAME} lists {len(manifest.files)} files, {MAX_FILES} at most")
    for name, entry in manifest.files.items():
        if not _NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise BundleError(f"{MANIFEST_NAME} lists a file with the unusable name {name[:80]!r}")
        if entry.size_bytes < 0:
            raise BundleError(f"{MANIFEST_NAME} gives {name!r} a negative size")
    sizes: Mapping[str, int] = {name: entry.size_bytes for name, entry in manifest.files.items()}
    stored = sizes.get(PARAMETERS_NAME)
    if stored is None:
        raise BundleError(f"{MANIFEST_NAME} does not list {PARAMETERS_NAME}; export the bundle again")
    width = {"float32": 4, "int64": 8, "bool": 1}
    needed = sum(math.prod(entry.shape) * width[entry.dtype] for entry in manifest.parameters)
    if needed > stored:
        raise BundleError(f"{MANIFEST_NAME}: the parameter table needs {needed} bytes, {PARAMETERS_NAME} has {stored}")


def _open_zip(path: Path) -> bytes:
    """Checks the table of contents and returns the manifest."""
    _check_end_record(path)
    try:
        with zipfile.ZipFile(path) as file:
            names = [info.filename for info in file.infolist()]
            for info in file.infolist():
                _check_entry(path, info)
            if len(set(names)) != len(names):
                raise BundleError(f"{path}: holds a file twice; export the bundle again")
            if MANIFEST_NAME not in names:
                raise BundleError(f"{path}: has no {MANIFEST_NAME}; is this file a bundle?")
            size = file.getinfo(MANIFEST_NAME).file_size
            if size > MANIFEST_LIMIT_BYTES:
                raise BundleError(f"{path}: {MANIFEST_NAME} of {size} bytes is over {MANIFEST_LIMIT_BYTES}")
            return _read_entry(file, path, MANIFEST_NAME, size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise BundleError(f"{path}: is a damaged zip ({error}); fetch the bundle again") from error


def _check_end_record(path: Path) -> None:
    """Bounds the table of contents before ``zipfile`` reads it whole."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END.size - 20))
        tail = file.read(_END.size + 20)
    if len(tail) < _END.size or tail[-_END.size : -_END.size + 4] != b"PK\5\6":
        raise BundleError(f"{path}: is no bundle or cut off ({size} bytes); fetch it again")
    _, disk, start_disk, here, entries, table_bytes, _, comment = _END.unpack(tail[-_END.size :])
    wide = tail[: -_END.size].startswith(b"PK\6\7")
    if wide or disk or start_disk or here != entries or comment:
        raise BundleError(f"{path}: is a zip of a kind that bundles do not use; export the bundle again")
    if entries > MAX_FILES + 1 or table_bytes > 1 << 20:
        raise BundleError(f"{path}: holds {entries} files, {MAX_FILES} at most")


def _check_entry(path: Path, info: zipfile.ZipInfo) -> None:
    name = info.filename
    if not _NAME.fullmatch(name):
        raise BundleError(f"{path}: holds an entry with the unusable name {name[:80]!r}; export the bundle again")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise BundleError(f"{path}: entry {name!r} is compressed or encrypted; a bundle stores its files as they are")


def _read_entry(file: zipfile.ZipFile, path: Path, name: str, size: int) -> bytes:
    try:
        info = file.getinfo(name)
    except KeyError:
        raise BundleError(f"{path}: file {name!r} is missing; fetch the bundle again") from None
    _check_entry(path, info)
    if info.file_size != size:
        raise BundleError(f"{path}: {name}: has {info.file_size} bytes, the manifest says {size}; fetch it again")
    with file.open(info) as stream:
        return stream.read(size)


def _read_folder(path: Path, name: str, size: int | None) -> bytes:
    try:
        with (path / name).open("rb") as file:
            found = file.seek(0, 2)
            if size is not None and found != size:
                raise BundleError(f"{path}: {name}: has {found} bytes, the manifest says {size}; export it again")
            if found > MANIFEST_LIMIT_BYTES and size is None:
                raise BundleError(f"{path}: {name} of {found} bytes is over {MANIFEST_LIMIT_BYTES}")
            file.seek(0)
            return file.read(found)
    except FileNotFoundError:
        raise BundleError(f"{path}: file {name!r} is missing; is this folder a bundle?") from None
