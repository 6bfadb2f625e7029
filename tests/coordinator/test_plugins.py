"""What every registered selector keeps, and how plug-ins are found, installed ones included."""

from __future__ import annotations

from random import Random

import pytest

from coordinator.aggregation import METHODS, OPTIMIZERS, create_method
from coordinator.errors import PluginError
from coordinator.plugins import Registry
from coordinator.scheduling import SELECTORS, Outcome, RoundRequest
from tests.coordinator import helpers as h


def request(names, *, seed=1, count=3):
    return RoundRequest(
        run="run", round_=0, attempt=0, count=count, candidates=sorted(names), plan=h.plan(), random=Random(seed)
    )


@pytest.mark.parametrize("name", SELECTORS.names())
def test_selectors_choose_among_the_candidates(name):
    """No stranger, no device twice, no more than asked for."""
    names = [f"d{number}" for number in range(10)]
    fleet = h.fleet(*names)
    for count in (1, 3, 10):
        chosen = [
            choice.device
            for choice in SELECTORS.create(name, {}).select(0.0, fleet, request(names, count=count)).choices
        ]
        assert len(set(chosen)) == len(chosen) <= count
        assert set(chosen) <= set(names)


@pytest.mark.parametrize("name", SELECTORS.names())
def test_selectors_are_deterministic(name):
    """The same seed, fleet and outcomes give the same choices."""
    names = [f"d{number}" for number in range(10)]
    state = h.start(h.plan())
    results = []
    for _ in range(2):
        selector, fleet = SELECTORS.create(name, {}), h.fleet(*names)
        for choice in selector.select(0.0, fleet, request(names)).choices:
            row = h.e.AssignmentRow(
                run="run",
                assignment="r0-0",
                device=choice.device,
                round=0,
                version=0,
                model=state.run.model,
                deadline_unix_s=1.0,
                assigned_unix_s=0.0,
            )
            selector.observe(choice.device, Outcome(assignment=row, meta=h.meta(row), elapsed_s=2.0), {})
        results.append([choice.device for choice in selector.select(5.0, fleet, request(names, seed=2)).choices])
    assert results[0] == results[1]


def test_unknown_names_and_options_are_named():
    """The error lists what there is."""
    with pytest.raises(PluginError, match=r"no selector is called 'x'; there are: .*random"):
        SELECTORS.create("x", {})
    with pytest.raises(PluginError, match=r"options \{'rate': 1.0\}: unknown rate; it takes weight_cap$"):
        METHODS.create("fedavg", {"rate": 1.0})
    with pytest.raises(PluginError, match="lr is -1, it must be at least"):
        OPTIMIZERS.create("sgd", {"lr": -1.0})


def test_errors_name_only_options_that_the_user_wrote():
    """What a plan says in [participation] is handed over unseen, and is not to be said twice."""
    with pytest.raises(PluginError, match=r"options \{'fraction': 0.2\}: unknown fraction; it takes no options$"):
        create_method(h.plan(server_method="median", server_options={"fraction": 0.2}))
    with pytest.raises(PluginError, match=r"set staleness_exponent in \[participation\] instead"):
        create_method(h.plan(server_options={"staleness_exponent": 3.0}))


def test_installed_plugins_are_found_by_entry_point(monkeypatch):
    """A package's entry point is a plug-in like the built-in ones, but cannot take their names."""

    class Point:
        name, value = "mine", "pkg:make"

        def load(self):
            return lambda _options: "made"

    monkeypatch.setattr("coordinator.plugins.entry_points", lambda **_: [Point()])
    registry = Registry("thing", "group", {"built": lambda _options: "built in"})
    assert registry.names() == ["built", "mine"]
    assert registry.create("mine", {}) == "made"
    assert registry.create("built", {}) == "built in"
