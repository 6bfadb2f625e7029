"""Decoding in other processes: all of it, on machines that do not see the store, and given up where a round fails."""

from __future__ import annotations

import pickle
from concurrent.futures import Future

import numpy as np
import pytest

from coordinator.aggregation import METHODS, decoding, gathering
from coordinator.errors import ModelError
from coordinator.executors import open_executor
from coordinator.executors.inline import InlineExecutor
from coordinator.plan import Downlink
from edge_runtime.compression import Layout
from edge_runtime.errors import CodecError
from tests.coordinator.aggregation.rounds import Sent, Server, plan_of, vectors

LAYOUT = Layout(("a.weight", "b.weight"), ((40, 50), (30, 40)))  # large enough for codecs that predict from the model
COUNT = 40
WAYS = ("fedavg", "refl", "afa_cs", "fedamd", "median", "norm_clipping")  # sums, deviations, rows, a matrix, norms


def updates(name, seed=0, predicted=0):
    """More than one block of every kind that the method knows, so many predicted from the model; some come late."""
    anchors = "anchor" in METHODS.create(name, {}).roles
    return [
        Sent(
            f"d{n:03}",
            vector,
            codec="default" if n < predicted else "raw",
            staleness=n % 2,
            steps=1 + n % 3,
            role="anchor" if anchors and n % 2 else "trainer",
        )
        for n, vector in enumerate(vectors(COUNT, seed, LAYOUT.size))
    ]


def plan(name):
    return plan_of(name, downlink=Downlink(codec="zstd" if name == "fedamd" else "default"))


class Far(InlineExecutor):
    """Stands for other machines: a task gets a copy of its arguments, and the store is out of its sight."""

    workers = 2
    local = False

    def __init__(self, *folders):
        super().__init__()
        self.folders, self.shared, self.tasks = folders, [], 0

    def share(self, data):
        self.shared.append(super().share(data))
        return self.shared[-1]

    def submit(self, function, *arguments):
        self.tasks += 1
        sent = pickle.dumps((function, arguments))
        for folder in self.folders:
            folder.rename(folder.with_suffix(".away"))
        try:
            function, arguments = pickle.loads(sent)
            return super().submit(function, *arguments)
        finally:
            for folder in self.folders:
                folder.with_suffix(".away").rename(folder)


@pytest.fixture(scope="module")
def processes():
    executor = open_executor(2)
    yield executor
    executor.close()


@pytest.mark.parametrize("name", WAYS)
def test_machines_that_do_not_see_the_store_get_all_they_need(tmp_path, name):
    """Updates and the models that these were predicted from travel with the tasks; the bits are the same."""
    alone = Server(tmp_path / "alone", plan(name), LAYOUT)
    spread = Server(tmp_path / "spread", plan(name), LAYOUT)
    spread.executor = far = Far(tmp_path / "spread")
    for number in range(2):
        sent = updates(name, number, predicted=2)
        alone.round(sent, members=COUNT)
        spread.round(sent, members=COUNT)
    assert spread.made == alone.made
    assert far.tasks
    assert far.shared
    assert not any(shared.path().exists() for shared in far.shared)
    far.close()


def test_a_model_that_is_gone_is_named_there_too(tmp_path):
    """The task says which version its update is relative to."""
    server = Server(tmp_path / "store", plan_of(), LAYOUT)
    server.executor = Far(tmp_path / "store")
    rows = server.rows(updates("fedavg", predicted=2))
    decoder = decoding.Decoder(LAYOUT, {"trainer": ("delta",)}, decoding.Models({}, LAYOUT, ("model",), lossless=True))
    sources = [decoding.Source(row.update, 0, "trainer", server.blobs.path(row.blob.sha256)) for row in rows]
    stored = [gathering.StoredContribution(s, row.meta, 1.0, 0) for s, row in zip(sources, rows, strict=True)]
    round_ = gathering.StoredRound(stored, decoder, server.base, executor=server.executor)
    with pytest.raises(ModelError, match="model version 0 as devices hold it is not in the store"):
        round_.total("delta", lambda _: 1.0)


@pytest.mark.parametrize("name", WAYS)
def test_nothing_is_decoded_where_there_are_processes(tmp_path, monkeypatch, processes, name):
    """Sums, matrices, norms, deviations and rows: the coordinator's own process decodes no update."""
    plan_ = plan_of(name, {"keep": 30} if name == "krum" else {})
    alone, spread = Server(tmp_path / "alone", plan_, LAYOUT), Server(tmp_path / "spread", plan_, LAYOUT, processes)
    sent = [updates(name, number) for number in range(2)]
    for part in sent:
        alone.round(part, members=COUNT)

    def refused(*_given, **_options):
        raise AssertionError("decoded in this process")

    monkeypatch.setattr(decoding.Decoder, "decode", refused)
    for part in sent:
        spread.round(part, members=COUNT)
    assert spread.made == alone.made


class Stuck(InlineExecutor):
    """Fails its first task and never does the others."""

    workers = 4

    def __init__(self):
        super().__init__()
        self.futures = []

    def submit(self, function, *arguments):
        future = super().submit(function, *arguments) if not self.futures else Future()
        self.futures.append(future)
        return future


def test_tasks_of_a_round_that_fails_are_cancelled(tmp_path):
    """Nobody waits for them, and they take no one's time."""
    server = Server(tmp_path, plan_of(), LAYOUT)
    rows = server.rows([Sent(f"d{n:03}", np.ones(LAYOUT.size, np.float32)) for n in range(100)])
    rows[3].blob = rows[4].blob
    server.executor = stuck = Stuck()
    with pytest.raises(CodecError, match="update run/d003/"):
        server.aggregate(rows)
    assert [future.cancelled() for future in stuck.futures] == [False, *[True] * (len(stuck.futures) - 1)]
    assert len(stuck.futures) == 5
