"""Tasks run at once, in the process and thread that submits them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from coordinator.executors.files import SharedFiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.executors.base import Shared

T = TypeVar("T")


class InlineExecutor:
    """See :class:`~coordinator.executors.base.Executor`."""

    workers = 1
    local = True

    def __init__(self) -> None:
        self._files = SharedFiles()

    def share(self, data: bytes) -> Shared:
        return self._files.share(data)

    def release(self, shared: Shared) -> None:
        self._files.release(shared)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever it raises is the caller's
            future.set_exception(error)
        return future

    def close(self) -> None:
        self._files.close()
