"""Aggregation: the same numbers as plain NumPy, constant memory, and models that can be built again."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from coordinator import events as e
from coordinator.aggregation import create_method, decoding
from coordinator.aggregation import making as aggregation
from coordinator.aggregation.fedavg import FedAvg
from coordinator.errors import ModelError
from coordinator.model_blobs import read_model, read_shared
from coordinator.plan import Downlink
from edge_runtime.compression import Layout
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import decode
from edge_runtime.compression.raw import Raw
from edge_runtime.errors import CodecError, ConfigError
from edge_runtime.messages import BlobRef, UpdateId, UpdateMeta
from edge_runtime.store.blobs import BlobStore
from tests.coordinator import helpers as h

LOSSY = "topk"
LAYOUT = Layout(("w", "b"), ((20, 5), (5,)))


def store_update(
    blobs, number, vector, layout=LAYOUT, *, samples=10, staleness=0, plan=None, codec="raw", version=0, **how
):
    """An encoded update in the store, and its row."""
    meta = UpdateMeta(round=0, model_version=version, samples=samples, steps=1)
    update = UpdateId("run", f"d{number:04}", f"r0-{number}", 0)
    stored = blobs.put(h.encoded(vector, layout, update, version=version, codec=codec, **how))
    return e.UpdateRow(
        update=update,
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
    made = aggregation.make_model(blobs, plan, h.aggregate(0, made, rows), LAYOUT)
    weights = [(10 + i) * (1 + i) ** -0.7 for i in range(4)]
    mean = sum(weight * delta.astype(np.float64) for weight, delta in zip(weights, deltas, strict=True)) / sum(weights)
    np.testing.assert_allclose(read_model(blobs, made.model, LAYOUT), base + mean, rtol=1e-6, atol=1e-7)
    assert made.down is None
    assert made.method_state is None


def test_server_momentum_leaves_running_statistics_alone(tmp_path):
    """Buffers become the plain mean of what the devices saw, so that no momentum drives a variance below zero."""
    layout = Layout(("w", "running_var"), ((4,), (3,)), frozenset({"running_var"}))
    blobs, plan = BlobStore(tmp_path), h.plan(server_optimizer="momentum")
    made = aggregation.make_initial(blobs, plan, np.ones(layout.size, np.float32), layout)
    delta = np.full(layout.size, -0.3, np.float32)
    for number in range(3):
        rows = [store_update(blobs, i, delta, layout, version=number) for i in range(2)]
        made = aggregation.make_model(blobs, plan, h.aggregate(number, made, rows), layout)
    tensors = layout.split(read_model(blobs, made.model, layout))
    np.testing.assert_allclose(tensors["running_var"], 1 - 3 * 0.3, rtol=1e-5)
    assert (tensors["w"] < -0.3).all()


def run_rounds(blobs, plan, count=3):
    """Rounds of three updates: the run's row, and each round with its updates."""
    rng = np.random.default_rng(2)
    made = aggregation.make_initial(blobs, plan, rng.normal(size=LAYOUT.size).astype(np.float32), LAYOUT)
    run = h.start(plan).run
    run.initial_model, run.initial_method_state = made.model, made.method_state
    rounds = []
    for number in range(count):
        vectors = [rng.normal(size=LAYOUT.size).astype(np.float32) for _ in range(3)]
        rows = [store_update(blobs, i, vector, version=number) for i, vector in enumerate(vectors)]
        made = aggregation.make_model(blobs, plan, h.aggregate(number, made, rows), LAYOUT)
        record = e.RoundRow(
            run="run",
            round=number,
            version=number + 1,
            model=made.model,
            down=made.down,
            change=made.change,
            vector_sha256=made.vector_sha256,
            method_state=made.method_state,
            opened_unix_s=0,
            closed_unix_s=1,
            updates=3,
            late_updates=0,
            samples=30,
        )
        rounds.append((record, rows))
    return run, rounds


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("downlink", ["raw", LOSSY])
def test_every_version_can_be_built_again(tmp_path, optimizer, downlink):
    """From version 0 and the retained updates the same hashes come out, of the shared model too."""
    blobs, plan = BlobStore(tmp_path), h.plan(server_optimizer=optimizer, downlink=Downlink(codec=downlink))
    run, rounds = run_rounds(blobs, plan)
    found = list(aggregation.recompute(blobs, plan, run, rounds, LAYOUT))
    assert [made.same for made in found] == [True, True, True]
    assert all((made.vector_sha256 is None) == (downlink == "raw") for made in found)
    rounds[1][1][0] = store_update(blobs, 0, np.ones(LAYOUT.size, np.float32), version=1)
    assert [made.same for made in aggregation.recompute(blobs, plan, run, rounds, LAYOUT)] == [True, False, False]
    blobs.delete(rounds[0][1][0].blob.sha256)
    with pytest.raises(ModelError, match="not in the store"):
        list(aggregation.recompute(blobs, plan, run, rounds, LAYOUT))


