"""A process full of light agents for :mod:`benchmarks.fleet`; does what it is asked on standard input, line by line.

    python -m benchmarks.fleet_agents --url mqtt://127.0.0.1:1883 --bundle b.bundle --folder /tmp/a --first 0 --count 10

Requests and answers are JSON objects: ``{"do": "connect", "per_s": 100}``, ``{"do": "beat", "per_s": 50}`` (0 stops),
``{"do": "status"}``. The end of standard input ends the process.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import deque
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.fleet_helper import Control, stamp
from benchmarks.light_agent import LightAgent, Updates
from edge_runtime.bundle import Bundle
from edge_runtime.messages import Heartbeat
from edge_runtime.transport.link import LinkSettings
from edge_runtime.transport.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable

PACE_S = 0.01  # how often what is due is sent


class Pacer:
    """Calls ``action`` so many times a second, in bursts of what fell due."""

    def __init__(self, loop: Loop, action: Callable[[], None]) -> None:
        self._loop, self._action = loop, action
        self._per_s = self._begun_s = 0.0
        self._done = 0
        self._runs = False

    def set(self, per_s: float) -> None:
        """From now on; 0 stops."""
        self._per_s, self._begun_s, self._done = per_s, self._loop.now(), 0
        if not self._runs and per_s:
            self._runs = True
            self._turn()

    def _turn(self) -> None:
        self._runs = self._per_s > 0
        if not self._runs:
            return
        due = int((self._loop.now() - self._begun_s) * self._per_s) - self._done
        for _ in range(due):
            self._done += 1
            self._action()
        self._loop.call_later(PACE_S, self._turn)


class Fleet:
    """The agents of this process."""

    def __init__(self, loop: Loop, options: argparse.Namespace) -> None:
        secret: Path | None = options.password_file
        self._loop = loop
        updates = Updates(options.folder, Bundle.open(options.bundle).layout())
        self.agents = [
            LightAgent(
                loop,
                LinkSettings(
                    url=options.url,
                    client_id=f"light-{number:05d}",
                    username=options.username,
                    password=None if secret is None else secret.read_text,
                    keepalive_s=options.keepalive_s,
                ),
                updates=updates,
                random=Random(number),
            )
            for number in range(options.first, options.first + options.count)
        ]
        self._waiting = deque(self.agents)
        self._turn = 0
        self._sent = 0
        self._connecting = Pacer(loop, self._connect)
        self._beating = Pacer(loop, self._beat)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what the main process asks."""
        match request["do"]:
            case "connect":
                self._connecting.set(request["per_s"])
            case "beat":
                self._sent = 0
                self._beating.set(request["per_s"])
        return {
            "connected": sum(agent.link.is_up for agent in self.agents),
            "sent": self._sent,
            "answered": sum(agent.answered for agent in self.agents),
        }

    def _connect(self) -> None:
        if self._waiting:
            self._waiting.popleft().link.start()

    def _beat(self) -> None:
        agent = self.agents[self._turn % len(self.agents)]
        self._turn += 1
        beat = Heartbeat(
            uptime_s=stamp(),
            clock_unix_s=int(time.time()),
            clock_synchronised=True,
            on_external_power=True,
            cpu_percent=12,
            free_memory_mb=400,
            temperature_c=51,
            temperature_margin_c=29,
            up_kbit_s=8000,
            down_kbit_s=30000,
            bundle=b"abcd",
            step_us=12_000,
            step_uj=45_000,
            availability_percent=90,
        )
        self._sent += agent.beat(beat)


def main() -> int:
    """Runs until standard input ends."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--url", required=True)
    result.add_argument("--username")
    result.add_argument("--password-file", type=Path)
    result.add_argument("--bundle", type=Path, required=True)
    result.add_argument("--folder", type=Path, required=True, help="for the bytes of updates")
    result.add_argument("--first", type=int, required=True, help="number of the first agent")
    result.add_argument("--count", type=int, required=True)
    result.add_argument("--keepalive-s", type=int, default=60)
    options = result.parse_args()
    logging.basicConfig(level=logging.ERROR)
    loop = Loop()
    fleet = Fleet(loop, options)
    Control(loop, fleet.answer)
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
