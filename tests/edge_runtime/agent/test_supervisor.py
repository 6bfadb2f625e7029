"""The supervisor of the worker, with small fake workers and once with the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edge_runtime.agent import pipe
from edge_runtime.agent import supervisor as supervisor_module
from edge_runtime.agent.config import LimitsConfig
from edge_runtime.agent.supervisor import Supervisor
from edge_runtime.data.config import DatasetConfig
from edge_runtime.messages import BlobRef, Job, ModelRef
from edge_runtime.transport.loop import Loop
from tests.support.brokers import run_until

ROOT = Path(__file__).parents[3]

FAKE = """
import os, sys, time, signal
sys.path.insert(0, {root!r})
from edge_runtime.agent import pipe
from edge_runtime.messages import UpdateMeta
reader = pipe.FrameReader()
def send(message):
    os.write(1, pipe.encode(message))
def answer(request):
    meta = UpdateMeta(round=0, model_version=0, samples=1, steps=1)
    send(pipe.Trained(path="p", sha256="s", size_bytes=os.getpid(), meta=meta, dataset_samples=1))
send(pipe.Ready(backends=["fake"]))
while data := os.read(0, 65536):
    for frame in reader.feed(data):
        request = pipe.decode_to_worker(frame)
{behaviour}
"""


def request(name: str = "a", **job) -> pipe.TrainRequest:
    blob = BlobRef(sha256="0" * 64, size_bytes=1)
    values = {"run": "r", "round": 0, "model_version": 0, "dataset": "d", "deadline_s": 60.0, "epochs": 1} | job
    return pipe.TrainRequest(
        job=Job(assignment=name, bundle=blob, model=ModelRef(blobs=[blob]), **values),
        device="dev",
        bundle_path="/nowhere/bundle",
        model_paths=["/nowhere/model"],
        output_folder="/nowhere",
        dataset=DatasetConfig(name="d", path="/nowhere/d.npz"),
    )


class Bench:
    """A supervisor with a fake worker."""

    def __init__(
        self, tmp_path: Path, monkeypatch, behaviour: str = "answer(request)", grace_s: float = 30.0, **limits
    ) -> None:
        self.loop = Loop()
        self.replies: list[pipe.FromWorker] = []
        self.ends: list[tuple[str, bool]] = []
        indented = "\n".join(" " * 8 + line for line in behaviour.splitlines())
        script = tmp_path / "worker.py"
        script.write_text(FAKE.format(root=str(ROOT), behaviour=indented))
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(supervisor_module.sys, "executable", str(program))
        self.on_reply = self.replies.append
        self.supervisor = Supervisor(
            LimitsConfig(**limits),
            self.loop,
            on_reply=lambda reply: self.on_reply(reply),  # noqa: PLW0108 - tests replace it
            on_end=lambda reason, ours: self.ends.append((reason, ours)),
            stop_grace_s=grace_s,
        )

    def until(self, condition) -> None:
        run_until(self.loop, condition, 20.0)

    @property
    def trained(self) -> list[pipe.Trained]:
        return [reply for reply in self.replies if isinstance(reply, pipe.Trained)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = []

    def make(*args, **limits) -> Bench:
        made.append(Bench(tmp_path, monkeypatch, *args, **limits))
        return made[-1]

    yield make
    for one in made:
        pid = one.supervisor.pid
        one.supervisor.close()
        assert one.supervisor.pid is None
        if pid is not None:
            assert not psutil.pid_exists(pid)
        one.loop.close()


def test_worker_is_used_again_while_it_lingers(bench):
    """Two jobs in a row go to one process, which is started for the first."""
    one = bench()
    assert one.supervisor.pid is None
    for count in (1, 2):
        one.supervisor.request(request())
        assert one.supervisor.busy
        one.until(lambda count=count: len(one.trained) == count)
        assert not one.supervisor.busy
    assert len({reply.size_bytes for reply in one.trained}) == 1
    assert one.ends == []


def test_idle_worker_is_killed_after_its_linger_time(bench):
    """A worker without work goes, silently, and the next job gets a new one."""
    one = bench(worker_linger_s=0.05)
    one.supervisor.request(request())
    one.until(lambda: one.trained and one.supervisor.pid is None)
    one.supervisor.request(request())
    one.until(lambda: len(one.trained) == 2)
    assert len({reply.size_bytes for reply in one.trained}) == 2
    assert one.ends == []


def test_request_to_a_worker_that_is_just_dying_gets_a_new_one(bench):
    """A job that comes right after the idle worker was killed, by us or by the kernel, is not blamed for it."""
    one = bench()
    one.supervisor.request(request())
    one.until(lambda: one.trained)
    one.supervisor.kill("idle")
    one.supervisor.request(request())
    one.until(lambda: len(one.trained) == 2)
    os.kill(one.supervisor.pid, signal.SIGKILL)
    os.waitid(os.P_PID, one.supervisor.pid, os.WEXITED | os.WNOWAIT)
    one.supervisor.request(request())
    one.until(lambda: len(one.trained) == 3)
    assert one.ends == []


def test_next_request_from_inside_a_reply(bench):
    """The agent starts its next job while it hears of the end of the last, also when that worker was being killed."""
    one = bench()

    def on_reply(reply):
        one.replies.append(reply)
        if len(one.trained) == 1 and isinstance(reply, pipe.Trained):
            one.supervisor.kill("cancelled")
            one.supervisor.request(request())

    one.on_reply = on_reply
    one.supervisor.request(request())
    one.until(lambda: len(one.trained) == 2)
    assert one.ends == []


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "lack of memory"),
    ],
)
def test_crash_is_one_end_that_says_how(bench, behaviour, said):
    """However the worker dies, the agent hears it once with the likely cause, and it counts against the bundle."""
    one = bench(behaviour)
    one.supervisor.request(request())
    one.until(lambda: one.ends)
    ((reason, ours),) = one.ends
    assert said in reason
    assert not ours


@pytest.mark.parametrize(
    "behaviour",
    [
        r"os.write(1, b'\xff\xff\xff\xff')" + "\ntime.sleep(60)",
        r"os.write(1, b'\x02\0\0\0\xc1\xc1')" + "\ntime.sleep(60)",
    ],
)
def test_damaged_reply_ends_the_worker(bench, behaviour):
    """A reply that makes no sense kills the worker; the fault is the worker's, and the next job gets a new one."""
    one = bench(behaviour)
    one.supervisor.request(request())
    one.until(lambda: one.ends)
    ((reason, ours),) = one.ends
    assert "damaged reply" in reason
    assert not ours
    one.supervisor.request(request())
    one.until(lambda: len(one.ends) == 2)