def test_devices_come_to_the_shared_model_by_changes_and_by_the_snapshot(tmp_path):
    """From the initial parameters alone every version is reached bit for bit; nothing that was not sent is lost."""
    blobs, plan = BlobStore(tmp_path), h.plan(downlink=Downlink(codec=LOSSY, budget_bytes=128))
    run, rounds = run_rounds(blobs, plan, 12)
    device = SharedModel.start(read_model(blobs, run.initial_model, LAYOUT), LAYOUT)
    layouts = {"model": LAYOUT}
    for record, _ in rounds:
        data = blobs.path(record.change.sha256).read_bytes()
        assert len(data) <= 128
        change = decode(data, layouts, base_version=record.version - 1, reference=device.vector)
        device = device.plus(change["model"].vector())
        assert device.sha256() == record.vector_sha256
        snapshot = read_shared(blobs, record.down, record.version, LAYOUT)
        assert snapshot.sha256() == record.vector_sha256
    server = read_model(blobs, rounds[-1][0].model, LAYOUT)
    assert 0 < np.abs(server - device.vector).max() < np.abs(server).max()


def test_the_same_effect_gives_the_same_bytes(tmp_path):
    """An aggregation that is repeated after a crash makes the very same blobs."""
    plan = h.plan(downlink=Downlink(codec=LOSSY))
    once, again = (run_rounds(BlobStore(tmp_path / name), plan)[1] for name in ("once", "again"))
    assert [record for record, _ in once] == [record for record, _ in again]


@pytest.mark.parametrize(
    ("channels", "downlink", "reason"),
    [
        ((("model", "control"), ("model",)), "raw", "sends control, model, or changes the model itself"),
        ((("control",), ("model",)), "raw", "sends control, or changes"),
        ((("model", "control"), ("model", "control")), "zstd", "sends model, control, method 'fedavg' takes model"),
        ((("model", "control"), ("model", "control")), LOSSY, "only a lossless downlink carries more than the model"),
    ],
)
def test_a_method_that_sends_what_devices_cannot_use_is_refused(tmp_path, monkeypatch, channels, downlink, reason):
    """It is told at once, not by devices that cannot use what they got."""
    sent, declared = channels
    monkeypatch.setattr(FedAvg, "down", lambda _self, model, _state: dict.fromkeys(sent, model))
    monkeypatch.setattr(FedAvg, "down_channels", declared)
    plan = h.plan(downlink=Downlink(codec=downlink))
    with pytest.raises(ConfigError, match=reason):
        aggregation.make_initial(BlobStore(tmp_path), plan, np.zeros(LAYOUT.size, np.float32), LAYOUT)


def test_sparse_updates_count_only_where_they_are(tmp_path):
    """The sum over sparse and dense updates is the one of their vectors."""
    blobs, rng, plan = BlobStore(tmp_path), np.random.default_rng(5), h.plan()
    deltas = [rng.normal(size=LAYOUT.size).astype(np.float32) for _ in range(4)]
    made = aggregation.make_initial(blobs, plan, np.zeros(LAYOUT.size, np.float32), LAYOUT)
    rows = [
        store_update(blobs, i, delta, codec="topk" if i % 2 else "raw", budget_bytes=120 if i % 2 else None)
        for i, delta in enumerate(deltas)
    ]
    method, total = create_method(plan), np.zeros(LAYOUT.size)
    for row in rows:
        path = blobs.path(row.blob.sha256)
        update = decoding.decode_update(path, method, LAYOUT, update=row.update, version=0)["delta"]
        total += update.vector().astype(np.float64) * row.weight
        assert row.update.device in ("d0000", "d0002") or len(update.indices) < LAYOUT.size / 2
    made = aggregation.make_model(blobs, plan, h.aggregate(0, made, rows), LAYOUT)
    np.testing.assert_allclose(read_model(blobs, made.model, LAYOUT), total / 40, rtol=1e-5, atol=1e-7)


