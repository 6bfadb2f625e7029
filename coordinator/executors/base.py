"""The executor seam: work that other processes may do, on this machine or on a cluster.

Decoding and summing of updates and the training of simulated devices run on it. A task is a function of a module
(importable by its name wherever it runs) and arguments that can be pickled. Nothing that was received is ever
unpickled, only what these processes say to one another. Results do not depend on where, or in which order, tasks ran.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

T = TypeVar("T")


class Shared(Protocol):
    """Bytes that many tasks need, sent to every process once. Given to tasks as it is."""

    def read(self) -> bytes:
        """The bytes, in the process of a task."""
        ...

    def path(self) -> Path:
        """A file with the bytes, on the machine of a task; not to be written."""
        ...


class Executor(Protocol):
    """Runs tasks. Its methods are called in one thread.

    Attributes:
        workers: how many tasks run at a time.
        local: whether tasks see the files of this machine.
    """

    workers: int
    local: bool

    def share(self, data: bytes) -> Shared:
        """Makes bytes known to all tasks; kept until :meth:`release` or :meth:`close`."""
        ...

    def release(self, shared: Shared) -> None:
        """No task needs these bytes any more."""
        ...

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Runs ``function(*arguments)`` somewhere; the future raises what it raised, or ExecutorError if it died."""
        ...

    def close(self) -> None:
        """Ends all processes; tasks in progress are lost."""
        ...
