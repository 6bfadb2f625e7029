"""What ``agent.toml`` says about one dataset."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edge_runtime.messages import Name


class DatasetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[data]]`` table. Exactly one of ``path`` and ``factory``.

    ``path``: an ``.npz`` file, or a folder of ``.npy`` files (``x.npy`` and ``y.npy``, or shards ``x_000.npy`` and
    ``y_000.npy``). ``factory``: ``module:callable`` or the name of an entry point of the group
    ``edge_runtime.datasets``; it is called with this configuration and returns a
    :class:`~edge_runtime.data.base.Dataset`.

    ``x``, ``y``, ``time`` and ``id`` name the arrays: a key of the ``.npz``, or the first part of a file name in the
    folder. ``time`` (unix seconds per sample) enables windows by age, ``id`` (any integers or strings) makes the
    hold-out follow the sample instead of its content or place. ``options`` are handed to the factory.
    """

    name: Name
    path: str = ""
    factory: str = ""
    format: Literal["auto", "npz", "npy"] = "auto"
    x: str = "x"
    y: str = "y"
    time: str | None = None
    id: str | None = None
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.factory):
            raise ValueError(f"dataset {self.name!r}: set exactly one of path and factory")
