"""What a device claims of itself, samples and steps, buys it a bounded part of the model."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation import METHODS, making
from coordinator.aggregation.capping import most
from coordinator.errors import PluginError
from tests.coordinator.aggregation.rounds import LAYOUT, Sent, Server, plan_of, sent_by, vectors

LIE = 10**9  # samples; more are refused as implausible


def weighted(vectors, weights):
    return sum(w * v.astype(float) for w, v in zip(weights, vectors, strict=True)) / sum(weights)


@pytest.mark.parametrize("name", ["fedavg", "refl"])
def test_a_liar_about_samples_weighs_ten_times_the_median(tmp_path, name):
    """Among seven devices one that claims a thousand million samples counts as ten; the option sets how many."""
    updates, samples = vectors(7), [20, 30, 40, 50, 60, 70, LIE]
    sent = [entry._replace(samples=count) for entry, count in zip(sent_by(updates), samples, strict=True)]
    for options, bound in (({}, 500), ({"weight_cap": 2}, 100), ({"weight_cap": 0}, LIE)):
        change = Server(tmp_path / str(bound), plan_of(name, options)).round(sent)
        expected = weighted(updates, [min(count, bound) for count in samples])
        np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-6)


def test_a_late_liar_weighs_no_more_in_refl(tmp_path):
    """The bound holds for what comes out of the formula, and the liar's own share in the fresh mean is bounded too."""
    server = Server(tmp_path, plan_of("refl"))
    for number in range(3):
        server.round(sent_by(vectors(2, number)))
    honest, lie = vectors(7, 5), np.full(LAYOUT.size, 100, np.float32)
    late = [*sent_by(honest, samples=10), Sent("z", lie, samples=LIE, staleness=3)]
    expected = weighted([*honest, lie], [10] * 7 + [100])
    np.testing.assert_allclose(server.round(late), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["fedavg", "refl"])
def test_skewed_but_honest_samples_count_as_they_are(tmp_path, name):
    """Below ten times the median the bits are those without a bound."""
    sent = [entry._replace(samples=1 + 9 * n, staleness=0) for n, entry in enumerate(sent_by(vectors(9)))]
    bound, free = (
        Server(tmp_path / str(cap), plan_of(name, {"weight_cap": cap}) if cap == 0 else plan_of(name))
        for cap in (10, 0)
    )
    bound.round(sent)
    free.round(sent)
    assert bound.model().tobytes() == free.model().tobytes()


def test_of_two_claims_the_smaller_decides():
    """The lower median, so that half of a round cannot raise it; one device alone is the round."""
    assert most([3], 10) == 30
    assert most([LIE, 3], 10) == 30
    assert most([LIE, 5, LIE, 3], 10) == 50
    assert most([LIE, 3], 0) == float("inf")


def test_versions_with_liars_can_be_built_again(tmp_path):
    """The bound follows from the kept updates alone."""
    for name in ("fedavg", "refl", "afa_cd", "afa_cs"):
        server = Server(tmp_path / name, plan_of(name))
        for number in range(3):
            sent = sent_by(vectors(5, number), samples=10, steps=20)
            server.round([*sent, Sent("z", vectors(1)[0], samples=LIE, staleness=number)], members=6)
        found = making.recompute(server.blobs, server.plan, server.run, server.rounds, LAYOUT)
        assert [made.same for made in found] == [True] * 3


@pytest.mark.parametrize("name", ["afa_cd", "afa_cs"])
def test_few_claimed_steps_multiply_an_update_by_ten_at_most(tmp_path, name):
    """A liar that took a hundred steps and says one does not count a hundredfold; the option sets how much."""
    updates = vectors(5)
    for steps, cap in (((100, 100, 100, 100, 1), 10), ((100, 100, 100, 100, 1), 4), ((100, 90, 110, 100, 20), 10)):
        reference = sum(steps) / 5
        sent = [entry._replace(steps=count) for entry, count in zip(sent_by(updates), steps, strict=True)]
        server = Server(tmp_path / f"{steps[-1]}-{cap}", plan_of(name, {"weight_cap": cap}))
        factors = [min(cap, reference / count) for count in steps]
        expected = sum(f * v.astype(float) for f, v in zip(factors, updates, strict=True)) / 5
        np.testing.assert_allclose(server.round(sent, members=5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["afa_cd", "afa_cs"])
def test_many_claimed_steps_do_not_lengthen_the_step(tmp_path, name):
    """The mean that changes are scaled by counts a claim of ten thousand million steps as ten times the median."""
    updates = vectors(5)
    sent = [entry._replace(steps=10) for entry in sent_by(updates)]
    sent[4] = sent[4]._replace(steps=10**10)
    change = Server(tmp_path, plan_of(name)).round(sent, members=5)
    assert np.linalg.norm(change) <= 28 / 10 * max(np.linalg.norm(vector) for vector in updates)


@pytest.mark.parametrize("name", ["fedbuff", "fedamd", "median", "krum", "norm_clipping"])
def test_methods_whose_claims_buy_nothing_have_no_bound(name):
    """The option is refused where it would do nothing."""
    with pytest.raises(PluginError, match="unknown weight_cap"):
        METHODS.create(name, {"weight_cap": 3})