def test_wall_limit_kills_a_job(bench):
    """A job that runs too long is killed by the agent: no fault of the bundle's, and the limit is named."""
    one = bench("time.sleep(60)", job_wall_s=0.3)
    one.supervisor.request(request())
    one.until(lambda: one.ends)
    assert one.ends == [("the job ran longer than 0.3 s", True)]


TWO_PARTS = """
if isinstance(request, pipe.TrainRequest):
    send(pipe.PhaseBegun(phase="train"))
else:
    assert (request.run, request.assignment, request.reason) == ("r", "a", "too hot")
    send(pipe.PhaseBegun(phase="compress"))
    time.sleep(0.3)
    answer(request)
"""


def test_training_that_is_to_end_early_gets_time_to_encode(bench):
    """The time to react counts until the worker encodes: that may take longer, and nothing is killed afterwards."""
    one = bench(TWO_PARTS, grace_s=0.15)
    one.supervisor.request(request())
    one.until(lambda: pipe.PhaseBegun(phase="train") in one.replies)
    one.supervisor.stop_early("too hot")
    one.until(lambda: one.trained)
    one.supervisor.stop_early("too hot")  # too late: no job runs
    assert one.ends == []
    assert one.supervisor.pid is not None


def test_training_that_goes_on_when_it_should_end_is_killed(bench):
    """A step that does not end in time ends with its process: no fault of the bundle, and the reason says it."""
    one = bench("time.sleep(60)", grace_s=0.1)
    one.supervisor.request(request())
    one.until(lambda: one.replies)
    one.supervisor.stop_early("too hot")
    one.until(lambda: one.ends)
    assert one.ends == [("too hot; the step that ran then did not end within 0.1 s", True)]


def test_kill_gives_its_reason(bench):
    """The first reason for which the agent killed the worker is the one that is told."""
    one = bench("time.sleep(60)")
    one.supervisor.request(request())
    one.until(lambda: one.replies)
    one.supervisor.kill("81 degrees")
    one.supervisor.kill("something else")
    one.until(lambda: one.ends)
    assert one.ends == [("81 degrees", True)]


def test_worker_that_cannot_be_started_is_no_fault_of_the_bundle(bench, monkeypatch):
    """Where no process can be made the job ends with that reason and counts against nobody."""
    one = bench()
    monkeypatch.setattr(supervisor_module.sys, "executable", "/nowhere/python")
    one.supervisor.request(request())
    one.until(lambda: one.ends)
    assert one.ends == [("the worker cannot be started (No such file or directory)", True)]


def test_largest_request_does_not_block_on_a_worker_that_does_not_read(bench):
    """A job message of the largest size fits the pipe even while the worker is still importing."""
    one = bench("time.sleep(60)")
    one.supervisor.request(request(hyper={f"{number:040}": 1.0 for number in range(2200)}))
    assert one.supervisor.busy
    one.supervisor.kill("enough")
    one.until(lambda: one.ends)


DAEMON = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests.edge_runtime.agent.test_supervisor import request
from edge_runtime.agent.config import LimitsConfig
from edge_runtime.agent.supervisor import Supervisor
from edge_runtime.transport.loop import Loop
loop = Loop()
supervisor = Supervisor(LimitsConfig(), loop, on_reply=lambda r: print(supervisor.pid, flush=True), on_end=print)
supervisor.request(request())
loop.run()
"""


@pytest.mark.slow
def test_real_worker_answers_and_dies_with_its_daemon(tmp_path):
    """kill -9 of the daemon takes the real worker along, so that no orphan keeps training."""
    pytest.importorskip("onnxruntime")
    child = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(ROOT)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    worker = psutil.Process(int(child.stdout.readline()))
    child.kill()
    child.wait()
    child.stdout.close()
    worker.wait(timeout=20)
