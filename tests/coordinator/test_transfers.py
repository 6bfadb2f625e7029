"""Both ends of transfers over a real broker: devices with caches and spools, a coordinator with its stores."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random

import msgspec
import pytest

pytest.importorskip("coordinator.transfers")

from coordinator.transfers import Downlink, Uplink, named, with_chunk_size
from edge_runtime import messages, topics
from edge_runtime.agent.transfers import Downloads, Uploads
from edge_runtime.messages import BlobRef, UpdateId, UpdateMeta
from edge_runtime.store.blobs import BlobStore
from edge_runtime.store.spool import Spool, SpooledUpdate
from edge_runtime.transport import transfer
from edge_runtime.transport.link import Link, LinkSettings
from edge_runtime.transport.loop import Loop
from edge_runtime.transport.transfer import ChunkPump, pack_chunk, unpack_chunk
from tests.support.brokers import Peer, own_mosquitto, run_until
from tests.support.proxy import Proxy

ROOT = Path(__file__).parents[2]
META = UpdateMeta(round=0, model_version=0, samples=1, steps=1)
MB = 1_000_000


def content(size: int, seed: int = 1) -> tuple[bytes, BlobRef]:
    data = Random(seed).randbytes(size)
    return data, BlobRef(sha256=sha256(data).hexdigest(), size_bytes=size)


class Device:
    """What the agent does for transfers, without jobs."""

    def __init__(self, loop: Loop, url: str, name: str, folder: Path, limit_bytes: int | None = None) -> None:
        self.name, self.loop = name, loop
        self.ready: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.chunks: Counter[tuple[str, int]] = Counter()
        self.need_chunks = 0
        self.damage = lambda payload: payload
        (folder / name).mkdir(parents=True, exist_ok=True)
        self.cache = BlobStore(folder / name / "cache", limit_bytes)
        self.spool = Spool(folder / name)
        own = (topics.to_device(name, "message"), topics.to_device(name, "chunk"))
        self.peer = Peer(loop, url, name, own)
        self.link = self.peer.link
        self.pump = ChunkPump(self.link)
        self.uploads = Uploads(name, self.spool, loop, self.link, pump=self.pump, random=Random(name))
        self.downloads = Downloads(
            name,
            self.cache,
            loop,
            self.link,
            on_ready=self.ready.append,
            on_failed=lambda sha, reason: self.failed.append((sha, reason)),
        )
        self.open: list[UpdateId] = []
        self.peer.handler, self.peer.when_up, self.peer.when_down = self.on_message, self.on_up, self.pump.reset

    def on_message(self, topic: str, payload: bytes) -> None:
        if not topic.endswith("/message"):
            payload = self.damage(payload)
            _, index, _, _ = unpack_chunk(payload)
            self.chunks[topic, index] += 1
            self.downloads.on_chunk(payload)
            return
        match messages.decode_from_coordinator(payload):
            case messages.Need() as need:
                self.need_chunks += sum(min(count, 10_000) for _, count in need.ranges)
                self.uploads.on_need(need)
            case messages.Gone(sha256=sha):
                self.downloads.on_gone(sha)
            case messages.Done(update=update):
                self.uploads.delivered(update)
                self.spool.set_state(update, "delivered")
                self.uploads.close(update)
                self.open.remove(update)

    def on_up(self) -> None:
        self.downloads.on_up()
        for update in self.open:
            self.uploads.offer(update, push=False)

    def finish(self, data: bytes, name: str = "a", chunk_bytes: int = 96 * 1024) -> UpdateId:
        """An update as the worker leaves it."""
        update = UpdateId("run", self.name, name, 0)
        path = self.spool.folder / f"{name}.update"
        path.write_bytes(data)
        blob = BlobRef(sha256=sha256(data).hexdigest(), size_bytes=len(data), chunk_bytes=chunk_bytes)
        self.spool.add(SpooledUpdate(update=update, file=path.name, blob=blob, meta=META))
        self.open.append(update)
        return update

    def close(self) -> None:
        self.downloads.close()
        self.link.stop()
        self.spool.close()


class Server:
    """What the coordinator does for transfers, without runs."""

    def __init__(self, loop: Loop, url: str, folder: Path, limit_bytes: int | None = None) -> None:
        self.arrived: list[UpdateId] = []
        self.refused: list[tuple[UpdateId, str]] = []
        self.needs: list[tuple[str, messages.Need]] = []
        self.chunks: Counter[int] = Counter()
        self.damage = lambda payload: payload
        self.store = BlobStore(folder / "server", limit_bytes)
        self.offered: dict[str, BlobRef] = {}
        self.peer = Peer(loop, url, "coord", tuple(f"fl/v1/d/+/{leaf}" for leaf in ("state", "message", "chunk")))
        self.link = self.peer.link
        self.downlink = Downlink(loop, self.link, self.find)
        self.uplink = Uplink(
            loop, self.link, arrived=self.on_arrived, refused=lambda *a: self.refused.append((a[0], a[3]))
        )
        self.peer.handler, self.peer.when_down = self.on_message, self.on_down

    def on_down(self) -> None:
        self.downlink.reset()
        self.uplink.reset()

    def has(self, data: bytes) -> BlobRef:
        stored = self.store.put(data)
        blob = with_chunk_size(BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes), self.link.chunk_bytes)
        self.offered[blob.sha256] = blob
        return blob

    def find(self, sha: str) -> tuple[Path, BlobRef] | None:
        blob = self.offered.get(sha)
        return None if blob is None else (self.store.path(sha), blob)

    def on_arrived(self, update: UpdateId, _blob: BlobRef, _meta: UpdateMeta) -> None:
        self.arrived.append(update)
        done = messages.encode(messages.Done(update=update))
        self.link.publish(topics.to_device(update.device, "message"), done)

    def on_message(self, topic: str, payload: bytes) -> None:
        device, leaf = topics.parse_from_device(topic)
        if leaf == "chunk":
            payload = self.damage(payload)
            self.chunks[unpack_chunk(payload)[1]] += 1
            self.uplink.on_chunk(device, payload)
            return
        match messages.decode_from_device(payload):
            case messages.Need() as need:
                self.needs.append((device, need))
                self.downlink.on_need(device, need)
            case messages.UpdateOffer() as offer:
                self.uplink.fetch(self.store, named(offer))

    def close(self) -> None:
        self.uplink.reset()
        self.link.stop()


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def broker(mosquitto_program, tmp_path):
    with own_mosquitto(mosquitto_program, tmp_path) as broker:
        yield broker


@pytest.fixture
def world(loop, broker, tmp_path):
    """Makes a server and devices that are closed at the end."""
    made: list = []

    class World:
        def server(self, url: str = broker.url, **options) -> Server:
            made.append(Server(loop, url, tmp_path, **options))
            made[-1].peer.up()
            return made[-1]

        def device(self, name: str = "dev", url: str = broker.url, **options) -> Device:
            made.append(Device(loop, url, name, tmp_path, **options))
            made[-1].peer.up()
            return made[-1]

        def until(self, condition, timeout_s: float = 30.0) -> None:
            run_until(loop, condition, timeout_s)

    yield World()
    for end in made:
        end.close()


def test_twenty_megabytes_both_ways(world):
    """A large blob goes down and another up, byte for byte, without one duplicate on a clean link."""
    server, device = world.server(), world.device()
    down, up = content(20 * MB)[0], content(20 * MB, 2)[0]
    blob = server.has(down)
    device.downloads.fetch(blob)
    device.uploads.offer(device.finish(up), push=True)
    world.until(lambda: device.ready and server.arrived and not device.open)
    assert device.cache.path(blob.sha256).read_bytes() == down
    assert server.store.path(sha256(up).hexdigest()).read_bytes() == up
    assert max(device.chunks.values()) == max(server.chunks.values()) == 1


def test_a_blob_for_four_devices_is_sent_once(world):
    """Devices that were told of a blob together share its chunks: the coordinator sends each chunk one time."""
    server, devices = world.server(), [world.device(f"d{number}") for number in range(4)]
    data = content(2 * MB)[0]
    blob = server.has(data)
    for device in devices:
        server.downlink.expect(device.name, blob)
    for device in devices:
        device.downloads.fetch(blob)
    world.until(lambda: all(device.ready for device in devices))
    chunks = -(-blob.size_bytes // blob.chunk_bytes)
    assert server.downlink._pump.sent_chunks == chunks
    assert all(device.cache.path(blob.sha256).read_bytes() == data for device in devices)
    assert all(topic == topics.blob(blob.sha256) for device in devices for topic, _ in device.chunks)


def test_a_blob_for_one_device_goes_to_it_alone(world):
    """What one device asks for travels on its own topic, and the rest of the fleet is not disturbed."""
    server, device, other = world.server(), world.device("d1"), world.device("d2")
    blob = server.has(content(300_000)[0])
    server.downlink.expect("d1", blob)
    device.downloads.fetch(blob)
    world.until(lambda: device.ready)
    assert {topic for topic, _ in device.chunks} == {topics.to_device("d1", "chunk")}
    assert other.chunks == {}


def test_an_expected_device_that_went_away_is_not_waited_for(world, monkeypatch):
    """When the missing device of a gathering goes, the others get their chunks without waiting for the timer."""
    monkeypatch.setattr("coordinator.transfers.GATHER_S", 600.0)
    server, device = world.server(), world.device("d1")
    blob = server.has(content(1000)[0])
    server.downlink.expect("d1", blob)
    server.downlink.expect("gone", blob)
    device.downloads.fetch(blob)
    world.until(lambda: server.needs)
    assert not device.ready
    server.downlink.unexpect("gone")
    world.until(lambda: device.ready)


def test_blob_the_coordinator_lacks_fails_at_once(world):
    """Asking for an unknown blob is answered, and the device knows why it cannot have it."""
    _server, device = world.server(), world.device()
    device.downloads.fetch(content(1000)[1])
    world.until(lambda: device.failed)
    assert "no longer has blob" in device.failed[0][1]


def test_manifest_over_the_limit_is_refused_on_both_ends(world):
    """A blob that claims 10 GB fails at once on the device; an update that claims it is refused by the coordinator."""
    server, device = world.server(limit_bytes=MB), world.device(limit_bytes=MB)
    huge = BlobRef(sha256="0" * 64, size_bytes=10_000 * MB)
    device.downloads.fetch(huge)
    offer = messages.UpdateOffer(update=UpdateId("run", "dev", "a", 0), blob=huge, meta=META)
    server.uplink.fetch(server.store, offer)
    world.until(lambda: device.failed)
    assert "10000000000 bytes refused" in device.failed[0][1]
    assert "10000000000 bytes refused" in server.refused[0][1]


@pytest.mark.parametrize("size", [0, 1, 98_304, 98_305])
def test_updates_of_any_size_arrive_once(world, size):
    """Empty updates, those of one chunk and those just over it arrive with one offer."""
    server, device = world.server(), world.device()
    data = content(size)[0]
    device.uploads.offer(device.finish(data), push=True)
    world.until(lambda: server.arrived and not device.open)
    assert server.store.path(sha256(data).hexdigest()).read_bytes() == data
    assert device.need_chunks == 0


def test_two_updates_with_the_same_bytes_both_arrive(world):
    """Devices may well send identical updates at the same time: each is told that it arrived."""
    server, devices = world.server(), [world.device(f"d{number}") for number in range(2)]
    data = content(MB)[0]
    for device in devices:
        device.uploads.offer(device.finish(data), push=True)
    world.until(lambda: not any(device.open for device in devices))
    assert {update.device for update in server.arrived} == {"d0", "d1"}


def spoiled(kind: str, random: Random):
    """Spoils some chunk packets on their way."""

    def damage(payload: bytes) -> bytes:
        if random.random() > 0.3:
            return payload
        raw = bytearray(payload)
        match kind:
            case "crc":
                raw[random.randrange(24, len(raw))] ^= 1
            case "short":
                del raw[-1]
            case "foreign":
                raw[0] ^= 1
            case "number":
                raw[16:20] = (10_000).to_bytes(4, "little")
        return bytes(raw)

    return damage


@pytest.mark.parametrize("kind", ["crc", "short", "foreign", "number"])
def test_spoiled_chunks_are_asked_again(world, monkeypatch, caplog, kind):
    """Damaged, cut, foreign and misnumbered chunks are refused and come again until both blobs are right."""
    monkeypatch.setattr(transfer.Incoming.__init__, "__kwdefaults__", {"stall_first_s": 0.1})
    caplog.set_level(logging.CRITICAL)
    server, device = world.server(), world.device()
    server.damage, device.damage = spoiled(kind, Random(1)), spoiled(kind, Random(2))
    down, up = content(2 * MB)[0], content(2 * MB, 2)[0]
    blob = server.has(down)
    device.downloads.fetch(blob)
    device.uploads.offer(device.finish(up), push=True)
    world.until(lambda: device.ready and server.arrived)
    assert device.cache.path(blob.sha256).read_bytes() == down
    assert server.store.path(sha256(up).hexdigest()).read_bytes() == up


def test_wrong_final_hash_is_asked_again_and_right_in_the_end(world, caplog):
    """Chunks that are whole in themselves but make another blob cost one more pass, and the blob is right."""
    caplog.set_level(logging.CRITICAL)
    server, device = world.server(), world.device()
    data = content(300_000)[0]
    blob = server.has(data)
    server.store.path(blob.sha256).write_bytes(bytes(300_000))
    real = device.downloads._complete

    def repaired(done: BlobRef) -> None:
        server.store.path(blob.sha256).write_bytes(data)
        real(done)

    device.downloads._complete = repaired
    device.downloads.fetch(blob)
    world.until(lambda: device.ready)
    assert device.cache.path(blob.sha256).read_bytes() == data
    assert max(device.chunks.values()) == 2


def test_sender_whose_copy_is_damaged_is_given_up(world, caplog):
    """A blob that keeps arriving with another hash fails after three passes instead of burning traffic for ever."""
    caplog.set_level(logging.CRITICAL)
    server, device = world.server(), world.device()
    blob = server.has(content(200_000)[0])
    server.store.path(blob.sha256).write_bytes(bytes(200_000))
    device.downloads.fetch(blob)
    update = device.finish(content(200_000, 2)[0])
    (device.spool.folder / "a.update").write_bytes(bytes(200_000))
    device.uploads.offer(update, push=True)
    world.until(lambda: device.failed and server.refused)
    assert "given up" in device.failed[0][1]
    assert "given up" in server.refused[0][1]
    assert max(device.chunks.values()) == transfer.WRONG_LIMIT


def test_update_whose_file_is_gone_does_not_end_the_agent(world, caplog):
    """A lost file is one clear line; the other update still arrives."""
    server, device = world.server(), world.device()
    lost, whole = device.finish(content(200_000)[0], "lost"), device.finish(content(200_000, 2)[0], "whole")
    (device.spool.folder / "lost.update").unlink()
    for update in (lost, whole):
        device.uploads.offer(update, push=True)
    world.until(lambda: server.arrived)
    assert server.arrived == [whole]
    assert any("lost/0 cannot be offered" in record.message for record in caplog.records)
    device.uploads.offer(lost, push=False)
    world.until(lambda: any("lost/0 cannot be sent" in record.message for record in caplog.records))


def test_update_cut_for_another_broker_is_cut_anew(loop, mosquitto_program, tmp_path):
    """An update made in large chunks still goes through a broker that takes only small packets."""
    with own_mosquitto(mosquitto_program, tmp_path, "allow_anonymous true", "max_packet_size 30000") as broker:
        server, device = Server(loop, broker.url, tmp_path), Device(loop, broker.url, "dev", tmp_path)
        server.peer.up()
        device.peer.up()
        data = content(500_000)[0]
        device.uploads.offer(device.finish(data, chunk_bytes=96 * 1024), push=True)
        run_until(loop, lambda: server.arrived)
        assert server.store.path(sha256(data).hexdigest()).read_bytes() == data
        assert (len(server.peer.downs), len(device.peer.downs)) == (0, 0)
        device.close()
        server.close()


def test_oversize_chunk_is_one_line_and_not_the_end(world, caplog):
    """A blob cut for larger packets than the broker takes is not sent, and the pump goes on with others."""
    server, device = world.server(), world.device()
    bad, good = server.has(content(200_000)[0]), server.has(content(1000, 2)[0])
    server.link.max_packet_bytes = 50_000
    for blob in (bad, good):
        device.downloads.fetch(blob)
    world.until(lambda: device.ready)
    assert device.ready == [good.sha256]
    assert any("over the broker's limit" in record.message for record in caplog.records)


def test_full_disk_of_the_coordinator_loses_nothing(world, caplog, monkeypatch):
    """With a full disk updates stay on their devices; when there is room, their next offer brings them in."""
    server, device = world.server(), world.device()
    data = content(400_000)[0]
    pwrite = os.pwrite

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    update = device.finish(data)
    device.uploads.offer(update, push=True)
    world.until(lambda: any("stays on its device" in record.message for record in caplog.records))
    assert "no space left" in caplog.text
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert device.spool.get(update).state == "ready"
    device.uploads.offer(update, push=False)
    world.until(lambda: server.arrived)
    assert server.store.path(sha256(data).hexdigest()).read_bytes() == data


def test_full_disk_of_the_device_fails_the_job_clearly(world, monkeypatch):
    """With a full disk a download fails with that reason, and goes on where it was once there is room."""
    server, device = world.server(), world.device()
    data = content(900_000)[0]
    blob = server.has(data)
    pwrite, calls = os.pwrite, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    device.downloads.fetch(blob)
    world.until(lambda: device.failed)
    assert "no space left" in device.failed[0][1]
    monkeypatch.setattr(os, "pwrite", pwrite)
    device.downloads.fetch(blob)
    world.until(lambda: device.ready)
    assert device.cache.path(blob.sha256).read_bytes() == data
    assert sum(count for _, count in server.needs[-1][1].ranges) == 10 - 4


def test_cached_blob_that_a_power_cut_damaged_is_fetched_again(world):
    """A blob that lay in the cache before this process began is believed only after its hash was checked."""
    server, device = world.server(), world.device()
    data = content(1000)[0]
    blob = server.has(data)
    device.cache.path(blob.sha256).write_bytes(bytes(1000))
    device.downloads.fetch(blob)
    world.until(lambda: device.ready)
    assert device.cache.path(blob.sha256).read_bytes() == data
    device.downloads.fetch(blob)
    world.until(lambda: len(device.ready) == 2)
    assert len(server.needs) == 1


def test_an_update_that_a_power_cut_damaged_is_received_again(world):
    """What lies there by name was acknowledged by nobody, and is believed only after its hash was checked."""
    server, device = world.server(), world.device()
    data = content(200_000)[0]
    path = server.store.path(sha256(data).hexdigest())
    path.write_bytes(bytes(200_000))
    device.uploads.offer(device.finish(data), push=True)
    world.until(lambda: server.arrived)
    assert path.read_bytes() == data


def test_blob_whose_last_chunk_came_just_before_the_end_is_finished(world):
    """All chunks on disk, but no hash checked yet: after a restart the blob is ready without asking anyone."""
    device = world.device()
    data, blob = content(300_000)
    partial = device.cache.receive(blob)
    for index in range(partial.chunks):
        part = data[index * blob.chunk_bytes : (index + 1) * blob.chunk_bytes]
        partial.add(index, transfer.zlib.crc32(part), part)
    partial.close()
    device.downloads.fetch(blob)
    world.until(lambda: device.ready)
    assert device.cache.path(blob.sha256).read_bytes() == data


DEVICE = """
import os, sys
from pathlib import Path
from tests.coordinator.test_transfers import Device, content
from edge_runtime.transport.link import Link, LinkSettings
from edge_runtime.transport.loop import Loop
url, folder = sys.argv[1], Path(sys.argv[2])
loop = Loop()
device = Device(loop, url, "dev", folder)
device.peer.up()
taken = device.downloads.on_chunk
def on_chunk(payload):
    taken(payload)
    os.write(1, b"c")
