"""Shared bytes as files in a temporary folder, in memory where the system has a file system there."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

_MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder is made in it
_KEPT = 4  # files whose bytes stay in a process's memory


def temporary_folder(purpose: str) -> Path:
    """A new folder for this process alone, in memory where that can be."""
    place = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix=f"edge-{purpose}-", dir=place))


class SharedFile:
    """Bytes in a file that every process of this machine reads by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self) -> bytes:
        return _read(self.name)

    def path(self) -> Path:
        return _path(self.name)


class SharedFiles:
    """A folder of shared bytes, deleted at the end."""

    def __init__(self) -> None:
        self.folder = temporary_folder("shared")
        self._number = 0
        self._delete = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)  # at exit at the latest

    def share(self, data: bytes) -> SharedFile:
        """See :class:`~coordinator.executors.base.Executor`."""
        path = self.folder / str(self._number)
        self._number += 1
        path.write_bytes(data)
        return SharedFile(str(path))

    def release(self, shared: Any) -> None:
        """See :class:`~coordinator.executors.base.Executor`."""
        shared.path().unlink(missing_ok=True)

    def close(self) -> None:
        """Deletes all."""
        self._delete()


@lru_cache(maxsize=64)
def _path(name: str) -> Path:
    return Path(name)


@lru_cache(maxsize=_KEPT)
def _read(name: str) -> bytes:
    return Path(name).read_bytes()
