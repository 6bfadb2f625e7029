"""Tasks on a Ray cluster (Moritz et al., "Ray: A Distributed Framework for Emerging AI Applications", OSDI 2018).

Every machine of the cluster needs this software in the same version. Without an address a local Ray is started, and
ended with the executor.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from coordinator.errors import ExecutorError
from coordinator.executors.files import temporary_folder
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.executors.base import Shared

T = TypeVar("T")
_KEPT = 64  # shared bytes that a process keeps as files
_files: OrderedDict[str, Path] = OrderedDict()  # of this process, by the object's name
_folder: list[Path] = []


class RayExecutor:
    """See :class:`~coordinator.executors.base.Executor`.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at ``address``.
    """

    local = False

    def __init__(self, workers: int, address: str = "") -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            cure = 'pip install "edge-training-runtime[ray]"'
            raise ConfigError(f"Ray is not installed; the coordinator needs its extra: {cure}") from error
        self._ray: Any = ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {"address": address} if address else {"address": "local", "num_cpus": workers}
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"at {address}" if address else "on this machine"
            raise ConfigError(f"no Ray {where}: {' '.join(str(error).split())[:300]}") from error
        self.workers = int(self._ray.cluster_resources().get("CPU", workers))
        self._run = ray.remote(max_retries=0)(_call)
        self._folder = temporary_folder(
            "ray"
        )  # processes of this machine leave their files in it, and it goes at the end

    def share(self, data: bytes) -> Shared:
        return _RayShared(self._ray.put(data), str(self._folder))

    def release(self, shared: Shared) -> None:
        """The object goes with the last reference to it."""

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        reference = self._run.remote(function, arguments)
        future: _RayFuture[T] = _RayFuture(self._ray, reference)
        name = f"{function.__module__}.{function.__qualname__}"
        reference.future().add_done_callback(lambda done: future.settle(name, done))
        return future

    def close(self) -> None:
        self._ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


class _RayFuture(Future[T]):
    """Can be cancelled until its result is here; the cluster breaks the task off."""

    def __init__(self, ray: Any, reference: Any) -> None:
        super().__init__()
        self._ray, self._reference = ray, reference

    def cancel(self) -> bool:
        before = self.cancelled()
        cancelled = super().cancel()
        if cancelled and not before:
            self._ray.cancel(self._reference)
        return cancelled

    def settle(self, name: str, done: Future[Any]) -> None:
        """Ray's own future of this task is done."""
        if not self.set_running_or_notify_cancel():
            return
        self._reference = None  # the cluster need not keep the result
        try:
            good, result = done.result()
        except Exception as error:  # noqa: BLE001 - Ray's own errors: the process or the machine died
            text = " ".join(str(error).split())[:200]
            self.set_exception(ExecutorError(f"the process of task {name} died ({text})"))
            return
        self.set_result(result) if good else self.set_exception(result)


class _RayShared:
    def __init__(self, reference: Any, folder: str) -> None:
        self._reference, self._folder = reference, Path(folder)

    def read(self) -> bytes:
        return self.path().read_bytes()

    def path(self) -> Path:
        """Written once per process; the oldest files go."""
        name = self._reference.hex()
        known = _files.get(name)
        if known is None:
            import ray

            if not _folder:
                here = self._folder.is_dir()  # the machine that began all this
                _folder.append(Path(tempfile.mkdtemp(dir=self._folder)) if here else temporary_folder("ray"))
                atexit.register(shutil.rmtree, _folder[0], ignore_errors=True)
            while len(_files) >= _KEPT:
                _files.popitem(last=False)[1].unlink(missing_ok=True)
            known = _folder[0] / name
            known.write_bytes(ray.get(self._reference))
            _files[name] = known
        _files.move_to_end(name)
        return known


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """In a process of the cluster; errors travel as values, so that they arrive as what they were."""
    try:
        return True, function(*arguments)
    except Exception as error:  # noqa: BLE001 - the caller's to judge
        return False, error
