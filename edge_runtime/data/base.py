"""The dataset seam, and how local data is opened."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from edge_runtime.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from edge_runtime.data.config import DatasetConfig

    Array: TypeAlias = NDArray[Any]
    Indices: TypeAlias = NDArray[np.integer[Any]]
    Keys: TypeAlias = NDArray[np.uint64]
    Times: TypeAlias = NDArray[np.float64]

GROUP = "edge_runtime.datasets"


class Snapshot(Protocol):
    """A dataset as it was at one moment: rows that arrive later are not seen. Rows count from 0, oldest first."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, indices: Indices) -> tuple[Array, Array]:
        """Inputs ``[len(indices), ...]`` and targets ``[len(indices), ...]`` of these rows, as they are stored."""
        ...

    def targets(self, indices: Indices) -> Array:
        """The targets alone, ``[len(indices), ...]``."""
        ...

    def keys(self, start: int, stop: int) -> Keys:
        """uint64 per row of ``[start, stop)``: a stable hash of the sample's identity, uniform over all values.

        It decides the hold-out, so it must not depend on the order or number of samples; see
        :mod:`edge_runtime.data.holdout` for helpers.
        """
        ...

    def times(self) -> Times | None:
        """Unix seconds float64 per row, or None if the samples have no time."""
        ...


class Dataset(Protocol):
    """Local data of one name."""

    def snapshot(self) -> Snapshot:
        """What is there now; the same object as before if nothing changed, so that checks need not be repeated.

        Raises:
            DataError: missing, unreadable or inconsistent data.
        """
        ...


def open_dataset(config: DatasetConfig, *, code_dir: str = "") -> Dataset:
    """The dataset of a configuration; reads no samples yet.

    ``code_dir`` is put first where the module of a factory is looked for.

    Raises:
        DataError: the path does not exist or has no known format, or the factory cannot be used.
    """
    if config.factory:
        return _from_factory(config, code_dir)
    path = Path(config.path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise DataError(f"dataset {config.name!r}: {path} cannot be read ({error.strerror})") from error
    if not exists:
        raise DataError(
            f"dataset {config.name!r}: {path} does not exist; correct the path in the agent's configuration"
        )
    if config.format == "npy" or (config.format == "auto" and is_folder):
        from edge_runtime.data.npy import NpyFolder

        return NpyFolder(config)
    if config.format == "npz" or path.suffix == ".npz":
        from edge_runtime.data.npz import NpzFile

        return NpzFile(config)
    raise DataError(f"dataset {config.name!r}: {path} is neither a .npz file nor a folder of .npy files")


def _from_factory(config: DatasetConfig, code_dir: str) -> Dataset:
    if code_dir and code_dir not in sys.path:
        sys.path.insert(0, code_dir)
    try:
        dataset: Dataset = _find_factory(config)(config)
    except DataError:
        raise
    except ModuleNotFoundError as error:
        places = f"in {code_dir}, " if code_dir else ""
        raise DataError(
            f"dataset {config.name!r}: factory {config.factory!r} failed: {error}; modules are looked for {places}in "
            "the agent's environment and on PYTHONPATH"
        ) from error
    except Exception as error:  # the user's own code
        raise DataError(f"dataset {config.name!r}: factory {config.factory!r} failed: {_line(error)}") from error
    if not callable(getattr(dataset, "snapshot", None)):
        raise DataError(
            f"dataset {config.name!r}: factory {config.factory!r} returned no dataset (snapshot is missing)"
        )
    return dataset


def _find_factory(config: DatasetConfig) -> Callable[[DatasetConfig], Dataset]:
    module, colon, attribute = config.factory.partition(":")
    if colon:
        factory: Callable[[DatasetConfig], Dataset] = getattr(import_module(module), attribute)
        return factory
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP, name=config.factory):
        found: Callable[[DatasetConfig], Dataset] = entry.load()
        return found
    raise DataError(
        f"dataset {config.name!r}: no installed package offers the dataset {config.factory!r}; install it, or write "
        "factory as module:callable"
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
