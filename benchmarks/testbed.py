"""Real processes for benchmarks: mosquitto, a coordinator, agents — each agent in a network namespace of its own.

With root and iproute2 every agent gets a veth pair, so the kernel counts exactly its bytes (Ethernet frames, with
TCP/IP headers and acknowledgements); broker and coordinator share a hub namespace. Without them all run on loopback
and byte counts are not available. Everything that is made is removed by :meth:`Testbed.close`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil

from coordinator.broker import mosquitto_path
from edge_runtime.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MB = 1e6
PORT = 18830
SUBNET = "10.203.0"
HUB_ADDRESS = f"{SUBNET}.1"


class Testbed:
    """Namespaces and processes in ``folder``."""

    __test__ = False

    def __init__(self, folder: Path, agents: int) -> None:
        self.folder = folder
        self.isolated = os.getuid() == 0 and shutil.which("ip") is not None
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._prefix = f"edge{os.getpid()}"
        self._agents = agents
        if self.isolated:
            self._make_namespaces()

    @property
    def url(self) -> str:
        """The broker's URL for agents."""
        return f"mqtt://{HUB_ADDRESS if self.isolated else '127.0.0.1'}:{PORT}"

    def start_broker(self) -> subprocess.Popen[bytes]:
        """Starts mosquitto in the hub, without passwords: nobody else can reach it."""
        program = mosquitto_path()
        if program is None:
            raise TransportError("this benchmark needs mosquitto: apt-get install mosquitto")
        lines = [
            f"listener {PORT} {HUB_ADDRESS if self.isolated else '127.0.0.1'}",
            "allow_anonymous true",
            "set_tcp_nodelay true",
            "max_queued_messages 0",
            "max_inflight_messages 0",
            "log_dest none",
        ]
        if os.getuid() == 0:
            lines.append("user root")
        configuration = self.folder / "mosquitto.conf"
        configuration.write_text("\n".join(lines) + "\n")
        process = self.start("broker", "hub", program, "-c", str(configuration))
        time.sleep(0.5)
        return process

    def start_python(self, name: str, where: str, *command: str) -> subprocess.Popen[bytes]:
        """Starts ``python -m command`` in a namespace; see :meth:`start`."""
        return self.start(name, where, sys.executable, "-m", *command)

    def start(self, name: str, where: str, *command: str) -> subprocess.Popen[bytes]:
        """Starts a program in the namespace ``where`` (``hub`` or an agent's number) with its log in the folder."""
        inside = ["ip", "netns", "exec", f"{self._prefix}-{where}"] if self.isolated else []
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self.processes[name] = process  # ip netns exec becomes the program, so this is its pid
        return process

    def link_bytes(self, agent: int) -> tuple[int, int] | None:
        """Bytes the agent has sent and received by the kernel's count; None without namespaces."""
        if not self.isolated:
            return None
        command = ["ip", "-n", f"{self._prefix}-{agent}", "-j", "-s", "link", "show", "eth0"]
        counters = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]["stats64"]
        return counters["tx"]["bytes"], counters["rx"]["bytes"]

    def close(self) -> None:
        """Ends the processes and removes the namespaces."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.terminate()
        for process in reversed(self.processes.values()):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.isolated:
            for name in ("hub", *range(self._agents)):
                _ip("netns", "delete", f"{self._prefix}-{name}")

    def _make_namespaces(self) -> None:
        hub = f"{self._prefix}-hub"
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", hub, "addr", "add", f"{HUB_ADDRESS}/24", "dev", "bridge0")
        _ip("-n", hub, "link", "set", "bridge0", "up")
        _quiet(hub)
        for agent in range(self._agents):
            space = f"{self._prefix}-{agent}"
            _ip("netns", "add", space)
            _quiet(space)
            _ip("-n", hub, "link", "add", f"veth{agent}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", hub, "link", "set", f"veth{agent}", "master", "bridge0", "up")
            _ip("-n", space, "addr", "add", f"{SUBNET}.{agent + 10}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """User and system seconds of a process and its descendants, ended ones that were waited for included."""
    total = 0.0
    for entry in _tree(process):
        try:
            times = entry.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_mb(processes: Iterable[subprocess.Popen[bytes]]) -> dict[str, float]:
    """RSS and PSS in MB (10^6), summed over the processes and their descendants."""
    rss = pss = 0.0
    for process in processes:
        for entry in _tree(process):
            try:
                full = entry.memory_full_info()
            except psutil.NoSuchProcess:
                continue
            rss += full.rss / MB
            pss += full.pss / MB
    return {"rss_mb": rss, "pss_mb": pss}


def _tree(process: subprocess.Popen[bytes]) -> list[Any]:
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _quiet(space: str) -> None:
    """No IPv6: its router solicitations would be counted as the agent's idle traffic."""
    _ip("netns", "exec", space, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
