"""Keeps the worker process: started by exec for the first job, asked over a framed pipe, killed when told.

The worker holds numpy and onnxruntime, so that the daemon need not; it may linger between consecutive rounds. Whatever
happens to it (crash, out of memory, wall limit) becomes one call of ``on_end``, never a dead agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from edge_runtime.agent import pipe
from edge_runtime.errors import EdgeError
from edge_runtime.transport.loop import READ, Loop, Timer

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_runtime.agent.config import LimitsConfig

log = logging.getLogger("edge.worker")

READ_BYTES = 1 << 16
PIPE_BYTES = 1 << 18  # more than the largest request: a job is one MQTT packet
STOP_GRACE_S = 30.0  # for the step that runs when training is to end
_F_SETPIPE_SZ = 1031  # fcntl has the name from Python 3.10 on, and not on every libc


class Supervisor:
    """At most one worker process and one request at a time.

    Args:
        limits: niceness, memory, wall and linger limits.
        loop: watches the pipe.
        on_reply: called with every reply of the worker.
        on_end: the worker died while a request was open; gives the reason and whether the agent killed it.
        stop_grace_s: how long training that is to end early may go on, before it is killed.
    """

    def __init__(
        self,
        limits: LimitsConfig,
        loop: Loop,
        *,
        on_reply: Callable[[pipe.FromWorker], None],
        on_end: Callable[[str, bool], None],
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        self._limits = limits
        self._loop = loop
        self._stop_grace_s = stop_grace_s
        self._on_reply, self._on_end = on_reply, on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = pipe.FrameReader()
        self._busy = False
        self._kill_reason: str | None = None  # set: we killed the process, its end is still to be read
        self._fault = False  # the process was killed for what it sent
        self._timer: Timer | None = None
        self._grace: Timer | None = None
        self._job = ("", "", 0)

    @property
    def pid(self) -> int | None:
        """Process id of the worker while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def busy(self) -> bool:
        """Whether a request is open."""
        return self._busy

    def request(self, request: pipe.TrainRequest) -> None:
        """Hands a request to the worker, starting it if need be; replies and the end come by callback."""
        if self._process is not None and (self._kill_reason is not None or self._process.poll() is not None):
            self._reap()  # it lingered and is dying or dead: no fault of this request
        self._busy = True
        self._job = request.job.run, request.job.assignment, request.job.sequence
        try:
            if self._process is None:
                self._start()
            self._arm(self._limits.job_wall_s, f"the job ran longer than {self._limits.job_wall_s:g} s")
            self._write(pipe.encode(request))
        except OSError as error:
            if self._process is not None:
                self._process.kill()
            self._kill_reason = f"the worker cannot be started ({error.strerror or error})"
            self._loop.call_soon(self._ended)

    def stop_early(self, reason: str) -> None:
        """Asks the worker to end its training after this step and to send what it has; kills it if it goes on."""
        if self._process is None or not self._busy or self._kill_reason is not None:
            return
        run, assignment, sequence = self._job
        word = pipe.StopEarly(run=run, assignment=assignment, sequence=sequence, reason=reason)
        with contextlib.suppress(OSError):  # it is dying: its end is still to be read
            self._write(pipe.encode(word))
        self._end_grace()
        late = f"{reason}; the step that ran then did not end within {self._stop_grace_s:g} s"
        self._grace = self._loop.call_later(self._stop_grace_s, lambda: self.kill(late))

    def kill(self, reason: str) -> None:
        """Kills the worker; if a request is open, ``on_end`` follows with this reason."""
        if self._process is not None:
            self._kill_reason = self._kill_reason or reason
            self._process.kill()

    def close(self) -> None:
        """Kills the worker without telling anyone."""
        self._busy = False
        if self._process is not None:
            self._process.kill()
            self._reap()

    def _start(self) -> None:
        command = [sys.executable, "-m", "edge_runtime.agent.worker", "--nice", str(self._limits.worker_nice)]
        if self._limits.worker_memory_mb is not None:
            command += ["--memory-mb", str(int(self._limits.worker_memory_mb))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._process.stdout is not None
        self._reader, self._kill_reason, self._fault = pipe.FrameReader(), None, False
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._process.stdin.fileno(), _F_SETPIPE_SZ, PIPE_BYTES)
        fd = self._process.stdout.fileno()
        os.set_blocking(fd, False)
        self._loop.watch(fd, READ, lambda _events: self._readable(fd))

    def _write(self, frame: bytes) -> None:
        """Writes a request; the pipe holds the largest one, so a worker that does not read cannot block the agent."""
        assert self._process is not None
        assert self._process.stdin is not None
        view = memoryview(frame)
        while view:
            view = view[self._process.stdin.write(view) :]

    def _readable(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._ended()
            return
        try:
            replies = [pipe.decode_from_worker(frame) for frame in self._reader.feed(data)]
        except EdgeError as error:
            self._loop.unwatch(fd)
            self._fault = True
            self.kill(f"the worker sent a damaged reply ({error})")
            self._ended()
            return
        for reply in replies:
            if isinstance(reply, pipe.PhaseBegun) and reply.phase == "compress":
                self._end_grace()
            if isinstance(reply, (pipe.Trained, pipe.Failed)):
                self._end_grace()
                self._busy = False
                self._arm(self._limits.worker_linger_s, "idle")
            if isinstance(reply, pipe.Failed) and reply.kind == "internal":
                self.kill("out of memory or worse: the next job gets a new worker")
            self._on_reply(reply)

    def _arm(self, delay_s: float, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, lambda: self.kill(reason))

    def _end_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _ended(self) -> None:
        killed, fault = self._kill_reason, self._fault
        code = self._reap()
        if not self._busy:
            return
        self._busy = False
        if killed is not None:
            self._on_end(killed, not fault)
        elif code == -signal.SIGKILL:
            self._on_end("the worker was killed, most likely for lack of memory; a smaller batch needs less", False)
        else:
            self._on_end(f"the worker crashed ({_describe(code)})", False)

    def _reap(self) -> int:
        process, self._process, self._kill_reason = self._process, None, None
        self._end_grace()
        if self._timer is not None:
            self._timer.cancel()
        if process is None:
            return 0
        assert process.stdout is not None
        assert process.stdin is not None
        self._loop.unwatch(process.stdout.fileno())
        process.stdout.close()
        process.stdin.close()
        try:
            return process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _describe(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
