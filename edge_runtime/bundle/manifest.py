"""The manifest of a bundle: what a device may believe about a model before it loads anything.

Stored as ``manifest.json``. Unknown fields are ignored, so that a newer exporter of the same ``format_version`` can
add some; wrong types are refused by field name. All sizes a device allocates come from here, after the SHA-256 of
every file was checked.

Names inside the graphs follow one convention, so that no port table is needed:

=================  =====================================================================================
graph input        meaning
=================  =====================================================================================
``p.NAME``         parameter or buffer NAME of the parameter table
``s.SLOT``         optimiser slot SLOT of the slot table
``g.NAME``         gradient of parameter NAME (``update.onnx`` only)
``x`` ``y``        batch of inputs and targets, first axis is the batch
``mask``           float32 ``[batch]``, 1 for samples that count (fixed-batch bundles without batch statistics)
``seed``           int64 scalar, drives dropout (only where the model has dropout)
``lr`` ...         hyper-parameters of the optimiser, float32 scalars, by the names in ``optimizer.hyper``
=================  =====================================================================================

Graph outputs: ``new.p.NAME`` and ``new.s.SLOT`` (train, update), ``g.NAME`` (gradients), ``loss`` (train and gradients:
mean over the batch, float32 scalar); ``loss_sum``, ``correct``, ``count`` (evaluate: float32 scalars, sums over the
batch; ``correct`` only for classification), ``output`` (predict: logits or values, ``[batch, ...]``).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_runtime.errors import BundleError

FORMAT = "edge-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PARAMETERS_NAME = "parameters.safetensors"

Loss = Literal["cross_entropy", "binary_cross_entropy_with_logits", "mean_squared_error"]
GRAPHS = ("train", "gradients", "update", "evaluate", "predict")


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """One graph input fed from data: ``x`` or ``y``. ``shape`` is without the batch axis."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...]
    preprocessing: list[Preprocessing] = []


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True):
    """``(value * scale - mean) / std``, applied on the device after the cast; mean and std: one or per channel."""

    scale: float = 1.0
    mean: list[float] = msgspec.field(default_factory=lambda: [0.0])
    std: list[float] = msgspec.field(default_factory=lambda: [1.0])


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What the model predicts. ``classes`` is set for cross entropy; ``labels`` names them where known."""

    loss: Loss
    classes: int | None = None
    labels: list[str] = []


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """How the graphs take batches.

    ``dynamic``: any size from 1. ``fixed``: exactly ``size``; a partial batch is padded and masked if ``mask`` is true,
    else dropped (models with batch statistics, where padding would change the statistics). A batch smaller than
    ``minimum`` cannot be trained on and is dropped: BatchNorm of single values needs two samples.
    """

    mode: Literal["dynamic", "fixed"]
    size: int | None = None
    mask: bool = False
    minimum: int = 1


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the model. Neither trainable nor buffer: frozen. ``layer`` is a name in the layer table."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "int64", "bool"]
    trainable: bool
    buffer: bool
    layer: str


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of optimiser state; it starts as zeros."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32"] = "float32"


class Optimizer(msgspec.Struct, frozen=True, kw_only=True):
    """Optimiser built into the graphs; ``hyper`` holds the default of every hyper-parameter input."""

    name: Literal["sgd", "adam", "adamw"]
    hyper: dict[str, float]
    slots: list[Slot] = []


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One leaf module, or one function that forward() calls outside of them, or the loss.

    FLOPs (2 per multiply-add) and bytes are for one sample of the forward pass. ``kind`` is the module's class, the
    function's name (``relu``, ``add``, ``cat``) or the loss. ``settings``: what else its cost depends on, by torch's
    names (``kernel_size``, ``groups``, ``hidden_size``). ``input_gradient``: whether training needs the gradient of
    its input; ``trainable``: whether one of its own parameters trains. ``calls``: how often one step runs it; 0 for a
    module that only holds parameters, its work being in other entries.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    flops: int
    parameter_bytes: int
    activation_bytes: int
    settings: dict[str, int | list[int] | str] = {}
    input_gradient: bool = True
    trainable: bool = True
    calls: int = 1


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """One ONNX file and the names of its inputs and outputs, in order."""

    file: str
    inputs: list[str]
    outputs: list[str]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Size and SHA-256 (hex) of one file of the bundle."""

    sha256: str
    size_bytes: int


class Publisher(msgspec.Struct, frozen=True, kw_only=True):
    """Place of the publisher's Ed25519 signature over the manifest without this field; not verified yet."""

    key_id: str
    signature: str


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """Other graphs of the same model (last layers only, local heads, another objective), by name."""

    name: str
    graphs: dict[str, Graph]


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """A place where the model may be split between device and server."""

    name: str
    after_layer: str
    graphs: dict[str, Graph]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a device needs to know about a bundle."""

    name: str
    task: Task
    inputs: list[Input]
    target: Input
    batch: Batch
    parameters: list[Parameter]
    optimizer: Optimizer
    graphs: dict[str, Graph]
    files: dict[str, FileEntry]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    created_by: str = ""
    opset: int = 20
    batch_statistics: bool = False
    layers: list[Layer] = []
    peak_memory_bytes: int | None = None
    variants: list[Variant] = []
    cuts: list[Cut] = []
    publisher: Publisher | None = None


class _Header(msgspec.Struct):
    format: str = ""
    format_version: int = 0


def decode_manifest(data: bytes) -> Manifest:
    """Reads and checks ``manifest.json``.

    Raises:
        BundleError: no JSON, another format, a newer format version, or a field of the wrong type.
    """
    try:
        header = msgspec.json.decode(data, type=_Header)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{MANIFEST_NAME} is no manifest ({error}); export the bundle again") from error
    if header.format != FORMAT:
        raise BundleError(f"{MANIFEST_NAME} has format {header.format!r}, not {FORMAT!r}; is this file a bundle?")
    if header.format_version > FORMAT_VERSION:
        raise BundleError(
            f"bundle format {header.format_version} is newer than this software reads ({FORMAT_VERSION}); "
            "update edge-training-runtime on this machine"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{MANIFEST_NAME} is malformed: {error}; export the bundle again") from error
    _check(manifest)
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """Writes a manifest as indented JSON with a stable order of fields."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def _check(manifest: Manifest) -> None:
    names = [parameter.name for parameter in manifest.parameters]
    if len(set(names)) != len(names):
        raise BundleError(f"{MANIFEST_NAME} names a parameter twice; export the bundle again")
    shapes = [parameter.shape for parameter in manifest.parameters]
    shapes += [slot.shape for slot in manifest.optimizer.slots]
    shapes += [manifest.target.shape, *(entry.shape for entry in manifest.inputs)]
    if any(size < 0 for shape in shapes for size in shape):
        raise BundleError(f"{MANIFEST_NAME} holds a negative size; export the bundle again")
    tables = [manifest.graphs]
    tables += [variant.graphs for variant in manifest.variants]
    tables += [cut.graphs for cut in manifest.cuts]
    for table in tables:
        for name, graph in table.items():
            if graph.file not in manifest.files:
                raise BundleError(f"graph {name!r} names file {graph.file!r}, which {MANIFEST_NAME} does not list")
