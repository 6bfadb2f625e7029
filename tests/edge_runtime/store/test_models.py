"""Held models: a cache of versions that never grows and never lies."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edge_runtime.errors import StorageError
from edge_runtime.store import models
from edge_runtime.store.models import HeldModels


@pytest.fixture
def held(tmp_path):
    return HeldModels(tmp_path / "models")


def versions(held: HeldModels, run: str = "run") -> set[int]:
    return {version for version in range(20) if held.path(run, version).exists()}


def test_version_0_needs_no_file(held):
    """Every device can make it from the bundle; other versions are here once they were kept."""
    assert held.has("run", 0)
    assert not held.has("run", 1)
    assert held.keep("run", 1, b"model") == 5
    assert held.has("run", 1)
    assert not held.has("other", 1)
    assert held.path("run", 1).read_bytes() == b"model"
    held.drop("run", 1)
    assert not held.has("run", 1)


def test_what_the_coordinator_takes_to_be_here_stays(held):
    """The version just made and the one that it was made from stay: an update that is lost brings the same job again.
    Without such a base the newest other one stays."""
    held.keep("run", 1, b"1", base=0)
    held.keep("run", 2, b"2", base=1)
    assert versions(held) == {1, 2}
    held.keep("run", 3, b"3", base=1)  # the job of version 2 never ended
    assert versions(held) == {1, 3}
    held.keep("run", 4, b"4")
    assert versions(held) == {3, 4}
    held.keep("run", 5, b"5", base=0)
    assert versions(held) == {4, 5}


def test_a_snapshot_that_arrived_is_not_written_again(held, tmp_path):
    """The blob itself becomes the held file: flash is not written twice. It outlives the blob in the cache."""
    blob = tmp_path / "blob"
    blob.write_bytes(b"snapshot")
    assert held.keep("run", 3, blob) == 0
    blob.unlink()
    assert held.path("run", 3).read_bytes() == b"snapshot"


def test_without_links_the_snapshot_is_copied(held, tmp_path, monkeypatch):
    """Some file systems have no hard links."""

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "blob").write_bytes(b"snapshot")
    assert held.keep("run", 3, tmp_path / "blob") == 8
    assert held.path("run", 3).read_bytes() == b"snapshot"


def test_pinned_versions_stay(held):
    """What an update that may be refused is relative to is not pruned, however many versions follow."""
    for version in range(1, 6):
        held.keep("run", version, b"m", base=version - 1, pinned=[1])
    assert versions(held) == {1, 4, 5}
    held.make_durable("run", 1)
    with pytest.raises(StorageError):
        held.make_durable("run", 2)


def test_only_the_runs_used_last_and_those_named_are_held(held, monkeypatch):
    """Runs that ended are not heard of; their models go when others come."""
    monkeypatch.setattr(models, "RUNS_KEPT", 2)
    held.prune_runs(())
    for number, run in enumerate(("a", "b", "c", "d")):
        held.keep(run, 1, b"1")
        os.utime(held.folder / run, (number, number))
    held.keep("a", 2, b"2", base=1)
    held.prune_runs(("b",))
    assert {run.name for run in held.folder.iterdir()} == {"a", "b", "d"}


def test_models_over_their_limit_go_by_the_age_of_their_run(held):
    """Those of the run used longest ago first; not pinned versions, and none of a run that is at work."""
    for number, run in enumerate(("a", "b", "c")):
        for version in (1, 2):
            held.keep(run, version, b"1234", base=version - 1)
        os.utime(held.folder / run, (number, number))
    assert held.used_bytes() == 24
    held.evict(24, {}, ())
    assert held.used_bytes() == 24
    held.evict(19, {"a": [2]}, ("b",))
    assert [versions(held, run) for run in ("a", "b", "c")] in ([{2}, {1, 2}, {1}], [{2}, {1, 2}, {2}])
    held.evict(0, {"a": [2]}, ("b",))
    assert [versions(held, run) for run in ("a", "b", "c")] == [{2}, {1, 2}, set()]
    held.folder = held.folder / "nothing"
    assert held.used_bytes() == 0


def test_what_was_left_half_written_goes(held):
    """The temporary file of a worker that was killed is no version and is removed by the next one."""
    held.keep("run", 1, b"1")
    (held.folder / "run" / "2.model.17.tmp").write_bytes(b"half")
    held.keep("run", 3, b"3", base=7)
    assert {entry.name for entry in (held.folder / "run").iterdir()} == {"1.model", "3.model"}


def test_a_full_disk_is_told_and_leaves_nothing(held, monkeypatch):
    """The error says what to do, and no half file stays."""

    def full(self, _data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="no space left on the device"):
        held.keep("run", 1, b"model")
    assert list((held.folder / "run").iterdir()) == []
