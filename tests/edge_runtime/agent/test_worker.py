"""The worker as the daemon uses it: a process, a pipe, and no way to take the daemon down."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_runtime.agent import pipe
from edge_runtime.data import DatasetConfig
from tests.edge_runtime.toy_jobs import ToyJobs

NOISY = """
import os, sys, time
from edge_runtime.data import open_dataset as inner
from edge_runtime.data import DatasetConfig
def make(config):
    print("loose words on stdout"); os.write(1, b"raw bytes on fd 1"); sys.stdout.flush()
    if config.options.get("crash"):
        os.kill(os.getpid(), 9)
    if config.options.get("bug"):
        raise KeyError("a bug in the user's code")
    dataset = inner(DatasetConfig(name=config.name, path=config.options["path"]))
    snapshot, pause_s = dataset.snapshot(), config.options.get("pause_s")
    if pause_s:
        batch = snapshot.batch
        snapshot.batch = lambda indices: (time.sleep(pause_s), batch(indices))[1]
    return dataset
"""

PARENT = """
import subprocess, sys, time
command = [sys.executable, "-m", "edge_runtime.agent.worker"]
worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker.stdin.write(open(sys.argv[1], "rb").read())
worker.stdin.flush()
worker.stdout.read(60)  # ready, and the first progress: it trains
print(worker.pid, flush=True)
time.sleep(60)
"""


class Worker:
    """A worker process and the daemon's end of its pipe."""

    def __init__(self, *arguments, cwd=None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.agent.worker", "--nice", "1", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(cwd or "")])},
        )
        self._reader, self._frames = pipe.FrameReader(), []

    def send(self, message):
        self.process.stdin.write(pipe.encode(message))
        self.process.stdin.flush()

    def receive(self):
        while not self._frames:
            data = os.read(self.process.stdout.fileno(), 4096)
            if not data:
                return None
            self._frames += self._reader.feed(data)
        return pipe.decode_from_worker(self._frames.pop(0))

    def answer(self, request):
        self.send(request)
        while isinstance(reply := self.receive(), (pipe.Progress, pipe.PhaseBegun)):
            pass
        return reply

    def close(self):
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    process = Worker(cwd=tmp_path)
    yield process
    process.close()


@pytest.fixture
def jobs(tmp_path):
    return ToyJobs(tmp_path)


def test_worker_trains_fails_and_trains_again(worker, jobs):
    """One process does job after job; a job that fails is a reply, not an end."""
    assert worker.receive() == pipe.Ready(backends=["onnx"])
    done = worker.answer(jobs.request())
    assert jobs.delta(done).any()
    failed = worker.answer(jobs.request(hyper={"rate": 1.0}))
    assert failed.kind == "training"
    assert "no hyper-parameter 'rate'" in failed.reason
    failed = worker.answer(jobs.request(dataset=DatasetConfig(name="d", path="/nothing")))
    assert (failed.kind, "does not exist" in failed.reason) == ("data", True)
    again = worker.answer(jobs.request())
    assert again.sha256 == done.sha256
    worker.process.stdin.close()
    assert worker.process.wait(10) == 0


def test_prints_do_not_damage_the_pipe(worker, jobs):
    """Whatever a library or the user's code writes to stdout goes to stderr."""
    worker.receive()
    noisy = DatasetConfig(name="d", factory="noisy:make", options={"path": str(jobs.data)})
    assert isinstance(worker.answer(jobs.request(dataset=noisy)), pipe.Trained)
    buggy = DatasetConfig(name="d", factory="noisy:make", options={"bug": True})
    failed = worker.answer(jobs.request(dataset=buggy))
    assert failed.kind == "data"
    assert "a bug in the user's code" in failed.reason
    worker.process.stdin.close()
    assert b"loose words" in worker.process.stderr.read()


