"""A model as a list of layers: kinds that behave alike, and the sizes that their cost depends on.

The layers of a bundle come from the layer table of its manifest. All kinds use the same names of sizes:

====================  ==================================================================================
size                  meaning
====================  ==================================================================================
``batch``             samples per step
``in_channels``       input channels, or features of a dense layer
``out_channels``      output channels, or features
``in_positions``      values per channel of the input: height x width, steps of a sequence, 1 for a vector
``out_positions``     the same of the output
``kernel_positions``  taps of the kernel: height x width
``stride``            along one axis
``dilation``          along one axis
``groups``            of a convolution, of a depthwise one those that training computes together as one; heads of
                      attention
``elements``          numbers that an optimiser updates (kinds ``optimizer-...`` only)
====================  ==================================================================================

A size that a kind lacks is 1, and sizes of 1 are left out. Where only the number of values counts (activations, sums),
they are all positions of one channel. The bias of a convolution is a layer of its own (kind ``bias``), and so is every
tensor that the optimiser updates.

What of a layer is computed backwards is part of its kind: ``conv2d`` both gradients, ``conv2d-input`` none of its input
(the first layer that trains), ``conv2d-frozen`` none of its weights, ``conv2d-forward`` neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from energy.errors import ProfileError

Sizes: TypeAlias = dict[str, int]
Entry: TypeAlias = Mapping[str, Any]

DEFAULT_BATCH = 32
DEPTHWISE_BLOCK = 8  # of exporters/_decompositions.py

# Classes whose name is not the function's in other letters.
_NAMES = {
    "NonDynamicallyQuantizableLinear": "linear",
    "LogSigmoid": "logsigmoid",
    "SiLU": "silu",
    "GELU": "gelu",
    "LSTM": "lstm",
    "GRU": "gru",
    "RNN": "rnn",
    "CELU": "celu",
    "ELU": "elu",
    "SELU": "selu",
    "GLU": "glu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "PReLU": "prelu",
}
_NOTHING = frozenset({"flatten", "unflatten", "identity"})
# Two operands: with a number, or of another shape, they are other kinds.
_PAIRED = frozenset({"add", "sub", "mul", "div"})
_NORMS = {"batch_norm1d", "batch_norm2d", "batch_norm3d", "layer_norm", "group_norm"}
_WEIGHTED = _NORMS | {"linear", "lstm", "gru", "rnn", "prelu", "multihead_attention"}


class LayerSpec(NamedTuple):
    """One layer of a model. ``kind`` names its family, for example ``conv2d``, ``conv2d-depthwise``, ``linear``.

    A kind that ends with ``-input`` needs no gradient of its input, being the first layer that trains. ``calls``: how
    often a step runs it.
    """

    name: str
    kind: str
    sizes: Sizes
    calls: int = 1


def partition(manifest: Mapping[str, Any], batch: int | None = None) -> list[LayerSpec]:
    """The layers of one training step of a bundle, with what its optimiser does; layers that cost nothing are left out.

    Args:
        manifest: ``manifest.json`` of the bundle as plain dicts and lists.
        batch: samples per step; None: 32. A bundle with a fixed batch always has its own.

    Raises:
        ProfileError: the manifest has no layer table, or one written before settings were in it.
    """
    name = manifest.get("name", "(unnamed)")
    layers = manifest.get("layers") or []
    if not layers:
        raise ProfileError(f"bundle {name}: its manifest has no layers; export it again with edge-export bundle")
    if any("settings" not in layer for layer in layers):
        raise ProfileError(
            f"bundle {name}: its layer table lacks settings (kernel sizes, strides), being written by an older "
            "version; export it again with edge-export bundle"
        )
    fixed = manifest.get("batch") or {}
    samples = (fixed.get("size") if fixed.get("mode") == "fixed" else None) or batch or DEFAULT_BATCH
    found = [spec_of(entry, samples) for layer in layers for entry in elementary(layer)]
    return [*found, *_optimizer(manifest)]


def base_kind(kind: str) -> str:
    """The kind without what of it is computed backwards: ``conv2d-depthwise-input`` gives ``conv2d-depthwise``."""
    for suffix in ("-input", "-frozen", "-forward"):
        kind = kind.removesuffix(suffix)
    return kind


def canonical(kind: str) -> str:
    """A class or function of torch as a kind: ``MaxPool2d`` and ``max_pool2d`` give ``max_pool2d``."""
    if kind in _NAMES:
        return _NAMES[kind]
    letters = []
    for index, letter in enumerate(kind):
        if letter.isupper() and index and not kind[index - 1].isupper():
            letters.append("_")
        letters.append(letter.lower())
    return "".join(letters)


def elementary(layer: Entry) -> list[Entry]:
    """An entry of a layer table as entries of one layer each: biases and stacked layers apart, free ones left out."""
    kind = canonical(layer["kind"])
    settings: Mapping[str, Any] = layer["settings"]
    free = kind in _NOTHING or ("dropout" in kind and str(settings.get("p")) == "0")
    if free or not layer.get("calls", 1):
        return []
    if kind in {"lstm", "gru", "rnn"}:
        return _recurrent(layer)
    if not kind.startswith("conv") or not settings.get("bias"):
        return [layer]
    made = layer["output_shape"]
    bias = {"name": f"{layer['name']}.bias", "kind": "bias", "input_shape": made, "output_shape": made, "settings": {}}
    plain = {**layer, "settings": {**settings, "bias": 0}}
    return [plain, {**bias, "calls": layer.get("calls", 1)}] if layer.get("trainable", True) else [plain]


def spec_of(entry: Entry, batch: int) -> LayerSpec:
    """Kind and sizes of an elementary entry."""
    kind = canonical(entry["kind"])
    family, sizes = _sizes(kind, entry["settings"], entry["input_shape"], entry["output_shape"])
    kept = {key: int(value) for key, value in {"batch": batch, **sizes}.items() if value != 1}
    return LayerSpec(entry["name"], family + _backward(kind, entry), kept, entry.get("calls", 1))


def _backward(kind: str, layer: Entry) -> str:
    given = layer.get("input_gradient", True)
    if kind not in _WEIGHTED and not kind.startswith("conv"):
        return "" if given or kind == "embedding" else "-forward"
    if layer.get("trainable", True):
        return "" if given else "-input"
    return "-frozen" if given else "-forward"


def _sizes(kind: str, settings: Entry, given: Sequence[int], made: Sequence[int]) -> tuple[str, Sizes]:
    if kind.startswith("conv"):
        return _convolution(kind, settings, given, made)
    special = _SIZES.get(kind)
    if special is not None:
        return kind, special(settings, given, made)
    if "pool" in kind or kind.startswith("batch_norm") or kind == "group_norm":
        sizes = _channels(given, made)
        if "kernel_size" in settings:
            rank = max(len(given) - 1, 1)
            window = _axes(settings["kernel_size"], rank)
            sizes["kernel_positions"] = math.prod(window)
            sizes["stride"] = max(_axes(settings.get("stride") or window, rank))
        return kind, {**sizes, "groups": int(settings.get("num_groups", 1))}
    return _elementwise(kind, settings, math.prod(given), math.prod(made))


def _elementwise(kind: str, settings: Entry, given: int, made: int) -> tuple[str, Sizes]:
    sizes = {"in_positions": made if kind == "cat" else given, "out_positions": made}
    if kind in _PAIRED and "other_shape" in settings:
        return f"{kind}_broadcast", {**sizes, "in_channels": math.prod(settings["other_shape"])}
    if kind in _PAIRED and settings.get("operands", 1) == 1:
        return f"{kind}_scalar", sizes
    return "dropout" if kind.startswith("dropout") else kind, sizes


def _convolution(kind: str, settings: Entry, given: Sequence[int], made: Sequence[int]) -> tuple[str, Sizes]:
    rank = len(given) - 1
    taps, groups = math.prod(_axes(settings["kernel_size"], rank)), int(settings.get("groups", 1))
    sizes = {
        **_channels(given, made),
        "kernel_positions": taps,
        "stride": max(_axes(settings.get("stride", 1), rank)),
        "dilation": max(_axes(settings.get("dilation", 1), rank)),
        "groups": groups,
    }
    if groups == given[0] and groups > 1:
        # The exported weight gradient takes up to 8 channels as one dense block, if their number can be divided so: 32
        # channels cost far less than 31.
        block = max(size for size in range(1, DEPTHWISE_BLOCK + 1) if groups % size == 0)
        return f"{kind}-depthwise", {**sizes, "groups": groups // block}
    if groups > 1:
        return f"{kind}-grouped", sizes
    return f"{kind}-pointwise" if taps == 1 else kind, sizes


def _axes(value: Any, rank: int) -> list[int]:
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)] * rank


def _channels(given: Sequence[int], made: Sequence[int]) -> Sizes:
    return {
        "in_channels": given[0] if given else 1,
        "out_channels": made[0] if made else 1,
        "in_positions": math.prod(given[1:]),
        "out_positions": math.prod(made[1:]),
    }


def _dense(settings: Entry, given: Sequence[int], made: Sequence[int]) -> Sizes:
    del settings
    tokens = math.prod(given[:-1])
    return {"in_channels": given[-1], "out_channels": made[-1], "in_positions": tokens, "out_positions": tokens}


def _layer_norm(settings: Entry, given: Sequence[int], made: Sequence[int]) -> Sizes:
    del made
    width = math.prod(_axes(settings.get("normalized_shape", list(given[-1:])), 1))
    rows = math.prod(given) // width
    return {"in_channels": width, "out_channels": width, "in_positions": rows, "out_positions": rows}


def _reduced(settings: Entry, given: Sequence[int], made: Sequence[int]) -> Sizes:
    """Of what stays there are channels, of what is summed up positions."""
    del settings
    kept = math.prod(made)
    return {"in_channels": kept, "out_channels": kept, "in_positions": math.prod(given) // max(kept, 1)}


def _along(settings: Entry, given: Sequence[int], made: Sequence[int]) -> Sizes:
    del made
    axis = _axes(settings.get("dim", -1), 1)[0]
    width = given[axis if axis < 0 else axis - 1] if given else 1
    rest = math.prod(given) // width
    return {"in_channels": width, "out_channels": width, "in_positions": rest, "out_positions": rest}


def _classes(settings: Entry, given: Sequence[int], made: Sequence[int]) -> Sizes:
    del settings, made
    return {"in_channels": given[0], "in_positions": math.prod(given[1:])}


def _embedding(settings: Entry, given: Sequence[int], made: Sequence[int]) -> Sizes:
    tokens = math.prod(given)
    rows = int(settings.get("num_embeddings", 1))
    return {"in_channels": rows, "out_channels": made[-1], "in_positions": tokens, "out_positions": tokens}


def _attention(settings: Entry, given: Sequence[int], made: Sequence[int]) -> Sizes:
    return {**_dense(settings, given, made), "groups": int(settings.get("num_heads", 1))}


_SIZES: dict[str, Callable[[Entry, Sequence[int], Sequence[int]], Sizes]] = {
    "linear": _dense,
    "layer_norm": _layer_norm,
    "mean": _reduced,
    "sum": _reduced,
    "softmax": _along,
    "log_softmax": _along,
    "cross_entropy": _classes,
    "lstm": _dense,
    "gru": _dense,
    "rnn": _dense,
    "bias": _classes,
    "embedding": _embedding,
    "multihead_attention": _attention,
}


def _recurrent(layer: Entry) -> list[Entry]:
    """One entry per stacked layer; a direction is a call."""
    settings, steps = layer["settings"], layer["input_shape"][0]
    width, hidden = layer["input_shape"][-1], int(settings["hidden_size"])
    directions = 1 + int(settings.get("bidirectional", 0))
    calls = layer.get("calls", 1) * directions
    entries: list[Entry] = []
    for index in range(int(settings.get("num_layers", 1))):
        single = {"input_size": width, "hidden_size": hidden, "num_layers": 1}
        shapes = {"input_shape": [steps, width], "output_shape": [steps, hidden]}
        entry = {**layer, **shapes, "settings": single, "calls": calls}
        if index:
            entry |= {"name": f"{layer['name']}.{index}", "input_gradient": layer.get("trainable", True)}
        entries.append(entry)
        width = hidden * directions
    return entries


def _optimizer(manifest: Mapping[str, Any]) -> list[LayerSpec]:
    """One spec per size of the tensors that train; ``calls``: how many there are."""
    counts: dict[int, int] = {}
    for parameter in manifest.get("parameters", []):
        if parameter["trainable"]:
            elements = math.prod(parameter["shape"])
            counts[elements] = counts.get(elements, 0) + 1
    kind = f"optimizer-{manifest['optimizer']['name']}"
    return [LayerSpec(f"optimizer.{size}", kind, {"elements": size}, number) for size, number in counts.items()]
