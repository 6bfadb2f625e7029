"""Executors: the same results in this process, in others, and on a Ray cluster; a death costs one task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coordinator.errors import ExecutorError
from coordinator.executors import open_executor
from coordinator.executors.files import temporary_folder
from edge_runtime.errors import ConfigError
from tests.coordinator import executor_tasks as tasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.executors.base import Executor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["inline", "local", pytest.param("ray", marks=pytest.mark.slow)])
def executor(request) -> Iterator[Executor]:
    """One of each kind."""
    if request.param == "ray":
        pytest.importorskip("ray", reason='Ray is not installed (pip install "edge-training-runtime[ray]")')
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))  # a cluster's processes know what is installed there
            made = open_executor(2, ray="")
    else:
        made = open_executor(1 if request.param == "inline" else 2)
    yield made
    made.close()


def test_results_come_back_to_whom_they_belong(executor):
    """Many tasks at once, each with its own result."""
    futures = [executor.submit(tasks.add, number, 1) for number in range(50)]
    assert [future.result(60) for future in futures] == list(range(1, 51))


def test_what_a_task_raises_is_raised(executor):
    """With its own type and text."""
    with pytest.raises(ValueError, match="no such thing"):
        executor.submit(tasks.fail, "no such thing").result(60)


def test_shared_bytes_are_read_by_every_task(executor):
    """As bytes and as a file, until they are released."""
    shared = executor.share(b"x" * 100_000)
    assert executor.submit(tasks.length, shared).result(60) == (100_000, 100_000)
    executor.release(shared)


def test_a_process_that_dies_costs_its_one_task(executor):
    """The task is named in an ExecutorError, and the others are done."""
    if executor.workers == 1:
        pytest.skip("tasks run in this very process")
    dying = executor.submit(tasks.die)
    others = [executor.submit(tasks.add, number, number) for number in range(6)]
    with pytest.raises(ExecutorError, match=r"executor_tasks\.die died"):
        dying.result(60)
    assert [future.result(60) for future in others] == [0, 2, 4, 6, 8, 10]


def test_a_task_that_is_cancelled_makes_room(executor):
    """One in the queue is never begun; on a cluster one in progress is broken off."""
    if executor.workers == 1:
        pytest.skip("tasks are done when they are submitted")
    cluster = not executor.local
    holding = [executor.submit(tasks.hold, 600.0 if cluster else 0.5) for _ in range(executor.workers)]
    queued = executor.submit(tasks.hold, 600.0)
    assert queued.cancel()
    assert [future.cancel() for future in holding if cluster] == [True] * len(holding if cluster else [])
    assert executor.submit(tasks.add, 1, 2).result(60) == 3
    assert queued.cancelled()


def test_local_processes_are_others_and_go_with_their_executor():
    """A task runs elsewhere; after close nothing is left of processes and files."""
    made = open_executor(2)
    shared = made.share(b"x")
    pid = made.submit(tasks.process).result(60)
    assert pid != os.getpid()
    made.close()
    assert not shared.path().exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_result_that_cannot_be_sent_fails_its_task_alone():
    """It is said which; the next task is done."""
    made = open_executor(2)
    with pytest.raises(ExecutorError, match="unsendable cannot be sent"):
        made.submit(tasks.unsendable).result(60)
    assert made.submit(tasks.add, 1, 2).result(60) == 3
    made.close()


def test_impossible_executors_are_refused():
    """A negative number of processes says so."""
    with pytest.raises(ConfigError, match=r"0 \(one per CPU\) or more"):
        open_executor(-1)


def test_temporary_folders_are_private():
    """Only this user can look into them."""
    folder = temporary_folder("test")
    assert folder.stat().st_mode & 0o077 == 0
    folder.rmdir()
