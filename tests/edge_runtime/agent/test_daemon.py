"""The agent as a whole, against a real broker and a coordinator played by the test."""

from __future__ import annotations

import logging
import sqlite3
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("numpy")

from edge_runtime import messages, topics
from edge_runtime.agent import daemon, events, pipe, transfers
from edge_runtime.agent.config import AgentConfig, BrokerConfig, LimitsConfig, TelemetryConfig
from edge_runtime.agent.daemon import Agent
from edge_runtime.agent.energy_config import EnergyConfig
from edge_runtime.data.config import DatasetConfig
from edge_runtime.errors import ConfigError, StorageError
from edge_runtime.messages import BlobRef, Job, ModelRef, UpdateMeta
from edge_runtime.store.blobs import BlobStore
from edge_runtime.store.spool import Spool
from edge_runtime.transport.loop import Loop
from edge_runtime.transport.transfer import ChunkPump
from tests.support.brokers import Peer, free_port, own_mosquitto, run_until

META = UpdateMeta(round=0, model_version=0, samples=3, steps=1)


def config(folder, url: str = "mqtt://localhost:1", **fields) -> AgentConfig:
    values = {
        "device": "dev",
        "state_dir": str(folder / "state"),
        "broker": BrokerConfig(url=url),
        "data": [DatasetConfig(name="digits", path="digits.npz")],
    }
    return AgentConfig(**values | fields)


def test_second_agent_on_one_folder_is_refused(tmp_path):
    """Two agents on one state folder would lose updates: the second is told, and may start when the first is gone."""
    first = Agent(config(tmp_path))
    with pytest.raises(ConfigError, match="another agent runs on this state_dir"):
        Agent(config(tmp_path))
    first.close()
    second = Agent(config(tmp_path))
    assert second.instance == first.instance
    second.close()


