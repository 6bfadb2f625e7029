"""Which layer to measure next."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")

from energy.thor.active import choose  # noqa: E402
from energy.thor.process import Process, prior, prior_parameters  # noqa: E402
from tests.energy.synthetic_layers import cost, draw, parameters  # noqa: E402

RANDOM = np.random.default_rng(0)
CANDIDATES, REFERENCES = draw(RANDOM, 40), draw(RANDOM, 12)


def test_first_points_are_spread_over_the_references() -> None:
    """Before anything was measured, the chosen points leave less uncertainty than the first ones of the list."""
    start = prior("conv2d", REFERENCES)
    chosen = choose(start, CANDIDATES, REFERENCES, 6)
    assert len(set(chosen)) == 6
    assert _uncertainty([CANDIDATES[place] for place in chosen]) < _uncertainty(CANDIDATES[:6])


def _uncertainty(rows: list[dict[str, int]]) -> float:
    believed = prior_parameters("conv2d", REFERENCES) | {"doubt": [1.0] * len(rows)}
    process = Process("conv2d", rows, [cost(row) for row in rows], [0.01] * len(rows), parameters=believed)
    return float(np.mean(process.predict(REFERENCES).deviation))


def test_what_was_measured_is_not_chosen_again() -> None:
    """A candidate equal to a measured point tells nothing new."""
    rows = CANDIDATES[:5]
    process = Process("conv2d", rows, [cost(row) for row in rows], [0.001] * 5, parameters=parameters(5))
    distant = {**CANDIDATES[6], "batch": 4000}
    assert choose(process, [*rows, distant], [distant], 1) == [5]


def test_fewer_candidates_than_asked_for() -> None:
    """All that there are, each once; nothing without references."""
    start = prior("conv2d", CANDIDATES)
    assert sorted(choose(start, CANDIDATES[:3], REFERENCES, 10)) == [0, 1, 2]
    assert choose(start, CANDIDATES, [], 3) == []
    assert choose(start, [], REFERENCES, 3) == []
