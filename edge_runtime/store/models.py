"""Versions of shared models that this device holds, so that a job need only bring what changed since.

One file for each, ``RUN/VERSION.model``: a snapshot of the model on its grid, or the whole model as it came, with a CRC
inside. They are a cache: one that is lost or damaged costs the coordinator a whole model, so nothing is fsynced, but
for what a refused update needs to be decoded here (:meth:`HeldModels.make_durable`).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from edge_runtime.files import fsync_folder, remove, storage_error

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

RUNS_KEPT = 8  # besides those that the caller names


class HeldModels:
    """The models in a folder, which is made when the first one is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: str, version: int) -> Path:
        """Where a version lies, or would lie."""
        return self.folder / run / f"{version}.model"

    def has(self, run: str, version: int) -> bool:
        """Whether this version is here. Version 0 always is: the bundle has the parameters that it is made of."""
        return version == 0 or self.path(run, version).is_file()

    def keep(
        self,
        run: str,
        version: int,
        source: bytes | Path,
        *,
        base: int | None = None,
        pinned: Collection[int] = (),
    ) -> int:
        """Keeps a version; gives the bytes that were written.

        Args:
            run: whose model it is.
            version: of it.
            source: bytes, or a file that holds them already and gets another name.
            base: version from which it was made; stays too, since the coordinator takes that one to be here until it
                hears of the new one. If it is not here, the newest other version stays.
            pinned: more versions that stay.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        path = self.path(run, version)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        written = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not isinstance(source, bytes):
                try:
                    os.link(source, temporary)
                except OSError:  # no links on this file system, or to another one
                    source = source.read_bytes()
            if isinstance(source, bytes):
                temporary.write_bytes(source)
                written = len(source)
            temporary.replace(path)
            os.utime(path.parent)
            self._prune(path, base, pinned)
        except OSError as error:
            remove(temporary)
            raise storage_error(path, error) from error
        return written

    def drop(self, run: str, version: int) -> None:
        """Forgets a version that turned out to be damaged."""
        remove(self.path(run, version))

    def make_durable(self, run: str, version: int) -> None:
        """Lets a version survive a power cut.

        Raises:
            StorageError: it is not here, or the disk fails.
        """
        path = self.path(run, version)
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            for folder in (path.parent, self.folder, self.folder.parent):
                fsync_folder(folder)
        except OSError as error:
            raise storage_error(path, error) from error

    def prune_runs(self, named: Collection[str]) -> None:
        """Forgets all runs but those ``named`` and the ones used last."""
        with contextlib.suppress(OSError):  # a worker may be at work in one; there is a next time
            others = [run for run in self.folder.iterdir() if run.name not in named]
            others.sort(key=lambda run: run.stat().st_mtime, reverse=True)
            for run in others[RUNS_KEPT:]:
                for entry in run.iterdir():
                    remove(entry)
                run.rmdir()

    def used_bytes(self) -> int:
        """Bytes of all models. One that came as a blob counts here and there: it has two names on the disk."""
        return sum(size for _, size in self._sizes())

    def evict(self, limit_bytes: int, pinned: Mapping[str, Collection[int]], spared: Collection[str]) -> None:
        """Forgets models until all fit the limit, those of the run that was used longest ago first.

        Args:
            limit_bytes: for all models.
            pinned: versions by run that stay.
            spared: runs of which all stay.
        """
        total = self.used_bytes()
        for path, size in self._sizes():
            if total <= limit_bytes:
                return
            run = path.parent.name
            if run not in spared and path.name not in {f"{version}.model" for version in pinned.get(run, ())}:
                remove(path)
                total -= size

    def _sizes(self) -> list[tuple[Path, int]]:
        found: list[tuple[Path, int]] = []
        with contextlib.suppress(OSError):  # none yet, or a worker is at work in one
            runs = sorted(self.folder.iterdir(), key=lambda run: run.stat().st_mtime)
            for run in runs:
                paths = sorted(run.iterdir(), key=lambda path: path.stat().st_mtime)
                found += [(path, path.stat().st_size) for path in paths]
        return found

    def _prune(self, path: Path, base: int | None, pinned: Collection[int]) -> None:
        others = [entry for entry in path.parent.iterdir() if entry != path]
        models = [entry for entry in others if entry.suffix == path.suffix]  # the rest was left half written
        expected = path.with_name(f"{base}.model")
        if expected not in models and models:
            expected = max(models, key=lambda entry: entry.stat().st_mtime)
        kept = {expected, *(path.with_name(f"{version}.model") for version in pinned)}
        for entry in others:
            if entry not in kept:
                remove(entry)