def test_state_folder_that_cannot_be_used_is_named(tmp_path):
    """A state folder in a place that is a file is refused by name."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="state_dir cannot be used"):
        Agent(config(tmp_path, state_dir=str(tmp_path / "file" / "state")))


def test_clock_years_off_waits_for_time_before_tls(tmp_path, caplog):
    """Without a set clock no certificate can be checked: the agent says so, waits, and connects once time has come."""
    clock, now = [86_400.0], [0.0]
    loop = Loop(lambda: now[0])
    agent = Agent(config(tmp_path, url=f"mqtts://localhost:{free_port()}"), loop=loop, clock=lambda: clock[0])
    agent.start()
    assert "the clock says 1970-01-02: waiting for time synchronisation" in caplog.text
    assert not agent.link._started
    clock[0] = 1.8e9
    now[0] += daemon.TICK_S
    loop.step(0)
    assert agent.link._started
    agent.close()
    loop.close()


def test_plain_mqtt_does_not_wait_for_the_clock(tmp_path):
    """On loopback without TLS the clock does not matter."""
    agent = Agent(config(tmp_path, url=f"mqtt://localhost:{free_port()}"), clock=lambda: 0.0)
    agent.start()
    assert agent.link._started
    agent.close()


class World:
    """An agent whose worker is a function, and a coordinator made of a link."""

    def __init__(self, loop: Loop, url: str, folder) -> None:
        self.loop, self.url, self.folder = loop, url, folder
        self.states: list[messages.DeviceState] = []
        self.said: list = []
        self.blobs: dict[str, bytes] = {}
        self.requests: list[pipe.TrainRequest] = []
        self.answer_needs = True
        self.heartbeats: list[messages.Heartbeat] = []
        self.order: list[str] = []  # heartbeats and states as they came
        leaves = ("state", "message", "heartbeat")
        self.coordinator = Peer(loop, url, "coord", tuple(f"fl/v1/d/+/{leaf}" for leaf in leaves))
        self.coordinator.handler = self.on_message
        self.store = BlobStore(folder / "coordinator")
        self.pump = ChunkPump(self.coordinator.link)
        self.coordinator.up()
        self.agents: list[Agent] = []

    def agent(self, **fields) -> Agent:
        agent = Agent(config(self.folder, self.url, **fields), loop=self.loop)
        agent.link._settings = agent.link._settings.__class__(url=self.url, client_id="dev", backoff_first_s=0.05)
        agent.supervisor.request = self.requests.append
        self.agents.append(agent)
        agent.start()
        return agent

    def close(self, agent: Agent) -> None:
        self.agents.remove(agent)
        agent.close()

    def on_message(self, topic: str, payload: bytes) -> None:
        if topic.endswith(("/heartbeat", "/state")):
            self.order.append(topic.rpartition("/")[2])
        if topic.endswith("/heartbeat"):
            assert len(payload) <= messages.HEARTBEAT_LIMIT_BYTES
            self.heartbeats.append(messages.decode_heartbeat(payload))
            return
        message = messages.decode_from_device(payload)
        if topic.endswith("/state"):
            self.states.append(message)
        else:
            self.said.append(message)
        if isinstance(message, messages.Need) and self.answer_needs:
            data = self.blobs[message.sha256]
            blob = BlobRef(sha256=message.sha256, size_bytes=len(data))
            self.pump.send(topics.to_device("dev", "chunk"), self.store.path(message.sha256), blob, message.ranges)

    def blob(self, size: int, seed: int) -> BlobRef:
        data = Random(seed).randbytes(size)
        stored = self.store.put(data)
        self.blobs[stored.sha256] = data
        return BlobRef(sha256=stored.sha256, size_bytes=size)

    def job(self, name: str = "a1", **fields) -> Job:
        values = {"run": "run", "round": 0, "model_version": 0, "dataset": "digits", "deadline_s": 600.0, "epochs": 1}
        model = ModelRef(blobs=[self.blob(1000, 2)])
        return Job(**{"assignment": name, "bundle": self.blob(300_000, 1), "model": model, **values, **fields})

    def tell(self, message) -> None:
        assert self.coordinator.link.publish(topics.to_device("dev", "message"), messages.encode(message))

    def heard(self, kind) -> list:
        return [message for message in self.said if isinstance(message, kind)]

    def until(self, condition) -> None:
        run_until(self.loop, condition)


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
    world = World(loop, broker.url, tmp_path)
    yield world
    for agent in list(world.agents):
        world.close(agent)
    world.coordinator.link.stop()


def train(world: World, agent: Agent, data: bytes = b"update", **fields) -> None:
    """Answers the running job as the worker would."""
    path, state = agent.spool.folder / f"{sha256(data).hexdigest()}.update", agent.spool.folder / "x.state"
    path.write_bytes(data)
    state.write_bytes(b"state after " + data)
    reply = pipe.Trained(
        **{
            "path": str(path),
            "sha256": sha256(data).hexdigest(),
            "size_bytes": len(data),
            "meta": META,
            "dataset_samples": 7,
            "state_path": str(state),
            "key": "k",
            **fields,
        }
    )
    world.loop.call_soon(lambda: agent._on_reply(reply))


def test_job_from_arrival_to_verdict(world):
    """A job's blobs are fetched for this device alone, its update is offered, and the verdict closes it."""
    agent = world.agent()
    world.until(lambda: world.states and world.states[-1].online)
    world.tell(world.job())
    world.until(lambda: world.requests)
    assert [Path(path).name for path in world.requests[0].model_paths] == [world.job().model.blobs[0].sha256]
    train(world, agent)
    world.until(lambda: world.heard(messages.UpdateOffer))
    (offer,) = world.heard(messages.UpdateOffer)
    assert (offer.first[4:], offer.blob) == (b"update", None)  # all of it: its hash need not travel
    assert world.heard(messages.JobStatus) == []
    for message in (messages.Done(update=offer.update), messages.Verdict(update=offer.update, counted=True)):
        world.tell(message)
        world.tell(message)
    world.until(lambda: agent.spool.get(offer.update).state == "counted")
    assert [entry.name for entry in agent.spool.folder.iterdir()] == ["x.state"]
    assert agent.uploads._waiting == {}


def test_a_heartbeat_goes_before_every_announcement(world):
    """Who selects as soon as a device joins, or joined again for a new coordinator, has what it says of itself now."""
    agent = world.agent()
    world.until(lambda: world.states and world.heartbeats)
    world.close(agent)
    agent = world.agent()
    world.until(lambda: len(world.states) == 3 and len(world.heartbeats) == 2)
    for session in ("one", "two"):
        said = messages.CoordinatorState(online=True, session=session)
        world.coordinator.link.publish(topics.COORDINATOR, messages.encode(said))
    world.until(lambda: len(world.states) == 4 and len(world.heartbeats) == 3)
    assert world.order == ["heartbeat", "state", "state", "heartbeat", "state", "heartbeat", "state"]


def test_a_job_leaves_one_line_of_what_it_took(world, caplog):
    """Time, bytes to send, CPU time of the codec and bytes written to the flash."""
    caplog.set_level(logging.INFO, "edge.agent")
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job())
    world.until(lambda: world.requests)
    meta = UpdateMeta(round=0, model_version=0, samples=3, steps=1, train_ms=1250, encode_cpu_ms=8, written_bytes=5006)
    train(world, agent, meta=meta)
    world.until(lambda: world.heard(messages.UpdateOffer))
    line = "job run/a1: 3 samples in 1.2 s, 6 bytes encoded in 8 ms of CPU, 5006 bytes written"
    assert line in caplog.text


