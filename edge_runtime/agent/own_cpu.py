"""CPU time of the agent and its worker, for the model of what they draw."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class OwnCpu:
    """CPU seconds of this process and its worker: :meth:`read` never falls, also when a worker ends.

    Args:
        worker: process id of the worker that runs now, if one does.
    """

    def __init__(self, worker: Callable[[], int | None]) -> None:
        self._worker = worker
        self._most_s = 0.0

    def read(self) -> float:
        """Seconds since this process began; what a worker used counts while it runs and after it was reaped."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        used_s = time.process_time() + children.ru_utime + children.ru_stime + self._of_worker()
        self._most_s = max(self._most_s, used_s)
        return self._most_s

    def _of_worker(self) -> float:
        pid = self._worker()
        if pid is None:
            return 0.0
        try:
            return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3): nanoseconds, where /proc has 10 ms
        except (OSError, OverflowError):  # it ended
            return 0.0
