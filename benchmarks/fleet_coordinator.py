"""The coordinator with a stopwatch for :mod:`benchmarks.fleet`: the product's own server, which also says how it does.

Requests on standard input: ``{"do": "status"}``, ``{"do": "reset"}`` (the same, then counts anew). The end of standard
input ends the process.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import sys
from pathlib import Path
from typing import Any

from benchmarks.fleet_helper import Control, stamp
from coordinator.server import Coordinator
from coordinator.settings import ServerSettings
from edge_runtime.errors import MessageError
from edge_runtime.messages import decode_heartbeat

LAG_S = 0.02  # a timer that should fire so often tells how late the loop is


class Measured(Coordinator):
    """Counts heartbeats as they are handled, and the time since they were sent."""

    def __init__(self, settings: ServerSettings) -> None:
        self.delays_ms: list[int] = []
        self.lags_ms: list[float] = []
        super().__init__(settings)
        self._due_s = self.loop.now() + LAG_S
        self.loop.call_later(LAG_S, self._lag)

    def _lag(self) -> None:
        now = self.loop.now()
        self.lags_ms.append(1000 * (now - self._due_s))
        self._due_s = now + LAG_S
        self.loop.call_later(LAG_S, self._lag)

    def _on_message(self, topic: str, payload: bytes) -> None:
        super()._on_message(topic, payload)
        if topic.endswith("/heartbeat"):
            try:
                self.delays_ms.append(stamp() - decode_heartbeat(payload).uptime_s)
            except MessageError:
                return

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What happened since the last reset."""
        status = {
            "devices": sum(1 for _ in self.fleet.devices()),
            "online": sum(device.online for device in self.fleet.devices()),
            "heartbeats": len(self.delays_ms),
            "delay_p50_ms": percentile(self.delays_ms, 50),
            "delay_p99_ms": percentile(self.delays_ms, 99),
            "lag_p50_ms": percentile(self.lags_ms, 50),
            "lag_p99_ms": percentile(self.lags_ms, 99),
            "lag_max_ms": percentile(self.lags_ms, 100),
        }
        if request["do"] == "reset":
            self.delays_ms.clear()
            self.lags_ms.clear()
        return status


def percentile(values: list[Any], percent: float) -> float | None:
    """Nearest rank; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return round(float(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]), 2)


def main() -> int:
    """Runs until standard input ends."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--state", type=Path, required=True)
    result.add_argument("--url", required=True)
    result.add_argument("--username")
    result.add_argument("--password-file", type=Path)
    result.add_argument("--profile", type=Path, help="write a profile (cProfile) there")
    options = result.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = ServerSettings(
        state_dir=options.state,
        broker_url=options.url,
        username=options.username,
        password_file=options.password_file,
    )
    server = Measured(settings)
    Control(server.loop, server.answer)
    profile = None
    if options.profile is not None:
        profile = cProfile.Profile()
        profile.enable()
    server.run()
    if profile is not None:
        profile.disable()
        profile.dump_stats(options.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