def test_the_radio_of_a_job_is_modelled_from_its_bytes(world):
    """What came for the job and what it sends; blobs that were here already cost nothing."""
    costs = EnergyConfig(sensor="none", joules_per_mb_up=3000.0, joules_per_mb_down=10.0)
    agent = world.agent(energy=costs)
    world.until(lambda: world.states)
    for name, fetched in (("a1", 301_000), ("b1", 0)):
        count = len(world.requests)
        world.tell(world.job(name, run=name))
        world.until(lambda count=count: len(world.requests) > count)
        train(world, agent, name.encode())
        world.until(lambda name=name: any(o.update.assignment == name for o in world.heard(messages.UpdateOffer)))
        energy = world.heard(messages.UpdateOffer)[-1].meta.energy
        assert energy == messages.EnergyUse(radio_mj=round(1000 * (2 * 0.003 + fetched * 1e-5)))
    assert agent._fetched == {}


def test_what_came_for_a_job_is_forgotten_with_it(world):
    """However a job goes, cancelled or failed before it began: its bytes burden no other job, and no pile grows."""
    agent = world.agent(energy=EnergyConfig(sensor="none", joules_per_mb_up=0.0, joules_per_mb_down=1.0))
    world.until(lambda: world.states)
    blobs = [world.blob(1000 + number, number) for number in range(20, 23)]
    world.tell(world.job("a", run="a"))
    world.until(lambda: world.requests)
    shared = len(agent._fetched)
    for name, blob in zip("bcd", blobs, strict=True):
        world.tell(world.job(name, run=name, model=ModelRef(blobs=[blob])))
    world.until(lambda: [entry.missing for entry in agent.state.jobs.values()] == [set()] * 4)
    assert len(agent._fetched) == shared + 3
    world.tell(messages.Cancel(run="b", assignment="b"))
    world.until(lambda: len(agent.state.jobs) == 3)
    assert blobs[0].sha256 not in agent._fetched
    agent._step(events.Tick(agent.loop.now() + 1e6))  # the deadlines pass
    assert len(agent.state.jobs) == 1
    assert len(agent._fetched) == shared
    train(world, agent)
    world.until(lambda: not agent.state.jobs)
    assert agent._fetched == {}


def test_models_that_others_build_on_are_kept(world):
    """A job is told which versions must stay: those of updates that may come back, and those that waiting jobs need."""
    agent = world.agent()
    world.until(lambda: world.states)
    for version in (3, 4):
        agent.models.keep("run", version, b"model", base=3)
    chain = {"blobs": [world.blob(500, 7)], "vector_sha256": "0" * 64}
    world.tell(world.job("e1", epochs=None, model=ModelRef(base=3, **chain)))
    world.until(lambda: world.requests)
    world.tell(world.job("a2", model=ModelRef(base=4, **chain)))
    world.until(lambda: ("run", "a2") in agent.state.jobs)
    assert agent.files.pinned("run") == [3, 4]
    assert agent.files.pinned("other") == []


def test_a_job_that_the_owner_forbids_is_declined_with_its_reason(world, tmp_path):
    """The coordinator hears why and for how long; the heartbeat says which limit holds; with the limit goes the no."""
    gauges = tmp_path / "gauges.json"
    gauges.write_text('{"on_external_power": false, "battery_percent": 55}')
    limits = LimitsConfig(only_when_charging=True, battery_reserve_percent=30.0)
    agent = world.agent(limits=limits, telemetry=TelemetryConfig(file=str(gauges)))
    world.until(lambda: world.states and world.heartbeats)
    assert world.states[-1].abilities == ["anchor", "standing"]
    assert messages.DECLINES[world.heartbeats[-1].declines] == "charging"
    world.tell(world.job())
    world.until(lambda: world.heard(messages.JobStatus))
    (status,) = world.heard(messages.JobStatus)
    assert (status.status, status.declined_s) == ("rejected", 900.0)
    assert status.reason == "no external power, and limits.only_when_charging is set"
    assert world.requests == []
    gauges.write_text('{"on_external_power": true, "battery_percent": 55}')
    agent._send_heartbeat()
    world.until(lambda: len(world.heartbeats) == 2)
    assert (world.heartbeats[-1].declines, world.heartbeats[-1].reserve_percent) == (0, 30)
    world.tell(world.job())
    world.until(lambda: world.requests)


def test_what_a_script_says_is_heard_within_a_tick(world, tmp_path, caplog):
    """A limit that ceases to hold by the telemetry file is told at the next tick, not at the next heartbeat; other news
    of the file wait for that."""
    caplog.set_level("INFO", "edge")
    gauges = tmp_path / "gauges.json"
    gauges.write_text('{"on_external_power": false}')
    agent = world.agent(limits=LimitsConfig(only_when_charging=True), telemetry=TelemetryConfig(file=str(gauges)))
    world.until(lambda: world.states and world.heartbeats)
    agent._tick()
    gauges.write_text('{"on_external_power": false, "temperature_c": 20}')
    agent._tick()
    gauges.write_text('{"on_external_power": true}')
    agent._tick()
    world.until(lambda: len(world.heartbeats) > 1)
    assert [beat.declines > 0 for beat in world.heartbeats] == [True, False]
    assert "training may run again" in caplog.text


