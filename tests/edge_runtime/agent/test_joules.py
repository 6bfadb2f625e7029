"""What jobs draw, and limits that end them early: the real agent with its real worker, on sensors made of files."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("onnxruntime")

from edge_runtime import messages
from edge_runtime.agent.config import AgentConfig, BrokerConfig, LimitsConfig
from edge_runtime.agent.daemon import Agent
from edge_runtime.agent.energy_config import EnergyConfig
from edge_runtime.agent.joules import OwnCpu
from edge_runtime.data import DatasetConfig
from edge_runtime.errors import ConfigError
from edge_runtime.messages import BlobRef, Job, JobStatus, ModelRef, UpdateId
from edge_runtime.transport.loop import Loop
from tests.edge_runtime.toy_jobs import ToyJobs
from tests.energy import boards
from tests.support.brokers import run_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge_runtime.store.spool import SpooledUpdate

INPUT_WATTS = 4.984 * 1.856  # of the Orin Nano's VDD_IN
MODEL = {"idle_watts": 2.0, "busy_watts": 6.0}
SLOW = """
import time
from edge_runtime.data import DatasetConfig, open_dataset
def make(config):
    dataset = open_dataset(DatasetConfig(name=config.name, path=config.options["path"]))
    snapshot = dataset.snapshot()
    batch = snapshot.batch
    snapshot.batch = lambda indices: (time.sleep(0.03), batch(indices))[1]
    return dataset
"""


class Device:
    """An agent without a broker: jobs are handed to it, and its updates stay in its spool."""

    def __init__(self, folder: Path, *, root: Path | None = None, **fields: Any) -> None:
        self.jobs = ToyJobs(folder)
        (folder / "slow.py").write_text(SLOW)
        root = root or folder / "bare"
        (root / "proc").mkdir(parents=True, exist_ok=True)
        (root / "proc/stat").symlink_to("/proc/stat")  # the load is this machine's
        config = AgentConfig(
            device="dev",
            state_dir=str(folder / "state"),
            broker=BrokerConfig(url="mqtt://localhost:1"),
            data=[DatasetConfig(name="d", factory="slow:make", options={"path": str(self.jobs.data)})],
            code_dir=str(folder),
            **fields,
        )
        self.loop = Loop()
        self.agent = Agent(config, loop=self.loop, energy_root=root)
        self.said: list[Any] = []
        self.announced: list[messages.DeviceState] = []
        self.agent._send = self.said.append
        self.agent.link.publish = self.publish
        self.agent.start()
        blobs = [self.agent.cache.put(path.read_bytes()) for path in (self.jobs.bundle.path, self.jobs.model)]
        self.bundle, self.model = (BlobRef(sha256=blob.sha256, size_bytes=blob.size_bytes) for blob in blobs)

    @property
    def source(self) -> messages.EnergySource | None:
        """What the agent announces."""
        return messages.decode_from_device(self.agent._announcement(online=True)).energy

    def publish(self, _topic: str, payload: bytes, **_options: Any) -> bool:
        """Takes announcements."""
        message = messages.decode_from_device(payload)
        if isinstance(message, messages.DeviceState):
            self.announced.append(message)
        return False

    def give(self, name: str = "a", **fields: Any) -> None:
        """Gives it a job of 20 steps, some 0.6 s."""
        values = {"run": "r", "round": 0, "model_version": 0, "dataset": "d", "deadline_s": 600.0, "steps": 20}
        model = ModelRef(blobs=[self.model])
        self.agent._handle(Job(**{"assignment": name, "bundle": self.bundle, "model": model, **values, **fields}))

    def until_it_trains(self) -> None:
        """The worker is in its first steps."""
        self.until(lambda: any(entry.phase == "train" for entry in self.agent.state.jobs.values()))

    def until(self, condition: Any) -> None:
        """Runs the agent."""
        run_until(self.loop, condition)

    def update(self, name: str = "a") -> SpooledUpdate:
        """Waits for the update of a job."""
        self.until(lambda: self.agent.spool.get(UpdateId("r", "dev", name, 0)))
        return self.agent.spool.get(UpdateId("r", "dev", name, 0))

    def failure(self) -> JobStatus:
        """Waits for a job to fail."""
        self.until(lambda: any(isinstance(message, JobStatus) for message in self.said))
        return next(message for message in self.said if isinstance(message, JobStatus))

    def close(self) -> None:
        """Ends it."""
        self.agent.close()
        self.loop.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Any]:
    """Makes the agent of a test."""
    made: list[Device] = []

    def make(**fields: Any) -> Device:
        made.append(Device(tmp_path, **fields))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """Files of a Jetson Orin Nano."""
    return boards.orin_nano(tmp_path / "orin")


def test_a_job_is_measured_by_the_board(device: Any, orin: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Power at the input, times the time that training took; the source is announced with what it covers."""
    caplog.set_level(logging.INFO, "edge")
    one = device(root=orin)
    assert (one.source.sensor, one.source.scope, one.source.quality) == ("jetson", "module", "power")
    assert "not the carrier board" in one.source.covers
    one.give()
    meta = one.update().meta
    assert meta.energy.train_mj == pytest.approx(INPUT_WATTS * meta.train_ms, rel=0.25)
    assert meta.energy.idle_mw == pytest.approx(1000 * INPUT_WATTS, rel=0.01)
    assert (meta.energy.modelled, meta.energy.radio_mj, meta.stopped) == (False, None, "")
    assert "J (training, measured)" in caplog.text
    assert "J (radio" not in caplog.text


