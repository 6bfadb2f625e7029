"""A small event loop over ``selectors``: file descriptors, timers and wake-ups from other threads.

asyncio would cost 2.4 MB of resident memory in the agent; this costs the file you are reading.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Timer:
    """A call in the future; :meth:`cancel` forgets it."""

    __slots__ = ("action", "at")

    def __init__(self, at: float, action: Callable[[], None]) -> None:
        self.at = at
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Forgets the call; harmless when it already happened."""
        self.action = None


class Loop:
    """Runs callbacks one at a time in the thread that calls :meth:`run`. ``clock`` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: deque[Callable[[], None]] = deque()
        self._foreign: deque[Callable[[], None]] = deque()  # appended by other threads; deque.append is atomic
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, READ, self._woken)
        self._stopping = self._closed = False

    def watch(self, fd: int, events: int, action: Callable[[int], None]) -> None:
        """Calls ``action(ready events)`` when ``fd`` is ready; a second call for the same fd changes the events."""
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, action)
        else:
            self._selector.register(fd, events, action)

    def unwatch(self, fd: int) -> None:
        """Stops watching ``fd``; call it before closing."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Calls ``action`` once, ``delay_s`` seconds from now."""
        timer = Timer(self.now() + delay_s, action)
        heapq.heappush(self._timers, (timer.at, next(self._order), timer))
        return timer

    def call_soon(self, action: Callable[[], None]) -> None:
        """Calls ``action`` before the loop waits again."""
        self._soon.append(action)

    def call_threadsafe(self, action: Callable[[], None]) -> None:
        """Like :meth:`call_soon`, from any thread; nothing happens once the loop is closed."""
        if self._closed:
            return
        self._foreign.append(action)
        try:
            os.write(self._wake_write, b"w")
        except BlockingIOError:
            return  # the pipe is full of wake-ups already

    def run(self) -> None:
        """Runs until :meth:`stop`, also an earlier one. Exceptions of callbacks end it and pass to the caller."""
        try:
            while not self._stopping:
                self.step(None)
        finally:
            self._stopping = False

    def step(self, limit_s: float | None) -> None:
        """Runs what is due, then waits at most ``limit_s`` seconds (None: until something happens) for the next."""
        self._run_due()
        if self._stopping:
            return
        for key, events in self._selector.select(self._wait_s(limit_s)):
            # An earlier callback of this batch may have closed it, or given its number to another file. What is
            # skipped here and still ready is told by the next wait.
            if self._selector.get_map().get(key.fd) is key:
                key.data(events)
        self._run_due()

    def stop(self) -> None:
        """Ends :meth:`run` after the current callback, or as soon as it starts."""
        self._stopping = True
        self.call_threadsafe(lambda: None)

    def close(self) -> None:
        """Frees the file descriptors of the loop itself."""
        self._closed = True
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run_due(self) -> None:
        while self._foreign:
            self._soon.append(self._foreign.popleft())
        while self._soon:
            self._soon.popleft()()
        now = self.now()
        while self._timers and self._timers[0][0] <= now:
            action = heapq.heappop(self._timers)[2].action
            if action is not None:
                action()
            while self._soon:
                self._soon.popleft()()

    def _wait_s(self, limit_s: float | None) -> float | None:
        if self._soon or self._foreign:
            return 0.0
        while self._timers and self._timers[0][2].action is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return limit_s
        wait_s = max(0.0, self._timers[0][0] - self.now())
        return wait_s if limit_s is None else min(wait_s, limit_s)

    def _woken(self, _events: int) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            return
