"""Probe packs: a deflated zip of small ONNX graphs, each one layer's training step, and ``probes.json`` about them.

``edge-export probes`` writes them on a workstation; ``edge-energy profile`` reads them on a device. The bytes of a
graph are believed after their SHA-256 was checked, and given away after a look over them.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec

from energy.errors import ProfileError
from energy.graph_check import GraphError, check_graph
from energy.thor.layers import LayerSpec
from energy.thor.profile import Count, Name, Size

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = "edge-probes"
FORMAT_VERSION = 1
PACK_NAME = "probes.json"

# Graphs are a few kB; an unrolled recurrent layer of a hundred steps has some 200.
MAX_FILE_BYTES = 64 << 20
MAX_TABLE_BYTES = 64 << 20
MAX_BATCH = 1 << 20
MAX_RUNS = 10_000

Batch = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]

# What zipfile raises for files that are none, or damaged.
NO_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OverflowError)

Role: TypeAlias = Literal["layer", "candidate", "empty"]

_AGAIN = "make it again with edge-export probes"


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One graph.

    ``sizes`` as in `layers.py`, without the batch. ``runs``: how often the layer is in the graph. ``batch``:
    the only size that the graph takes; None: any. ``limits``: values of integer inputs stay below these. ``layers``:
    whose it is, by model and name, for messages.
    """

    file: Name
    role: Role
    kind: Name = ""
    sizes: dict[Name, Size] = {}
    runs: Annotated[int, msgspec.Meta(ge=1, le=MAX_RUNS)] = 1
    batch: Batch | None = None
    limits: dict[Name, Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]] = {}
    layers: list[Name] = []

    def spec(self, batch: int) -> LayerSpec:
        """Kind and sizes of the layer when it runs with ``batch`` samples."""
        own = {} if "elements" in self.sizes or batch == 1 else {"batch": batch}
        return LayerSpec(self.layers[0] if self.layers else self.kind, self.kind, {**own, **self.sizes})


class PackedLayer(msgspec.Struct, frozen=True, array_like=True):
    """A layer of a model that the pack was made for; sizes without the batch."""

    kind: Name
    sizes: dict[Name, Size]
    calls: Count


class PackedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that the pack was made for."""

    name: Name
    layers: list[PackedLayer]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Size and SHA-256 (hex) of one graph."""

    sha256: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """``probes.json``. ``batch``: what to measure with if nothing else is asked for. ``missing``: kinds of layers that
    have no probe, and whose they are.
    """

    files: dict[str, FileEntry]
    probes: list[Probe]
    models: list[PackedModel] = []
    missing: dict[Name, list[Name]] = {}
    batch: Batch = 32
    created_by: str = ""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


class _Header(msgspec.Struct):
    format: str = ""
    format_version: int = 0


class Pack:
    """An open probe pack. ``table`` is what it says about itself."""

    def __init__(self, path: Path) -> None:
        """Opens and checks a pack.

        Raises:
            ProfileError: unreadable, no pack, or of a newer version.
        """
        self._path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except OSError as error:
            raise ProfileError(
                f"{path}: cannot be read ({error.strerror}); name a file of edge-export probes"
            ) from error
        except NO_ZIP as error:
            raise ProfileError(f"{path}: is no probe pack ({error}); {_AGAIN}") from error
        try:
            self.table = self._table()
        except ProfileError:
            self._archive.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._archive.close()

    def graph(self, probe: Probe) -> bytes:
        """The ONNX graph of a probe.

        Raises:
            ProfileError: its bytes are not those that the pack lists, or no graph that a device may load.
        """
        entry = self.table.files.get(probe.file)
        if entry is None:
            raise ProfileError(f"{self._path}: lists no file {probe.file!r}; {_AGAIN}")
        data = self._read(probe.file, entry.size_bytes)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ProfileError(f"{self._path}: {probe.file} does not match its SHA-256; copy the pack again")
        try:
            check_graph(data)
        except GraphError as error:
            raise ProfileError(f"{self._path}: {probe.file}: {error}") from error
        return data

    def references(self, batch: int) -> dict[str, list[LayerSpec]]:
        """The layers of the models that the pack was made for, by kind."""
        found: dict[str, list[LayerSpec]] = {}
        for model in self.table.models:
            for layer in model.layers:
                probe = Probe(file="", role="layer", kind=layer.kind, sizes=layer.sizes, layers=[model.name])
                found.setdefault(layer.kind, []).append(probe.spec(batch)._replace(calls=layer.calls))
        return found

    def _table(self) -> Table:
        data = self._read(PACK_NAME, MAX_TABLE_BYTES)
        try:
            header = msgspec.json.decode(data, type=_Header)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProfileError(f"{self._path}: {PACK_NAME} cannot be read ({error}); {_AGAIN}") from error
        if header.format != FORMAT:
            raise ProfileError(f"{self._path}: has format {header.format!r}, not {FORMAT!r}; {_AGAIN}")
        if header.format_version > FORMAT_VERSION:
            raise ProfileError(
                f"{self._path}: pack format {header.format_version} is newer than this software reads "
                f"({FORMAT_VERSION}); update edge-training-runtime on this machine"
            )
        try:
            return msgspec.json.decode(data, type=Table)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProfileError(f"{self._path}: {PACK_NAME} is malformed: {error}; {_AGAIN}") from error

    def _read(self, name: str, limit: int) -> bytes:
        """Reads one file, never more than ``limit`` bytes of it."""
        try:
            with self._archive.open(name) as stream:
                data = stream.read(limit + 1)
        except (KeyError, OSError, RuntimeError, *NO_ZIP) as error:
            raise ProfileError(f"{self._path}: {name} cannot be read ({error}); {_AGAIN}") from error
        if len(data) > limit:
            raise ProfileError(f"{self._path}: {name} is larger than the pack says; {_AGAIN}")
        return data
