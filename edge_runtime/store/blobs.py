"""Content-addressed files, and blobs that are still arriving.

A blob is known by its SHA-256. While chunks arrive, ``partial/<sha256>.part`` holds the bytes at their places and
``.map`` one record per chunk (flag and CRC-32), both written as chunks come in: after the death of the process every
chunk whose CRC still fits is kept, and after a power cut the whole-blob hash has the last word.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import zlib
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.errors import StorageError, TransferError
from edge_runtime.files import fsync_folder, remove, storage_error, write_durably

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from edge_runtime.messages import BlobRef

_MAP_HEADER = struct.Struct("<QI")  # size_bytes, chunk_bytes
_MAP_ENTRY = struct.Struct("<BI")  # 1 when the chunk is written, its CRC-32
_READ_BYTES = 1 << 20
PARTIAL_KEPT_S = 7 * 86400.0
CHUNKS_LIMIT = 1 << 18  # bookkeeping is memory: 25 GB in chunks of 96 KiB


class StoredBlob(msgspec.Struct, frozen=True):
    """Hash and size of a blob in a store."""

    sha256: str
    size_bytes: int


class BlobStore:
    """A folder of blobs, each a file named by the SHA-256 of its content.

    Args:
        folder: made if missing.
        limit_bytes: largest blob that will be received; None: no limit.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.partial_folder = folder / "partial"
        try:
            self.partial_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error

    def sweep(self) -> None:
        """Deletes what dead processes left half written, and partial blobs nobody added to for a week.

        Only for the one process that owns the folder, before it writes: others may be writing while it looks.
        """
        try:
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
            limit = time.time() - PARTIAL_KEPT_S
            for leftover in self.partial_folder.iterdir():
                if leftover.stat().st_mtime < limit:
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def path(self, sha: str) -> Path:
        """Where the blob lies, or would lie."""
        return self.folder / sha

    def has(self, sha: str) -> bool:
        """Whether the whole blob is here."""
        return self.path(sha).is_file()

    def put(self, data: bytes | memoryview, *, durable: bool = True) -> StoredBlob:
        """Stores bytes; storing the same bytes again is free. Unless ``durable``, a power cut may damage them.

        Raises:
            StorageError: the disk is full or not writable.
        """
        blob = StoredBlob(sha256(data).hexdigest(), memoryview(data).nbytes)
        if self.has(blob.sha256):
            return blob
        path = self.path(blob.sha256)
        if durable:
            write_durably(path, data)
            return blob
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            remove(temporary)
            raise storage_error(path, error) from error
        return blob

    def put_file(self, source: Path) -> StoredBlob:
        """Stores a copy of a file durably."""
        try:
            return self.put(source.read_bytes())
        except OSError as error:
            raise StorageError(f"{source}: cannot be read ({error.strerror})") from error

    def delete(self, sha: str) -> None:
        """Forgets a blob; harmless when it is not here.

        Raises:
            StorageError: the file system does not let it.
        """
        try:
            self.path(sha).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.path(sha), error) from error

    def receive(self, blob: BlobRef) -> PartialBlob:
        """Starts or resumes receiving a blob.

        Raises:
            TransferError: the blob is larger than this store takes.
            StorageError: the disk is full or not writable.
        """
        if self.limit_bytes is not None and blob.size_bytes > self.limit_bytes:
            raise TransferError(
                f"blob of {blob.size_bytes} bytes refused: the limit here is {self.limit_bytes}; raise the limit in "
                "the configuration or send a smaller model"
            )
        if blob.size_bytes > CHUNKS_LIMIT * blob.chunk_bytes:
            raise TransferError(
                f"blob of {blob.size_bytes} bytes in chunks of {blob.chunk_bytes} refused: "
                f"{CHUNKS_LIMIT} chunks are the most"
            )
        return PartialBlob(self, blob)

    def used_bytes(self) -> int:
        """Bytes of all whole blobs."""
        return sum(entry.stat().st_size for entry in self.folder.iterdir() if entry.is_file())

    def evict(self, quota_bytes: int, keep: Collection[str]) -> list[str]:
        """Deletes the least recently used blobs not in ``keep`` until all fit the quota; gives what was deleted.

        What arrived of a blob that is not in ``keep`` is deleted in any case: nobody waits for it any more.
        """
        for entry in self.partial_folder.iterdir():
            if entry.stem not in keep:
                remove(entry)
        files = [(entry.stat(), entry) for entry in self.folder.iterdir() if entry.is_file()]
        files.sort(key=lambda item: item[0].st_mtime)
        total, deleted = sum(stat.st_size for stat, _ in files), []
        for stat, entry in files:
            if total <= quota_bytes:
                break
            if entry.name not in keep:
                remove(entry)
                total -= stat.st_size
                deleted.append(entry.name)
        return deleted

    def touch(self, sha: str) -> None:
        """Marks a blob as used now, for :meth:`evict`; where it cannot be marked it is evicted a little earlier."""
        with contextlib.suppress(OSError):
            os.utime(self.path(sha))


