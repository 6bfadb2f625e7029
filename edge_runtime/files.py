"""Small helpers for files: typed TOML, and writes that survive a power cut."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edge_runtime.errors import ConfigError, StorageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from pathlib import Path

_T = TypeVar("_T")


def load_toml(path: Path, kind: type[_T]) -> _T:
    """Reads a TOML file into a struct.

    Raises:
        ConfigError: unreadable, no TOML, an unknown key, or a value of the wrong type; the message names the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid TOML ({error})") from error
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        from edge_runtime.toml_errors import explained

        raise ConfigError(f"{path}: {explained(str(error), kind, table)}") from error


def lock_folder(folder: Path, taken: str) -> int:
    """Makes ``folder`` if it is missing and locks it; closing the handle, or the end of the process, unlocks it.

    Raises:
        ConfigError: another process holds the lock; the message is ``taken``.
        StorageError: the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"{folder}: state_dir cannot be used ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ConfigError(f"{folder}: {taken}") from error
    return handle


def fsync_folder(folder: Path) -> None:
    """Makes renames and deletions inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes | memoryview, *, mode: int = 0o644) -> None:
    """Writes a file so that after a power cut it holds either the old or all of the new content.

    Raises:
        StorageError: the disk is full or cannot be written; the old content is untouched.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
        try:
            view, at = memoryview(data), 0
            view = view.cast("B") if view.nbytes else memoryview(b"")
            while at < len(view):
                at += os.write(handle, view[at:])
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def make_durable(path: Path) -> None:
    """Makes a file that was written before, and its name, survive a power cut.

    Raises:
        StorageError: the disk is full or failing.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


def remove(path: Path) -> None:
    """Deletes a file nobody needs; where that fails (a card gone read-only) it stays, for the next sweep to try."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The clear error for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: no space left on the device; free space or lower the quota, nothing was lost")
    return StorageError(f"{path}: cannot be written ({error.strerror})")