def test_the_days_joules_need_no_sensor_where_the_file_says_them(world, tmp_path, caplog):
    """No word of a limit that would not hold: it holds by what a step draws, as the script says."""
    gauges = tmp_path / "gauges.json"
    gauges.write_text('{"step_joules": 0.5}')
    limits = LimitsConfig(joules_per_day=5.0)
    agent = world.agent(limits=limits, telemetry=TelemetryConfig(file=str(gauges)))
    world.until(lambda: world.states and world.heartbeats)
    world.tell(world.job(epochs=None, steps=8))
    world.until(lambda: world.requests)
    assert "without that limit" not in caplog.text
    agent.conditions.worked("", 8, 1.0, None)
    world.tell(world.job("a2", epochs=None, steps=8))
    world.until(lambda: world.heard(messages.JobStatus))
    assert "1 J are left of limits.joules_per_day = 5" in world.heard(messages.JobStatus)[0].reason


def test_without_a_connection_a_device_is_not_there(loop, tmp_path):
    """Ticks without a link count as time in which it could not take part."""
    now = [1_798_714_800.0]
    agent = Agent(config(tmp_path, url=f"mqtt://localhost:{free_port()}"), loop=loop, clock=lambda: now[0])
    for _ in range(20):
        agent._tick()
        now[0] += 60.0
    assert agent.conditions.heartbeat().availability_percent == 0
    agent.close()


def test_a_limit_whose_fact_is_unknown_is_told_and_declines(world, tmp_path, caplog):
    """An owner who asked for external power does not pay for what the device cannot know: one warning with the cure,
    and no job, until a script says it."""
    gauges = tmp_path / "gauges.json"
    gauges.write_text('{"temperature_c": 20}')
    limits = LimitsConfig(only_when_charging=True)
    agent = world.agent(limits=limits, telemetry=TelemetryConfig(file=str(gauges)))
    if agent.conditions.known({}).on_external_power is not None:
        pytest.skip("this machine knows what powers it")
    world.until(lambda: world.states and world.heartbeats)
    agent._on_up()
    assert caplog.text.count("limits.only_when_charging declines every job: nothing here says whether external") == 1
    assert messages.DECLINES[world.heartbeats[-1].declines] == "charging"
    world.tell(world.job())
    world.until(lambda: world.heard(messages.JobStatus))
    assert world.heard(messages.JobStatus)[0].reason.startswith("external power is unknown here")
    gauges.write_text('{"on_external_power": true}')
    world.tell(world.job())
    world.until(lambda: world.requests)


def test_a_job_that_is_too_slow_here_is_declined_once_its_steps_are_known(world):
    """The first job teaches what a step takes; a later one that cannot meet its deadline goes back, one that can does
    not. What the link carries is learnt, too."""
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job(steps=10, epochs=None))
    world.until(lambda: world.requests)
    train(world, agent, meta=UpdateMeta(round=0, model_version=0, samples=3, steps=10), train_s=5.0)
    world.until(lambda: world.heard(messages.UpdateOffer))
    world.tell(messages.Verdict(update=world.heard(messages.UpdateOffer)[0].update, counted=True))
    world.tell(world.job("a2", steps=1000, epochs=None, deadline_s=60.0))
    world.until(lambda: world.heard(messages.JobStatus))
    (status,) = world.heard(messages.JobStatus)
    assert "the job would take about 500 s here (1000 steps in 500 s" in status.reason
    assert status.declined_s is not None
    world.tell(world.job("a2b", steps=1000, epochs=None, deadline_s=60.0))  # what was measured is believed half as much
    world.until(lambda: len(world.heard(messages.JobStatus)) == 2)
    assert "the job would take about 250 s here" in world.heard(messages.JobStatus)[1].reason
    world.tell(world.job("a3", steps=1000, epochs=None, deadline_s=60.0))  # and by now that is worth a try
    world.until(lambda: len(world.requests) == 2)
    assert agent.conditions.down.kbit_s > 1000