def test_a_job_is_modelled_and_says_so(device: Any) -> None:
    """Without a sensor the watts of the configuration stand in, labelled as modelled wherever they go."""
    one = device(energy=EnergyConfig(**MODEL, radio="lte"))
    assert (one.source.sensor, one.source.scope, one.source.quality) == ("modelled", "modelled", "modelled")
    one.give()
    update = one.update()
    energy = update.meta.energy
    assert energy.modelled
    assert 0.8 * 2.0 * update.meta.train_ms < energy.train_mj < 1.3 * 6.0 * update.meta.train_ms
    assert energy.radio_mj == round(5.2685e-3 * update.blob.size_bytes)  # the blobs were here already


def test_the_model_may_count_the_agent_alone(device: Any) -> None:
    """Agents that share a machine model their own CPU time: training that mostly sleeps is near the idle watts."""
    one = device(energy=EnergyConfig(sensor="modelled", modelled_of="agent", idle_watts=1.0, busy_watts=1001.0))
    one.give()
    meta = one.update().meta
    assert 1.0 * meta.train_ms < meta.energy.train_mj < 400 * meta.train_ms


def test_without_a_sensor_nothing_is_known(device: Any, caplog: pytest.LogCaptureFixture) -> None:
    """No figure, no announcement, no zero; a limit that nothing can measure is said not to hold."""
    caplog.set_level(logging.INFO, "edge")
    one = device(limits=LimitsConfig(job_joules=0.001))
    assert "there is no sensor here" in caplog.text
    assert one.source is None
    one.give()
    meta = one.update().meta
    assert (meta.energy, meta.stopped, meta.steps) == (None, "", 20)
    assert "may draw 0.001 J (limits.job_joules), but nothing here can measure it" in caplog.text


def test_switched_off_is_off(device: Any, orin: Path) -> None:
    """With ``none`` nothing is looked for."""
    one = device(root=orin, energy=EnergyConfig(sensor="none"))
    one.give()
    assert (one.source, one.update().meta.energy) == (None, None)


@pytest.mark.parametrize("own", [True, False])
def test_a_job_ends_at_its_joules_and_keeps_its_work(device: Any, orin: Path, own: bool) -> None:
    """The smaller of the job's limit and the device's ends training after its step; the update is sent as any other,
    and the next job runs.
    """
    limits = LimitsConfig(job_joules=1000.0 if own else 10.0)
    one = device(root=orin, limits=limits)
    one.give("first", run="other", steps=1)
    one.until(lambda: one.agent.state.updates)  # the worker is there: what its start draws counts for its job
    one.give(steps=2000, joule_limit=10.0 if own else None)
    update = one.update()
    name = "job_joules of its plan" if own else "limits.job_joules"
    assert f"J (measured), and {name} = 10" in update.meta.stopped
    assert 0 < update.meta.steps < 2000
    assert update.meta.energy.train_mj > 1000
    assert (update.state, update.blob.size_bytes > 0) == ("ready", True)
    assert one.said == []
    one.agent._handle(messages.Verdict(update=update.update, counted=True))
    one.give("b", steps=1)
    assert one.update("b").meta.stopped == ""


