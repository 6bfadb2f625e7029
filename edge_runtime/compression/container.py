"""The container: encoded vectors, bound to the tensors, the model version and the update that they are of.

All integers little-endian::

    2 bytes  magic "EU"
    u8       format version in the low 6 bits, bytes of padding before the sections in the high 2
    u8       number of the codec; 0: u8 length and the name follow
    u32      fingerprint of the channels and their layouts, as the receiver's own manifest gives them
    u32      tag of the update, 0 for a model
    varint   model version that the values are relative to, 0 for a model
    varint   length of the channel's section, for all channels but the last (channels in the order of their names)
    padding  0 to 3 zeros, so that the sections begin where the codec wants them
    sections one per channel: buffers (of a lossy codec only), payload
    u32      CRC-32 of everything before

Shapes never come from the bytes: a receiver decodes with its own layouts, and refuses what does not fit them.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edge_runtime.compression.base import Layout

MAGIC = b"EU"
FORMAT_VERSION = 2
_FIXED = struct.Struct("<2sBB")
_BINDING = struct.Struct("<4sI")
_CRC = struct.Struct("<I")
_MAX_CHANNELS = 16
_MAX_NAME_BYTES = 64
LARGEST_VERSION = 2**53


class Header(msgspec.Struct, kw_only=True):
    """What a container says before its sections. ``codec`` is a number, or the name of another package's codec."""

    codec: int | str
    tag: int = 0
    base_version: int = 0


def size_limit(layouts: Mapping[str, Layout]) -> int:
    """Most bytes of a container with these channels; what is longer need not be read."""
    return sum(16 * layout.size + 64 * 1024 for layout in layouts.values())


def update_tag(update: object) -> int:
    """The tag of an update, from the text of its id; never 0."""
    return int.from_bytes(hashlib.sha256(str(update).encode()).digest()[:4], "little") or 1


def fingerprint(layouts: Mapping[str, Layout]) -> bytes:
    """Four bytes that stand for the channels and their layouts."""
    if len(layouts) == 1:
        ((name, layout),) = layouts.items()
        return hashlib.sha256(name.encode() + b"\0" + layout.fingerprint).digest()[:4]
    parts = b"".join(name.encode() + b"\0" + layouts[name].fingerprint for name in sorted(layouts))
    return hashlib.sha256(parts).digest()[:4]


def pack(
    header: Header, layouts: Mapping[str, Layout], sections: Sequence[Sequence[bytes | memoryview]], alignment: int = 1
) -> bytes:
    """The container.

    Args:
        header: what it says before its sections.
        layouts: of the channels.
        sections: parts per channel, in the order of the channels' names.
        alignment: 1, 2 or 4; the first section begins at a multiple of it.

    Raises:
        CodecError: too many channels, or a version or name that the format does not hold.
    """
    if len(sections) > _MAX_CHANNELS or not 0 <= header.base_version <= LARGEST_VERSION:
        raise CodecError(f"{len(sections)} channels or version {header.base_version} are over the format's limits")
    number = header.codec if isinstance(header.codec, int) else 0
    parts: list[bytes | memoryview] = [b""]
    if isinstance(header.codec, str):
        name = header.codec.encode()
        if not 0 < len(name) <= _MAX_NAME_BYTES:
            raise CodecError(f"codec name {header.codec[:80]!r} is empty or longer than {_MAX_NAME_BYTES} bytes")
        parts += [bytes([len(name)]), name]
    parts += [_BINDING.pack(fingerprint(layouts), header.tag), varint(header.base_version)]
    parts += [varint(sum(len(part) for part in section)) for section in sections[:-1]]
    padding = -(_FIXED.size + sum(len(part) for part in parts)) % alignment
    parts[0] = _FIXED.pack(MAGIC, FORMAT_VERSION | padding << 6, number)
    parts.append(bytes(padding))
    for section in sections:
        parts += section
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([*parts, _CRC.pack(crc)])


def header_bytes(header: Header, channels: int) -> int:
    """Size of all that is not a section; a channel's length is taken as 4 bytes."""
    name = 1 + len(header.codec.encode()) if isinstance(header.codec, str) else 0
    return _FIXED.size + name + _BINDING.size + len(varint(header.base_version)) + 4 * max(0, channels - 1) + _CRC.size


def unpack(data: bytes | memoryview, layouts: Mapping[str, Layout]) -> tuple[Header, dict[str, tuple[int, int]]]:
    """The header, and first byte and end of every channel's section in ``data``.

    Raises:
        CodecError: no container, a newer version, damaged, cut off, or made for other tensors.
    """
    view = memoryview(data)
    number, padding, end = _check_outside(view, layouts)
    at = _FIXED.size
    codec: int | str = number
    if number == 0:
        codec, at = _name(view, at, end)
    if at + _BINDING.size > end:
        raise CodecError("header is cut off")
    print_, tag = _BINDING.unpack_from(view, at)
    if print_ != fingerprint(layouts):
        raise CodecError("made for other tensors: names, shapes or channels differ from this bundle's manifest")
    base_version, at = read_varint(view, at + _BINDING.size, end, LARGEST_VERSION)
    lengths = []
    for _ in range(len(layouts) - 1):
        length, at = read_varint(view, at, end, end)
        lengths.append(length)
    if at + padding > end or any(view[at : at + padding]):
        raise CodecError("padding is cut off or not zero")
    at += padding
    lengths.append(end - at - sum(lengths))
    if lengths[-1] < 0:
        raise CodecError("a channel's section is cut off")
    sections = {}
    for name, length in zip(sorted(layouts), lengths, strict=True):
        sections[name] = (at, at + length)
        at += length
    return Header(codec=codec, tag=tag, base_version=base_version), sections


def _check_outside(view: memoryview, layouts: Mapping[str, Layout]) -> tuple[int, int, int]:
    """Number of the codec, bytes of padding, and where the CRC begins, which is right."""
    least = _FIXED.size + _BINDING.size + 1 + _CRC.size
    if len(view) < least or bytes(view[:2]) != MAGIC:
        raise CodecError("these bytes are no update or model (bad magic, or too short)")
    if len(view) > size_limit(layouts):
        raise CodecError(f"{len(view)} bytes are more than these {len(layouts)} channels can take")
    _, version, number = _FIXED.unpack_from(view)
    if version & 63 != FORMAT_VERSION:
        raise CodecError(f"format version {version & 63} is not read here ({FORMAT_VERSION} is); update the older side")
    end = len(view) - _CRC.size
    if _CRC.unpack_from(view, end)[0] != zlib.crc32(view[:end]):
        raise CodecError("the bytes are damaged (CRC)")
    return number, version >> 6, end


def _name(view: memoryview, at: int, end: int) -> tuple[str, int]:
    length = view[at]
    if not 0 < length <= _MAX_NAME_BYTES or at + 1 + length > end:
        raise CodecError("name of the codec is cut off")
    try:
        return bytes(view[at + 1 : at + 1 + length]).decode(), at + 1 + length
    except UnicodeDecodeError as error:
        raise CodecError("name of the codec is damaged") from error


def varint(number: int) -> bytes:
    """LEB128 of a number >= 0."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(view: memoryview, at: int, end: int, limit: int) -> tuple[int, int]:
    """A number up to ``limit`` and the place behind it.

    Raises:
        CodecError: cut off, above the limit, or written longer than needed.
    """
    number = shift = 0
    while True:
        if at >= end or shift > 63:
            raise CodecError("a number is cut off or too long")
        byte = view[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if number > limit or (byte == 0 and shift > 7):
        raise CodecError(f"a number is above its limit of {limit}, or badly written")
    return number, at
