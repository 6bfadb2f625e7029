"""What every server method keeps, and the formula of each."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from coordinator.aggregation import METHODS, OPTIMIZERS, decoding, gathering, making
from coordinator.errors import ModelError
from coordinator.executors import open_executor
from coordinator.plan import Downlink
from edge_runtime.compression import Layout
from edge_runtime.compression.pipeline import decode
from edge_runtime.errors import CodecError, ConfigError
from edge_runtime.messages import UpdateMeta
from tests.coordinator.aggregation.rounds import LAYOUT, Sent, Server, plan_of, sent_by, vectors

# With these options, fresh updates and devices that are alike, the change is the plain mean.
NEUTRAL = {
    "fedavg": {},
    "refl": {},
    "fedbuff": {},
    "afa_cd": {},
    "afa_cs": {},
    "fedamd": {},
    "trimmed_mean": {"fraction": 0.0},
    "krum": {"byzantine": 0, "keep": 1000},
    "bulyan": {"byzantine": 0},
    "nna": {"byzantine": 0},
    "norm_clipping": {"multiple": 0},
}
SAME_BITS = ("refl", "fedbuff", "afa_cd", "fedamd", "krum", "norm_clipping")
STREAMING = ("fedavg", "refl", "fedbuff", "afa_cd", "afa_cs", "fedamd", "norm_clipping")
CLIENT_LR = {"fedhyper_sl": {"client_lr": 0.05}}


def test_every_built_in_method_says_what_its_neutral_options_are():
    """The median alone has none."""
    assert set(METHODS.names()) == {*NEUTRAL, "median"}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_options_give_the_plain_mean(tmp_path, name):
    """A method's extra vanishes where its options say so; methods that add up give the very same bits."""
    sent = sent_by(vectors(7), samples=4)
    plain = Server(tmp_path / "plain", plan_of())
    plain.round(sent)
    own = Server(tmp_path / "own", plan_of(name, NEUTRAL[name]))
    own.round(sent, members=7)
    np.testing.assert_allclose(own.model(), plain.model(), rtol=1e-6, atol=1e-7)
    if name in SAME_BITS:
        mean = np.zeros(LAYOUT.size)
        for entry in sent:
            mean += entry.vector.astype(np.float64)
        assert own.model().tobytes() == (own.base + mean / 7).astype(np.float32).tobytes()


def mixed(server, seed=0, count=9):
    """Updates of every kind that the method knows: sparse and dense, late, of different steps and samples."""
    sent = []
    for number, vector in enumerate(vectors(count, seed)):
        role = (
            "anchor"
            if "anchor" in METHODS.create(server.plan.server_method, {}).roles and number % 3 == 0
            else "trainer"
        )
        sent.append(
            Sent(
                f"d{number}",
                vector,
                samples=3 + number,
                staleness=number % 3,
                steps=1 + number,
                role=role,
                codec="topk" if number % 2 else "raw",
            )
        )
    return sent


@pytest.mark.parametrize("name", METHODS.names())
def test_the_order_of_arrival_does_not_matter(tmp_path, name):
    """Updates go in update id order, so two servers agree bit for bit, table rows and states included."""
    results = []
    for order in (1, -1):
        server = Server(tmp_path / str(order), plan_of(name))
        for number in range(3):
            rows = server.rows(mixed(server, number))[::order]
            server.aggregate(sorted(rows, key=lambda row: row.update), members=20)
        results.append((server.made, server.table))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", METHODS.names())
def test_an_aggregation_that_is_repeated_after_a_crash_makes_the_same(tmp_path, name):
    """Nothing that the first one wrote changes what the second one reads."""
    server = Server(tmp_path, plan_of(name))
    server.round(mixed(server), members=9)
    effect = server.effect(server.rows(mixed(server, 1)), members=9)
    once, again = (making.make_model(server.blobs, server.plan, effect, LAYOUT) for _ in range(2))
    assert once == again
    assert bool(once.table) == METHODS.create(name, {}).table


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *((name, "sgd") for name in METHODS.names()),
        *(("fedavg", name) for name in OPTIMIZERS.names()),
        *((name, "momentum") for name in ("afa_cs", "fedamd")),
    ],
)
def test_every_version_can_be_built_again(tmp_path, name, optimizer):
    """From version 0 and the kept updates the same hashes come out, for tables and states too."""
    plan = plan_of(name, server_optimizer=optimizer, server_optimizer_options=CLIENT_LR.get(optimizer, {}))
    server = Server(tmp_path, plan)
    for number in range(4):
        server.round(mixed(server, number, count=9 if number % 2 else 4), members=10 + number)
    found = making.recompute(server.blobs, plan, server.run, server.rounds, LAYOUT, roles=server.roles)
    assert [made.same for made in found] == [True] * 4


