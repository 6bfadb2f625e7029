"""What jobs draw, and limits that end them early: the real agent with its real worker, on sensors made of files."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

pytest.importorskip("onnxruntime")

from edge_runtime import messages
from edge_runtime.agent import idle, pipe
from edge_runtime.agent.config import AgentConfig, BrokerConfig, LimitsConfig, TelemetryConfig
from edge_runtime.agent.daemon import Agent
from edge_runtime.agent.energy_config import EnergyConfig
from edge_runtime.agent.job_energy import UNTOLD, energy_use
from edge_runtime.agent.own_cpu import OwnCpu
from edge_runtime.data import DatasetConfig
from edge_runtime.errors import ConfigError
from edge_runtime.messages import BlobRef, Job, JobStatus, ModelRef, UpdateId
from edge_runtime.transport.loop import Loop
from energy.metering import meter
from energy.metering.measurement import Measurement
from energy.sensors.base import Rail, Source
from energy.sensors.discovery import Found
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
            telemetry=TelemetryConfig(file=str(folder / "telemetry.json")),
            **fields,
        )
        self._telemetry = folder / "telemetry.json"
        self.measure()
        self.loop = Loop()
        self.agent = Agent(config, loop=self.loop, energy_root=root)
        self.said: list[Any] = []
        self.announced: list[messages.DeviceState] = []
        self.agent._send = self.said.append
        self.agent.link.publish = self.publish
        self.agent.start()
        blobs = [self.agent.cache.put(path.read_bytes()) for path in (self.jobs.bundle.path, self.jobs.model)]
        self.bundle, self.model = (BlobRef(sha256=blob.sha256, size_bytes=blob.size_bytes) for blob in blobs)

    def measure(self, **values: float | bool) -> None:
        """What its gauges say from now on."""
        self._telemetry.write_bytes(msgspec.json.encode(values))

    @property
    def source(self) -> messages.EnergySource | None:
        """What the agent announces."""
        return messages.decode_from_device(self.agent._announcement(online=True)).energy

    def publish(self, topic: str, payload: bytes, **_options: Any) -> bool:
        """Takes announcements."""
        if topic.endswith("/heartbeat"):
            return False
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

    def only_update(self, run: str) -> SpooledUpdate:
        """The update of assignment "a" of a run."""
        update = self.agent.spool.get(UpdateId(run, "dev", "a", 0))
        assert update is not None
        return update

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
    began_s = time.monotonic()
    one.give()
    meta = one.update().meta
    most_mj = 1000 * INPUT_WATTS * (time.monotonic() - began_s)
    energy = meta.energy
    assert energy.train_mj == pytest.approx(INPUT_WATTS * meta.train_ms, rel=0.25)
    assert 0 < energy.other_mj < most_mj, "the start of the worker, loading, evaluating"
    assert energy.train_mj + energy.other_mj + (energy.compress_mj or 0) <= most_mj
    assert (energy.sensor, energy.modelled, energy.radio_mj, meta.stopped) == ("jetson", False, None, "")
    assert "J (training, measured" in caplog.text
    assert "J (loading and evaluating, measured" in caplog.text
    assert "J (radio" not in caplog.text


def test_a_job_is_modelled_and_says_so(device: Any) -> None:
    """Without a sensor the watts of the configuration stand in, labelled as modelled wherever they go."""
    one = device(energy=EnergyConfig(**MODEL, radio="lte"))
    assert (one.source.sensor, one.source.scope, one.source.quality) == ("modelled", "modelled", "modelled")
    one.give()
    update = one.update()
    energy = update.meta.energy
    assert (energy.modelled, energy.sensor) == (True, "modelled")
    assert 0.8 * 2.0 * update.meta.train_ms < energy.train_mj < 1.3 * 6.0 * update.meta.train_ms
    assert energy.radio_mj == max(1, round(5.2685e-3 * update.blob.size_bytes))  # the blobs were here already


def test_the_model_may_count_the_agent_alone(device: Any) -> None:
    """Agents that share a machine model what their own CPU time adds: the watts of an idle machine are no agent's, and
    training that mostly sleeps costs little. The worker's clock tells the phases, however late the agent hears of them.
    """
    core_watts = 1000.0 / (os.cpu_count() or 1)
    one = device(energy=EnergyConfig(sensor="modelled", modelled_of="agent", idle_watts=9000.0, busy_watts=10_000.0))
    assert "without the idle power of the machine" in one.source.covers
    replies: list[Any] = []
    hear = one.agent._on_reply

    def late(reply: Any) -> None:
        replies.append(reply)
        if isinstance(reply, pipe.Trained):
            for told in replies:
                hear(told)

    one.agent.supervisor._on_reply = late
    one.give()
    energy, done = one.update().meta.energy, replies[-1]
    assert 0 < done.train_cpu_s < done.train_s
    assert energy.train_mj == pytest.approx(1000 * core_watts * done.train_cpu_s, abs=1)
    assert energy.compress_mj == pytest.approx(1000 * core_watts * done.compress_cpu_s, abs=1)
    assert energy.other_mj > energy.compress_mj, "the imports of the worker take longer"


def test_a_job_that_only_evaluates_or_fails_drew_energy_too(device: Any, orin: Path) -> None:
    """All of it is beside the two phases; the report of a job that could not begin to train has it, too."""
    one = device(root=orin)
    one.give(steps=None)
    energy = one.update().meta.energy
    assert energy.other_mj > 0
    assert (energy.train_mj, energy.compress_mj, energy.sensor) == (None, None, "jetson")
    one.give("b", run="other", hyper={"no such thing": 1.0})
    status = one.failure()
    assert (status.assignment, status.status, status.energy.sensor) == ("b", "failed", "jetson")
    assert status.energy.other_mj > 0


def test_idle_power_is_that_of_a_device_without_a_job(device: Any, orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known after some seconds without a job, and of the last such stretch also for the second of two jobs in a
    row: the moment between them, when the board is still at full power, says nothing. It grows old.
    """
    for name, value in (("STRETCH_S", 0.8), ("STRETCH_INTERVALS", 3.0), ("LEAST_S", 0.7), ("PAUSE_S", 0.0)):
        monkeypatch.setattr(idle, name, value)
    one = device(root=orin)
    one.give("a", run="early", steps=1)
    one.until(lambda: one.agent.state.updates)
    assert one.only_update("early").meta.energy.idle_mw is None
    one.agent.joules.tick()
    one.until(one.agent.joules._idle.now)
    current = orin / "sys/class/hwmon/hwmon1/curr1_input"
    boards.write(current, 5 * int(current.read_text()))
    one.give("a", run="first", steps=1)
    one.until(lambda: len(one.agent.state.updates) == 2)
    one.agent.joules.tick()
    later_s = one.loop.now() + 0.35
    one.until(lambda: one.loop.now() > later_s)
    one.give("a", run="second", steps=5)
    one.until(lambda: len(one.agent.state.updates) == 3)
    uses = [one.only_update(run).meta.energy for run in ("first", "second")]
    assert [use.idle_mw for use in uses] == [pytest.approx(1000 * INPUT_WATTS, rel=0.02)] * 2
    assert uses[1].train_mj > 0
    monkeypatch.setattr(idle, "KEPT_S", -1.0)
    one.give("a", run="third", steps=1)
    one.until(lambda: len(one.agent.state.updates) == 4)
    assert one.only_update("third").meta.energy.idle_mw is None