def test_a_standing_assignment_is_pulled_trained_and_pulled_again(world):
    """The device asks by itself, its updates have ever higher numbers, one at a time waits for its verdict, also over a
    restart; a cancelled assignment is over."""
    agent = world.agent()
    world.until(lambda: world.states)
    wanted = messages.Standing(
        run="run", assignment="s1", sequence=3, dataset="digits", bundle=world.job().bundle, max_steps=40
    )
    world.tell(wanted)
    for number in (3, 4):
        world.until(lambda number=number: any(pull.sequence == number for pull in world.heard(messages.Pull)))
        assert world.heard(messages.Pull)[-1].steps == 40
        asked = len(world.requests)
        world.tell(world.job("s1", steps=40, epochs=None, sequence=number))
        world.until(lambda asked=asked: len(world.requests) > asked)
        train(world, agent, b"update %d" % number)
        world.until(lambda number=number: any(o.update.sequence == number for o in world.heard(messages.UpdateOffer)))
        assert {pull.sequence for pull in world.heard(messages.Pull)} == set(range(3, number + 1))
        if number == 3:
            update = world.heard(messages.UpdateOffer)[-1].update
            world.tell(messages.Done(update=update))
            world.tell(messages.Verdict(update=update, counted=True))
    world.close(agent)
    world.said.clear()
    agent = world.agent()
    world.until(lambda: world.heard(messages.UpdateOffer))
    assert world.heard(messages.Pull) == []
    world.tell(messages.Verdict(update=world.heard(messages.UpdateOffer)[0].update, counted=False, reason="late"))
    world.until(lambda: world.heard(messages.Pull))
    assert world.heard(messages.Pull)[0].sequence == 5
    world.tell(messages.Cancel(run="run", assignment="s1"))
    world.until(lambda: not agent.standing.state.held)
    assert not (Path(agent.config.state_dir) / "standing").exists()


def test_a_run_that_has_ended_is_pulled_no_more(world):
    """A verdict that says so ends the standing assignment, though no one cancelled it; a refusal alone does not."""
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(messages.Standing(run="run", assignment="s1", dataset="digits", bundle=world.job().bundle, max_steps=4))
    world.until(lambda: world.heard(messages.Pull))
    world.tell(world.job("s1", steps=4, epochs=None))
    world.until(lambda: world.requests)
    train(world, agent)
    world.until(lambda: world.heard(messages.UpdateOffer))
    update = world.heard(messages.UpdateOffer)[0].update
    world.tell(messages.Verdict(update=update, counted=False, reason="its assignment is unknown here"))
    world.until(lambda: not agent.state.updates)
    assert agent.standing.state.held
    world.tell(messages.Verdict(update=update, counted=False, reason="in any words", ends=True))
    world.until(lambda: not agent.standing.state.held)


def test_large_update_is_offered_with_its_hash(world):
    """What does not fit the offer is named in it, and its chunks follow."""
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job())
    world.until(lambda: world.requests)
    train(world, agent, bytes(300_000))
    world.until(lambda: world.heard(messages.UpdateOffer))
    (offer,) = world.heard(messages.UpdateOffer)
    assert (offer.blob.size_bytes, offer.blob.sha256) == (300_000, sha256(bytes(300_000)).hexdigest())
    assert len(offer.first) == offer.blob.chunk_bytes + 4


def test_bytes_can_be_asked_for_until_the_verdict(world):
    """A coordinator that was restored from a backup asks for what it had acknowledged: the bytes are still here. Once
    they were counted, it is told that they are gone."""
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job())
    world.until(lambda: world.requests)
    train(world, agent)
    world.until(lambda: world.heard(messages.UpdateOffer))
    update = world.heard(messages.UpdateOffer)[0].update
    need = messages.Need(sha256=sha256(b"update").hexdigest(), ranges=[(0, 1)])
    world.tell(messages.Done(update=update))
    world.tell(need)
    world.until(lambda: agent.pump.sent_chunks == 1)
    world.tell(messages.Verdict(update=update, counted=True))
    world.tell(need)
    world.until(lambda: world.heard(messages.Gone))
    assert agent.pump.sent_chunks == 1


def test_refused_update_goes_to_the_worker_with_the_next_job(world):
    """The next job waits for the verdict; then the worker gets the refused bytes and the state of the run, and when
    its update is durable both are replaced."""
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job("a1"))
    world.until(lambda: len(world.requests) == 1)
    assert (world.requests[0].state_path, world.requests[0].refused) == ("", [])
    train(world, agent, b"one")
    world.until(lambda: world.heard(messages.UpdateOffer))
    update = world.heard(messages.UpdateOffer)[0].update
    world.tell(world.job("a2"))
    world.until(lambda: ("run", "a2") in agent.state.jobs and not agent.state.jobs["run", "a2"].missing)
    world.until(lambda: len(world.heard(messages.UpdateOffer)) == 2)  # asks for the verdict
    assert len(world.requests) == 1
    world.tell(messages.Done(update=update))
    world.tell(messages.Verdict(update=update, counted=False, reason="late"))
    world.until(lambda: len(world.requests) == 2)
    request = world.requests[1]
    (refused,) = request.refused
    assert (refused.update, refused.key) == (update, "k")
    assert Path(refused.path).read_bytes() == b"one"
    assert Path(request.state_path).read_bytes() == b"state after one"
    train(world, agent, b"two", returned=[update])
    world.until(lambda: len(agent.state.updates) == 1)
    assert not Path(refused.path).exists()
    assert agent.spool.run_state("run").read_bytes() == b"state after two"