@pytest.mark.parametrize("name", METHODS.names())
def test_weights_are_above_zero_and_never_grow_with_age(name):
    """Whatever a device says of its samples, a weight is a finite number."""
    method = METHODS.create(name, {})
    for samples in (1, 10, 10**15):
        meta = UpdateMeta(round=0, model_version=0, samples=samples, steps=1)
        weights = [method.weight(meta, staleness) for staleness in range(60)]
        assert all(0 < weight < 1e16 for weight in weights)
        assert weights == sorted(weights, reverse=True)
        assert method.accept(meta, 0) == ""


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rounds_with_few_devices_work(tmp_path, name, count):
    """One device is away, or all but one: the model still moves their way and is finite."""
    server = Server(tmp_path, plan_of(name))
    updates = vectors(count)
    change = server.round(sent_by(updates), members=count)
    assert np.isfinite(change).all()
    assert np.dot(change, np.mean(updates, axis=0)) > 0


@pytest.mark.parametrize("name", ["fedavg", "afa_cd", "fedbuff", "norm_clipping"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bits_come_out_of_any_number_of_processes(tmp_path, name, workers):
    """Blocks of 16 updates are summed anywhere; their sums are added in order."""
    sent = [*sent_by(vectors(60)), *(Sent(f"s{n}", v, codec="topk") for n, v in enumerate(vectors(9, 4)))]
    alone = Server(tmp_path / "alone", plan_of(name))
    alone.round(sent)
    executor = open_executor(workers)
    try:
        spread = Server(tmp_path / "spread", plan_of(name), executor=executor)
        spread.round(sent)
    finally:
        executor.close()
    assert spread.made == alone.made


def test_processes_decode_what_was_predicted_from_the_model(tmp_path):
    """The default codec may predict from the model: tasks read it themselves, and name updates that are bad."""
    layout = Layout(("a.weight", "b.weight"), ((40, 50), (30, 40)))
    sent = [Sent(f"d{n:03}", v, codec="default") for n, v in enumerate(vectors(40, size=layout.size))]
    alone = Server(tmp_path / "alone", plan_of(), layout)
    alone.round(sent)
    executor = open_executor(2)
    try:
        spread = Server(tmp_path / "spread", plan_of(), layout, executor)
        spread.round(sent)
        assert spread.made == alone.made
        rows = spread.rows(sent)
        rows[20].blob = rows[21].blob
        with pytest.raises(CodecError, match=r"update run/d020/.*those of another update"):
            spread.aggregate(rows)
    finally:
        executor.close()


@pytest.mark.parametrize("name", STREAMING)
def test_memory_does_not_grow_with_the_number_of_updates(tmp_path, name):
    """Forty updates of 400 kB take no more than a few vectors."""
    layout = Layout(("w",), ((100_000,),))
    server = Server(tmp_path, plan_of(name), layout)
    sent = [
        Sent(f"d{n:03}", np.full(layout.size, n + 1, np.float32), staleness=n % 2, role="trainer") for n in range(40)
    ]
    server.round(sent[:2], members=50)
    rows = server.rows(sent)
    tracemalloc.start()
    server.aggregate(rows, members=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 4 * layout.size  # a table's state is four of them, and is read, changed and written


@pytest.mark.parametrize("name", ["median", "nna", "bulyan", "krum"])
def test_many_updates_are_laid_out_on_disk(tmp_path, monkeypatch, name):
    """Methods that look at all updates at once give the same bits from a file."""
    models = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(gathering, "MATRIX_IN_MEMORY_BYTES", limit)
        server = Server(tmp_path / str(limit), plan_of(name))
        server.round(sent_by(vectors(9)))
        models.append(server.model().tobytes())
    assert models[0] == models[1]


def test_fedavg_weighs_by_samples_and_age(tmp_path):
    """Against the formula."""
    server = Server(tmp_path, plan_of(staleness_exponent=0.7))
    server.round(sent_by(vectors(2)))
    server.round(sent_by(vectors(2)))
    sent = [entry._replace(samples=5 + n, staleness=n) for n, entry in enumerate(sent_by(vectors(3, 1)))]
    weights = [(5 + n) * (1 + n) ** -0.7 for n in range(3)]
    expected = sum(w * s.vector.astype(float) for w, s in zip(weights, sent, strict=True)) / sum(weights)
    np.testing.assert_allclose(server.round(sent), expected, rtol=1e-5, atol=1e-6)


def test_refl_weighs_late_updates_by_age_and_by_what_they_tell(tmp_path):
    """Against the formula; one that is far off counts no more than a fresh one."""
    server = Server(tmp_path, plan_of("refl", {"beta": 0.4}))
    for number in range(3):
        server.round(sent_by(vectors(2, number)))
    updates = vectors(5, 7)
    updates[4] *= 1000
    ages = (0, 0, 0, 1, 3)
    sent = [e._replace(staleness=age) for e, age in zip(sent_by(updates), ages, strict=True)]
    exact = [vector.astype(float) for vector in updates]
    fresh = sum(exact[:3]) / 3
    told = [np.sum((fresh - (late + 3 * fresh) / 4) ** 2) / np.sum(fresh**2) for late in exact[3:]]
    weights = [
        1,
        1,
        1,
        *(0.6 / (age + 1) + 0.4 * (1 - np.exp(-d / max(told))) for age, d in zip((1, 3), told, strict=True)),
    ]
    assert max(weights) == 1
    expected = sum(w * v for w, v in zip(weights, exact, strict=True)) / sum(weights)
    np.testing.assert_allclose(server.round(sent), expected, rtol=1e-5, atol=1e-4)
    late_only = [entry._replace(staleness=n + 1) for n, entry in enumerate(sent_by(updates[:2]))]
    expected = (exact[0] / 2 + exact[1] / 3) / (1 / 2 + 1 / 3)
    np.testing.assert_allclose(server.round(late_only), expected, rtol=1e-5, atol=1e-4)


def test_fedbuff_divides_by_the_buffer(tmp_path):
    """Old updates shorten the step, samples do not count."""
    server = Server(tmp_path, plan_of("fedbuff"))
    for number in range(3):
        server.round(sent_by(vectors(2, number)))
    sent = [e._replace(staleness=3, samples=1 + n) for n, e in enumerate(sent_by(vectors(4)))]
    expected = sum(entry.vector.astype(float) for entry in sent) / 4 / 2
    np.testing.assert_allclose(server.round(sent), expected, rtol=1e-5, atol=1e-6)


def test_afa_cd_counts_every_device_alike_whatever_its_steps(tmp_path):
    """Twice the steps with twice the change tell the same; the reference gives the scale."""
    one, two = vectors(2)
    steps = [Sent("a", one * 8, steps=8), Sent("b", two * 2, steps=2)]
    mean = (one.astype(float) + two) / 2
    np.testing.assert_allclose(Server(tmp_path / "m", plan_of("afa_cd")).round(steps), 5 * mean, rtol=1e-5, atol=1e-5)
    fixed = Server(tmp_path / "f", plan_of("afa_cd", {"reference_steps": 10}))
    np.testing.assert_allclose(fixed.round(steps), 10 * mean, rtol=1e-5, atol=1e-5)
    method = METHODS.create("afa_cd", {})
    assert "divides by steps" in method.accept(UpdateMeta(round=0, model_version=0, samples=1, steps=0), 0)


def test_afa_cs_remembers_those_who_are_away(tmp_path):
    """The change is over all rows, new and old, and zero for members without one; the newest of a device counts."""
    server = Server(tmp_path, plan_of("afa_cs", {"reference_steps": 1}))
    a, b, c, d = (vector.astype(float) for vector in vectors(4))
    first = [Sent("a", a.astype(np.float32)), Sent("b", (b * 2).astype(np.float32), steps=2)]
    np.testing.assert_allclose(server.round(first, members=4), (a + b) / 4, rtol=1e-5, atol=1e-6)
    second = [Sent("b", c.astype(np.float32), sequence=0), Sent("b", d.astype(np.float32), sequence=1)]
    np.testing.assert_allclose(server.round(second, members=5), (a + d) / 5, rtol=1e-5, atol=1e-6)
    assert set(server.table) == {"a", "b"}


def test_a_row_that_leaves_a_table_takes_everything_with_it(tmp_path):
    """The sum of the rows stays exact over many changes, and over one large row."""
    server = Server(tmp_path, plan_of("afa_cs", {"reference_steps": 1}))
    rng = np.random.default_rng(3)
    for number in range(30):
        scale = 1e8 if number == 10 else 10.0 ** rng.integers(-6, 6)
        sent = [
            Sent(f"d{n}", (scale * rng.normal(size=LAYOUT.size)).astype(np.float32)) for n in rng.permutation(5)[:3]
        ]
        server.round(sent, members=5)
    server.round([Sent(f"d{n}", np.full(LAYOUT.size, 0.1, np.float32)) for n in range(5)], members=5)
    state = server.state()
    np.testing.assert_allclose(state["method.sum"] + state["method.rest"], 5 * float(np.float32(0.1)), rtol=1e-12)


def test_fedamd_sends_the_mean_of_the_anchors_with_the_model(tmp_path):
    """Anchors do not move the model, miners do; the newest gradient of a device replaces the one before."""
    server = Server(tmp_path, plan_of("fedamd", downlink=Downlink(codec="zstd")))
    anchors = vectors(3, 5)
    assert not (beside(server)["anchor"]).any()
    sent = [Sent("a", anchors[0], role="anchor"), Sent("b", anchors[1], role="anchor"), Sent("c", anchors[2])]
    np.testing.assert_allclose(server.round(sent), anchors[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(beside(server)["anchor"], (anchors[0] + anchors[1]) / 2, rtol=1e-5)
    assert not server.round([Sent("a", anchors[2], role="anchor")]).any()
    np.testing.assert_allclose(beside(server)["anchor"], (anchors[2] + anchors[1]) / 2, rtol=1e-5)
    assert beside(server)["model"].tobytes() == server.model().tobytes()


def beside(server):
    data = server.blobs.path(server.made.down.sha256).read_bytes()
    return {name: part.vector() for name, part in decode(data, dict.fromkeys(("model", "anchor"), LAYOUT)).items()}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"downlink": Downlink(codec="topk")},
            'only a lossless downlink carries more than the model, set codec = "zstd"',
        ),
        ({"client": "fedavg"}, "sends model, anchor, method 'fedavg' takes model; choose two that belong together"),
        ({"method": "fedavg", "client": "fedamd"}, "sends model, method 'fedamd' takes model, anchor"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_at_once(tmp_path, changes, reason):
    """Before any device is asked."""
    with pytest.raises(ConfigError, match=reason):
        Server(tmp_path, plan_of(**{"method": "fedamd", **changes}))


def test_updates_of_unknown_roles_are_refused(tmp_path):
    """FedAvg knows trainers only."""
    server = Server(tmp_path, plan_of())
    with pytest.raises(CodecError, match="server method 'fedavg' takes no update of role 'anchor'"):
        server.round([Sent("a", vectors(1)[0], role="anchor")])
    method = METHODS.create("fedamd", {})
    assert decoding.channels_of(method, "anchor") == ("anchor",)


def test_a_lost_table_row_is_named(tmp_path):
    """The run cannot go on as if the device had never sent anything."""
    server = Server(tmp_path, plan_of("afa_cs"))
    server.round(sent_by(vectors(2)), members=2)
    server.blobs.delete(server.table["d001"].sha256)
    with pytest.raises(ModelError, match="row of device 'd001' in the server method's table"):
        server.round(sent_by(vectors(2, 1)), members=2)
