"""Tasks for tests of executors; importable wherever they run."""

from __future__ import annotations

import os
import time


def add(a: int, b: int) -> int:
    return a + b


def fail(text: str) -> None:
    raise ValueError(text)


def die() -> None:
    os._exit(3)


def hold(seconds: float) -> None:
    time.sleep(seconds)


def unsendable() -> object:
    return lambda: None


def length(shared) -> tuple[int, int]:
    return len(shared.read()), shared.path().stat().st_size


def process() -> int:
    return os.getpid()
