"""Methods that stand liars: no farther than honest devices differ, whatever the liars hold."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from coordinator.aggregation import METHODS
from coordinator.aggregation.bulyan import _choose
from coordinator.aggregation.robust import krum_scores
from coordinator.errors import PluginError
from edge_runtime.errors import CodecError, ConfigError
from edge_runtime.messages import UpdateMeta
from tests.coordinator.aggregation.rounds import Sent, Server, plan_of, sent_by, vectors

COUNT, LIARS = 15, 3
ROBUST = {
    "median": {},
    "trimmed_mean": {"fraction": LIARS / COUNT},
    "krum": {"byzantine": LIARS},
    "bulyan": {"byzantine": LIARS},
    "nna": {"byzantine": LIARS},
}
MULTI = {**ROBUST, "multi_krum": {"byzantine": LIARS, "keep": 0}}
ATTACKS = {
    "sign_flip": lambda honest, number: -10 * honest[number],
    "scaling": lambda honest, number: 1e3 * honest[number],
    "constant": lambda honest, _number: np.full_like(honest[0], 100.0),
    "enormous": lambda honest, number: np.full_like(honest[0], 3e38 * (-1) ** number),
    "zeros": lambda honest, _number: np.zeros_like(honest[0]),
    "hidden": lambda honest, number: np.where(np.arange(len(honest[0])) == 3, 50.0, honest[number + 3]),
    "alike": lambda honest, _number: np.mean(honest, axis=0) + 0.5,
}


def method_of(name):
    return "krum" if name == "multi_krum" else name


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", MULTI)
def test_liars_move_the_result_no_farther_than_honest_devices_differ(tmp_path, name, attack):
    """Three of fifteen, on whatever side of the update ids they stand."""
    honest = vectors(COUNT - LIARS)
    lies = [np.asarray(ATTACKS[attack](honest, number), np.float32) for number in range(LIARS)]
    centre = np.mean(np.asarray(honest, np.float64), axis=0)
    spread = max(float(np.linalg.norm(vector - centre)) for vector in honest)
    for place in ("a", "z"):
        server = Server(tmp_path / place, plan_of(method_of(name), MULTI[name]))
        sent = [*sent_by(honest), *(Sent(f"{place}{n}", lie, samples=10**9) for n, lie in enumerate(lies))]
        change = server.round(sent)
        assert np.linalg.norm(change - centre) <= spread


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "bulyan"])
def test_every_number_lies_among_those_of_honest_devices(tmp_path, name):
    """Coordinate by coordinate, even where a liar is like the others in all but one."""
    honest = vectors(COUNT - LIARS)
    lies = [np.asarray(ATTACKS["hidden"](honest, n), np.float32) for n in range(LIARS)]
    change = Server(tmp_path, plan_of(name, ROBUST[name])).round(sent_by([*honest, *lies]))
    assert (change >= np.min(honest, axis=0) - 1e-5).all()
    assert (change <= np.max(honest, axis=0) + 1e-5).all()


def test_norm_clipping_bounds_what_a_liar_adds(tmp_path):
    """The step is no longer than the honest ones are, and with one liar the direction stays."""
    honest = vectors(14)
    server = Server(tmp_path / "median", plan_of("norm_clipping"))
    change = server.round(sent_by([*honest, -1e6 * honest[0]]))
    assert np.linalg.norm(change) <= max(np.linalg.norm(vector) for vector in honest)
    centre = np.mean(honest, axis=0)
    assert np.dot(change, centre) > 0.7 * np.dot(centre, centre)
    fixed = Server(tmp_path / "fixed", plan_of("norm_clipping", {"max_norm": 0.5}))
    assert np.linalg.norm(fixed.round(sent_by(honest))) <= 0.5 + 1e-6
    assert not Server(tmp_path / "zero", plan_of("norm_clipping")).round(sent_by([0 * honest[0]] * 3)).any()


def test_norm_clipping_holds_where_most_send_zeros(tmp_path):
    """A median norm of 0 lets nothing through, not everything; a fixed length is what the plan says it is."""
    zeros, lie = [np.zeros(vectors(1)[0].shape, np.float32)] * 3, np.full_like(vectors(1)[0], 1e6)
    sent = sent_by([*zeros, lie])
    assert not Server(tmp_path / "median", plan_of("norm_clipping")).round(sent).any()
    fixed = Server(tmp_path / "fixed", plan_of("norm_clipping", {"max_norm": 2.0})).round(sent)
    assert np.linalg.norm(fixed) == pytest.approx(0.5, rel=1e-4)
    free = Server(tmp_path / "free", plan_of("norm_clipping", {"multiple": 0})).round(sent)
    assert np.linalg.norm(free) > 1e6


def test_bulyan_chooses_as_krum_does_again_and_again(tmp_path, monkeypatch):
    """The same updates as by scoring anew for each choice, in a number of sorts that does not grow with them."""
    rows = np.random.default_rng(2).normal(size=(31, 40)) * np.linspace(1, 4, 31)[:, None]
    squares = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    left = list(range(31))
    expected = [left.pop(int(krum_scores(squares[left][:, left], 7).argmin())) for _ in range(31 - 2 * 7)]
    assert _choose(squares, 7) == sorted(expected)
    sorts, sort, argsort = [], np.sort, np.argsort
    monkeypatch.setattr(np, "sort", lambda *how, **options: sorts.append(1) or sort(*how, **options))
    monkeypatch.setattr(np, "argsort", lambda *how, **options: sorts.append(1) or argsort(*how, **options))
    Server(tmp_path, plan_of("bulyan")).round(sent_by(vectors(40)))
    assert len(sorts) < 5


def test_median_and_trimmed_mean_follow_their_formulas(tmp_path):
    """Against NumPy, for even and odd counts."""
    for count in (4, 5, 10):
        updates = vectors(count)
        change = Server(tmp_path / f"m{count}", plan_of("median")).round(sent_by(updates))
        np.testing.assert_allclose(change, np.median(np.asarray(updates, float), axis=0), rtol=1e-5, atol=1e-5)
        change = Server(tmp_path / f"t{count}", plan_of("trimmed_mean", {"fraction": 0.2})).round(sent_by(updates))
        ends = count // 5
        expected = np.sort(np.asarray(updates, float), axis=0)[ends : count - ends].mean(axis=0)
        np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-5)


def test_krum_takes_one_of_the_updates_and_multi_krum_the_mean_of_several(tmp_path):
    """Against a direct computation of the scores."""
    updates = np.asarray(vectors(9), np.float64)
    squares = ((updates[:, None] - updates[None]) ** 2).sum(axis=2)
    scores = np.sort(squares, axis=1)[:, 1 : 9 - 2 - 2 + 1].sum(axis=1)
    one = Server(tmp_path / "one", plan_of("krum", {"byzantine": 2}))
    np.testing.assert_allclose(
        one.round(sent_by(list(updates.astype(np.float32)))), updates[scores.argmin()], atol=1e-5
    )
    some = Server(tmp_path / "some", plan_of("krum", {"byzantine": 2, "keep": 4}))
    expected = updates[np.argsort(scores)[:4]].mean(axis=0)
    np.testing.assert_allclose(some.round(sent_by(list(updates.astype(np.float32)))), expected, atol=1e-5)


def test_samples_buy_no_weight():
    """A device may claim a billion samples, or that its update is fresh."""
    for name in (*ROBUST, "norm_clipping"):
        method = METHODS.create(name, {})
        metas = [UpdateMeta(round=0, model_version=0, samples=samples, steps=1) for samples in (1, 10**9)]
        assert {method.weight(meta, staleness) for meta in metas for staleness in (0, 5)} == {1.0}


@pytest.mark.parametrize("name", ["krum", "bulyan", "nna"])
def test_small_rounds_stand_fewer_liars_and_say_so(tmp_path, caplog, name):
    """The largest number that the round allows is taken, and the log names it."""
    server = Server(tmp_path, plan_of(name, {"byzantine": 2}))
    with caplog.at_level(logging.WARNING, "edge.coordinator"):
        server.round(sent_by(vectors(12)))
        assert not caplog.records
        server.round(sent_by(vectors(4)))
    least = {"krum": 7, "bulyan": 11, "nna": 5}[name]
    assert f"{name}: 4 updates stand" in caplog.text
    assert f"it takes {least} updates for them" in caplog.text


def test_plans_whose_rounds_are_too_small_are_refused(tmp_path):
    """At submission, with what to change."""
    Server(tmp_path / "fits", plan_of("krum", {"byzantine": 2}, target=7))
    with pytest.raises(ConfigError, match=r"needs at least 7 updates a round .* participation.target is 6; raise it"):
        Server(tmp_path / "small", plan_of("krum", {"byzantine": 2}, target=6))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("krum", {"byzantine": 1.5}, "byzantine is 1.5; give a whole number"),
        ("krum", {"byzantine": -1}, "byzantine is -1, it must be at least 0"),
        ("trimmed_mean", {"fraction": 0.5}, "fraction is 0.5, it must be 0 to 0.4999"),
        ("median", {"fraction": 0.1}, "unknown fraction"),
        ("norm_clipping", {"max_norm": float("inf")}, "max_norm is inf; give a finite number"),
    ],
)
def test_options_are_checked(name, options, reason):
    """When the plan is read."""
    with pytest.raises(PluginError, match=reason):
        METHODS.create(name, options)


def test_what_is_not_finite_does_not_come_so_far(tmp_path):
    """NaN is refused where the update is decoded, by name."""
    server = Server(tmp_path, plan_of("median"))
    rows = server.rows(sent_by(vectors(3)))
    path = server.blobs.path(rows[0].blob.sha256)
    data = bytearray(path.read_bytes())
    data[-8:-4] = np.float32(np.nan).tobytes()
    rows[0].blob = type(rows[0].blob)(sha256=server.blobs.put(bytes(data)).sha256, size_bytes=len(data))
    with pytest.raises(CodecError, match="update run/d000/"):
        server.aggregate(rows)