def test_what_speaks_against_a_job_makes_it_doubtful(device: Any, orin: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The board slows its clocks down while it trains: the figure is sent, marked, and one line says why."""
    caplog.set_level(logging.INFO, "edge")
    one = device(root=orin)
    one.give("a", run="cool")
    one.until(lambda: one.agent.state.updates)
    assert "throttled" not in caplog.text
    one.give("a", run="hot", steps=60)
    one.until_it_trains()
    boards.cooling(orin, [("cpufreq-cpu0", 2)])
    one.until(lambda: len(one.agent.state.updates) == 2)
    energy = one.only_update("hot").meta.energy
    assert (energy.doubtful, energy.modelled, energy.train_mj > 0) == (True, False, True)
    lines = [line for line in caplog.messages if "joules of job hot/a are doubtful" in line]
    assert len(lines) == 1
    assert "throttled: cpufreq-cpu0 slowed down (step 2)" in lines[0]


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
    limits = LimitsConfig(job_joules=1000.0 if own else 25.0)
    one = device(root=orin, limits=limits)
    one.give("first", run="other", steps=1)
    one.until(lambda: one.agent.state.updates)  # the worker is there: what its start draws counts for its job
    one.give(steps=20_000, hyper={"lr": 1e-4}, joule_limit=25.0 if own else None)
    update = one.update()
    name = "job_joules of its plan" if own else "limits.job_joules"
    assert f"J (measured), and {name} = 25" in update.meta.stopped
    assert 0 < update.meta.steps < 20_000
    assert update.meta.energy.train_mj > 1000
    assert (update.state, update.blob.size_bytes > 0) == ("ready", True)
    assert one.said == []
    one.agent._handle(messages.Verdict(update=update.update, counted=True))
    one.give("b", steps=1)
    assert one.update("b").meta.stopped == ""


def test_the_joules_of_the_day_end_training_and_decline_the_next_job(device: Any, orin: Path) -> None:
    """What jobs before drew counts; what was reached is sent, the next job is declined until tomorrow, also after a
    restart.
    """
    one = device(root=orin, limits=LimitsConfig(joules_per_day=25.0))
    one.give("first", run="other", steps=None)  # only evaluates: what a step draws is unknown
    one.until(lambda: one.agent.state.updates)
    one.give(steps=20_000, hyper={"lr": 1e-4})
    update = one.update()
    assert "J (measured), and joules left of limits.joules_per_day = " in update.meta.stopped
    assert 0 < update.meta.steps < 20_000
    one.give("b", run="third", steps=1)
    said = one.failure()
    assert (said.status, "limits.joules_per_day = 25" in said.reason, said.declined_s > 0) == ("rejected", True, True)
    assert one.agent.conditions.heartbeat().joules_left == 0


def test_without_its_charger_a_device_ends_training_and_keeps_its_work(device: Any) -> None:
    """Its owner lets it train while it charges; what it reached until then is sent."""
    one = device(limits=LimitsConfig(only_when_charging=True))
    one.measure(on_external_power=True)
    one.give(steps=2000)
    one.until_it_trains()
    one.measure(on_external_power=False)
    one.agent._check_limits()
    meta = one.update().meta
    assert meta.stopped == "no external power, and limits.only_when_charging is set"
    assert 0 < meta.steps < 2000


def test_a_limit_that_starting_uses_up_says_so(device: Any) -> None:
    """The job fails before its first step, and the reason names the limit and the cure."""
    one = device(energy=EnergyConfig(**MODEL))
    one.give(joule_limit=0.01)
    reason = one.failure().reason
    assert re.fullmatch(
        r"the job drew [\d.]+ J \(modelled\) before its first step \(starting and loading\); "
        r"job_joules = 0\.01 of its plan; raise it",
        reason,
    ), reason


def test_small_is_not_nothing() -> None:
    """Less than half a millijoule is reported as one, measured or of the radio; 0 stays 0, unknown stays unknown."""
    source = Source("board", "board", "power", "all")
    job = Measurement("a", 0.0, 1.0, 2e-4, None, None, source, {}, 10, 0.1)
    use = energy_use(job, {}, UNTOLD, radio_joules=1e-5)
    assert (use.other_mj, use.radio_mj) == (1, 1)
    use = energy_use(None, {}, UNTOLD, radio_joules=0.0)
    assert (use.train_mj, use.other_mj, use.radio_mj) == (None, None, 0)


def test_heat_ends_training_and_keeps_its_work(device: Any) -> None:
    """The update is made of the steps until then; no other job begins before it is cooler."""
    one = device(limits=LimitsConfig(max_temperature_c=80.0))
    one.give(steps=2000)
    one.until_it_trains()
    one.measure(temperature_c=81.0)
    one.agent._check_limits()
    meta = one.update().meta
    assert meta.stopped == "81 degrees C is over limits.max_temperature_c = 80"
    assert 0 < meta.steps < 2000
    one.give("b")
    assert one.failure().reason == meta.stopped
    assert one.failure().declined_s > 0


def test_want_of_memory_kills_training_and_says_what_it_drew(device: Any, orin: Path) -> None:
    """There is no time to encode; the report of the failed job has the joules that were spent in vain."""
    one = device(root=orin, limits=LimitsConfig(min_free_memory_mb=100.0))
    one.give(steps=2000)
    one.until_it_trains()
    one.measure(free_memory_bytes=1)
    one.agent._check_limits()
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
    assert (meta.energy.modelled, meta.energy.sensor, meta.energy.doubtful) == (True, "modelled", True)
    assert meta.energy.train_mj > 0
    assert [state.energy.sensor for state in one.announced] == ["modelled"]
    lines = [record.getMessage() for record in caplog.records if record.name == "edge.energy"]
    assert len([line for line in lines if "jetson failed" in line and "goes on with modelled" in line]) == 1


def test_the_only_sensor_vanishes(device: Any, orin: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Then joules are unknown, for this job too; it is trained and sent all the same."""
    caplog.set_level(logging.INFO, "edge")
    one = device(root=orin, limits=LimitsConfig(job_joules=1e6))
    one.give()
    one.until_it_trains()
    boards.vanish(orin / "sys/class/hwmon/hwmon1")
    meta = one.update().meta
    assert (meta.energy, meta.steps) == (None, 20)
    assert one.source is None
    assert "so joules are unknown" in caplog.text
    lines = [line for line in caplog.messages if "does not hold until a sensor is back" in line]
    assert len(lines) == 1, "the limit is said not to hold, once, with what is known"
    assert float(re.search(r"known until now: (\S+) J", lines[0])[1]) > 0
    (line,) = [line for line in caplog.messages if "joules of job r/a are unknown" in line]
    assert re.search(r"\d J are known, of \d+% of the time", line)


def test_a_limit_holds_though_the_sensor_failed_for_a_moment(
    device: Any, orin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was drawn before and after the failure counts; only the joules of the job are unknown."""
    monkeypatch.setattr(meter, "RETRY_FIRST_S", 0.1)
    one = device(root=orin, limits=LimitsConfig(job_joules=INPUT_WATTS * 2.0))
    one.give("a", run="other", steps=1)
    one.until(lambda: one.agent.state.updates)  # the worker is there
    one.give(steps=2000)
    one.until_it_trains()
    current = orin / "sys/class/hwmon/hwmon1/curr1_input"
    known = current.read_text()
    boards.write(current, "")
    one.until(lambda: one.source is None)
    boards.write(current, known.strip())
    meta = one.update().meta
    assert "J (measured), and limits.job_joules" in meta.stopped
    assert 0 < meta.steps < 2000


def test_a_sensor_that_appears_later_is_found(device: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A permission is given, a driver loaded: between jobs the agent looks again, ever more seldom."""
    caplog.set_level(logging.INFO, "edge")
    root = tmp_path / "board"
    one = device(root=root, energy=EnergyConfig(**MODEL))
    assert one.source.sensor == "modelled"
    now_s, looked = one.loop.now(), []
    joules_ = one.agent.joules
    survey = joules_._survey
    joules_._survey = lambda config, **how: (looked.append(now_s), survey(config, **how))[1]
    one.loop.now = lambda: now_s
    joules_._idle.end()
    for _ in range(720):  # an hour of ticks
        now_s += 5.0
        joules_.tick()
        joules_._idle.end()
    assert [round(b - a) for a, b in itertools.pairwise(looked)] == [300, 900]
    boards.orin_nano(root)
    now_s += 3600.0
    joules_.tick()
    assert one.source.sensor == "jetson"
    assert [state.energy.sensor for state in one.announced] == ["jetson"]
    assert "energy: from jetson (module)" in caplog.text
    now_s += 3600.0
    joules_._idle.end()
    joules_.tick()
    assert len(looked) == 5, "three times in vain, once to see it, once to take it; then never while it works"


def test_a_slow_sensor_keeps_nobody_waiting(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read by a thread: the agent's loop goes on, and the job is measured."""
    readers: list[int] = []

    class Slow:
        """Reads 5 W, and takes its time."""

        source = Source("slow", "board", "power", "a sensor behind a bus")
        domain = "system"
        rails = (Rail("slow", "board", "watts"),)
        interval_s = 0.3
        slow = True

        def read(self) -> tuple[float, ...]:
            time.sleep(0.05)
            readers.append(threading.get_ident())
            return (5.0,)

        def close(self) -> None:
            """Nothing to free."""

    monkeypatch.setattr("energy.sensors.discovery.discover", lambda _root: Found((Slow(),), ()))
    one = device()
    one.until(lambda: one.source is not None)
    one.give(steps=40)
    energy = one.update().meta.energy
    assert (energy.sensor, energy.train_mj > 0) == ("slow", True)
    assert len(readers) > 3
    assert threading.get_ident() not in readers


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
    with pytest.raises(ConfigError, match=r"no sensor is called 'jetsom'; did you mean 'jetson'\? .*jetson, "):
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
