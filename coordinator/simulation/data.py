"""Training data of all virtual devices: one set of arrays, shared out among them, opened by the device's own code.

The workers of an executor map the arrays once per machine; a virtual device's dataset is a list of row numbers.
"""

from __future__ import annotations

import io
import zipfile
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_runtime.data.holdout import keys_of_ids
from edge_runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edge_runtime.data.base import Array, Indices, Keys, Times
    from edge_runtime.data.config import DatasetConfig

FACTORY = "coordinator.simulation.data:open_share"
_MAPPED = 4  # data sets that a process keeps mapped


class Data(NamedTuple):
    """Inputs ``[n, ...]``, targets ``[n, ...]`` and, maybe, a group per sample (a writer, a patient) ``[n]``."""

    x: NDArray[Any]
    y: NDArray[Any]
    group: NDArray[Any] | None = None


class Shares(NamedTuple):
    """``rows[starts[i]:starts[i + 1]]`` are the samples of device ``i``: int64, ascending."""

    data: Data
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]

    def count(self, device: int) -> int:
        """Samples of a device."""
        return int(self.starts[device + 1] - self.starts[device])

    def of(self, device: int) -> NDArray[np.int64]:
        """Row numbers of a device's samples."""
        return self.rows[self.starts[device] : self.starts[device + 1]]