def test_bytes_in_a_job_need_no_transfer(world, caplog):
    """The last change of a chain comes with the job; damaged bytes are fetched like any other blob."""
    agent = world.agent()
    world.until(lambda: world.states)
    change = world.blob(500, 7)
    model = ModelRef(base=0, blobs=[change], vector_sha256="0" * 64)
    world.tell(world.job("a1", model=model, inline=world.blobs[change.sha256]))
    world.until(lambda: world.requests)
    assert {need.sha256 for need in world.heard(messages.Need)} == {world.job().bundle.sha256}
    assert Path(world.requests[0].model_paths[0]).read_bytes() == world.blobs[change.sha256]
    assert world.requests[0].job.inline == b""
    other = world.blob(500, 8)
    world.tell(
        world.job("b1", run="other", model=ModelRef(base=0, blobs=[other], vector_sha256="0" * 64), inline=bytes(500))
    )
    world.until(lambda: agent.cache.has(other.sha256))
    assert "in a job's message is damaged" in caplog.text
    assert other.sha256 in {need.sha256 for need in world.heard(messages.Need)}


def test_model_that_is_not_held_is_rejected_by_name(world):
    """The coordinator hears which version is missing; one that is held is taken."""
    agent = world.agent()
    world.until(lambda: world.states)
    agent.models.keep("run", 3, b"model")
    change = world.blob(500, 7)
    for name, base in (("a1", 2), ("a2", 3)):
        world.tell(world.job(name, model=ModelRef(base=base, blobs=[change], vector_sha256="0" * 64)))
    world.until(lambda: world.requests)
    (status,) = world.heard(messages.JobStatus)
    assert (status.assignment, status.status) == ("a1", "rejected")
    assert "builds on model version 2 of run 'run'" in status.reason
    assert world.requests[0].job.assignment == "a2"


def test_model_that_is_gone_when_the_job_starts_is_rejected_by_name(world):
    """While a job waits for a verdict, the version that it builds on may go; the coordinator hears it as at arrival. So
    it does when the worker finds that version damaged."""
    agent = world.agent()
    world.until(lambda: world.states)
    agent.models.keep("run", 3, b"model")
    change = ModelRef(base=3, blobs=[world.blob(500, 7)], vector_sha256="0" * 64)
    world.tell(world.job("a1"))
    world.until(lambda: world.requests)
    world.tell(world.job("a2", model=change))
    world.until(lambda: ("run", "a2") in agent.state.jobs and not agent.state.jobs["run", "a2"].missing)
    agent.models.drop("run", 3)
    train(world, agent)
    world.until(lambda: world.heard(messages.UpdateOffer))
    world.tell(messages.Verdict(update=world.heard(messages.UpdateOffer)[0].update, counted=True))
    world.until(lambda: world.heard(messages.JobStatus))
    agent.models.keep("run", 3, b"model")
    world.tell(world.job("a3", model=change))
    world.until(lambda: len(world.requests) == 2)
    agent.models.drop("run", 3)
    agent._on_reply(pipe.Failed(kind="codec", reason="3.model: damaged"))
    world.until(lambda: len(world.heard(messages.JobStatus)) == 2)
    for status, name in zip(world.heard(messages.JobStatus), ("a2", "a3"), strict=True):
        assert (status.assignment, status.status) == (name, "rejected")
        assert "builds on model version 3 of run 'run'" in status.reason


def test_a_long_chain_of_changes_is_fetched_a_few_at_a_time(world, monkeypatch):
    """However many changes a device missed, only some are being received at once, and all arrive."""
    monkeypatch.setattr(transfers, "OPEN_LIMIT", 3)
    agent = world.agent()
    world.until(lambda: world.states)
    changes = [world.blob(100 + number, number) for number in range(20)]
    most = []
    real = agent.downloads._ask
    monkeypatch.setattr(agent.downloads, "_ask", lambda one: (most.append(len(agent.downloads.open)), real(one)))
    world.tell(world.job(model=ModelRef(base=0, blobs=changes, vector_sha256="0" * 64)))
    world.until(lambda: world.requests)
    assert len(world.requests[0].model_paths) == 20
    assert max(most) <= 3
    assert agent.downloads.open == set()


