"""Processes of :mod:`benchmarks.fleet` that do what they are asked: requests and answers are lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil

from edge_runtime.transport.loop import READ, Loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Helper:
    """A process of this benchmark that answers JSON requests."""

    def __init__(self, folder: Path, name: str, *command: str) -> None:
        with (folder / f"{name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._name = name
        self.usage = psutil.Process(self._process.pid)

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Sends a request and gives the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise SystemExit(f"{self._name} ended") from error
        return answer

    def check(self) -> None:
        """Ends the benchmark if this process has ended."""
        if self._process.poll() is not None:
            raise SystemExit(f"{self._name} ended")

    def end(self, limit_s: float = 20.0) -> None:
        """Lets it end, and ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Control:
    """Answers requests on standard input from within a loop; the end of input stops the loop."""

    def __init__(self, loop: Loop, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._loop, self._answer, self._text = loop, answer, b""
        loop.watch(0, READ, self._ready)

    def _ready(self, _events: int) -> None:
        data = os.read(0, 65536)
        if not data:
            self._loop.unwatch(0)
            self._loop.stop()
            return
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            print(json.dumps(self._answer(json.loads(line))), flush=True)


def stamp() -> int:
    """Milliseconds of the machine's monotonic clock, in 32 bits; what a beat carries as its uptime."""
    return int(time.monotonic() * 1000) & 0xFFFFFFFF
