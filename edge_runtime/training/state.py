"""What a run keeps on the device from job to job: the codec's state, a method's memory, personal tensors.

A job that was done but whose update got lost is done again, and must start from the same state: so the state before
the last job is kept beside the state after it, and each says which assignment made it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edge_runtime.errors import StorageError
from edge_runtime.files import storage_error, write_durably

if TYPE_CHECKING:
    from edge_runtime.methods.base import Memory


class RunState(msgspec.Struct, kw_only=True):
    """``codec`` is only used again by the codec that made it; vectors are float32."""

    assignment: str = ""
    codec_name: str = ""
    codec: bytes = b""
    memory: dict[str, bytes] = {}
    personal: dict[str, bytes] = {}

    def vectors(self, kind: str) -> Memory:
        """``memory`` or ``personal`` as writable float32 arrays."""
        table: dict[str, bytes] = getattr(self, kind)
        return {name: np.frombuffer(data, "<f4").astype(np.float32) for name, data in table.items()}


_decoder = msgspec.msgpack.Decoder(RunState)


class StateFolder:
    """The state of all runs, one folder each; an empty path keeps nothing."""

    def __init__(self, folder: str, run: str) -> None:
        self._folder = Path(folder) / run if folder else None

    def load(self, assignment: str) -> RunState:
        """The state before this assignment, also if it was done already.

        Raises:
            StorageError: the state cannot be read or is damaged.
        """
        current = self._read("current")
        return self._read("previous") if assignment and current.assignment == assignment else current

    def save(self, state: RunState) -> None:
        """Makes ``state`` the current one, durably; writes nothing as long as there is nothing to keep.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        if self._folder is None:
            return
        current = self._read("current")
        keeps = state.codec or state.memory or state.personal
        if not keeps and not current.assignment:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if current.assignment and current.assignment != state.assignment:
                (self._folder / "current.state").replace(self._folder / "previous.state")
        except OSError as error:
            raise storage_error(self._folder, error) from error
        write_durably(self._folder / "current.state", msgspec.msgpack.encode(state))

    def _read(self, name: str) -> RunState:
        if self._folder is None:
            return RunState()
        path = self._folder / f"{name}.state"
        try:
            return _decoder.decode(path.read_bytes())
        except FileNotFoundError:
            return RunState()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
        except msgspec.MsgspecError as error:
            raise StorageError(f"{path}: is damaged ({error}); delete it to start afresh") from error
