"""Keeps the worker process: started by exec for the first job, asked over a framed pipe, killed when told.

The worker holds numpy and onnxruntime, so that the daemon need not; it may linger between consecutive rounds. Whatever
happens to it (crash, out of memory, wall limit) becomes one call of ``on_end``, never a dead agent.
"""

from __future__ import annotations

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


class Supervisor:
    """At most one worker process and one request at a time.

    Args:
        limits: niceness, memory, wall and linger limits.
        loop: watches the pipe.
        on_reply: called with every reply of the worker.
        on_end: the worker died while a request was open; gives the reason and whether the agent killed it.
    """

    def __init__(
        self,
        limits: LimitsConfig,
        loop: Loop,
        *,
        on_reply: Callable[[pipe.FromWorker], None],
        on_end: Callable[[str, bool], None],
    ) -> None:
        self._limits = limits
        self._loop = loop
        self._on_reply, self._on_end = on_reply, on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = pipe.FrameReader()
        self._busy = False
        self._kill_reason = ""
        self._timer: Timer | None = None

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
        self._arm(self._limits.job_wall_s, f"the job ran longer than {self._limits.job_wall_s:g} s")
        self._busy = True
        try:
            if self._process is None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(pipe.encode(request))  # far below the pipe's capacity, so it does not block
        except OSError as error:
            reason = f"the worker cannot be started ({error.strerror})"
            self._loop.call_soon(lambda: self._ended(reason))

    def kill(self, reason: str) -> None:
        """Kills the worker; if a request is open, ``on_end`` follows with this reason."""
        if self._process is not None:
            self._kill_reason = reason
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
        self._reader, self._kill_reason = pipe.FrameReader(), ""
        fd = self._process.stdout.fileno()
        os.set_blocking(fd, False)
        self._loop.watch(fd, READ, lambda _events: self._readable(fd))

    def _readable(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._ended("")
            return
        try:
            replies = [pipe.decode_from_worker(frame) for frame in self._reader.feed(data)]
        except EdgeError as error:
            self.kill(f"the worker sent a damaged reply ({error})")
            return
        for reply in replies:
            if isinstance(reply, (pipe.Trained, pipe.Failed)):
                self._busy = False
                self._arm(self._limits.worker_linger_s, "")
            self._on_reply(reply)

    def _arm(self, delay_s: float, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, lambda: self.kill(reason))

    def _ended(self, reason: str) -> None:
        killed = self._kill_reason
        code = self._reap()
        if not self._busy:
            return
        self._busy = False
        if killed:
            self._on_end(killed, True)
        elif code == -signal.SIGKILL:
            self._on_end("the worker was killed, most likely for lack of memory; a smaller batch needs less", False)
        else:
            self._on_end(reason or f"the worker crashed ({_describe(code)})", False)

    def _reap(self) -> int:
        process, self._process = self._process, None
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
