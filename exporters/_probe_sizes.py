"""Other layers of the same kind: what a device measures to learn how the cost of a kind depends on its sizes.

Every size of a layer of the user's models is multiplied by a factor, log-uniform between 1/3 and 3; kernels and strides
change now and then. So configurations lie around the layers that will be asked about, and somewhat beyond them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from energy.thor.layers import canonical

if TYPE_CHECKING:
    import random

    from energy.thor.layers import Entry

_REACH = 3.0
_RARELY = 0.25
_KERNELS = (3, 5, 7)
_STRIDES = (1, 2)
# Of a recurrent layer every step is traced, so only fewer steps are tried; the cost per step hardly changes.
_STEPS_DOWN = 4.0


def draw(entry: Entry, rng: random.Random) -> Entry:
    """A new elementary entry of the same kind, without its output shape where that follows from the rest."""
    kind = canonical(entry["kind"])
    for rule in (_convolution, _pool, _sequence, _channels, _other):
        drawn = rule(kind, entry, rng)
        if drawn is not None:
            return {**entry, "name": "", "calls": 1, **drawn}
    shape = [_size(math.prod(entry["input_shape"]), rng)]
    settings = entry["settings"]
    if "other_shape" not in settings:
        return {**entry, "name": "", "calls": 1, "input_shape": shape, "output_shape": shape}
    repeats = max(math.prod(entry["input_shape"]) // max(math.prod(settings["other_shape"]), 1), 1)
    own = max(shape[0] // repeats, 1)
    shapes = {"input_shape": [own, repeats], "output_shape": [own, repeats]}
    return {**entry, "name": "", "calls": 1, **shapes, "settings": {**settings, "other_shape": [1, own, 1]}}


def work(entry: Entry) -> int:
    """Multiply-adds, or numbers touched, per sample: a rough measure of what a probe costs to run."""
    given, made = (math.prod(int(size) for size in entry[key]) for key in ("input_shape", "output_shape"))
    kind, settings = canonical(entry["kind"]), entry["settings"]
    if kind.startswith("conv"):
        rank = len(entry["input_shape"]) - 1
        kernel = settings["kernel_size"]
        taps = math.prod(_axes(kernel, rank))
        return int(made * taps * entry["input_shape"][0] // settings.get("groups", 1))
    if kind in {"linear", "lstm", "gru", "rnn", "multihead_attention"}:
        return int(given * entry["output_shape"][-1])
    return given + made


def _size(value: int, rng: random.Random, least: int = 1) -> int:
    return max(least, round(value * float(_REACH ** rng.uniform(-1, 1))))


def _near(value: int, rng: random.Random) -> int:
    """A number of input channels: 3 stays 3 in half of the cases, because images do."""
    return value if value < 8 and rng.random() < 0.5 else _size(value, rng)


def _convolution(kind: str, entry: Entry, rng: random.Random) -> dict[str, Any] | None:
    if not kind.startswith("conv"):
        return None
    settings = dict(entry["settings"])
    rank, groups = len(entry["input_shape"]) - 1, int(settings.get("groups", 1))
    inputs, outputs = int(settings["in_channels"]), int(settings["out_channels"])
    kernel, stride, padding = (_axes(settings.get(key, 0), rank) for key in ("kernel_size", "stride", "padding"))
    filling = all(2 * p == k - 1 for p, k in zip(padding, kernel, strict=True))
    if math.prod(kernel) > 1 and rng.random() < _RARELY:
        kernel = [rng.choice(_KERNELS)] * rank
    if rng.random() < _RARELY:
        stride = [rng.choice(_STRIDES)] * rank
    if filling:
        padding = [size // 2 for size in kernel]
    if groups == 1:
        new_inputs, new_outputs, new_groups = _near(inputs, rng), _size(outputs, rng), 1
    elif groups == inputs:
        new_inputs = _size(groups, rng, 2)
        if rng.random() < 0.5:  # as most networks have them; others take another way through the exporter
            new_inputs = max(8, round(new_inputs / 8) * 8)
        new_groups = new_inputs
        new_outputs = new_inputs * (outputs // groups)
    else:
        new_groups = groups
        new_inputs, new_outputs = (_size(size // groups, rng) * groups for size in (inputs, outputs))
    channels = {"in_channels": new_inputs, "out_channels": new_outputs, "groups": new_groups, "bias": 0}
    side = _side(entry, rank, rng, max(kernel))
    return {
        "input_shape": [new_inputs, *[side] * rank],
        "settings": {**settings, **channels, "kernel_size": kernel, "stride": stride, "padding": padding},
    }


def _pool(kind: str, entry: Entry, rng: random.Random) -> dict[str, Any] | None:
    if "pool" not in kind:
        return None
    rank = len(entry["input_shape"]) - 1
    kernel = max(_axes(entry["settings"].get("kernel_size", 1), rank))
    side = _side(entry, rank, rng, max(kernel, *entry["output_shape"][1:]) if kernel == 1 else kernel)
    channels = _size(entry["input_shape"][0], rng)
    return {"input_shape": [channels, *[side] * rank], "output_shape": [channels, *entry["output_shape"][1:]]}


def _sequence(kind: str, entry: Entry, rng: random.Random) -> dict[str, Any] | None:
    settings, given, made = dict(entry["settings"]), entry["input_shape"], entry["output_shape"]
    if kind in {"lstm", "gru", "rnn"}:
        steps = max(2, round(given[0] * _STEPS_DOWN ** rng.uniform(-1, 0)))
        hidden, width = _size(made[-1], rng, 2), _size(given[-1], rng)
        shapes = {"input_shape": [steps, width], "output_shape": [steps, hidden]}
        return {**shapes, "settings": {**settings, "input_size": width, "hidden_size": hidden}}
    if kind == "multihead_attention":
        heads = int(settings["num_heads"])
        shape = [_size(given[0], rng, 2), heads * _size(given[-1] // heads, rng)]
        return {"input_shape": shape, "output_shape": shape, "settings": {**settings, "embed_dim": shape[-1]}}
    if kind == "embedding":
        tokens, rows = _size(math.prod(given), rng), _size(int(settings["num_embeddings"]), rng, 2)
        shapes = {"input_shape": [tokens], "output_shape": [tokens, _size(made[-1], rng)]}
        return {**shapes, "settings": {**settings, "num_embeddings": rows}}
    if kind == "linear":
        leading = [_size(size, rng) if size > 1 else size for size in given[:-1]]
        return {"input_shape": [*leading, _size(given[-1], rng)], "output_shape": [*leading, _size(made[-1], rng)]}
    return None


def _channels(kind: str, entry: Entry, rng: random.Random) -> dict[str, Any] | None:
    """Kinds that go through channels and positions."""
    given = entry["input_shape"]
    if kind.startswith("batch_norm") or kind in {"group_norm", "bias"}:
        groups = int(entry["settings"].get("num_groups", 1))
        side = _side(entry, len(given) - 1, rng, 1)
        shape: list[int] = [max(groups, _size(given[0], rng) // groups * groups), *[side] * (len(given) - 1)]
        return {"input_shape": shape, "output_shape": shape}
    if kind == "layer_norm":
        width = _size(given[-1], rng, 2)
        rows = [_size(size, rng) for size in given[:-1]]
        return {
            "input_shape": [*rows, width],
            "output_shape": [*rows, width],
            "settings": {**entry["settings"], "normalized_shape": [width]},
        }
    return None


def _other(kind: str, entry: Entry, rng: random.Random) -> dict[str, Any] | None:
    given = [_size(size, rng, 2) if size > 1 else size for size in entry["input_shape"]]
    if kind in {"softmax", "log_softmax"}:
        return {"input_shape": given, "output_shape": given}
    if kind in {"mean", "sum"}:
        return {"input_shape": given, "output_shape": None}
    if kind == "cross_entropy":
        return {"input_shape": given, "output_shape": []}
    if kind == "getitem":
        made = _size(math.prod(entry["output_shape"]), rng)
        ratio = max(math.prod(entry["input_shape"]) // math.prod(entry["output_shape"]), 2)
        return {"input_shape": [_size(ratio, rng, 2), made], "output_shape": [made]}
    return None


def _side(entry: Entry, rank: int, rng: random.Random, least: int) -> int:
    positions = math.prod(entry["input_shape"][1:])
    return _size(round(positions ** (1 / rank)), rng, least) if rank else 1


def _axes(value: Any, rank: int) -> list[int]:
    if isinstance(value, str):  # padding "same" or "valid"
        return [0] * rank
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)] * rank