def test_a_crash_is_seen_as_the_end_of_the_pipe(worker, jobs):
    """The daemon reads end of file and the signal."""
    worker.receive()
    assert (
        worker.answer(jobs.request(dataset=DatasetConfig(name="d", factory="noisy:make", options={"crash": True})))
        is None
    )
    assert worker.process.wait(10) == -signal.SIGKILL


def test_progress_comes_about_once_a_second(worker, jobs):
    """A long job says where it is, but does not flood the daemon."""
    worker.receive()
    began = time.monotonic()
    worker.send(jobs.request(epochs=None, steps=60_000))
    assert worker.receive() == pipe.PhaseBegun(phase="train")
    seen = []
    while isinstance(reply := worker.receive(), pipe.Progress):
        seen.append(reply)
        if len(seen) == 2:
            break
    assert len(seen) == 2
    assert 1.5 < time.monotonic() - began < 30
    assert 0 < seen[0].step < seen[1].step < seen[1].steps_total == 60_000


def test_training_ends_early_with_what_it_reached(worker, jobs):
    """Asked to end, the worker stops after the step that runs and sends its update, which says how far it came and why;
    word about another job, or about one that is over, ends nothing.
    """
    worker.receive()
    slow = DatasetConfig(name="d", factory="noisy:make", options={"path": str(jobs.data), "pause_s": 0.02})
    worker.send(pipe.StopEarly(run="r", assignment="other", sequence=0, reason="stale"))
    worker.send(jobs.request(dataset=slow, epochs=None, steps=100, batch_size=8))
    assert worker.receive() == pipe.PhaseBegun(phase="train")
    worker.send(pipe.StopEarly(run="r", assignment="a", sequence=0, reason="drew 12 J"))
    while isinstance(reply := worker.receive(), pipe.Progress):
        pass
    assert reply == pipe.PhaseBegun(phase="compress")
    done = worker.receive()
    assert done.meta.stopped == "drew 12 J"
    assert 0 < done.meta.steps < 100
    assert done.meta.samples == min(60, 8 * done.meta.steps)
    assert jobs.delta(done).any()
    again = worker.answer(jobs.request(sequence=1))  # the next of a standing assignment has the same name
    assert (again.meta.stopped, again.meta.steps) == ("", 8)


def test_worker_ends_when_its_input_ends(worker):
    """A daemon that is gone leaves no worker behind."""
    worker.receive()
    worker.process.stdin.close()
    assert worker.process.wait(10) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="parent death signal is Linux")
def test_worker_dies_with_its_parent_in_the_middle_of_a_job(jobs, tmp_path):
    """Even while it trains and reads nothing."""
    (tmp_path / "request").write_bytes(pipe.encode(jobs.request(epochs=None, steps=100_000_000)))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "request")], stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_is_niced_and_first_to_go_for_memory(worker):
    """The rest of the device comes first."""
    worker.receive()
    proc = Path(f"/proc/{worker.process.pid}")
    assert int(proc.joinpath("stat").read_text().rsplit(")", 1)[1].split()[16]) >= os.nice(0) + 1
    assert int(proc.joinpath("oom_score_adj").read_text()) >= 500


def test_a_memory_limit_fails_the_job_and_not_the_daemon(jobs):
    """Enough memory trains; too little ends in a reply or the worker's own end."""
    worker = Worker("--memory-mb", "300")
    try:
        worker.receive()
        assert isinstance(worker.answer(jobs.request()), pipe.Trained)
    finally:
        worker.close()
    worker = Worker("--memory-mb", "20")
    try:
        replies = [worker.receive()]
        if replies[0] is not None:
            replies.append(worker.answer(jobs.request()))
        assert not any(isinstance(reply, pipe.Trained) for reply in replies)
    finally:
        worker.close()


def test_a_damaged_request_ends_the_worker(worker):
    """There is no way to go on after the stream is broken."""
    worker.receive()
    worker.process.stdin.write(b"\xff\xff\xff\xff")
    worker.process.stdin.flush()
    assert worker.process.wait(10) not in (0, None)
