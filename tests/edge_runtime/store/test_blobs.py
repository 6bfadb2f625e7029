"""Content-addressed blobs and blobs that are still arriving."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections import deque
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

from edge_runtime.errors import StorageError, TransferError
from edge_runtime.messages import BlobRef
from edge_runtime.store.blobs import BlobReader, BlobStore, hash_file, indexes

ROOT = Path(__file__).parents[3]


def blob_of(data: bytes, chunk_bytes: int = 100) -> BlobRef:
    return BlobRef(sha256=sha256(data).hexdigest(), size_bytes=len(data), chunk_bytes=chunk_bytes)


def chunk(data: bytes, index: int, chunk_bytes: int = 100) -> tuple[int, int, bytes]:
    part = data[index * chunk_bytes : (index + 1) * chunk_bytes]
    return index, zlib.crc32(part), part


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "blobs")


DATA = Random(5).randbytes(1234)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1234])
@pytest.mark.parametrize("seed", range(3))
def test_chunks_in_any_order_make_the_blob(store, size, seed):
    """Chunks of a blob of any size, in any order and with repetitions, give its bytes under its hash."""
    data = DATA[:size]
    blob = blob_of(data)
    partial = store.receive(blob)
    order = [*range(partial.chunks), *range(partial.chunks)]
    Random(seed).shuffle(order)
    taken = [partial.add(*chunk(data, index)) for index in order]
    assert sum(taken) == partial.chunks
    assert partial.missing == 0
    assert partial.missing_ranges() == []
    path = partial.finish(durable=True)
    assert path == store.path(blob.sha256)
    assert path.read_bytes() == data
    assert list(store.partial_folder.iterdir()) == []


def test_missing_ranges_name_the_gaps(store):
    """The gaps are told as (first, count), at most so many as asked for."""
    partial = store.receive(blob_of(DATA))
    for index in (0, 3, 4, 12):
        partial.add(*chunk(DATA, index))
    assert partial.missing_ranges() == [(1, 2), (5, 7)]
    assert partial.missing_ranges(1) == [(1, 2)]
    partial.close()


@pytest.mark.parametrize(
    ("index", "crc", "data", "said"),
    [
        (13, 0, b"", "has 13 chunks"),
        (-1, 0, b"", "has 13 chunks"),
        (0, zlib.crc32(b"short"), b"short", "has 5 bytes"),
        (0, 1, DATA[:100], "damaged"),
        (12, zlib.crc32(DATA[:100]), DATA[:100], "has 100 bytes"),
    ],
)
def test_wrong_chunk_is_refused_and_nothing_is_lost(store, index, crc, data, said):
    """A chunk with a wrong number, length or CRC is refused by name, and the right one may still come."""
    partial = store.receive(blob_of(DATA))
    with pytest.raises(TransferError, match=said):
        partial.add(index, crc, data)
    for number in range(partial.chunks):
        partial.add(*chunk(DATA, number))
    assert partial.finish(durable=False).read_bytes() == DATA


def test_wrong_hash_asks_for_everything_again(store):
    """Chunks that fit their CRC but not the blob's hash are all forgotten, and the right ones make the blob."""
    partial = store.receive(blob_of(DATA))
    wrong = bytes(100) + DATA[100:]
    for index in range(partial.chunks):
        partial.add(*chunk(wrong, index))
    with pytest.raises(TransferError, match="another SHA-256"):
        partial.finish(durable=True)
    assert partial.missing_ranges() == [(0, 13)]
    for index in reversed(range(partial.chunks)):
        partial.add(*chunk(DATA, index))
    assert partial.finish(durable=True).read_bytes() == DATA


def test_blob_over_the_limit_is_refused_before_anything_is_reserved(tmp_path):
    """A manifest that claims 10 GB, or millions of tiny chunks, costs neither disk nor memory."""
    store = BlobStore(tmp_path, limit_bytes=1_000_000_000)
    with pytest.raises(TransferError, match="the limit here is 1000000000"):
        store.receive(BlobRef(sha256="0" * 64, size_bytes=10_000_000_000))
    with pytest.raises(TransferError, match="chunks are the most"):
        store.receive(BlobRef(sha256="0" * 64, size_bytes=900_000_000, chunk_bytes=64))
    assert list(store.partial_folder.iterdir()) == []


