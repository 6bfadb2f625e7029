"""Which way a device comes to the shared model: from what it holds, from the start, or by a snapshot. Pure.

With a lossy downlink all devices hold versions of one shared model (:mod:`edge_runtime.compression.grid`), and each
version is the one before plus a change. A device that missed versions gets all changes since then, or the whole model,
whichever takes fewer bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

REQUEST_BYTES = 250  # around each blob: the request for its chunks and the headers of their packets


def cheapest_base(version: int, held: int | None, changes: Mapping[int, int], snapshot_bytes: int) -> int | None:
    """The version to start from, None for the snapshot; what takes the fewest bytes.

    Args:
        version: that the device is to come to.
        held: version that it holds; None: none, or unknown. Version 0 is always at hand: the bundle has it.
        changes: bytes of the changes that are kept, by the version that they make.
        snapshot_bytes: of the whole model.
    """
    total = 0
    for base in range(version, -1, -1):
        if base in (0, held):  # what is older costs more
            return base if total <= snapshot_bytes + REQUEST_BYTES else None
        size = changes.get(base)
        if size is None:
            break
        total += size + REQUEST_BYTES
    return None
