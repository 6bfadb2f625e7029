"""`edge-agent worker`: the child process that trains, so that the daemon stays small and alive.

It speaks frames (:mod:`edge_runtime.agent.pipe`) on standard input and output, one request at a time, and ends with
its parent: by signal where the kernel offers it, else when its input ends.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import select
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.agent import pipe
from edge_runtime.errors import EdgeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_runtime.messages import Job
    from edge_runtime.training.job import JobRunner

log = logging.getLogger("edge.worker")
PROGRESS_INTERVAL_S = 1.0
_READ_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves requests until told to end or the daemon is gone; gives the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the daemon, which ends this process
    _die_with_parent()
    _lower_priority(options.nice, options.oom_score_adj)
    requests = os.dup(0)
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)  # whatever a library prints must not get between frames
    os.close(null)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would reserve memory per core
    try:
        return _serve(requests, replies, options.memory_mb)
    except BrokenPipeError:
        return 0


def _serve(requests: int, replies: int, memory_mb: int | None) -> int:
    from edge_runtime.training.job import JobRunner

    if memory_mb is not None:
        _limit_memory(memory_mb)  # not before the imports: OpenBLAS tries for ever where it gets no memory to start
    runner = JobRunner()
    incoming = _Requests(requests)
    _send(replies, pipe.Ready(backends=["onnx"]))
    while (request := incoming.next()) is not None:
        _send(replies, _answer(runner, request, replies, incoming))
    return 0


class _Requests:
    """What the daemon sends: one job after the other, and word that the one at work is to end."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._reader = pipe.FrameReader()
        self._jobs: deque[pipe.TrainRequest] = deque()
        self._stop: pipe.StopEarly | None = None
        self._poll = select.poll()
        self._poll.register(handle, select.POLLIN)
        self._ended = False

    def next(self) -> pipe.TrainRequest | None:
        """Waits for the next job; None when the daemon is gone."""
        while not self._jobs and not self._ended:
            self._read()
        return self._jobs.popleft() if self._jobs else None

    def stop_reason(self, job: Job) -> str:
        """Why the training of this job should end now; empty: it should go on. Takes microseconds, never waits."""
        if not self._ended and self._poll.poll(0):
            self._read()
        asked = self._stop
        meant = None if asked is None else (asked.run, asked.assignment, asked.sequence)
        if asked is None or meant != (job.run, job.assignment, job.sequence):
            return ""
        return asked.reason

    def _read(self) -> None:
        data = os.read(self._handle, _READ_BYTES)
        self._ended = not data
        for frame in self._reader.feed(data):
            message = pipe.decode_to_worker(frame)
            if isinstance(message, pipe.StopEarly):
                self._stop = message
            else:
                self._jobs.append(message)


def _answer(
    runner: JobRunner, request: pipe.TrainRequest, replies: int, incoming: _Requests
) -> pipe.Trained | pipe.Failed:
    from edge_runtime.training.job import failure_kind

    told = time.monotonic()

    def on_step(step: int, steps_total: int, loss: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= PROGRESS_INTERVAL_S:
            told = now
            _send(replies, pipe.Progress(step=step, steps_total=steps_total, loss=loss))

    try:
        return runner.run(
            request,
            on_step,
            on_phase=lambda phase: _send(replies, pipe.PhaseBegun(phase=phase)),
            stop=lambda: incoming.stop_reason(request.job),
        )
    except BrokenPipeError:
        raise
    except EdgeError as error:
        if _is_out_of_memory(error):  # met while reading data or in onnxruntime, and neither is at fault
            return _out_of_memory()
        return pipe.Failed(kind=failure_kind(error), reason=_line(str(error)))
    except MemoryError:
        return _out_of_memory()
    except Exception as error:
        log.exception("job %s failed", request.job.assignment)
        return pipe.Failed(kind=failure_kind(error), reason=_line(f"{type(error).__name__}: {error}"))


def _is_out_of_memory(error: EdgeError) -> bool:
    return isinstance(error.__cause__, MemoryError) or any(sign in str(error) for sign in ("bad_alloc", "bfc_arena"))


def _out_of_memory() -> pipe.Failed:
    return pipe.Failed(kind="internal", reason="out of memory; lower the batch size or raise limits.worker_memory_mb")


def _send(replies: int, message: pipe.FromWorker) -> None:
    view = memoryview(pipe.encode(message))
    while view:
        view = view[os.write(replies, view) :]


def _line(text: str) -> str:
    return " ".join(text.split())[:1000]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-agent worker", description="Trains for the agent; not to be called.")
    parser.add_argument("--nice", type=int, default=10, help="added to the process's niceness")
    parser.add_argument("--oom-score-adj", type=int, default=500, help="how much rather the kernel kills this process")
    parser.add_argument(
        "--memory-mb", type=int, default=None, help="limit of private memory, in 10^6 bytes (RLIMIT_DATA)"
    )
    return parser


def _die_with_parent() -> None:
    """Best effort: where it does not exist, the end of the input pipe ends the worker between jobs."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the signal was asked for
        sys.exit(0)


def _lower_priority(nice: int, oom_score_adj: int) -> None:
    with contextlib.suppress(OSError):
        os.nice(nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(oom_score_adj), encoding="ascii")


def _limit_memory(memory_mb: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb * 1_000_000, memory_mb * 1_000_000))


if __name__ == "__main__":
    sys.exit(main())
