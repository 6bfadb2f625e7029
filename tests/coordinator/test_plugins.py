"""What every registered selector and server method keeps, installed ones included."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from coordinator.aggregation import METHODS
from coordinator.aggregation.making import aggregate
from coordinator.errors import PluginError
from coordinator.events import UpdateRow
from coordinator.plugins import Registry
from coordinator.scheduling import SELECTORS, Outcome, RoundRequest
from edge_runtime.compression import Layout
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.pipeline import CodecSpec, encode
from edge_runtime.messages import UpdateId, UpdateMeta
from tests.coordinator import helpers as h

LAYOUT = Layout(("w",), ((7,),))


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
            choice.device for choice in SELECTORS.create(name, {}).select(0.0, fleet, request(names, count=count))
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
        for choice in selector.select(0.0, fleet, request(names)):
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
            selector.observe(choice.device, Outcome(assignment=row, meta=h.meta(row), elapsed_s=2.0))
        results.append([choice.device for choice in selector.select(5.0, fleet, request(names, seed=2))])
    assert results[0] == results[1]


def make_updates(method, count=5):
    """Rows with weights, and encoded updates of very different magnitudes."""
    rng = np.random.default_rng(3)
    made = []
    for number in range(count):
        meta = UpdateMeta(round=0, model_version=0, samples=number + 1, steps=1)
        vector = (rng.normal(size=LAYOUT.size) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
        update = UpdateId("run", f"d{number}", f"r0-{number}", 0)
        vectors, layouts = dict.fromkeys(method.channels, vector), dict.fromkeys(method.channels, LAYOUT)
        data = encode(CodecSpec("raw"), vectors, layouts, tag=update_tag(update)).data
        row = UpdateRow(
            update=update,
            blob=h.blob(number),
            meta=meta,
            received_unix_s=0.0,
            weight=method.weight(meta, number % 3),
        )
        made.append((row, data))
    return made


@pytest.mark.parametrize("name", METHODS.names())
def test_methods_give_the_same_bits_for_any_order_of_arrival(name):
    """Updates are summed in update id order, so two runs over the stored updates agree bit for bit."""
    base = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
    results = set()
    for seed in range(4):
        method = METHODS.create(name, {})
        arrived = make_updates(method)
        Random(seed).shuffle(arrived)
        arrived.sort(key=lambda pair: pair[0].update)
        state = None
        vector = base
        for _ in range(3):
            vector, state = aggregate(vector, arrived, method, LAYOUT, state)
        results.add(vector.tobytes())
        assert vector.dtype == np.float32
        assert vector.shape == (LAYOUT.size,)
    assert len(results) == 1
    assert base.tobytes() == np.linspace(-1, 1, LAYOUT.size, dtype=np.float32).tobytes()


@pytest.mark.parametrize("name", METHODS.names())
def test_methods_weigh_by_samples_and_staleness(name):
    """Weights are positive, and never grow with staleness."""
    method = METHODS.create(name, {})
    meta = UpdateMeta(round=0, model_version=0, samples=10, steps=1)
    weights = [method.weight(meta, staleness) for staleness in range(6)]
    assert all(weight > 0 for weight in weights)
    assert weights == sorted(weights, reverse=True)
    assert method.accept(meta, 0) == ""


@pytest.mark.parametrize(("name", "neutral"), [("fedavgm", {"momentum": 0.0})])
def test_methods_at_neutral_options_are_fedavg_bit_for_bit(name, neutral):
    """A method's extra must vanish where its hyper-parameter says so."""
    base = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
    plain, method = METHODS.create("fedavg", {}), METHODS.create(name, neutral)
    expected, _ = aggregate(base, make_updates(plain, 1), plain, LAYOUT)
    vector, _ = aggregate(base, make_updates(method, 1), method, LAYOUT)
    assert vector.tobytes() == expected.tobytes()


def test_momentum_adds_up():
    """Two rounds of the same update: the second step is (1 + momentum) times the first."""
    base = np.zeros(LAYOUT.size, np.float32)
    method = METHODS.create("fedavgm", {"momentum": 0.5})
    updates = make_updates(method, 1)
    first, state = aggregate(base, updates, method, LAYOUT)
    second, _ = aggregate(first, updates, method, LAYOUT, state)
    np.testing.assert_allclose(second - first, 1.5 * first, rtol=1e-5)


def test_unknown_names_and_options_are_named():
    """The error lists what there is."""
    with pytest.raises(PluginError, match=r"no selector is called 'x'; there are: .*random"):
        SELECTORS.create("x", {})
    with pytest.raises(PluginError, match="unknown rate; it takes lr"):
        METHODS.create("fedavg", {"rate": 1.0})
    with pytest.raises(PluginError, match="lr is -1"):
        METHODS.create("fedavg", {"lr": -1.0})


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
