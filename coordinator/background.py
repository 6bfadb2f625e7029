"""One thread beside the event loop, for aggregation and evaluation."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from edge_runtime.errors import EdgeError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_runtime.transport.loop import Loop

log = logging.getLogger("edge.coordinator")

DISK_RETRY_S = 5.0
_T = TypeVar("_T")


class Background:
    """Runs work in another thread and hands results back in the loop's thread, in the order of the calls."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aggregate")

    def run(
        self,
        action: Callable[[], _T],
        *,
        done: Callable[[_T], None],
        failed: Callable[[str], None],
        wanted: Callable[[], bool],
    ) -> None:
        """Runs ``action`` and calls ``done`` with its result, or ``failed`` with the reason.

        A full disk is no failure: the work is tried again as long as it is ``wanted``. Any other error, also one of a
        plug-in, fails this work only; the server and its other runs go on.
        """

        def again() -> None:
            if wanted():
                self.run(action, done=done, failed=failed, wanted=wanted)

        def work() -> None:
            try:
                result = action()
            except StorageError as error:
                log.error("%s; trying again in %g s", error, DISK_RETRY_S)  # noqa: TRY400 - one line for the operator
                self._loop.call_threadsafe(lambda: self._later(again))
            except EdgeError as error:
                reason = str(error)
                self._loop.call_threadsafe(lambda: failed(reason))
            except Exception as error:  # a plug-in may raise anything; the log keeps where
                log.exception("work for a run failed")
                reason = f"{type(error).__name__}: {error}"
                self._loop.call_threadsafe(lambda: failed(reason))
            else:
                self._loop.call_threadsafe(lambda: done(result))

        self._thread.submit(work)

    def close(self) -> None:
        """Waits for the work in progress and forgets the rest."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _later(self, action: Callable[[], None]) -> None:
        self._loop.call_later(DISK_RETRY_S, action)
