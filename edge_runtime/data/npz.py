"""A dataset in one ``.npz`` file; read whole, so it has to fit into memory."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.data.holdout import keys_of_content, keys_of_ids
from edge_runtime.errors import DataError

if TYPE_CHECKING:
    from edge_runtime.data.base import Array, Indices, Keys, Times
    from edge_runtime.data.config import DatasetConfig


class NpzFile:
    """Reads the file again only after it changed."""

    def __init__(self, config: DatasetConfig) -> None:
        self._config = config
        self._path = Path(config.path)
        self._seen: tuple[int, int, int] | None = None
        self._snapshot: NpzSnapshot | None = None

    def snapshot(self) -> NpzSnapshot:
        """The file's arrays; see :class:`~edge_runtime.data.base.Dataset`."""
        name, path = self._config.name, self._path
        try:
            stat = path.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._snapshot is None or seen != self._seen:
                self._snapshot = None  # the old arrays go before the new ones come
                self._snapshot, self._seen = _load(self._config, path), seen
        except OSError as error:
            raise DataError(f"dataset {name!r}: {path} cannot be read ({error.strerror})") from error
        except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(
                f"dataset {name!r}: {path} is damaged, half-written or holds Python objects ({error}); write it under "
                "another name and rename it when it is complete"
            ) from error
        return self._snapshot


class NpzSnapshot:
    """Arrays in memory, in the type they were stored in."""

    def __init__(self, x: Array, y: Array, times: Times | None, ids: Array | None) -> None:
        self._x, self._y, self._times, self._ids = x, y, times, ids

    def __len__(self) -> int:
        return len(self._y)

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        """Copies of these rows."""
        return self._x[indices], self._y[indices]

    def targets(self, indices: Indices) -> Array:
        """Copies of these rows' targets."""
        return self._y[indices]

    def keys(self, start: int, stop: int) -> Keys:
        """By id, or by content where there are no ids."""
        if self._ids is not None:
            return keys_of_ids(self._ids[start:stop].tolist())
        return keys_of_content(self._x[start:stop], self._y[start:stop])

    def times(self) -> Times | None:
        """Unix seconds, if configured."""
        return self._times


def _load(config: DatasetConfig, path: Path) -> NpzSnapshot:
    with np.load(path, allow_pickle=False) as file:
        arrays: dict[str, Array] = {}
        for key in filter(None, (config.x, config.y, config.time, config.id)):
            if key not in file.files:
                raise DataError(
                    f"dataset {config.name!r}: {path} has no array {key!r}; it has {', '.join(file.files) or 'none'}; "
                    "set x, y, time and id in the agent's configuration"
                )
            arrays[key] = file[key]
    sizes = {key: len(array) if array.ndim else 0 for key, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"dataset {config.name!r}: {path} holds arrays of different lengths: {sizes}")
    times = None if config.time is None else arrays[config.time].astype(np.float64)
    return NpzSnapshot(arrays[config.x], arrays[config.y], times, None if config.id is None else arrays[config.id])
