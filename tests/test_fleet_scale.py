"""A coordinator and 200 light agents over a real broker: many devices at once are as well served as a few."""

from __future__ import annotations

import time
from random import Random
from typing import TYPE_CHECKING

import pytest

from benchmarks.light_agent import LightAgent, Updates
from benchmarks.perturbing_bundle import write_perturbing_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.messages import Heartbeat
from edge_runtime.transport.link import LinkSettings
from tests.support.federation import Federation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AGENTS = 200
TARGET = 50
PARAMETERS = 2000

pytestmark = [pytest.mark.slow, pytest.mark.mosquitto]


class Crowd:
    """A federation whose agents are light; all on one loop."""

    def __init__(self, folder: Path, broker: object) -> None:
        self.federation = Federation(folder, broker)
        self.bundle = folder / "perturb.bundle"
        write_perturbing_bundle(self.bundle, PARAMETERS)
        given = self.federation.connection
        (folder / "updates").mkdir()
        updates = Updates(folder / "updates", Bundle.open(self.bundle).layout())
        secret = broker.password_file.read_text()  # type: ignore[attr-defined]
        self.agents = [
            LightAgent(
                self.federation.loop,
                LinkSettings(
                    url=given["url"],
                    client_id=f"light-{number:03d}",
                    username=given["username"],
                    password=lambda: secret,
                ),
                updates=updates,
                random=Random(number),
            )
            for number in range(AGENTS)
        ]
        for agent in self.agents:
            agent.link.start()
        self.until_online(AGENTS)

    def until_online(self, count: int) -> None:
        """Until the coordinator sees so many."""
        fleet = self.federation.coordinator.fleet
        self.federation.until(lambda: sum(device.online for device in fleet.devices()) == count, f"{count} online")

    def submit(self, rounds: int) -> str:
        """A run of all that takes ``TARGET`` updates a round."""
        return self.federation.submit(
            name="crowd",
            bundle=str(self.bundle),
            dataset="noise",
            rounds=rounds,
            participation={"target": TARGET, "minimum": TARGET, "deadline_s": 30.0},
            training={"steps": 1, "batch_size": 8},
            evaluate_on_devices=False,
        )

    def close(self) -> None:
        """Ends everything."""
        for agent in self.agents:
            agent.stop()
        self.federation.close()


@pytest.fixture
def crowd(tmp_path: Path, mosquitto: object) -> Iterator[Crowd]:
    """200 connected agents."""
    made = Crowd(tmp_path / "crowd", mosquitto)
    yield made
    made.close()


def test_a_run_goes_on_while_half_of_the_fleet_leaves_and_returns(crowd):
    """Each round has its updates, each update counts once, and everybody is back at the end."""
    federation = crowd.federation
    run = crowd.submit(rounds=2)
    federation.until(lambda: federation.row(run).next_assignment > 0, "the first jobs")
    for agent in crowd.agents[: AGENTS // 2]:
        agent.stop()
    crowd.until_online(AGENTS // 2)
    for agent in crowd.agents[: AGENTS // 2]:
        agent.link.start()
    federation.finish(run)
    crowd.until_online(AGENTS)
    federation.until(lambda: not any(agent.state.updates for agent in crowd.agents), "all verdicts")
    taken = [row.updates for row in federation.store.rounds(run)]
    assert min(taken) >= TARGET  # those that came back may be late, and count in the second round
    assert federation.store.update_counts(run)["counted"] == sum(taken)


def test_heartbeats_of_all_at_once_do_not_delay_verdicts(crowd):
    """While beats come as fast as the loop turns, updates are taken, answered and counted."""
    federation, turns = crowd.federation, 0
    run = crowd.submit(rounds=2)
    end = time.monotonic() + 60
    while federation.row(run).status == "running":
        assert time.monotonic() < end, "the run does not end under heartbeats"
        for agent in crowd.agents[turns % 20 :: 20]:
            agent.beat(Heartbeat(uptime_s=turns, battery_percent=80))
        turns += 1
        federation.loop.step(0.01)
    assert federation.row(run).status == "finished", federation.row(run)
    federation.until(lambda: sum(agent.answered for agent in crowd.agents) == 2 * TARGET, "all verdicts")
    fleet = federation.coordinator.fleet
    federation.until(lambda: all(device.heartbeat is not None for device in fleet.devices()), "a beat of everybody")


def test_the_fleet_is_back_soon_after_the_broker_was_lost(crowd, mosquitto):
    """All reconnect with jitter, and the coordinator sees each of them again."""
    federation = crowd.federation
    mosquitto.process.kill()
    mosquitto.process.wait()
    mosquitto.revive()
    federation.until(lambda: not any(device.online for device in federation.coordinator.fleet.devices()), "the loss")
    crowd.until_online(AGENTS)
