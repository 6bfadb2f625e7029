"""Checks arrived updates beside the event loop: can they be decoded, are they finite, is their norm allowed?

There their bytes are made durable, too: a disk is slow, and devices are answered meanwhile.

Results come back in the order of arrival, whichever process was done first, so that the same updates count wherever
they are checked. An update that is being checked is neither fetched nor checked a second time.
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coordinator.errors import ModelError
from edge_runtime.errors import CodecError, StorageError
from edge_runtime.files import make_durable

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from coordinator.aggregation.decoding import Decoder, Source
    from coordinator.executors.base import Executor
    from edge_runtime.messages import UpdateId
    from edge_runtime.transport.loop import Loop

log = logging.getLogger("edge.coordinator")


class Check(NamedTuple):
    """What to check: an encoded update, how to decode it, and the largest norm allowed."""

    source: Source
    decoder: Decoder
    max_norm: float | None


def damage(check: Check) -> str:
    """Why an update cannot be used (undecodable, wrong size, NaN, too large a norm); empty if it can. A task."""
    try:
        check.decoder.decode(check.source, max_norm=check.max_norm)
    except (CodecError, ModelError, OSError) as error:
        return str(error) or type(error).__name__
    return ""


def durable_damage(check: Check) -> str:
    """Like :func:`damage`; an update that can be used survives a power cut when this returns. A task.

    Raises:
        StorageError: the disk is full or failing.
    """
    reason = damage(check)
    if not reason and isinstance(check.source.payload, Path):
        make_durable(check.source.payload)
    return reason


class Checks:
    """Runs checks in a thread of this process, or in the processes of an executor. Called in the loop's thread."""

    def __init__(self, loop: Loop, executor: Executor | None = None) -> None:
        self._loop, self._executor = loop, executor
        self._thread = None if executor is not None else ThreadPoolExecutor(1, thread_name_prefix="check")
        self._running: deque[tuple[UpdateId, Future[str], Callable[[str], None]]] = deque()
        self._names: set[UpdateId] = set()

    def __contains__(self, update: object) -> bool:
        return update in self._names

    def run(self, check: Check, done: Callable[[str], None]) -> None:
        """Checks an update, which must not be running already, and calls ``done`` with what is wrong with it."""
        name = check.source.update
        future = (self._executor or self._thread).submit(durable_damage, check)  # type: ignore[union-attr]
        self._names.add(name)
        self._running.append((name, future, done))
        future.add_done_callback(lambda _: self._loop.call_threadsafe(self._hand_out))

    def close(self) -> None:
        """Forgets what is running; devices offer those updates again."""
        self._running.clear()
        self._names.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _hand_out(self) -> None:
        while self._running and self._running[0][1].done():
            name, future, done = self._running.popleft()
            self._names.discard(name)
            error = future.exception()
            if isinstance(error, StorageError):
                log.error("%s; update %s stays on its device", error, name)
            else:
                done(_reason(future))


def _reason(future: Future[str]) -> str:
    """A plug-in may raise anything, and a process may die of what it reads: that refuses this update, no more."""
    error = future.exception()
    if error is None:
        return future.result()
    log.error("an update could not be checked: %s", error)
    return f"could not be checked: {type(error).__name__}: {error}"
