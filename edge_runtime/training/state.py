"""What a run keeps on the device from job to job: the codec's state, a method's memory, personal tensors.

The worker writes the state that a run has after an update beside that update; the agent's spool makes both exist in
one transaction (:mod:`edge_runtime.store.spool`). So the state is never ahead of the updates, nor behind them.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edge_runtime.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edge_runtime.compression.base import State
    from edge_runtime.compression.pipeline import CodecSpec
    from edge_runtime.methods.base import Memory

_CRC_BYTES = 4


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
    read-only views.

    Raises:
        StorageError: the file cannot be read or is damaged.
    """
    if path is None:
        return RunState()
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); restart the agent to start afresh") from error
    content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if zlib.crc32(content) != int.from_bytes(crc, "little"):
        raise StorageError(f"{path}: is damaged (CRC); delete it and restart the agent to start afresh")
    try:
        stored = _decoder.decode(content)
        if stored.bundle != bundle_sha256:
            return RunState()
        return RunState(
            codec={name: _array(entry) for name, entry in stored.codec.items()} if stored.key == key else {},
            memory={name: _array(entry).copy() for name, entry in stored.memory.items()},
            personal={name: _array(entry).copy() for name, entry in stored.personal.items()},
        )
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise StorageError(f"{path}: is damaged ({error}); delete it and restart the agent to start afresh") from error


def _stored(array: NDArray[Any]) -> _Array:
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return _Array(array.dtype.str, array.shape, array.reshape(-1).view(np.uint8).data)


def _array(entry: _Array) -> NDArray[Any]:
    return np.frombuffer(entry.data, np.dtype(entry.dtype)).reshape(entry.shape)