device.downloads.on_chunk = on_chunk
device.downloads.fetch(content(12_000_000)[1])
update = device.finish(content(12_000_000, 2)[0])
device.uploads.offer(update, push=True)
while not device.ready or device.open:
    loop.step(1.0)
os.write(1, b"F")
"""


def test_killed_device_goes_on_with_what_is_missing(world, broker, tmp_path):
    """A device killed in the middle of both directions asks after its restart only for what it lacks."""
    server = world.server()
    down, up = content(12 * MB)[0], content(12 * MB, 2)[0]
    blob = server.has(down)
    chunks = -(-blob.size_bytes // blob.chunk_bytes)
    with Proxy(broker.port, rate_bytes_s=12 * MB, delay_s=0.005) as proxy:
        command = [sys.executable, "-c", DEVICE, f"mqtt://127.0.0.1:{proxy.port}", str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment)
        os.set_blocking(child.stdout.fileno(), False)
        taken = bytearray()

        def enough() -> bool:
            taken.extend(child.stdout.read() or b"")
            return len(taken) >= 15 and sum(server.chunks.values()) >= 15

        world.until(enough)
        child.send_signal(signal.SIGKILL)
        child.wait()
        taken.extend(child.stdout.read() or b"")
        child.stdout.close()
        server.needs.clear()
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
        world.until(lambda: server.needs or child.poll() is not None)
        assert server.needs, f"{len(taken)} of {chunks} chunks were taken; the second process ended {child.returncode}"
        asked = sum(count for _, count in server.needs[0][1].ranges)
        assert 0 < asked <= chunks - len(taken)
        world.until(lambda: server.arrived and child.poll() is not None)
    assert child.returncode == 0
    assert (tmp_path / "dev" / "cache" / blob.sha256).read_bytes() == down
    assert server.store.path(sha256(up).hexdigest()).read_bytes() == up
    assert sum(server.chunks.values()) <= 2 * chunks


def test_restarted_coordinator_goes_on_with_what_is_missing(loop, broker, tmp_path):
    """A coordinator that dies in the middle of an update asks its successor's way: only for missing chunks."""
    device, first = Device(loop, broker.url, "dev", tmp_path), Server(loop, broker.url, tmp_path)
    device.peer.up()
    first.peer.up()
    data, blob = content(8 * MB)
    update = device.finish(data)
    device.uploads.offer(update, push=True)
    run_until(loop, lambda: sum(first.chunks.values()) >= 30)
    partial = first.uplink._uploads[blob.sha256[:32]].incoming.partial
    missing = partial.missing
    first.close()
    run_until(loop, lambda: not device.pump._by_key)
    second = Server(loop, broker.url, tmp_path)
    second.peer.up()
    device.uploads.offer(update, push=False)
    run_until(loop, lambda: second.arrived)
    assert device.need_chunks == missing < 60
    assert second.store.path(blob.sha256).read_bytes() == data
    device.close()
    second.close()


