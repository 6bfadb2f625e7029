"""Ten thousand connected agents on one machine: what coordinator and broker need for them, and what they can take.

    python -m benchmarks.fleet --agents 10000

mosquitto, the product's coordinator and light agents (:mod:`benchmarks.light_agent`: link, job machine and transfers
of the product, no worker), all over loopback. Heartbeats are *held* at a rate when all that were sent in a window of
``--window-s`` were handled, and 99 of 100 within a second of their sending. A round is from its opening to the next
model on disk; the agents answer at once, so what is measured is the server side at its busiest. Broker and coordinator
share the cores with the agents, and all of them with whatever else runs here: see ``load_before`` and ``agents_cpu``.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.fleet_helper import Helper
from benchmarks.perturbing_bundle import write_perturbing_bundle
from benchmarks.report import MB, parser, print_report
from coordinator.broker import USERNAME, MosquittoBroker, password_file, start_broker
from coordinator.plan import Downlink, Participation, Plan, Training, Uplink
from coordinator.store import Store
from coordinator.submission import submit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

INTERVAL_S = 50.0  # between two heartbeats of one agent
HELD_P99_MS = 1000.0
SETTLE_S = 2.0  # in which the last beats of a window may still arrive
RAMP = 1.5  # from one rate to the next


class Bench:
    """Everything that runs, and how it is measured."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.started_s = time.monotonic()
        broker, self._url = start_broker(folder / "broker")
        assert isinstance(broker, MosquittoBroker), "this benchmark needs mosquitto: apt-get install mosquitto"
        self.broker = broker
        self.bundle = folder / "perturb.bundle"
        write_perturbing_bundle(self.bundle, options.parameters)
        self.coordinator = self._start_coordinator()
        self.agents: list[Helper] = []

    def close(self) -> None:
        """Ends all processes."""
        for helper in [*self.agents, self.coordinator]:
            helper.end()
        self.broker.stop()

    def _access(self) -> list[str]:
        secret = str(password_file(self.folder / "broker"))
        return ["--url", self._url, "--username", USERNAME, "--password-file", secret]

    def _start_coordinator(self) -> Helper:
        more = [] if self.options.profile is None else ["--profile", str(self.options.profile)]
        command = ["benchmarks.fleet_coordinator", "--state", str(self.folder / "state"), *self._access(), *more]
        return Helper(self.folder, "coordinator", *command)

    def start_agents(self) -> float:
        """Starts the agents' processes and connects; gives seconds until the coordinator knew of all."""
        count, processes = self.options.agents, self.options.processes
        shares = [count // processes + (number < count % processes) for number in range(processes)]
        for number, share in enumerate(shares):
            updates = self.folder / f"updates-{number}"
            updates.mkdir()
            numbers = ["--first", str(sum(shares[:number])), "--count", str(share)]
            files = ["--bundle", str(self.bundle), "--folder", str(updates)]
            command = ["benchmarks.fleet_agents", *self._access(), *files, *numbers]
            self.agents.append(Helper(self.folder, f"agents-{number}", *command))
        for helper in self.agents:
            helper.ask("status")  # it is there
        begun_s = time.monotonic()
        for helper in self.agents:
            helper.ask("connect", per_s=self.options.connect_per_s / processes)
        self.wait(self.all_online, 300, "all agents to be online")
        return time.monotonic() - begun_s

    def all_online(self) -> bool:
        """Whether the coordinator sees all agents."""
        return bool(self.coordinator.ask("status")["online"] == self.options.agents)

    def beat(self, per_s: float) -> int:
        """Sets the rate of all agents together; gives how many were sent at the one before."""
        sent: int = sum(helper.ask("status")["sent"] for helper in self.agents)
        for helper in self.agents:
            helper.ask("beat", per_s=per_s / len(self.agents))
        return sent

    def window(self, per_s: float, seconds: float) -> dict[str, Any]:
        """Beats for a while and gives what became of it."""
        self.coordinator.ask("reset")
        before = self._cpu()
        begun_s = time.monotonic()
        self.beat(per_s)
        time.sleep(seconds)
        window_s, used = time.monotonic() - begun_s, self._cpu()
        sent = self.beat(0)
        end = time.monotonic() + SETTLE_S
        while (status := self.coordinator.ask("status"))["heartbeats"] < sent and time.monotonic() < end:
            time.sleep(0.05)
        held = status["heartbeats"] >= sent and (status["delay_p99_ms"] or 0) <= HELD_P99_MS
        cpu = {f"{name}_cpu": round((used[name] - before[name]) / window_s, 3) for name in used}
        each_us = round(1e6 * (used["coordinator"] - before["coordinator"]) / max(1, status["heartbeats"]), 1)
        rate = {"per_s": round(sent / window_s, 1), "held": held, "coordinator_us_each": each_us}
        del status["devices"], status["online"]
        return {**rate, **cpu, **status, **self._memory()}

    def run(self, participants: int, rounds: int) -> dict[str, Any]:
        """A run of some rounds; seconds of the first (which brings the bundle) and of the median of the others."""
        store = Store(self.folder / "state", create=False)
        plan = Plan(
            name=f"fleet-{participants}",
            bundle=str(self.bundle),
            dataset="noise",
            rounds=rounds,
            participation=Participation(target=participants, minimum=participants, deadline_s=180.0),
            training=Training(steps=1, batch_size=8),
            uplink=Uplink(codec=self.options.codec),
            downlink=Downlink(codec=self.options.codec),
            evaluate_on_devices=False,
        )
        before = self._cpu()
        self.coordinator.ask("reset")
        run = submit(store, plan)
        self.wait(lambda: store.run(run).row.status != "running", 400, f"run {run}")
        row, closed, used = store.run(run).row, store.rounds(run), self._cpu()
        store.close()
        if row.status != "finished":
            raise SystemExit(f"run {run} {row.status}: {row.reason}")
        seconds = [entry.closed_unix_s - entry.opened_unix_s for entry in closed]
        later = sorted(seconds[1:]) or seconds
        status = self.coordinator.ask("status")
        return {
            f"first_round_{participants}_s": round(seconds[0], 2),
            f"round_{participants}_s": round(later[len(later) // 2], 2),
            f"round_{participants}_coordinator_cpu_s": round((used["coordinator"] - before["coordinator"]) / rounds, 2),
            f"round_{participants}_broker_cpu_s": round((used["broker"] - before["broker"]) / rounds, 2),
            f"round_{participants}_lag_p99_ms": status["lag_p99_ms"],
            f"round_{participants}_lag_max_ms": status["lag_max_ms"],
            f"round_{participants}_mb_up": round(sum(entry.bytes_up for entry in closed) / rounds / MB, 1),
            f"round_{participants}_mb_down": round(closed[-1].bytes_down / MB, 1),
        }

    def restart_broker(self) -> float:
        """Kills the broker and starts it again; seconds until the coordinator sees all agents again."""
        self.broker.process.kill()
        self.broker.process.wait()
        begun_s = time.monotonic()
        self.broker.revive()
        self.wait(lambda: not self.all_online(), 30, "the coordinator to notice")
        self.wait(self.all_online, 300, "all agents to come back")
        return time.monotonic() - begun_s

    def restart_coordinator(self) -> float:
        """Ends the coordinator and starts it again; seconds from its start until it knows all agents."""
        self.options.profile = None  # one is enough, and it is that of the work
        self.coordinator.end()
        begun_s = time.monotonic()
        self.coordinator = self._start_coordinator()
        self.wait(self.all_online, 120, "the coordinator to know its fleet")
        return time.monotonic() - begun_s

    def wait(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        """Until it is true, as long as all processes live."""
        end = time.monotonic() + limit_s
        while not condition():
            for helper in self.agents:
                helper.check()
            if time.monotonic() > end:
                raise SystemExit(f"waited {limit_s:g} s for {what}")
            time.sleep(0.1)

    def _cpu(self) -> dict[str, float]:
        broker = psutil.Process(self.broker.process.pid)
        agents = [helper.usage for helper in self.agents]
        groups = {"coordinator": [self.coordinator.usage], "broker": [broker], "agents": agents}
        return {name: sum(sum(p.cpu_times()[:2]) for p in group) for name, group in groups.items()}

    def _memory(self) -> dict[str, float]:
        broker = psutil.Process(self.broker.process.pid)
        rss = {"coordinator": self.coordinator.usage, "broker": broker}
        return {f"{name}_rss_mb": round(process.memory_info().rss / MB, 1) for name, process in rss.items()}


def measure(bench: Bench) -> dict[str, Any]:
    """All figures."""
    options = bench.options
    result: dict[str, Any] = {"agents": options.agents, "load_before": round(os.getloadavg()[0], 2)}
    result["connect_all_s"] = round(bench.start_agents(), 1)
    result["connected"] = sum(helper.ask("status")["connected"] for helper in bench.agents)
    _say(bench, f"{result['connected']} agents after {result['connect_all_s']} s")
    steady = bench.window(options.agents / INTERVAL_S, options.steady_s)
    _say(bench, f"steady: {steady}")
    result |= {f"steady_{name}": value for name, value in steady.items()}
    result |= {f"max_{name}": value for name, value in _ramp(bench).items()}
    bench.beat(options.agents / INTERVAL_S)
    for participants in options.participants:
        if participants <= options.agents:
            result |= bench.run(participants, options.rounds)
            _say(bench, f"{participants} participants: {result[f'round_{participants}_s']} s")
    result["broker_restart_s"] = round(bench.restart_broker(), 1)
    _say(bench, f"all back {result['broker_restart_s']} s after the broker")
    result["coordinator_restart_s"] = round(bench.restart_coordinator(), 1)
    _say(bench, f"coordinator knows all {result['coordinator_restart_s']} s after its start")
    return result


def _ramp(bench: Bench) -> dict[str, Any]:
    """The last rate that was held; the result's ``per_s`` is what was sent, which may be less than what was asked."""
    per_s, best = max(50.0, bench.options.agents / INTERVAL_S), None
    while bench.options.ramp_limit_per_s >= per_s:
        found = bench.window(per_s, bench.options.window_s)
        _say(bench, f"{per_s:.0f} asked: {found}")
        if not found["held"]:  # the host may have been busy with something else
            time.sleep(SETTLE_S)
            found = bench.window(per_s, bench.options.window_s)
            _say(bench, f"{per_s:.0f} asked again: {found}")
        if not found["held"] or found["per_s"] < (best or found)["per_s"]:
            break
        best = found
        if found["per_s"] < 0.8 * per_s:  # the agents cannot send more
            break
        per_s *= RAMP
    if best is None:
        raise SystemExit(f"not even {per_s:.0f} heartbeats a second were held")
    return best


def _say(bench: Bench, text: str) -> None:
    print(f"{time.monotonic() - bench.started_s:7.1f} s  {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    if options.quick:
        options.agents, options.participants, options.rounds = min(options.agents, 400), [50], 2
        options.steady_s, options.window_s, options.ramp_limit_per_s = 3.0, 1.5, 600.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))  # and everything that was started with it
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # what is started here inherits it
    if hard < options.agents + 100:
        raise SystemExit(f"{hard} files may be open (ulimit -Hn), the broker needs one for each of {options.agents}")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        bench = Bench(Path(folder), options)
        try:
            result = measure(bench)
        except SystemExit:
            for log in Path(folder).glob("*.log"):
                print(f"{log.name}:", *log.read_text().splitlines()[-5:], sep="\n  ", file=sys.stderr)
            raise
        finally:
            bench.close()
    print_report("fleet", options, [result])
    return 0


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--agents", type=int, default=10000, help="how many connect")
    result.add_argument("--processes", type=int, default=4, help="processes that the agents share")
    result.add_argument("--connect-per-s", type=float, default=400.0, help="new connections a second, at most")
    result.add_argument("--steady-s", type=float, default=60.0, help="window at one heartbeat per 50 s and agent")
    result.add_argument("--window-s", type=float, default=10.0, help="window of each rate of the ramp")
    result.add_argument("--ramp-limit-per-s", type=float, default=50000.0, help="rate at which the ramp ends")
    result.add_argument("--participants", type=int, nargs="*", default=[100, 1000], help="devices in a round")
    result.add_argument("--rounds", type=int, default=4, help="rounds of each run")
    result.add_argument("--parameters", type=int, default=60000, help="float32 numbers in the model")
    result.add_argument("--codec", default="raw", help="of updates and models")
    result.add_argument("--quick", action="store_true", help="400 agents and short windows, under a minute")
    result.add_argument("--profile", type=Path, default=None, help="write a profile of the coordinator there")
    result.add_argument("--work", type=Path, default=None, help="folder on a real disk for the state")
    return result


if __name__ == "__main__":
    sys.exit(main())
