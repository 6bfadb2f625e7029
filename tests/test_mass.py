"""Whatever is killed between any two steps, no part of any update is lost or counted twice.

What was trained is at every moment the sum of what the coordinator counted, what the codec holds back on the device,
and the bytes there that were not counted. The agent here is the real one without a broker: its machine, spool and
worker code run in the test's process, where a blade can fall between any two steps that touch the disk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edge_runtime import messages
from edge_runtime.agent import daemon
from edge_runtime.agent.config import AgentConfig, BrokerConfig
from edge_runtime.agent.daemon import Agent
from edge_runtime.compression import registry
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.pipeline import CodecSpec, decode, encode_model
from edge_runtime.data import DatasetConfig
from edge_runtime.messages import BlobRef, Job, ModelRef, UpdateId
from edge_runtime.store import models as models_module
from edge_runtime.store import spool as spool_module
from edge_runtime.training import outgoing
from edge_runtime.training.job import JobRunner
from edge_runtime.training.state import codec_key, load_state
from tests.edge_runtime.toy_codec import Predicting
from tests.edge_runtime.toy_jobs import ToyJobs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge_runtime.agent.pipe import TrainRequest
    from edge_runtime.bundle import Bundle
    from edge_runtime.store.spool import Spool

RUN, DEVICE = "run", "dev"
CODECS = {"topk": {"density": 0.2}, "predicting": {}, "default": {}}
SEEDS = range(40) if os.environ.get("EDGE_FULL") else range(15)


class Killed(BaseException):
    """kill -9, as far as the disk can tell."""


class Blade:
    """Falls at a chosen step."""

    def __init__(self) -> None:
        self.steps = 0
        self.falls_at: int | None = None

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.falls_at:
            self.falls_at = None
            raise Killed

    def around(self, function: Callable) -> Callable:
        """The function with a step before and a step after it."""

        def inner(*args, **kwargs):
            self.step()
            result = function(*args, **kwargs)
            self.step()
            return result

        return inner


class Database:
    """A connection whose every statement that writes is a step."""

    def __init__(self, blade: Blade, connection: sqlite3.Connection) -> None:
        self._read, self._write = connection.execute, blade.around(connection.execute)
        self.executescript = blade.around(connection.executescript)
        self.close = connection.close

    def execute(self, query: str, values: tuple = ()) -> sqlite3.Cursor:
        if query == "PRAGMA synchronous=FULL":  # for power cuts, and slow
            query = "PRAGMA synchronous=OFF"
        reads = query.startswith(("SELECT", "PRAGMA"))
        return self._read(query, values) if reads else self._write(query, values)


def left_on_device(
    spool: Spool,
    bundle: Bundle,
    spec: CodecSpec,
    verdicts: dict[UpdateId, bool],
    decoded: Callable[[bytes, UpdateId], np.ndarray],
) -> np.ndarray:
    """What the codec holds back and the bytes that were not counted, float64 ``[layout.size]``."""
    layout, path = bundle.layout(), spool.run_state(RUN)
    found = np.zeros(layout.size)
    for row in spool._rows("WHERE run=? AND file!=''", (RUN,)):
        if row.blob.size_bytes and not verdicts.get(row.update):
            found += decoded(spool.path(row).read_bytes(), row.update)
    is_buffer = np.concatenate([np.full(end - start, name in layout.buffers) for name, _, start, end in layout.spans()])
    state = load_state(path, bundle.sha256, codec_key(bundle.sha256, spec)).codec
    found[~is_buffer] += state.get("delta.feedback.residual", 0)
    found[is_buffer] += state.get("delta.buffers.residual", 0)
    return found


class Rig:
    """One device, and a coordinator that remembers everything."""

    def __init__(self, folder: Path, jobs: ToyJobs, runner: JobRunner, codec: str) -> None:
        self.folder, self.jobs, self.runner = folder, jobs, runner
        self.layouts = {"delta": self.jobs.bundle.layout()}
        self.spec = CodecSpec(codec, CODECS[codec])
        self.blade = Blade()
        self.pending: TrainRequest | None = None
        self.handles: list[int] = []
        self.databases: list[sqlite3.Connection] = []
        self.agent: Agent | None = None
        self.local: dict[int, np.ndarray] = {}  # what was trained, by tag
        self.received: dict[UpdateId, np.ndarray] = {}
        self.verdicts: dict[UpdateId, bool] = {}
        self.versions: list[np.ndarray] = [self.jobs.bundle.initial_vector()]
        self.kills = 0
        self._patches = pytest.MonkeyPatch()
        self._patch(self._patches)
        self.start()
        self.bundle = self._put(self.jobs.bundle.path.read_bytes())

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step, around = self.blade.step, self.blade.around
        write, connect, encode = outgoing.write_durably, sqlite3.connect, outgoing.encode

        def write_durably(path: Path, data: bytes) -> None:
            step()
            half = path.with_name(f"{path.name}.1.tmp")
            half.write_bytes(bytes(data[: len(data) // 2]))
            step()
            half.unlink()
            write(path, data)
            step()

        def open_database(*args, **kwargs) -> Database:
            self.databases.append(connect(*args, **kwargs))
            return Database(self.blade, self.databases[-1])

        def lock(folder: Path, _taken: str) -> int:  # the dead process of this test lives on
            folder.mkdir(exist_ok=True)
            self.handles.append(os.open(os.devnull, os.O_RDONLY))
            return self.handles[-1]

        def remember(spec, vectors, *args, **kwargs):
            known = self.local.setdefault(kwargs["tag"], vectors["delta"].copy())
            np.testing.assert_array_equal(known, vectors["delta"])  # the same job trains the same, however often
            return encode(spec, vectors, *args, **kwargs)

        monkeypatch.setitem(registry._loaded, "predicting", Predicting)
        monkeypatch.setattr(registry, "_entry_points", lambda: {"predicting": None})
        monkeypatch.setattr(os, "fsync", lambda _: None)  # for power cuts, and slow
        monkeypatch.setattr(outgoing, "write_durably", write_durably)
        monkeypatch.setattr(outgoing, "encode", remember)
        monkeypatch.setattr(spool_module.sqlite3, "connect", open_database)
        monkeypatch.setattr(spool_module, "remove", around(spool_module.remove))
        monkeypatch.setattr(models_module.HeldModels, "keep", around(models_module.HeldModels.keep))
        monkeypatch.setattr(models_module, "remove", around(models_module.remove))
        monkeypatch.setattr(daemon, "lock_folder", lock)

    # The device

    def start(self) -> None:
        """A new process of the agent."""
        config = AgentConfig(
            device=DEVICE,
            state_dir=str(self.folder),
            broker=BrokerConfig(url="mqtt://localhost:1"),
            data=[DatasetConfig(name="d", path=str(self.jobs.data))],
        )
        self.agent = Agent(config)
        self.agent.supervisor.request = lambda request: setattr(self, "pending", request)
        self.agent.supervisor.kill = lambda reason: self.agent.loop.call_soon(lambda: self._worker_dies(reason))

    def kill(self) -> None:
        """What a dead process leaves: no transaction, no lock, no worker."""
        for database in self.databases:
            database.close()
        if self.agent is not None:
            self.agent.loop.close()
        for handle in self.handles:
            with contextlib.suppress(OSError):
                os.close(handle)
        self.databases, self.handles, self.agent, self.pending = [], [], None, None

    def survive(self, action: Callable[[], object]) -> None:
        """Does something to the agent; if the blade falls, the agent is dead and starts again."""
        try:
            action()
            self.agent.loop.step(0)
            self.agent.loop.step(0)
        except Killed:
            self._restart()

    def _restart(self) -> None:
        self.kills += 1
        while True:
            self.kill()
            try:
                self.start()
            except Killed:
                self.kills += 1
                continue
            return

    def work(self) -> None:
        """The worker does its job."""
        if self.pending is not None:
            request, self.pending = self.pending, None
            self.survive(lambda: self.agent._on_reply(self.runner.run(request)))

    def _worker_dies(self, reason: str) -> None:
        if self.pending is not None:
            self.pending = None
            self.agent._on_worker_end(reason, True)

    # The coordinator

    def _put(self, data: bytes) -> BlobRef:
        stored = self.agent.cache.put(data)
        return BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes)

    def job(self, number: int, **fields) -> Job:
        """The job with this number; every second one has another model."""
        while len(self.versions) <= number // 2:
            self.versions.append(self.versions[-1] * np.float32(1.01))
        version = number // 2
        model = self._put(encode_model(self.versions[version], self.layouts["delta"]))
        values = {"round": number, "model_version": version, "dataset": "d", "deadline_s": 1e9, "steps": 3}
        return Job(
            **{
                "run": RUN,
                "assignment": f"a{number}",
                "bundle": self.bundle,
                "model": ModelRef(blobs=[model]),
                "codec": self.spec.name,
                "codec_options": self.spec.options,
                **values,
                **fields,
            }
        )

    def send(self, message: messages.FromCoordinator) -> None:
        self.survive(lambda: self.agent._handle(message))

    def receive(self) -> None:
        """Takes in the bytes of every update that is being offered, and says so."""
        for update in list(self.agent.uploads._waiting):
            spooled = self.agent.spool.get(update)
            if spooled is None or spooled.state != "ready":
                continue
            data = self.agent.spool.path(spooled).read_bytes()
            if data:
                known = self.received.setdefault(update, self.decoded(data, update))
                np.testing.assert_array_equal(known, self.decoded(data, update))
            else:
                self.received[update] = np.zeros(self.layouts["delta"].size, np.float32)
            self.send(messages.Done(update=update))

    def decoded(self, data: bytes, update: UpdateId) -> np.ndarray:
        version = outgoing.unpack(data, self.layouts)[0].base_version
        found = decode(data, self.layouts, tag=update_tag(update), reference=self.versions[version])
        return found["delta"].vector().astype(np.float64)

    def tell(self, update: UpdateId, *, counted: bool) -> None:
        """The verdict, which is never another one than the first."""
        counted = self.verdicts.setdefault(update, counted)
        self.send(messages.Verdict(update=update, counted=counted, reason="" if counted else "late"))

    # The law

    def check(self) -> None:
        """What was trained is what was counted, what is held back, and what lies here not counted."""
        found = left_on_device(self.agent.spool, self.jobs.bundle, self.spec, self.verdicts, self.decoded)
        trained = np.zeros(len(found))
        for row in self.agent.spool._rows("WHERE run=?", (RUN,)):
            if row.blob.size_bytes:
                trained += self.local[update_tag(row.update)]
                found += self.received[row.update] if self.verdicts.get(row.update) else 0
        np.testing.assert_allclose(found, trained, atol=2e-4, rtol=1e-5)

    def finish(self, number: int, *, counted: bool, **fields) -> None:
        """Repeats the job until its update was received, and the verdict until the device knows it."""
        update = UpdateId(RUN, DEVICE, f"a{number}", 0)
        for _ in range(50):
            if update in self.received:
                break
            self.send(self.job(number, **fields))
            self.work()
            self.check()
            self.receive()
            self.check()
        for _ in range(50):
            found = self.agent.spool.get(update)
            if found is not None and found.state in ("counted", "refused"):
                return
            self.send(self.job(number, **fields))  # what a restarted agent offers after it connected
            self.tell(update, counted=counted)
            self.check()
        raise AssertionError(f"job {number} never ended: {self.agent.state}")

    def end(self) -> None:
        """Undoes everything."""
        self.blade.falls_at = None
        self.kill()
        self._patches.undo()

    def settled(self) -> None:
        """At the end only what the codec holds back is left, and no file that no row names."""
        self._restart()
        self.check()
        assert self.agent.spool.open_updates() == []
        names = {path.name for path in self.agent.spool.folder.iterdir()}
        state, refused = self.agent.spool.run_state(RUN), self.agent.spool.refused(RUN)
        assert names == {row.file for row in refused} | ({state.name} if state else set())
        assert len(refused) <= 1


@pytest.fixture
def make_rig(tmp_path: Path) -> Callable[[str], Rig]:
    """Makes rigs with a fresh device each, for one codec at a time."""
    jobs, runner, numbers = ToyJobs(tmp_path), JobRunner(), itertools.count()
    return lambda codec: Rig(tmp_path / f"device-{next(numbers)}", jobs, runner, codec)


def story(rig: Rig) -> None:
    """Rounds in which everything that matters follows everything else: counted, refused twice, only evaluated."""
    after = 0  # rounds since the kill: two of them show what it has done
    for number, counted in enumerate((True, False, False, True, False, False)):
        if after < 2:
            rig.finish(number, counted=counted, **({"steps": None} if number == 4 else {}))
            after += rig.kills > 0
    rig.settled()


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["topk", "predicting"])
def test_a_kill_at_any_one_step_loses_nothing(make_rig: Callable[[str], Rig], codec: str) -> None:
    """Before and after every write of a file, every statement of the database and every deletion, the agent is killed
    once; the sums hold at every moment afterwards."""
    rig = make_rig(codec)
    first = rig.blade.steps
    story(rig)
    steps = rig.blade.steps - first
    rig.end()
    assert steps > 60
    for falls_at in range(1, steps + 1):
        rig = make_rig(codec)
        rig.blade.falls_at = rig.blade.steps + falls_at
        try:
            story(rig)
            assert rig.kills >= 2, f"the blade did not fall at step {falls_at}"  # the last one is the story's own
        except AssertionError as error:
            raise AssertionError(f"killed at step {falls_at}") from error
        finally:
            rig.end()


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_schedule_with_any_kills_loses_nothing(make_rig: Callable[[str], Rig], seed: int, codec: str) -> None:
    """Jobs, dying workers, lost verdicts, cancels and kills in any order: the sums hold after each of them."""
    print(f"schedule seed {seed}")
    random, rig = Random(seed), make_rig(codec)
    try:
        number = 0
        for _ in range(80):
            if random.random() < 0.4:
                rig.blade.falls_at = rig.blade.steps + random.randrange(1, 25)
            number = act(rig, random, number)
            rig.check()
        rig.blade.falls_at = None
        for update in list(rig.received):
            rig.tell(update, counted=random.random() < 0.5)
        for left in range(number + 1):
            rig.finish(left, counted=random.random() < 0.5)
        rig.settled()
        assert rig.kills > 3
    finally:
        rig.end()


def act(rig: Rig, random: Random, number: int) -> int:
    """One thing that can happen; gives the number of the newest job."""
    choice = random.randrange(8)
    if choice <= 1:
        rig.send(rig.job(number, steps=None if number % 7 == 6 else 3))
        return number
    if choice == 2:
        rig.send(messages.Cancel(run=RUN, assignment=f"a{number}"))
    elif choice == 3:
        rig.survive(lambda: rig._worker_dies("killed"))
    elif choice == 4 and rig.received:
        rig.tell(random.choice(list(rig.received)), counted=random.random() < 0.5)
    elif choice == 5:
        rig.receive()
    elif choice == 6 and random.random() < 0.3:
        rig._restart()
    else:
        rig.work()
    done = UpdateId(RUN, DEVICE, f"a{number}", 0) in rig.received
    return number + (done and random.random() < 0.5)