RECEIVER = """
import sys, zlib, os
from pathlib import Path
from random import Random
from edge_runtime.messages import BlobRef
from edge_runtime.store.blobs import BlobStore
folder, sha, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
data = Random(7).randbytes(size)
partial = BlobStore(folder).receive(BlobRef(sha256=sha, size_bytes=size, chunk_bytes=1024))
for first, count in partial.missing_ranges():
    for index in range(first, first + count):
        part = data[index * 1024 : index * 1024 + 1024]
        partial.add(index, zlib.crc32(part), part)
        os.write(1, b"%d\\n" % index)
"""


def test_every_chunk_taken_survives_kill_9(tmp_path):
    """A receiver killed in the middle, twice, goes on with what is missing: each chunk it took is still there."""
    data = Random(7).randbytes(3_000_000)
    blob = blob_of(data, 1024)
    taken: set[int] = set()
    for stop_after in (150, 400):
        command = [sys.executable, "-c", RECEIVER, str(tmp_path), blob.sha256, str(len(data))]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        said = [int(child.stdout.readline()) for _ in range(stop_after)]
        child.send_signal(signal.SIGKILL)
        said += [int(line) for line in child.stdout.read().split(b"\n")[:-1]]
        child.wait()
        child.stdout.close()
        assert not taken & set(said)
        taken |= set(said)
    partial = BlobStore(tmp_path).receive(blob)
    missing = set(indexes(partial.missing_ranges(), partial.chunks))
    assert not missing & taken
    assert len(missing) in (
        partial.chunks - len(taken),
        partial.chunks - len(taken) - 1,
        partial.chunks - len(taken) - 2,
    )
    for index in missing:
        partial.add(*chunk(data, index, 1024))
    assert partial.finish(durable=False).read_bytes() == data


@pytest.mark.parametrize("seed", range(20))
def test_torn_map_or_bytes_cost_only_the_torn_chunks(store, seed):
    """After damage to the map or the bytes, what no longer fits its CRC is asked again and the blob comes out right."""
    random = Random(seed)
    blob = blob_of(DATA)
    partial = store.receive(blob)
    for index in range(0, partial.chunks, 2):
        partial.add(*chunk(DATA, index))
    partial.close()
    victim = store.partial_folder / f"{blob.sha256}.{random.choice(['map', 'part'])}"
    raw = bytearray(victim.read_bytes())
    if random.random() < 0.5:
        raw = raw[: random.randrange(len(raw))]
    else:
        for _ in range(3):
            raw[random.randrange(len(raw))] ^= random.randrange(1, 256)
    victim.write_bytes(raw)
    partial = store.receive(blob)
    for index in indexes(partial.missing_ranges(), partial.chunks):
        partial.add(*chunk(DATA, index))
    assert partial.finish(durable=False).read_bytes() == DATA, f"seed {seed}"


def test_other_chunk_size_starts_afresh(store):
    """What arrived in chunks of another size is not mistaken for chunks of this size."""
    partial = store.receive(blob_of(DATA, 100))
    partial.add(*chunk(DATA, 0))
    partial.close()
    partial = store.receive(blob_of(DATA, 200))
    assert partial.missing == partial.chunks == 7
    partial.close()


def test_full_disk_keeps_what_arrived(store, monkeypatch):
    """When the disk is full the error says so; what was there stays, and the blob is finished once there is room."""
    partial = store.receive(blob_of(DATA))
    partial.add(*chunk(DATA, 0))
    pwrite = os.pwrite

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="no space left"):
        partial.add(*chunk(DATA, 1))
    with pytest.raises(StorageError, match="no space left"):
        store.receive(blob_of(DATA[:500]))
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert partial.missing_ranges() == [(1, 12)]
    for index in range(1, partial.chunks):
        partial.add(*chunk(DATA, index))
    assert partial.finish(durable=True).read_bytes() == DATA


def test_finish_that_fails_on_a_full_disk_can_be_repeated(store, monkeypatch):
    """A full disk at the very end loses nothing: finishing again gives the blob its place."""
    partial = store.receive(blob_of(DATA))
    for index in reversed(range(partial.chunks)):
        partial.add(*chunk(DATA, index))

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        partial.finish(durable=True)
    monkeypatch.undo()
    assert partial.finish(durable=True).read_bytes() == DATA