def test_heat_ends_training_and_keeps_its_work(device: Any) -> None:
    """The update is made of the steps until then; no other job begins before it is cooler."""
    one = device(limits=LimitsConfig(max_temperature_c=80.0))
    one.give(steps=2000)
    one.until_it_trains()
    hot = messages.Telemetry(uptime_s=1.0, clock_unix_s=1.0, temperature_c=81.0)
    one.agent._check_health(hot)
    meta = one.update().meta
    assert meta.stopped == "81 degrees C is over limits.max_temperature_c = 80"
    assert 0 < meta.steps < 2000
    one.give("b")
    assert "training is paused here: 81 degrees C" in one.failure().reason


def test_want_of_memory_kills_training_and_says_what_it_drew(device: Any, orin: Path) -> None:
    """There is no time to encode; the report of the failed job has the joules that were spent in vain."""
    one = device(root=orin, limits=LimitsConfig(min_free_memory_mb=100.0))
    one.give(steps=2000)
    one.until_it_trains()
    one.agent._check_health(messages.Telemetry(uptime_s=1.0, clock_unix_s=1.0, free_memory_bytes=1))
    status = one.failure()
    assert (status.status, "free memory" in status.reason) == ("failed", True)
    assert status.energy.train_mj is not None
    assert one.agent.spool.open_updates() == []


def test_a_crash_says_what_was_drawn_until_then(device: Any, orin: Path) -> None:
    """However the worker ends, what the job drew is reported."""
    one = device(root=orin)
    one.give(steps=2000)
    one.until_it_trains()
    os.kill(one.agent.supervisor.pid, signal.SIGSEGV)
    status = one.failure()
    assert "SIGSEGV" in status.reason
    assert not status.energy.modelled


def test_a_sensor_that_vanishes_in_the_middle(device: Any, orin: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model takes over, said in one line and announced; the whole job counts as modelled, never as measured."""
    one = device(root=orin, energy=EnergyConfig(**MODEL))
    assert one.source.sensor == "jetson"
    one.give()
    one.until_it_trains()
    boards.vanish(orin / "sys/class/hwmon/hwmon1")
    meta = one.update().meta
    assert meta.energy.modelled
    assert meta.energy.train_mj > 0
    assert [state.energy.sensor for state in one.announced] == ["modelled"]
    lines = [record.getMessage() for record in caplog.records if record.name == "edge.energy"]
    assert len([line for line in lines if "jetson failed" in line and "goes on with modelled" in line]) == 1


def test_the_only_sensor_vanishes(device: Any, orin: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Then joules are unknown, for this job too; it is trained and sent all the same."""
    one = device(root=orin)
    one.give()
    one.until_it_trains()
    boards.vanish(orin / "sys/class/hwmon/hwmon1")
    meta = one.update().meta
    assert (meta.energy, meta.steps) == (None, 20)
    assert one.source is None
    assert "so joules are unknown" in caplog.text


def test_a_named_sensor_that_cannot_be_read_is_stood_in_for(device: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The agent starts, says why, and models."""
    one = device(energy=EnergyConfig(sensor="rapl", **MODEL))
    assert one.source.sensor == "modelled"
    assert "rapl: no intel-rapl below" in caplog.text


def test_a_sensor_that_does_not_exist_is_refused(tmp_path: Path, orin: Path) -> None:
    """A misspelt name is an error that says which sensors there are."""
    config = AgentConfig(
        device="dev",
        state_dir=str(tmp_path / "state"),
        broker=BrokerConfig(url="mqtt://localhost:1"),
        data=[DatasetConfig(name="d", path="d.npz")],
        energy=EnergyConfig(sensor="jetsom"),
    )
    agent = Agent(config, energy_root=orin)
    with pytest.raises(ConfigError, match=r"no sensor 'jetsom' on this machine .*one of: jetson"):
        agent.start()
    agent.close()


def test_cpu_time_of_the_worker_is_kept_when_it_ends() -> None:
    """While a process runs its time counts, and after it was reaped it still does."""
    pids: list[int] = []
    cpu = OwnCpu(lambda: pids[0] if pids else None)
    before = cpu.read()
    code = "sum(range(3_000_000)); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        pids.append(child.pid)
        child.stdout.readline()
        while_it_runs = cpu.read()
        child.kill()
    gone = cpu.read()
    pids.clear()
    assert before < while_it_runs <= gone <= cpu.read()
