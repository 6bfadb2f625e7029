"""Aggregation: the same numbers as plain NumPy, constant memory, and models that can be built again."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from coordinator import aggregation
from coordinator import events as e
from coordinator.errors import ModelError
from coordinator.methods import create_method
from edge_runtime.compression import Layout, encode
from edge_runtime.errors import CodecError
from edge_runtime.messages import BlobRef, UpdateId, UpdateMeta
from edge_runtime.store.blobs import BlobStore
from tests.coordinator import helpers as h

LAYOUT = Layout(("w", "b"), ((20, 5), (5,)))


def store_update(blobs, number, vector, layout=LAYOUT, *, samples=10, staleness=0, plan=None, codec="raw"):
    """An encoded update in the store, and its row."""
    meta = UpdateMeta(round=0, model_version=0, samples=samples, steps=1)
    stored = blobs.put(encode(codec, {"delta": vector}, {"delta": layout})[0])
    return e.UpdateRow(
        update=UpdateId("run", f"d{number:04}", f"r0-{number}", 0),
        blob=BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes),
        meta=meta,
        received_unix_s=0.0,
        verdict="counted",
        counted_round=0,
        weight=create_method(plan or h.plan()).weight(meta, staleness),
    )


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_fedavg_is_the_weighted_mean(tmp_path, codec):
    """Against the formula in NumPy, for updates of different weight, staleness and codec."""
    blobs, rng, plan = BlobStore(tmp_path), np.random.default_rng(1), h.plan(staleness_exponent=0.7)
    base = rng.normal(size=LAYOUT.size).astype(np.float32)
    deltas = [rng.normal(size=LAYOUT.size).astype(np.float32) for _ in range(4)]
    made = aggregation.make_initial(blobs, plan, base, LAYOUT)
    rows = [
        store_update(blobs, i, delta, samples=10 + i, staleness=i, plan=plan, codec=codec)
        for i, delta in enumerate(deltas)
    ]
    made = aggregation.make_model(blobs, plan, e.Aggregate("run", 0, made.model, rows), LAYOUT)
    weights = [(10 + i) * (1 + i) ** -0.7 for i in range(4)]
    mean = sum(weight * delta.astype(np.float64) for weight, delta in zip(weights, deltas, strict=True)) / sum(weights)
    np.testing.assert_allclose(aggregation.read_model(blobs, made.model, LAYOUT), base + mean, rtol=1e-6, atol=1e-7)
    assert made.down is None
    assert made.method_state is None


def test_server_momentum_leaves_running_statistics_alone(tmp_path):
    """Buffers become the plain mean of what the devices saw, so that no momentum drives a variance below zero."""
    layout = Layout(("w", "running_var"), ((4,), (3,)), frozenset({"running_var"}))
    blobs, plan = BlobStore(tmp_path), h.plan(server_method="fedavgm")
    made = aggregation.make_initial(blobs, plan, np.ones(layout.size, np.float32), layout)
    delta = np.full(layout.size, -0.3, np.float32)
    for number in range(3):
        rows = [store_update(blobs, i, delta, layout) for i in range(2)]
        effect = e.Aggregate("run", number, made.model, rows, made.method_state)
        made = aggregation.make_model(blobs, plan, effect, layout)
    tensors = layout.split(aggregation.read_model(blobs, made.model, layout))
    np.testing.assert_allclose(tensors["running_var"], 1 - 3 * 0.3, rtol=1e-5)
    assert (tensors["w"] < -0.3).all()


@pytest.mark.parametrize("method", ["fedavg", "fedavgm"])
def test_every_version_can_be_built_again(tmp_path, method):
    """From version 0 and the retained updates the same hashes come out; a changed update is noticed."""
    blobs, rng, plan = BlobStore(tmp_path), np.random.default_rng(2), h.plan(server_method=method)
    made = aggregation.make_initial(blobs, plan, rng.normal(size=LAYOUT.size).astype(np.float32), LAYOUT)
    run = h.start(plan).run
    run.initial_model, run.initial_method_state = made.model, made.method_state
    rounds = []
    for number in range(3):
        rows = [store_update(blobs, i, rng.normal(size=LAYOUT.size).astype(np.float32)) for i in range(3)]
        effect = e.Aggregate("run", number, made.model, rows, made.method_state)
        made = aggregation.make_model(blobs, plan, effect, LAYOUT)
        record = e.RoundRow(
            run="run",
            round=number,
            version=number + 1,
            model=made.model,
            opened_unix_s=0,
            closed_unix_s=1,
            updates=3,
            late_updates=0,
            samples=30,
        )
        rounds.append((record, rows))
    for record, digest in aggregation.recompute(blobs, plan, run, rounds, LAYOUT):
        assert digest == record.model.sha256
    rounds[1][1][0] = store_update(blobs, 0, np.ones(LAYOUT.size, np.float32))
    digests = [
        digest == record.model.sha256 for record, digest in aggregation.recompute(blobs, plan, run, rounds, LAYOUT)
    ]
    assert digests == [True, False, False]
    blobs.delete(rounds[0][1][0].blob.sha256)
    with pytest.raises(ModelError, match="not in the store"):
        list(aggregation.recompute(blobs, plan, run, rounds, LAYOUT))


def test_memory_does_not_grow_with_the_number_of_updates(tmp_path):
    """Forty updates of 400 kB take no more than a few vectors."""
    layout = Layout(("w",), ((100_000,),))
    blobs, plan = BlobStore(tmp_path), h.plan()
    made = aggregation.make_initial(blobs, plan, np.zeros(layout.size, np.float32), layout)
    rows = [store_update(blobs, i, np.full(layout.size, i, np.float32), layout) for i in range(40)]
    tracemalloc.start()
    aggregation.make_model(blobs, plan, e.Aggregate("run", 0, made.model, rows), layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 4 * layout.size


def test_unusable_updates_are_named(tmp_path):
    """A damaged update, none at all, or a wrong order stop the aggregation with a reason."""
    blobs, plan = BlobStore(tmp_path), h.plan()
    base = aggregation.make_initial(blobs, plan, np.zeros(LAYOUT.size, np.float32), LAYOUT).model
    good = store_update(blobs, 1, np.ones(LAYOUT.size, np.float32))
    damaged = store_update(blobs, 0, np.ones(LAYOUT.size, np.float32))
    damaged.blob = BlobRef(sha256=blobs.put(b"nonsense").sha256, size_bytes=8)
    with pytest.raises(CodecError, match="d0000/r0-0/0"):
        aggregation.make_model(blobs, plan, e.Aggregate("run", 0, base, [damaged, good]), LAYOUT)
    with pytest.raises(ModelError, match="no update"):
        aggregation.make_model(blobs, plan, e.Aggregate("run", 0, base, []), LAYOUT)
    with pytest.raises(ModelError, match="out of order"):
        aggregation.make_model(blobs, plan, e.Aggregate("run", 0, base, [good, good]), LAYOUT)


def test_a_lossy_downlink_is_stored_beside_the_model(tmp_path):
    """Devices download the encoded model; the exact one stays the base of the next round."""
    blobs, plan = BlobStore(tmp_path), h.plan(downlink_codec="zstd")
    made = aggregation.make_initial(blobs, plan, np.zeros(LAYOUT.size, np.float32), LAYOUT)
    assert made.down is not None
    assert made.down != made.model
