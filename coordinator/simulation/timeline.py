"""Virtual time: one heap of what is to happen, in the order of time, then of its planning."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Timeline:
    """``now_s`` begins at 0 and only moves forward. What was planned cannot be taken back: actions check themselves."""

    __slots__ = ("_heap", "_number", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Plans ``action(*arguments)``; a time that has passed is now, after what is planned for now."""
        self._number += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._number, action, arguments))

    def step(self) -> bool:
        """Does what comes next; False if there is nothing."""
        if not self._heap:
            return False
        self.now_s, _, action, arguments = heapq.heappop(self._heap)
        action(*arguments)
        return True