def test_a_really_full_file_system_is_a_storage_error(tmp_path):
    """On a file system of 64 KB the error comes from the kernel, and the store goes on after something was deleted."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        store = BlobStore(tmp_path)
        first = store.put(bytes(30_000))
        data = Random(1).randbytes(50_000)
        partial = store.receive(blob_of(data, 10_000))
        with pytest.raises(StorageError, match="no space left"):
            deque((partial.add(*chunk(data, index, 10_000)) for index in range(5)), maxlen=0)
        with pytest.raises(StorageError, match="no space left"):
            store.put(Random(2).randbytes(40_000))
        store.delete(first.sha256)
        for index in indexes(partial.missing_ranges(), 5):
            partial.add(*chunk(data, index, 10_000))
        assert partial.finish(durable=True).read_bytes() == data
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_put_is_durable_and_free_when_repeated(store):
    """Bytes are stored under their hash once; putting them again writes nothing."""
    stored = store.put(DATA)
    before = store.path(stored.sha256).stat().st_mtime_ns
    assert store.put(memoryview(DATA)) == stored
    assert store.path(stored.sha256).stat().st_mtime_ns == before
    assert hash_file(store.path(stored.sha256)) == stored
    store.delete(stored.sha256)
    store.delete(stored.sha256)
    assert not store.has(stored.sha256)


def test_eviction_takes_the_least_recently_used_and_never_what_is_kept(store):
    """The quota is met oldest first; a blob in ``keep`` stays even when it alone is over the quota."""
    stored = [store.put(bytes([number]) * 1000).sha256 for number in range(4)]
    for age, sha in enumerate(stored):
        os.utime(store.path(sha), (age, age))
    store.touch(stored[0])
    assert store.evict(2500, {stored[1]}) == [stored[2], stored[3]]
    assert store.evict(0, {stored[0], stored[1]}) == []
    assert store.has(stored[0])
    assert store.has(stored[1])


def test_eviction_clears_what_nobody_waits_for(store):
    """Half a blob that no job names any more is deleted; one that is still wanted stays."""
    wanted, left = blob_of(DATA), blob_of(DATA[:500])
    for blob in (wanted, left):
        partial = store.receive(blob)
        partial.add(*chunk(DATA, 0))
        partial.close()
    store.evict(10**9, {wanted.sha256})
    assert {entry.stem for entry in store.partial_folder.iterdir()} == {wanted.sha256}


def test_leftovers_of_a_killed_writer_are_swept(tmp_path):
    """A temporary file of a process that died while writing does not stay for ever."""
    store = BlobStore(tmp_path)
    (tmp_path / "abc.123.tmp").write_bytes(b"half")
    old, new = tmp_path / "partial" / "old.part", tmp_path / "partial" / "new.part"
    old.write_bytes(b"1")
    new.write_bytes(b"2")
    os.utime(old, (0, 0))
    BlobStore(tmp_path)  # another process that only looks must not touch what is being written
    assert (tmp_path / "abc.123.tmp").exists()
    store.sweep()
    assert not (tmp_path / "abc.123.tmp").exists()
    assert new.exists()
    assert not old.exists()


def test_folder_that_cannot_be_made_is_named(tmp_path):
    """A store in a place that is no folder says which place."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        BlobStore(tmp_path / "file" / "blobs")


def test_reader_of_a_missing_file_says_so(tmp_path):
    """A file that is gone is a storage error with its path, for opening and for reading."""
    with pytest.raises(StorageError, match="gone: cannot be read"):
        BlobReader(tmp_path / "gone", blob_of(DATA))
    reader = BlobReader(tmp_path, blob_of(DATA))
    with pytest.raises(StorageError, match="cannot be read"):
        reader.chunk(0)
    reader.close()
    reader.close()


def test_ranges_outside_the_blob_are_ignored():
    """Absurd ranges of a peer give only chunk numbers that exist."""
    assert list(indexes([(2, 2), (9, 1 << 60), (1 << 60, 1)], 10)) == [2, 3, 9]
