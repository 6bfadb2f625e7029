"""A folder of ``.npy`` files, memory-mapped: data may be larger than memory and may still be growing.

``x.npy`` and ``y.npy``, or shards ``x_000.npy`` and ``y_000.npy``, ``x_001.npy``, ... in the order of their names.
New data comes as new shards. The rule for a shard that is not complete (its file cut off, or one of its files still
missing): the last shard may be incomplete, it is being written and is left out; any earlier one is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.data.holdout import keys_of_ids, keys_of_rows
from edge_runtime.errors import DataError

if TYPE_CHECKING:
    from edge_runtime.data.base import Array, Indices, Keys, Times
    from edge_runtime.data.config import DatasetConfig


class NpyFolder:
    """Maps each shard once; a shard that was replaced is mapped again."""

    def __init__(self, config: DatasetConfig) -> None:
        self._config = config
        self._folder = Path(config.path)
        self._parts = tuple(part for part in (config.x, config.y, config.time, config.id) if part is not None)
        self._shards: dict[str, _Shard] = {}
        self._snapshot: NpySnapshot | None = None

    def snapshot(self) -> NpySnapshot:
        """The complete shards; see :class:`~edge_runtime.data.base.Dataset`."""
        config, folder = self._config, self._folder
        try:
            names = {file.name for file in folder.iterdir() if file.suffix == ".npy"}
        except OSError as error:
            raise DataError(f"dataset {config.name!r}: {folder} cannot be read ({error.strerror})") from error
        suffixes = {suffix for name in names for suffix in [self._suffix(name)] if suffix is not None}
        found = sorted(suffixes, key=_by_number)
        if not found:
            raise DataError(
                f"dataset {config.name!r}: {folder} holds neither {config.x}.npy nor {config.x}_*.npy; set x and y in "
                "the agent's configuration to the names of the files"
            )
        shards = {suffix: self._shard(suffix) for suffix in found[:-1]}
        try:
            shards[found[-1]] = self._shard(found[-1])
        except DataError:
            if found[-1] == "":
                raise
        if not shards:
            raise DataError(f"dataset {config.name!r}: {folder} holds no complete shard yet")
        if self._snapshot is None or shards != self._shards:
            self._shards, self._snapshot = shards, NpySnapshot(config, list(shards.values()))
        return self._snapshot

    def _suffix(self, name: str) -> str | None:
        for part in self._parts:
            if name == f"{part}.npy":
                return ""
            if name.startswith(f"{part}_"):
                return name[len(part) : -len(".npy")]
        return None

    def _shard(self, suffix: str) -> _Shard:
        stamp, arrays = [], []
        known = self._shards.get(suffix)
        for part in self._parts:
            path = self._folder / f"{part}{suffix}.npy"
            try:
                stat = path.stat()
            except OSError as error:
                raise self._incomplete(f"{path} is missing or cannot be read") from error
            stamp.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        if known is not None and known.stamp == stamp:
            return known
        for part in self._parts:
            path = self._folder / f"{part}{suffix}.npy"
            try:
                arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise self._incomplete(f"{path} is cut off or no .npy file ({error})") from error
        sizes = {len(array) if array.ndim else 0 for array in arrays}
        if len(sizes) != 1:
            raise self._incomplete(
                f"{self._folder}: files *{suffix}.npy hold different numbers of rows {sorted(sizes)}"
            )
        return _Shard(suffix, stamp, dict(zip(self._parts, arrays, strict=True)), sizes.pop())

    def _incomplete(self, detail: str) -> DataError:
        return DataError(
            f"dataset {self._config.name!r}: {detail}; complete or delete it, only the newest shard may be half-written"
        )


class NpySnapshot:
    """Rows of all shards, one after the other; only the rows of a batch are ever copied."""

    def __init__(self, config: DatasetConfig, shards: list[_Shard]) -> None:
        self._config = config
        self._shards = shards
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        for part in (config.x, config.y):
            kinds = {(shard.arrays[part].shape[1:], shard.arrays[part].dtype.str) for shard in shards}
            if len(kinds) > 1:
                raise DataError(f"dataset {config.name!r}: shards of {part!r} differ in shape or type: {sorted(kinds)}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        """Copies of these rows."""
        return self._gather(self._config.x, indices), self._gather(self._config.y, indices)

    def targets(self, indices: Indices) -> Array:
        """Copies of these rows' targets."""
        return self._gather(self._config.y, indices)

    def _gather(self, part: str, indices: Indices) -> Array:
        first: Array = self._shards[0].arrays[part]
        out = np.empty((len(indices), *first.shape[1:]), first.dtype)
        if len(self._shards) == 1:
            out[:] = first[indices]
            return out
        where = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(where):
            rows = where == number
            out[rows] = self._shards[number].arrays[part][indices[rows] - self._starts[number]]
        return out

    def keys(self, start: int, stop: int) -> Keys:
        """By id, or by shard and row where there are no ids."""
        parts = [np.empty(0, np.uint64)]
        for shard, begin in zip(self._shards, self._starts.tolist(), strict=False):
            low, high = max(start - begin, 0), min(stop - begin, shard.rows)
            if low < high and self._config.id is not None:
                parts.append(keys_of_ids(shard.arrays[self._config.id][low:high].tolist()))
            elif low < high:
                parts.append(keys_of_rows(shard.suffix, low, high))
        return np.concatenate(parts)

    def times(self) -> Times | None:
        """Unix seconds, if configured."""
        if self._config.time is None:
            return None
        return np.concatenate([shard.arrays[self._config.time] for shard in self._shards]).astype(np.float64)


class _Shard:
    def __init__(self, suffix: str, stamp: list[tuple[int, int, int]], arrays: dict[str, Array], rows: int) -> None:
        self.suffix, self.stamp, self.arrays, self.rows = suffix, stamp, arrays, rows


def _by_number(suffix: str) -> list[tuple[bool, int, str]]:
    """Sorts ``_998`` before ``_1000``: runs of digits by their value, the rest as text."""
    parts = re.split(r"([0-9]+)", suffix)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