@pytest.mark.parametrize("seed", [11])
def test_bad_link_delivers_the_same_bytes(world, broker, seed):
    """2 MB/s, 50 ms away and cut every two seconds: both blobs arrive whole, and not much is sent twice."""
    server = world.server()
    options = {"rate_bytes_s": 2 * MB, "delay_s": 0.05, "cut_every_s": 2.0, "seed": seed}
    with Proxy(broker.port, **options) as proxy:
        device = world.device(url=f"mqtt://127.0.0.1:{proxy.port}")
        down, up = content(5 * MB)[0], content(5 * MB, 2)[0]
        blob = server.has(down)
        device.downloads.fetch(blob)
        device.uploads.offer(device.finish(up), push=True)
        world.until(lambda: sum(server.chunks.values()) > 10, 60)
        proxy.cut()  # at least one, whatever the seed says
        world.until(lambda: device.ready and not device.open, 60)
        cuts = proxy.cuts
    assert device.cache.path(blob.sha256).read_bytes() == down, f"seed {seed}"
    assert server.store.path(sha256(up).hexdigest()).read_bytes() == up, f"seed {seed}"
    chunks = -(-blob.size_bytes // blob.chunk_bytes)
    allowed = chunks + (cuts + 1) * 2 * transfer.WINDOW
    assert sum(server.chunks.values()) <= allowed, f"seed {seed}, {cuts} cuts"
    assert cuts > 0


def test_pump_that_lost_its_link_starts_afresh(world):
    """Chunks asked for while the link is down are not stuck: asked again, they come."""
    server, device = world.server(), world.device()
    data, blob = content(300_000)
    path = server.store.path(server.store.put(data).sha256)
    pump = ChunkPump(device.link)
    device.link.is_up = False
    pump.send("t/x", path, blob, [(0, 4)])
    assert pump._by_key == {}
    device.link.is_up = True
    pump.send("t/x", path, blob, [(0, 4), (0, 4)])
    world.until(lambda: not pump._by_key)
    assert pump.sent_chunks == 4


def test_offers_are_repeated_until_closed(loop):
    """An offer that nobody answers is made again, ever more rarely, and never after the verdict."""
    now = [0.0]
    loop = Loop(lambda: now[0])
    said = []

    class Link:
        is_up, chunk_bytes = True, 96 * 1024

        def publish(self, _topic, payload, **_):
            said.append((now[0], messages.decode_from_device(payload)))
            return True

    class OneUpdate:
        def get(self, update):
            blob = content(10)[1]
            return SpooledUpdate(update=update, file="", blob=blob, meta=META, state="delivered")

    uploads = Uploads("dev", OneUpdate(), loop, Link(), pump=None, random=Random(1))
    update = UpdateId("run", "dev", "a", 0)
    uploads.offer(update, push=True)
    for _ in range(4000):
        now[0] += 0.5
        loop.step(0)
    times = [at for at, _ in said]
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps[0] <= 6.5
    assert 200 < gaps[-1] <= 361
    assert all(msgspec.structs.astuple(offer.update) == msgspec.structs.astuple(update) for _, offer in said)
    count = len(said)
    uploads.close(update)
    now[0] += 1000
    loop.step(0)
    assert len(said) == count
    loop.close()


def test_a_stranger_cannot_spoil_an_upload(mosquitto, tmp_path):
    """Chunks of a blob are taken from the devices that offer it, and from no other."""
    loop, store = Loop(), BlobStore(tmp_path / "blobs")
    settings = LinkSettings(url=mosquitto.url, client_id="c")
    link = Link(
        settings,
        loop,
        topics=[],
        on_message=lambda *_: None,
        on_up=lambda: None,
        on_down=lambda _: None,
        random=Random(1),
    )
    arrived = []
    uplink = Uplink(loop, link, arrived=lambda *found: arrived.append(found), refused=lambda *_: None)
    data = b"update" * 100
    blob = BlobRef(sha256=sha256(data).hexdigest(), size_bytes=len(data), chunk_bytes=len(data))
    meta = messages.UpdateMeta(round=0, model_version=0, samples=1, steps=1)
    uplink.fetch(store, messages.UpdateOffer(update=UpdateId("r", "honest", "r0-0", 0), blob=blob, meta=meta))
    packet = pack_chunk(blob.sha256, 0, data)
    uplink.on_chunk("stranger", packet)
    assert not arrived
    uplink.on_chunk("honest", packet)
    assert [found[0].device for found in arrived] == ["honest"]
    loop.close()