def test_last_will_names_the_session_that_was_announced(world, broker):
    """When the connection ends without a word, the broker's "offline" carries the session of the last "online"."""
    agent = world.agent()
    for number in (1, 2):
        world.until(lambda number=number: len(world.states) >= 2 * number - 1)
        online = world.states[-1]
        assert online.online
        agent.link._client.socket().shutdown(2)
        world.until(lambda number=number: len(world.states) >= 2 * number)
        assert (world.states[-1].online, world.states[-1].session) == (False, online.session)
    world.until(lambda: len(world.states) >= 5)
    assert len({state.session for state in world.states}) == 3
    world.close(agent)
    world.until(lambda: not world.states[-1].online)
    assert broker.process is not None


def test_new_coordinator_session_makes_the_agent_speak_again(world):
    """When the coordinator is a new process, the agent announces itself and offers its updates again."""
    agent = world.agent()
    world.until(lambda: world.states)

    def announce(session):
        state = messages.CoordinatorState(online=True, session=session)
        world.coordinator.link.publish(topics.COORDINATOR, messages.encode(state), retain=True)

    announce("one")
    world.until(lambda: agent._coordinator_session == "one")
    count = len(world.states)
    announce("one")
    announce("two")
    world.until(lambda: len(world.states) == count + 1)
    assert agent._coordinator_session == "two"


def test_evaluation_without_training_is_offered_without_bytes(world):
    """A job that only evaluates answers with an update of no bytes, twice over too."""
    agent = world.agent()
    world.until(lambda: world.states)
    for name in ("e1", "e2"):
        count = len(world.requests)
        world.tell(world.job(name, epochs=None))
        world.until(lambda count=count: len(world.requests) > count)
        agent._on_reply(pipe.Trained(path="", sha256="", size_bytes=0, meta=META, dataset_samples=7))
    world.until(lambda: len(world.heard(messages.UpdateOffer)) == 2)
    for offer in world.heard(messages.UpdateOffer):
        assert (offer.blob, offer.first) == (None, bytes(4))
        world.tell(messages.Verdict(update=offer.update, counted=False, reason="empty"))
    world.until(lambda: not agent.state.updates)


def test_full_disk_keeps_the_agent_alive_and_the_update(world, monkeypatch, caplog):
    """With a full disk the finished update is tried until its row is written, its job is not trained twice, and then it
    is offered. A verdict is tried until it is written, too."""
    monkeypatch.setattr(daemon, "DISK_RETRY_S", 0.1)
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job())
    world.until(lambda: world.requests)
    real = agent.spool._db

    class Full:
        def execute(self, query, values=()):
            if query.startswith(("INSERT", "UPDATE", "DELETE")):
                raise sqlite3.OperationalError("database or disk is full")
            return real.execute(query, values)

    agent.spool._db = Full()
    train(world, agent)
    world.until(lambda: caplog.text.count("disk is full") >= 2)
    world.tell(world.job())
    world.tell(messages.Gone(sha256="0" * 64))
    world.until(lambda: len(agent.state.updates) == 1)
    agent.spool._db = real
    world.until(lambda: world.heard(messages.UpdateOffer))
    update = world.heard(messages.UpdateOffer)[0].update
    agent.spool._db = Full()
    world.tell(messages.Verdict(update=update, counted=True))
    world.until(lambda: not agent.state.updates)
    agent.spool._db = real
    world.until(lambda: agent.spool.get(update).state == "counted")
    assert len(world.requests) == 1
    assert agent.link.is_up


def test_a_worker_that_dies_after_its_write_leaves_no_file(world):
    """What it wrote before it could say so goes at once, whoever killed it; what rows name stays."""
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job("a0", run="other"))
    world.until(lambda: world.requests)
    train(world, agent)
    world.until(lambda: world.heard(messages.UpdateOffer))
    kept = set(agent.spool.folder.iterdir())
    for name, ours in (("a1", True), ("a2", False)):
        world.requests.clear()
        world.tell(world.job(name))
        world.until(lambda: world.requests)
        (agent.spool.folder / f"run.{name}.0123456789abcdef.state").write_bytes(bytes(1000))
        agent._on_worker_end("killed", ours)
        assert set(agent.spool.folder.iterdir()) == kept


def test_full_spool_refuses_to_train(world):
    """When waiting updates fill their quota, a new job fails with that reason and the old updates stay."""
    agent = world.agent(limits=LimitsConfig(spool_mb=0.001))
    world.until(lambda: world.states)
    world.tell(world.job("a0", run="other"))
    world.until(lambda: world.requests)
    train(world, agent, bytes(2000))
    world.until(lambda: world.heard(messages.UpdateOffer))
    world.requests.clear()
    world.tell(world.job())
    world.until(lambda: any(status.status == "failed" for status in world.heard(messages.JobStatus)))
    assert "limits.spool_mb" in world.heard(messages.JobStatus)[-1].reason
    assert world.requests == []


