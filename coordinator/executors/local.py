"""Tasks in processes of this machine: started afresh (no thread, lock or handle is inherited), one task at a time each.

A process that dies takes its one task with it, which gets an ExecutorError; a new process takes the next one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from coordinator.errors import ExecutorError
from coordinator.executors.files import SharedFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from coordinator.executors.base import Shared

T = TypeVar("T")
_Task = tuple["Future[Any]", "Callable[..., Any]", tuple[Any, ...]]
_JOIN_S = 5.0


class LocalExecutor:
    """See :class:`~coordinator.executors.base.Executor`; a thread per process hands tasks over and takes results."""

    local = True

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._files = SharedFiles()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._hands = [_Hand(self._tasks) for _ in range(workers)]

    def share(self, data: bytes) -> Shared:
        return self._files.share(data)

    def release(self, shared: Shared) -> None:
        self._files.release(shared)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def close(self) -> None:
        for hand in self._hands:
            hand.stop()
        for _ in self._hands:
            self._tasks.put(None)
        for hand in self._hands:
            hand.join()
        self._files.close()


class _Hand:
    """One process and the thread that speaks with it."""

    def __init__(self, tasks: queue.SimpleQueue[_Task | None]) -> None:
        self._tasks = tasks
        self._stopping = False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._thread = threading.Thread(target=self._work, name="executor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Kills the process; the task in progress is lost."""
        self._stopping = True
        process = self._process
        if process is not None:
            process.kill()

    def join(self) -> None:
        self._thread.join(_JOIN_S)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if self._stopping or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                good, result = self._ask(function, arguments)
            except (EOFError, OSError):
                end = self._end()
                name = f"{function.__module__}.{function.__qualname__}"
                future.set_exception(ExecutorError(f"the process of task {name} died ({end}); is memory short?"))
            except Exception as error:  # noqa: BLE001 - arguments or results that cannot be pickled
                self._end()
                future.set_exception(error)
            else:
                future.set_result(result) if good else future.set_exception(result)
        self._end()

    def _ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        if self._process is None or self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), name="edge-executor", daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send((function, arguments))
        answer: tuple[bool, Any] = self._pipe.recv()
        return answer

    def _end(self) -> str:
        """Ends the process, and says how it ended if it had done so by itself."""
        process, self._process = self._process, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if process is None:
            return "not started"
        process.join(0.2)
        process.kill()
        process.join()
        code = process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(pipe: Connection[Any, Any]) -> None:
    """The process: task after task, until the other end is gone."""
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # processes are the parallelism
        os.environ.setdefault(name, "1")
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, function(*arguments)
        except Exception as error:  # noqa: BLE001 - the caller's to judge
            answer = False, error
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # noqa: BLE001 - it cannot be pickled
            text = f"{type(error).__name__}: {error}"
            pipe.send((False, ExecutorError(f"result of {function.__qualname__} cannot be sent: {text}")))
