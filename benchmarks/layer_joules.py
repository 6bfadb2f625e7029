"""Joules of training layers on two hosts, measured by others: github.com/willowec/characterizing-pytorch-power (MIT).

1,000 configurations each of a convolution, a dense layer and a pooling layer: forward and backward pass, RAPL. Rows
whose counter went backwards, stood still or gave more than 600 W are left out.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from energy.thor.layers import Sizes

FOLDER = "energy/willowec_cpu_train_layers/src/out"
KINDS = {"conv": "conv2d", "linear": "linear", "pool": "max_pool2d"}
MAX_WATTS = 600.0


class LayerTable(NamedTuple):
    """Layers of one kind on one host; ``joules`` of one training step each, ``sizes`` as in `energy/thor/layers.py`."""

    host: str
    kind: str
    family: str
    sizes: list[Sizes]
    joules: list[float]


def layer_tables(data: Path) -> list[LayerTable]:
    """Every host and kind below the folder of data sets.

    Raises:
        FileNotFoundError: the data set is not there.
    """
    folders = sorted(folder for folder in (data / FOLDER).iterdir() if folder.is_dir())
    return [_read(folder, kind) for folder in folders for kind in KINDS]


def _read(folder: Path, kind: str) -> LayerTable:
    table = LayerTable(folder.name.split("-20", 1)[0], kind, KINDS[kind], [], [])
    with (folder / f"{kind}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            forward, backward = float(row["for_energy"]), float(row["back_energy"])
            microseconds = float(row["for_time"])
            # Pooling was measured forward only.
            whole = forward > 0 and microseconds > 0 and (backward > 0 or kind == "pool")
            if whole and forward / microseconds < MAX_WATTS:
                settings = {name: int(value) for name, value in row.items() if not name.endswith(("_energy", "_time"))}
                table.sizes.append(_sizes(kind, settings))
                table.joules.append((forward + backward) / 1e6)
    return table


def _sizes(kind: str, row: dict[str, int]) -> Sizes:
    if kind == "linear":
        return {"batch": row["batch_size"], "in_channels": row["in_size"], "out_channels": row["out_size"]}
    pool = kind == "pool"
    side, taps = (row["im_side_length"], row["k_side_length"]) if pool else (row["side_len"], row["k_size"])
    return {
        "batch": row["batch_size"],
        "in_channels": row["in_chan"],
        "out_channels": row["in_chan"] if pool else row["out_chan"],
        "in_positions": side**2,
        "out_positions": ((side - taps) // row["stride"] + 1) ** 2,
        "kernel_positions": taps**2,
        "stride": row["stride"],
    }
