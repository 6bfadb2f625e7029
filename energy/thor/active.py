"""Which layer to measure next, so that the layers of the user's own models become known soonest.

Integrated variance reduction (Cohn 1996, Neural Network Exploration Using Optimal Experiment Design): measuring a
candidate takes cov(reference, candidate)^2 / (var(candidate) + noise) off the variance of each reference layer. What
counts here is the error, so the candidate with the largest fall of the references' standard deviations is the best;
deviations well below a tenth hardly count. The variance of a Gaussian process does not depend on what will be measured,
so several points are chosen one after the other without measuring between them. Before anything was measured, the same
rule works on the prior, and spreads points over the references.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.thor.layers import Sizes
    from energy.thor.process import Process


TOLERANCE = 0.1  # relative error that a user does not mind


def choose(
    process: Process,
    candidates: Sequence[Sizes],
    references: Sequence[Sizes],
    count: int,
) -> list[int]:
    """Positions of up to ``count`` candidates, the best first; fewer only if there are fewer.

    Args:
        process: what is known by now; :func:`energy.thor.process.prior` at the start.
        candidates: layers that could be measured.
        references: layers that shall be predicted well; only their sizes matter.
        count: how many to choose at a time.
    """
    if not references or count <= 0:
        return []
    split = len(candidates)
    mean, covariance = process.posterior([*candidates, *references])
    noise = process.noise_variance(mean[:split]) + 1e-9
    chosen: list[int] = []
    for _ in range(min(count, split)):
        own = np.maximum(np.diag(covariance), 0.0)
        variance, open_variance = own[:split] + noise, own[split:] + TOLERANCE**2
        fall = covariance[:split, split:] ** 2 / variance[:, None]
        after = np.sqrt(np.maximum(open_variance - fall, 0.0))
        gain = (np.sqrt(open_variance) - after).sum(axis=1)
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        chosen.append(best)
        column = covariance[:, best].copy()
        covariance -= np.outer(column, column) / variance[best]
    return chosen
