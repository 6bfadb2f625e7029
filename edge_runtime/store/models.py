"""Versions of shared models that this device holds, so that a job need only bring what changed since.

One file for each, ``RUN/VERSION.model``: a snapshot of the model on its grid, with a CRC inside. They are a cache: one
that is lost or damaged costs the coordinator a whole model, so nothing is fsynced.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from edge_runtime.files import remove, storage_error

if TYPE_CHECKING:
    from pathlib import Path

RUNS_KEPT = 8


class HeldModels:
    """The models in a folder; made when the first one is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: str, version: int) -> Path:
        """Where a version lies, or would lie."""
        return self.folder / run / f"{version}.model"

    def has(self, run: str, version: int) -> bool:
        """Whether this version is here. Version 0 always is: the bundle has the parameters that it is made of."""
        return version == 0 or self.path(run, version).is_file()

    def keep(self, run: str, version: int, source: bytes | Path, *, base: int | None = None) -> int:
        """Keeps a version, as bytes or as a file that holds it already; gives the bytes that were written.

        Of the run's other versions stays ``base``, from which this one was made and which the coordinator takes to be
        here until it hears of the new one; of other runs stay those used last.

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
            self._prune(path, base)
        except OSError as error:
            remove(temporary)
            raise storage_error(path, error) from error
        return written

    def drop(self, run: str, version: int) -> None:
        """Forgets a version that turned out to be damaged."""
        remove(self.path(run, version))

    def _prune(self, path: Path, base: int | None) -> None:
        others = [entry for entry in path.parent.iterdir() if entry != path]
        models = [entry for entry in others if entry.suffix == path.suffix]  # the rest was left half written
        expected = path.with_name(f"{base}.model")
        if expected not in models and models:
            expected = max(models, key=lambda entry: entry.stat().st_mtime)
        for entry in others:
            if entry != expected:
                remove(entry)
        runs = sorted(self.folder.iterdir(), key=lambda run: run.stat().st_mtime, reverse=True)
        for run in runs[RUNS_KEPT:]:
            for entry in run.iterdir():
                remove(entry)
            run.rmdir()