def test_sparse_updates_are_not_made_dense(tmp_path):
    """Beside the sum there is nothing of the model's size for an update that holds a hundred values."""
    layout = Layout(("w",), ((1_000_000,),))
    blobs, method = BlobStore(tmp_path), create_method(h.plan())
    vector = np.random.default_rng(0).normal(size=layout.size).astype(np.float32)
    row = store_update(blobs, 0, vector, layout, codec="topk", budget_bytes=600)
    total = np.zeros(layout.size)
    tracemalloc.start()
    path = blobs.path(row.blob.sha256)
    decoding.decode_update(path, method, layout, update=row.update, version=0)["delta"].add_to(total, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < layout.size / 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"update": UpdateId("run", "other", "r0-1", 0)}, "those of another update"),
        ({"version": 3}, "relative to model version 0, expected 3"),
        ({"max_norm": 0.5}, "L2 norm of 10.25 is above the plan's max_norm = 0.5"),
    ],
)
def test_updates_that_are_not_what_was_asked_for_are_refused(tmp_path, changes, reason):
    """Bytes of another update, of another version, and too long steps do not get into a model."""
    blobs = BlobStore(tmp_path)
    row = store_update(blobs, 0, np.ones(LAYOUT.size, np.float32))
    given = {"update": row.update, "version": 0, "max_norm": 11.0}
    path, method = blobs.path(row.blob.sha256), create_method(h.plan())
    decoding.decode_update(path, method, LAYOUT, **given)
    with pytest.raises(CodecError, match=reason):
        decoding.decode_update(path, method, LAYOUT, **{**given, **changes})


def test_a_codec_may_predict_from_the_model_that_devices_hold(tmp_path, monkeypatch):
    """Such updates are decoded against the version that they are relative to, late ones included."""
    seen = []

    class Predicts(Raw):
        def decode_against(self, payload, layout, reference):
            seen.append(None if reference is None else reference.tobytes())
            return self.decode(payload, layout)

    monkeypatch.setattr("edge_runtime.compression.pipeline.codec_class", lambda _codec: Predicts)
    blobs, plan = BlobStore(tmp_path), h.plan(downlink=Downlink(codec="raw"))
    first = aggregation.make_initial(blobs, plan, np.ones(LAYOUT.size, np.float32), LAYOUT)
    second = aggregation.make_initial(blobs, plan, np.full(LAYOUT.size, 2, np.float32), LAYOUT)
    rows = [
        store_update(blobs, i, np.ones(LAYOUT.size, np.float32), version=version) for i, version in enumerate((1, 0, 1))
    ]
    effect = h.aggregate(1, second, rows)
    effect.held[0] = first.model
    aggregation.make_model(blobs, plan, effect, LAYOUT)
    models = [np.full(LAYOUT.size, value, np.float32).tobytes() for value in (2, 1, 2)]
    assert [vector for vector in seen if vector is not None] == models


def test_memory_does_not_grow_with_the_number_of_updates(tmp_path):
    """Forty updates of 400 kB take no more than a few vectors."""
    layout = Layout(("w",), ((100_000,),))
    blobs, plan = BlobStore(tmp_path), h.plan()
    made = aggregation.make_initial(blobs, plan, np.zeros(layout.size, np.float32), layout)
    rows = [store_update(blobs, i, np.full(layout.size, i, np.float32), layout) for i in range(40)]
    tracemalloc.start()
    aggregation.make_model(blobs, plan, h.aggregate(0, made, rows), layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 4 * layout.size


def test_unusable_updates_are_named(tmp_path):
    """A damaged update, none at all, or a wrong order stop the aggregation with a reason."""
    blobs, plan = BlobStore(tmp_path), h.plan()
    made = aggregation.make_initial(blobs, plan, np.zeros(LAYOUT.size, np.float32), LAYOUT)
    good = store_update(blobs, 1, np.ones(LAYOUT.size, np.float32))
    damaged = store_update(blobs, 0, np.ones(LAYOUT.size, np.float32))
    damaged.blob = BlobRef(sha256=blobs.put(b"nonsense").sha256, size_bytes=8)
    with pytest.raises(CodecError, match="d0000/r0-0/0"):
        aggregation.make_model(blobs, plan, h.aggregate(0, made, [damaged, good]), LAYOUT)
    with pytest.raises(ModelError, match="no update"):
        aggregation.make_model(blobs, plan, h.aggregate(0, made, []), LAYOUT)
    with pytest.raises(ModelError, match="out of order"):
        aggregation.make_model(blobs, plan, h.aggregate(0, made, [good, good]), LAYOUT)


def test_an_encoded_model_is_stored_beside_the_exact_one(tmp_path):
    """With a lossless codec devices download the encoded model; the other one stays the base of the next round."""
    blobs, plan = BlobStore(tmp_path), h.plan(downlink=Downlink(codec="zstd"))
    made = aggregation.make_initial(blobs, plan, np.zeros(LAYOUT.size, np.float32), LAYOUT)
    assert made.down is not None
    assert made.down != made.model
    assert made.vector_sha256 is None
    np.testing.assert_array_equal(read_model(blobs, made.down, LAYOUT), read_model(blobs, made.model, LAYOUT))
