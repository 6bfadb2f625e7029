"""What a run keeps on the device from job to job: the codec's state, a method's memory, personal tensors.

The worker writes the state that a run has after an update beside that update; the agent's spool makes both exist in
one transaction (:mod:`edge_runtime.store.spool`). So the state is never ahead of the updates, nor behind them.

A file that rotted on the disk costs what it held, not the run: the next job starts without it, and its update replaces
the file.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edge_runtime.errors import CodecError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edge_runtime.compression.base import State
    from edge_runtime.compression.pipeline import CodecSpec
    from edge_runtime.methods.base import Memory

log = logging.getLogger("edge.worker")

_CRC_BYTES = 4
_LOST = (errno.ENOENT, errno.EIO)  # what the disk does not give back, however often it is asked


@dataclass
class RunState:
    """``codec`` is what :func:`~edge_runtime.compression.pipeline.encode` gave; ``memory`` and ``personal`` are float32
    by name.
    """

    codec: State = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    personal: Memory = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything to keep."""
        return bool(self.codec or self.memory or self.personal)


class _Array(msgspec.Struct, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class _Stored(msgspec.Struct):
    bundle: str
    key: str
    codec: dict[str, _Array]
    memory: dict[str, _Array]
    personal: dict[str, _Array]


_decoder = msgspec.msgpack.Decoder(_Stored)


def codec_key(bundle_sha256: str, spec: CodecSpec) -> str:
    """Names bundle and codec, options included: what the codec keeps belongs to both."""
    text = msgspec.json.encode([bundle_sha256, spec.name, spec.options], order="sorted")
    return hashlib.sha256(text).hexdigest()[:16]


def encode_state(state: RunState, bundle_sha256: str, key: str) -> memoryview:
    """The bytes of a state's file, with a CRC-32 at their end."""
    stored = _Stored(
        bundle=bundle_sha256,
        key=key,
        codec={name: _stored(array) for name, array in state.codec.items()},
        memory={name: _stored(array) for name, array in state.memory.items()},
        personal={name: _stored(array) for name, array in state.personal.items()},
    )
    data = bytearray()
    msgspec.msgpack.Encoder().encode_into(stored, data)
    data += zlib.crc32(data).to_bytes(_CRC_BYTES, "little")
    return memoryview(data)


def load_state(path: Path | None, bundle_sha256: str, key: str) -> RunState:
    """The state of a run for a job with this bundle and this :func:`codec_key`.

    What was made with another bundle is left out, and so is the codec's part with another key. The codec's arrays are
    read-only views. A file that is gone or damaged is as none, with an error in the log.

    Raises:
        StorageError: the file cannot be read now, but maybe later.
    """
    if path is None:
        return RunState()
    try:
        stored = _read(path)
    except CodecError as error:
        log.error(  # noqa: TRY400 - one line for the user
            "%s: %s; the run goes on without it: lost are the residual (what its codec had not sent yet), the memory "
            "of its method and its personal tensors",
            *(path, error),
        )
        return RunState()
    if stored.bundle != bundle_sha256:
        return RunState()
    return RunState(
        codec=_arrays(stored.codec) if stored.key == key else {},
        memory={name: array.copy() for name, array in _arrays(stored.memory).items()},
        personal={name: array.copy() for name, array in _arrays(stored.personal).items()},
    )


def _read(path: Path) -> _Stored:
    """What the file holds, all arrays of it usable.

    Raises:
        CodecError: it is lost.
        StorageError: it cannot be read now, but maybe later.
    """
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        if error.errno in _LOST:
            raise CodecError(f"cannot be read ({error.strerror})") from error
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if zlib.crc32(content) != int.from_bytes(crc, "little"):
        raise CodecError("is damaged (CRC)")
    try:
        stored = _decoder.decode(content)
        for arrays in (stored.codec, stored.memory, stored.personal):
            _arrays(arrays)
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise CodecError(f"is damaged ({error})") from error
    return stored


def _arrays(stored: dict[str, _Array]) -> dict[str, NDArray[Any]]:
    return {name: _array(entry) for name, entry in stored.items()}


def _stored(array: NDArray[Any]) -> _Array:
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return _Array(array.dtype.str, array.shape, array.reshape(-1).view(np.uint8).data)


def _array(entry: _Array) -> NDArray[Any]:
    return np.frombuffer(entry.data, np.dtype(entry.dtype)).reshape(entry.shape)