class PartialBlob:
    """One blob that is being received; see the module's text for what survives what."""

    def __init__(self, store: BlobStore, blob: BlobRef) -> None:
        self.blob = blob
        self.chunks = max(1, -(-blob.size_bytes // blob.chunk_bytes))
        self._store = store
        self._part = store.partial_folder / f"{blob.sha256}.part"
        self._map = store.partial_folder / f"{blob.sha256}.map"
        self._have = bytearray(self.chunks)
        self.missing = self.chunks
        self._hash, self._hashed = sha256(), 0  # over the chunks [0, _hashed)
        self._fd = self._map_fd = -1
        try:
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o600)
            self._map_fd = os.open(self._map, os.O_RDWR | os.O_CREAT, 0o600)
            self._resume()
        except OSError as error:
            self.close()
            raise storage_error(self._part, error) from error

    def add(self, index: int, crc: int, data: bytes | memoryview) -> bool:
        """Takes one chunk; False if it was here already.

        Raises:
            TransferError: no such chunk, wrong length, or the CRC does not fit: the sender's copy must come again.
            StorageError: the disk is full; what is here stays.
        """
        if not 0 <= index < self.chunks:
            raise TransferError(f"chunk {index} refused: blob {self.blob.sha256[:12]} has {self.chunks} chunks")
        if self._have[index]:
            return False
        if len(data) != self._length(index):
            raise TransferError(f"chunk {index} of blob {self.blob.sha256[:12]} has {len(data)} bytes, refused")
        if zlib.crc32(data) != crc:
            raise TransferError(f"chunk {index} of blob {self.blob.sha256[:12]} is damaged (CRC), refused")
        try:
            _write_all(self._fd, data, index * self.blob.chunk_bytes)
            _write_all(self._map_fd, _MAP_ENTRY.pack(1, crc), _MAP_HEADER.size + index * _MAP_ENTRY.size)
        except OSError as error:
            raise storage_error(self._part, error) from error
        self._have[index] = 1
        self.missing -= 1
        if index == self._hashed:  # chunks mostly come in order: hash while the bytes are warm
            self._hash.update(data)
            self._hashed += 1
        return True

    def missing_ranges(self, limit: int = 1000) -> list[tuple[int, int]]:
        """(first, count) of chunks still to come, the first ``limit`` ranges."""
        ranges: list[tuple[int, int]] = []
        at = self._have.find(0)
        while at >= 0 and len(ranges) < limit:
            end = self._have.find(1, at)
            end = self.chunks if end < 0 else end
            ranges.append((at, end - at))
            at = self._have.find(0, end)
        return ranges

    def finish(self, *, durable: bool) -> Path:
        """Checks the hash and gives the blob its place in the store, after an fsync if ``durable``.

        Raises:
            TransferError: the hash does not fit; all chunks are forgotten and must come again.
            StorageError: the disk is full or not writable.
        """
        target = self._store.path(self.blob.sha256)
        try:
            for index in range(self._hashed, self.chunks):
                self._hash.update(os.pread(self._fd, self._length(index), index * self.blob.chunk_bytes))
                self._hashed = index + 1
            if self._hash.hexdigest() != self.blob.sha256:
                self._forget()
                raise TransferError(
                    f"blob {self.blob.sha256[:12]} arrived with another SHA-256, all chunks asked again"
                )
            if durable:
                os.fsync(self._fd)
            self._part.rename(target)
            if durable:
                fsync_folder(target.parent)
        except OSError as error:
            raise storage_error(target, error) from error
        self.close()
        remove(self._map)
        return target

    def discard(self) -> None:
        """Forgets all that arrived."""
        self.close()
        remove(self._part)
        remove(self._map)

    def close(self) -> None:
        """Closes the files; what arrived stays for the next time."""
        for fd in (self._fd, self._map_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._map_fd = -1

    def _length(self, index: int) -> int:
        return min(self.blob.chunk_bytes, self.blob.size_bytes - index * self.blob.chunk_bytes)

    def _resume(self) -> None:
        header = _MAP_HEADER.pack(self.blob.size_bytes, self.blob.chunk_bytes)
        stored = os.pread(self._map_fd, _MAP_HEADER.size + self.chunks * _MAP_ENTRY.size, 0)
        if stored[: _MAP_HEADER.size] != header:
            self._forget()
            return
        entries = stored[_MAP_HEADER.size :]
        for index in range(len(entries) // _MAP_ENTRY.size):
            flag, crc = _MAP_ENTRY.unpack_from(entries, index * _MAP_ENTRY.size)
            if flag:
                data = os.pread(self._fd, self._length(index), index * self.blob.chunk_bytes)
                if len(data) == self._length(index) and zlib.crc32(data) == crc:
                    self._have[index] = 1
                    self.missing -= 1

    def _forget(self) -> None:
        self._have, self.missing = bytearray(self.chunks), self.chunks
        self._hash, self._hashed = sha256(), 0
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._map_fd, 0)
        _write_all(self._map_fd, _MAP_HEADER.pack(self.blob.size_bytes, self.blob.chunk_bytes), 0)


class BlobReader:
    """Reads chunks of a file for sending; holds one file descriptor and no bytes."""

    def __init__(self, path: Path, blob: BlobRef) -> None:
        self.blob = blob
        self.chunks = max(1, -(-blob.size_bytes // blob.chunk_bytes))
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error

    def chunk(self, index: int) -> bytes:
        """Bytes of one chunk; raises StorageError if they cannot be read."""
        try:
            return os.pread(self._fd, self.blob.chunk_bytes, index * self.blob.chunk_bytes)
        except OSError as error:
            raise StorageError(f"blob {self.blob.sha256[:12]} cannot be read ({error.strerror})") from error

    def close(self) -> None:
        """Closes the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def hash_file(path: Path) -> StoredBlob:
    """SHA-256 and size of a file.

    Raises:
        StorageError: the file cannot be read.
    """
    digest, size = sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    return StoredBlob(digest.hexdigest(), size)


def indexes(ranges: Iterable[tuple[int, int]], chunks: int) -> Iterable[int]:
    """The chunk numbers of (first, count) ranges that a blob of ``chunks`` chunks has; the rest is ignored."""
    for first, count in ranges:
        yield from range(max(0, first), min(first + count, chunks))


def _write_all(fd: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
