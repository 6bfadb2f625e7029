"""A coordinator and agents on one event loop in the test's process, with a real broker and real workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from coordinator.plan import Plan
from coordinator.server import Coordinator
from coordinator.settings import ServerSettings
from coordinator.store import Store
from coordinator.submission import submit
from edge_runtime import messages
from edge_runtime.agent.config import AgentConfig, BrokerConfig, LimitsConfig
from edge_runtime.agent.daemon import Agent
from edge_runtime.data.config import DatasetConfig
from edge_runtime.transport.link import packet_bytes
from edge_runtime.transport.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.events import RunRow


class Packet(NamedTuple):
    """One MQTT message over an agent's link, up (from the device) or down."""

    up: bool
    topic: str
    payload: bytes

    @property
    def size_bytes(self) -> int:
        """What the link carried for it."""
        return packet_bytes(self.topic, len(self.payload))

    @property
    def message(self) -> Any:
        """What it says, None for a chunk."""
        if not self.topic.endswith("/message"):
            return None
        return (messages.decode_from_device if self.up else messages.decode_from_coordinator)(self.payload)


def _record(agent: Agent, packets: list[Packet]) -> None:
    publish, received = agent.link.publish, agent.link._on_message

    def sent(topic: str, payload: bytes, **how: Any) -> bool:
        went = publish(topic, payload, **how)
        if went:
            packets.append(Packet(up=True, topic=topic, payload=bytes(payload)))
        return went

    def came(topic: str, payload: bytes) -> None:
        packets.append(Packet(up=False, topic=topic, payload=bytes(payload)))
        received(topic, payload)

    agent.link.publish, agent.link._on_message = sent, came


class Federation:
    """Close it at the end. ``broker`` is the fixture ``mosquitto``; without it the coordinator starts ``embedded``."""

    def __init__(self, folder: Path, broker: Any = None, embedded: str = "mosquitto") -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        settings = ServerSettings(state_dir=folder / "coordinator", embedded=embedded)
        if broker is not None:
            settings = msgspec.structs.replace(
                settings, broker_url=broker.url, username="edge", password_file=broker.password_file
            )
        self.loop = Loop()
        self.coordinator = Coordinator(settings, loop=self.loop)
        self.agents: dict[str, Agent] = {}
        self.held: dict[str, Callable[[], None]] = {}
        self.packets: dict[str, list[Packet]] = {}
        self.connection = msgspec.to_builtins(self.coordinator.connection.described())
        self.coordinator.start()
        self.store = Store(folder / "coordinator", create=False)

    def agent(
        self,
        device: str,
        data: DatasetConfig | tuple[np.ndarray, np.ndarray],
        *,
        hold: bool = False,
        clock: Callable[[], float] = time.time,
        home: Path | None = None,
        energy_root: Path = Path("/"),
        **limits: Any,
    ) -> Agent:
        """Starts an agent; with ``hold`` its offers wait in ``held`` until :meth:`release`."""
        home = home or self.folder / device
        home.mkdir(exist_ok=True)
        if not isinstance(data, DatasetConfig):
            np.savez(home / "data.npz", x=data[0], y=data[1], id=np.arange(len(data[0])))
            data = DatasetConfig(name="d", path=str(home / "data.npz"), id="id")
        given = self.connection
        config = AgentConfig(
            device=device,
            state_dir=str(home / "state"),
            broker=BrokerConfig(
                url=given["url"],
                username=given["username"],
                password_file=given["password_file"],
                protocol=given["protocol"],
            ),
            data=[data],
            limits=LimitsConfig(**limits),
        )
        agent = self.agents[home.name] = Agent(config, loop=self.loop, clock=clock, energy_root=energy_root)
        if hold:
            real = agent.uploads.offer
            agent.uploads.offer = lambda update, **how: self.held.__setitem__(device, lambda: real(update, **how))
        _record(agent, self.packets.setdefault(device, []))
        agent.start()
        return agent

    def stop(self, home: str) -> None:
        """Ends an agent; its folder stays, for another one to go on with."""
        agent = self.agents.pop(home)
        for update in list(agent.state.updates):  # timers end with a process, but this loop goes on
            agent.uploads.close(update)
        agent.close()

    def release(self, device: str) -> None:
        """Lets a held offer go."""
        self.until(lambda: device in self.held, f"an update of {device}")
        self.held.pop(device)()

    def submit(self, **plan: Any) -> str:
        """Submits a plan given as keyword arguments."""
        return submit(self.store, msgspec.convert(plan, Plan))

    def row(self, run: str) -> RunRow:
        """What is stored of the run."""
        return self.store.run(run).row

    def finish(self, *runs: str, limit_s: float = 60.0) -> None:
        """Until the runs have finished well."""
        self.until(lambda: all(self.row(run).status != "running" for run in runs), f"{runs} to end", limit_s)
        for run in runs:
            assert self.row(run).status == "finished", self.row(run)

    def until(self, condition: Callable[[], Any], what: str, limit_s: float = 60.0) -> None:
        """Runs the loop until the condition holds."""
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"waited {limit_s:g} s for {what}"
            self.loop.step(0.02)

    def close(self) -> None:
        """Ends everything. Agents are known by their home's name, which is the device's unless another was given."""
        for agent in self.agents.values():
            agent.close()
        self.store.close()
        self.coordinator.close()
        self.loop.close()
