"""Which layer to measure next, so that the layers of the user's own models become known soonest.

Integrated variance reduction (Cohn 1996, Neural Network Exploration Using Optimal Experiment Design, ALC): a candidate
is worth the mean of cov(reference, candidate)^2 / (var(candidate) + noise) over the reference layers, that is, how much
their variance falls when it is measured. The variance of a Gaussian process does not depend on what will be measured,
so several points are chosen one after the other without measuring between them. Before anything was measured, the
same rule works on the prior.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.layers import Sizes
    from energy.process import Process


def choose(
    process: Process,
    candidates: Sequence[Sizes],
    references: Sequence[Sizes],
    count: int,
    *,
    weights: Sequence[float] | None = None,
    prices: Sequence[float] | None = None,
) -> list[int]:
    """Positions of up to ``count`` candidates, the best first; fewer only if there are fewer.

    Args:
        process: what is known by now; :func:`energy.process.prior` at the start.
        candidates: layers that could be measured.
        references: layers that shall be predicted well; only their sizes matter.
        count: how many to choose at a time.
        weights: importance of each reference, for example its share of a model's cost; alike where None.
        prices: what measuring each candidate costs, in any unit; alike where None.
    """
    if not references or count <= 0:
        return []
    split = len(candidates)
    mean, covariance = process.posterior([*candidates, *references])
    noise = process.noise_variance(mean[:split]) + 1e-9
    share = np.full(len(references), 1.0) if weights is None else np.asarray(weights, dtype=np.float64)
    price = np.ones(split) if prices is None else np.asarray(prices, dtype=np.float64)
    chosen: list[int] = []
    for _ in range(min(count, split)):
        variance = np.maximum(np.diag(covariance)[:split], 0.0) + noise
        gain = (covariance[:split, split:] ** 2 @ share) / share.sum() / variance / price
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        chosen.append(best)
        column = covariance[:, best].copy()
        covariance -= np.outer(column, column) / variance[best]
    return chosen