def load_data(path: Path) -> Data:
    """Reads an ``.npz`` file with arrays ``x``, ``y`` and, for groups, ``group``.

    Raises:
        DataError: it cannot be read, or lacks an array, or they are of different lengths.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb"):
                raise DataError(f"{path}: is no .npz file; write one with numpy.savez(FILE, x=inputs, y=targets)")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("x", "y") if name not in file.files]
            if missing:
                raise DataError(f"{path}: has no array {missing[0]!r}; it has {', '.join(file.files) or 'none'}")
            data = Data(file["x"], file["y"], file["group"] if "group" in file.files else None)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: x, y and group must be arrays of numbers, and the file whole") from error
    lengths = {len(array) for array in data if array is not None}
    if len(lengths) != 1 or 0 in lengths:
        raise DataError(f"{path}: arrays of different lengths, or empty: {sorted(lengths)}")
    return data


def share_out(data: Data, how: str, devices: int, *, seed: int = 0, samples: Sequence[int | None] = ()) -> Shares:
    """Shares samples out among devices.

    Args:
        data: all samples.
        how: "iid"; "dirichlet:0.3", labels of a device drawn from a symmetric Dirichlet distribution with that
            concentration (Hsu et al. 2019, section 3); or "groups", whole groups, so that no two devices have one.
        devices: how many there are.
        seed: of what is drawn.
        samples: how many a device wants; None, and for "groups": an equal part. Scaled down if there are too few.

    Raises:
        ConfigError: no such partition, or fewer samples or groups than devices.
    """
    kind, _, option = how.partition(":")
    total = len(data.y)
    if total < devices:
        raise ConfigError(f"{total} samples cannot be shared out among {devices} devices; give more data")
    random = Random(f"{seed}/partition")
    if kind == "groups" and not option:
        parts = _by_groups(data, devices, random)
    elif kind in ("iid", "dirichlet"):
        wanted = _sizes(total, devices, samples)
        alpha = _alpha(how, option) if kind == "dirichlet" else 0.0
        parts = _dirichlet(data.y, wanted, alpha, random) if alpha else _iid(total, wanted, random)
    else:
        raise ConfigError(f"no partition is called {how!r}; there are: iid, dirichlet:ALPHA, groups")
    starts = np.zeros(devices + 1, np.int64)
    starts[1:] = np.cumsum([len(part) for part in parts])
    rows = np.concatenate([np.sort(np.asarray(part, np.int64)) for part in parts])
    return Shares(data, rows, starts)


def _alpha(how: str, option: str) -> float:
    try:
        alpha = float(option)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < 1e6:
        raise ConfigError(f"partition {how!r}: write the concentration behind the colon, as dirichlet:0.3")
    return alpha


def _sizes(total: int, devices: int, samples: Sequence[int | None]) -> list[int]:
    equal = total // devices
    wanted = [max(1, (samples[i] if i < len(samples) else None) or equal) for i in range(devices)]
    scale = min(1.0, total / sum(wanted))
    sizes = [max(1, int(count * scale)) for count in wanted]
    while sum(sizes) > total:
        sizes[max(range(devices), key=sizes.__getitem__)] -= 1
    return sizes


def _iid(total: int, sizes: list[int], random: Random) -> list[list[int]]:
    order = list(range(total))
    random.shuffle(order)
    ends = np.cumsum(sizes).tolist()
    return [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _dirichlet(labels: NDArray[Any], sizes: list[int], alpha: float, random: Random) -> list[list[int]]:
    """Each device draws its own mixture of labels; where a label has run out, the others fill the rest."""
    if labels.ndim != 1:
        raise ConfigError("partition dirichlet needs one label per sample; use iid or groups for this data")
    classes = np.unique(labels)
    pools = [np.flatnonzero(labels == label).tolist() for label in classes]
    for pool in pools:
        random.shuffle(pool)
    parts = []
    for size in sizes:
        weights = [random.gammavariate(alpha, 1.0) for _ in pools]
        part: list[int] = []
        while len(part) < size:
            left = [weight if pool else 0.0 for weight, pool in zip(weights, pools, strict=True)]
            if sum(left) <= 0.0:
                left = [float(len(pool)) for pool in pools]
            drawn = random.choices(range(len(pools)), left, k=size - len(part))
            part += [pools[index].pop() for index in drawn if pools[index]]
        parts.append(part)
    return parts


def _by_groups(data: Data, devices: int, random: Random) -> list[list[int]]:
    if data.group is None:
        raise ConfigError("partition groups needs an array group in the data")
    names, of = np.unique(data.group, return_inverse=True)
    if len(names) < devices:
        raise ConfigError(f"{len(names)} groups cannot be shared out among {devices} devices; take fewer devices")
    order = list(range(len(names)))
    random.shuffle(order)
    by_group = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
    parts: list[list[int]] = [[] for _ in range(devices)]
    for place, group in enumerate(order):
        parts[place % devices] += by_group[group].tolist()
    return parts


# What a process that trains sees


def packed(array: NDArray[Any]) -> bytes:
    """The bytes of an ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def open_share(config: DatasetConfig) -> Share:
    """The dataset of a virtual device; ``options`` names the files of the arrays, and the device's number."""
    options = config.options
    x, y, rows, starts = _mapped(options["x"], options["y"], options["rows"], options["starts"])
    device = options["device"]
    return Share(x, y, rows[starts[device] : starts[device + 1]])


@lru_cache(maxsize=_MAPPED)
def _mapped(*paths: str) -> tuple[NDArray[Any], ...]:
    return tuple(np.asarray(np.load(Path(path), mmap_mode="r", allow_pickle=False)) for path in paths)


class Share:
    """The rows of one virtual device; a dataset, and its own snapshot, since nothing changes."""

    def __init__(self, x: NDArray[Any], y: NDArray[Any], rows: NDArray[np.int64]) -> None:
        self._x, self._y, self._rows = x, y, rows

    def snapshot(self) -> Share:
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        """Copies of these rows."""
        rows = self._rows[indices]
        return self._x[rows], self._y[rows]

    def targets(self, indices: Indices) -> Array:
        """Copies of these rows' targets."""
        targets: Array = self._y[self._rows[indices]]
        return targets

    def keys(self, start: int, stop: int) -> Keys:
        """By the number of the sample in the whole data, as a device whose samples have such an ``id``."""
        return keys_of_ids(self._rows[start:stop].tolist())

    def times(self) -> Times | None:
        """None: the samples have no time."""
        return None