def test_refused_bytes_fill_the_spool_for_other_runs_only(world):
    """The job that sends them again may come in any case."""
    agent = world.agent(limits=LimitsConfig(spool_mb=0.001))
    world.until(lambda: world.states)
    world.tell(world.job("a0"))
    world.until(lambda: world.requests)
    train(world, agent, bytes(2000))
    world.until(lambda: world.heard(messages.UpdateOffer))
    world.requests.clear()
    world.tell(messages.Verdict(update=world.heard(messages.UpdateOffer)[0].update, counted=False, reason="late"))
    world.tell(world.job("b0", run="other"))
    world.until(lambda: world.heard(messages.JobStatus))
    assert "for a job that sends them again" in world.heard(messages.JobStatus)[-1].reason
    world.tell(world.job("a1"))
    world.until(lambda: world.requests)
    assert len(world.requests[0].refused) == 1


def test_a_job_that_cannot_begin_for_the_disk_fails(world):
    """A database that cannot be read when a job starts does not leave it hanging."""
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job())
    world.until(lambda: agent.state.jobs)
    real = agent.spool._db

    class Broken:
        def execute(self, *_args):
            raise sqlite3.OperationalError("disk I/O error")

    agent.spool._db = Broken()
    world.until(lambda: world.heard(messages.JobStatus))
    agent.spool._db = real
    (status,) = world.heard(messages.JobStatus)
    assert status.status == "failed"
    assert "disk I/O error" in status.reason
    assert agent.state.running is None


def test_held_models_share_the_quota_of_the_cache(world):
    """Models of runs that nobody asks for any more go before blobs do; those of the job's run and those that an update
    is relative to stay."""
    agent = world.agent(limits=LimitsConfig(cache_mb=0.31))
    world.until(lambda: world.states)
    for run in ("old", "run"):
        agent.models.keep(run, 3, bytes(20_000))
    agent.cache.put(bytes(5000))
    world.tell(world.job())
    world.until(lambda: world.requests)
    assert not agent.models.has("old", 3)
    assert agent.models.has("run", 3)
    assert agent.cache.used_bytes() + agent.models.used_bytes() <= 0.31e6 + 20_000


def test_heat_pauses_and_says_so_once(tmp_path, caplog):
    """While it is too hot no job starts; the log says it when it begins and when it ends, not at every reading."""
    caplog.set_level(logging.INFO, "edge.agent")
    path = tmp_path / "telemetry.json"
    path.write_text("{}")
    told = TelemetryConfig(file=str(path))
    agent = Agent(config(tmp_path, limits=LimitsConfig(max_temperature_c=60.0), telemetry=told))
    for heat in (61.0, 62.0, 63.0, 50.0, 50.0):
        path.write_text(f'{{"temperature_c": {heat}}}')
        agent._check_limits()
        assert bool(agent.state.paused) == (heat > 60)
    assert caplog.text.count("training paused") == caplog.text.count("training may run again") == 1
    agent.close()


def test_updates_wait_over_a_restart_of_the_agent(world):
    """An agent that is stopped before its update was delivered offers it at its next start."""
    agent = world.agent()
    world.until(lambda: world.states)
    world.tell(world.job())
    world.until(lambda: world.requests)
    train(world, agent)
    world.until(lambda: world.heard(messages.UpdateOffer))
    world.close(agent)
    world.said.clear()
    again = world.agent()
    world.until(lambda: world.heard(messages.UpdateOffer))
    assert isinstance(again.spool, Spool)
    world.tell(world.job())
    world.until(lambda: len(world.heard(messages.UpdateOffer)) >= 2)
    assert len(world.requests) == 1


def test_sample_counts_are_announced_when_they_are_news(world, monkeypatch):
    """A count that became known or changed by over a tenth is announced on the same connection, not too often."""
    monkeypatch.setattr(daemon, "ANNOUNCE_INTERVAL_S", 0.0)
    agent = world.agent()
    world.until(lambda: world.states)
    for count, told in ((100, 100), (110, 100), (111, 111), (0, 0), (1, 1)):
        agent._samples["digits"] = count
        agent._tick()
        world.until(lambda told=told: world.states[-1].datasets[0].samples == told)
    assert [state.datasets[0].samples for state in world.states] == [None, 100, 111, 0, 1]
    assert len({state.session for state in world.states}) == 1
    monkeypatch.setattr(daemon, "ANNOUNCE_INTERVAL_S", 60.0)
    agent._announce()
    agent._samples["digits"] = 500
    agent._tick()
    assert agent._announced == {"digits": 1}


def test_two_agents_with_one_name_are_told(world, tmp_path, caplog):
    """Two agents of one name throw each other out, and after some rounds the log says what to do."""
    first, second = world.agent(), world.agent(state_dir=str(tmp_path / "other"))
    world.until(lambda: "is another agent running as device 'dev'" in caplog.text)
    assert "the certificate belongs to another device name" in caplog.text
    assert first.instance != second.instance
