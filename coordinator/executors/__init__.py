"""Where heavy work runs: in this process, in local processes, on a cluster."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.executors.base import Executor


def open_executor(workers: int = 0, ray: str | None = None) -> Executor:
    """An executor; close it at the end.

    Args:
        workers: processes (CPUs of a local Ray); 0: one per CPU that this process may use. One worker without Ray is
            this process itself.
        ray: None: processes of this machine. Else an address of a Ray cluster; empty: a local one is started.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached; or a negative number of workers.
    """
    if workers < 0:
        raise ConfigError(f"{workers} processes cannot be had; give 0 (one per CPU) or more")
    count = workers or _cpus()
    if ray is not None:
        from coordinator.executors.ray import RayExecutor

        return RayExecutor(count, ray)
    if count == 1:
        from coordinator.executors.inline import InlineExecutor

        return InlineExecutor()
    from coordinator.executors.local import LocalExecutor

    return LocalExecutor(count)


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


__all__ = ["open_executor"]
