"""Finds the parameters of :mod:`energy.process` from measured points. Needs SciPy: the extra ``profile``.

Maximum a posteriori: log marginal likelihood with its gradient (Rasmussen and Williams 2006, 5.4.1) plus log-normal
priors, so that a score of points does not pretend to know a length per feature. The block of channels is the one with
the highest posterior. The spread of intervals comes from leaving points out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from energy.errors import ProfileError, UsageError
from energy.features import BLOCKS, Floats, features
from energy.process import JITTER, LEVEL, PRIOR, Process, prior_length, telling_columns
from energy.profile import Fitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.layers import Sizes
    from energy.profile import Family, Profile, Quantity

MINIMUM_POINTS = 4
RESTARTS = 1
_ITERATIONS = 80
_PRIOR_DEVIATION = 1.0  # of a parameter's logarithm around its prior
_FARTHEST = 6.0  # from its prior, in logarithms
_SQRT5 = 5.0**0.5
_Z90 = 1.6449


def fit_profile(profile: Profile, seed: int = 0) -> Profile:
    """Fits every kind and quantity that was measured; the rest of the profile stays.

    Raises:
        ProfileError: a kind has too few points.
        UsageError: SciPy is not installed.
    """
    return msgspec.structs.replace(profile, families=[fit_family(family, seed) for family in profile.families])


def fit_family(family: Family, seed: int = 0) -> Family:
    """Fits one kind, for every quantity that all of its points have.

    Raises:
        ProfileError: too few points, or a cost that is not positive.
        UsageError: SciPy is not installed.
    """
    if not family.points:
        raise ProfileError(f"{family.kind}: no points; profile this kind of layer first")
    common = set.intersection(*(set(point.costs) for point in family.points))
    fitted: dict[Quantity, Fitted] = {}
    for quantity in sorted(common):
        costs = [point.costs[quantity] for point in family.points]
        fitted[quantity] = fit(
            family.kind,
            [point.sizes for point in family.points],
            [cost.mean for cost in costs],
            [cost.relative_error for cost in costs],
            seed=seed,
        )
    return msgspec.structs.replace(family, fitted=fitted)


def fit(
    kind: str,
    sizes: Sequence[Sizes],
    costs: Sequence[float],
    relative_errors: Sequence[float],
    *,
    seed: int = 0,
    start: Fitted | None = None,
) -> Fitted:
    """Fits one Gaussian process. ``start``: an earlier fit of fewer points, to begin from and keep its block.

    Raises:
        ProfileError: too few points, or a cost that is not positive.
        UsageError: SciPy is not installed.
    """
    if len(sizes) < MINIMUM_POINTS:
        raise ProfileError(f"{kind}: {len(sizes)} points, a model needs {MINIMUM_POINTS}; profile more of its sizes")
    if not all(cost > 0 for cost in costs):
        raise ProfileError(f"{kind}: a point costs nothing or less; measure it again or take it out")
    target = np.log(np.asarray(costs, dtype=np.float64))
    offset = float(np.median(target))
    own = np.asarray(relative_errors, dtype=np.float64) ** 2
    best: tuple[float, dict[str, list[float]]] | None = None
    seen: list[Floats] = []
    for block in BLOCKS if start is None else (int(start.parameters["block"][0]),):
        table = features(kind, sizes, block)
        if any(np.array_equal(table, other) for other in seen):
            continue  # the same model again: no channels to pad
        seen.append(table)
        columns = telling_columns(table)
        center, scale = table[:, columns].mean(axis=0), table[:, columns].std(axis=0)
        problem = _Problem((table[:, columns] - center) / scale, target - offset, own)
        loss, parameters = problem.solve(seed, None)
        if best is None or loss < best[0]:
            named = {"block": [float(block)], "columns": [float(column) for column in columns]}
            named |= {"center": center.tolist(), "scale": scale.tolist(), **parameters, "offset": [offset]}
            best = (loss, named)
    assert best is not None
    return Fitted(parameters=best[1], spread=_spread(Process(kind, sizes, costs, relative_errors, parameters=best[1])))


def _spread(process: Process) -> float:
    """What the deviations must be multiplied with so that 90 % intervals would have held the points left out."""
    residuals = np.sort(np.abs(process.left_out()))
    count = len(residuals)
    rank = min(count, int(np.ceil(0.9 * (count + 1))))
    return float(max(1.0, residuals[rank - 1] / _Z90))


class _Problem:
    """Negative log posterior of the parameters' logarithms, and its gradient, over the pairs of points."""

    def __init__(self, inputs: Floats, target: Floats, own: Floats) -> None:
        count, columns = inputs.shape
        self._target, self._own, self._columns = target, own, columns
        self._pairs = np.triu_indices(count)
        left, right = inputs[self._pairs[0]], inputs[self._pairs[1]]
        self._distances = np.ascontiguousarray(((left - right) ** 2).T)
        self._products = np.sum(left * right, axis=1)
        self._times = np.where(self._pairs[0] == self._pairs[1], 1.0, 2.0)
        medians = [prior_length(columns)] * columns + [PRIOR[name] for name in ("signal", "trend", "noise")]
        self._mean, self._deviation = np.log(medians), np.full(len(medians), _PRIOR_DEVIATION)

    def solve(self, seed: int, start: Floats | None) -> tuple[float, dict[str, list[float]]]:
        """The loss, and parameters by name."""
        try:
            from scipy.optimize import minimize
        except ModuleNotFoundError as error:
            raise UsageError(
                "fitting needs SciPy, which is not installed: pip install 'edge-training-runtime[profile]', or run "
                "edge-energy fit on a workstation"
            ) from error
        random = np.random.default_rng(seed)
        starts = [self._mean if start is None else start]
        starts += [
            self._mean + 0.7 * self._deviation * random.standard_normal(len(self._mean)) for _ in range(RESTARTS)
        ]
        bounds = [(mean - _FARTHEST, mean + _FARTHEST) for mean in self._mean]
        results = [
            minimize(self.loss, x, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _ITERATIONS})
            for x in starts
        ]
        best = min(results, key=lambda result: float(result.fun))
        values = np.exp(best.x)
        names = {"length": values[: self._columns].tolist()}
        names |= {name: [float(values[self._columns + i])] for i, name in enumerate(("signal", "trend", "noise"))}
        return float(best.fun), names

    def loss(self, logs: Floats) -> tuple[float, Floats]:
        """Loss and gradient at the logarithms of lengths, signal, trend and noise."""
        from scipy.linalg import lapack

        squares = np.exp(2.0 * logs)
        inverse2 = 1.0 / squares[: self._columns]
        signal2, trend2, noise2 = squares[self._columns :]
        r = _SQRT5 * np.sqrt(inverse2 @ self._distances)
        decay = signal2 * np.exp(-r)
        bend = decay * (1.0 + r + r * r / 3.0)
        count = len(self._target)
        covariance = np.empty((count, count))
        covariance[self._pairs] = bend + trend2 * self._products + LEVEL**2
        covariance.T[self._pairs] = covariance[self._pairs]
        covariance[np.diag_indices(count)] += noise2 + self._own + JITTER
        factor, failed = lapack.dpotrf(covariance, lower=1)
        if failed:
            return 1e10, np.zeros_like(logs)
        lower, _ = lapack.dpotri(factor, lower=1)
        inverse = np.tril(lower) + np.tril(lower, -1).T
        weights = inverse @ self._target
        deviations = (logs - self._mean) / self._deviation
        loss = 0.5 * self._target @ weights + np.log(np.diag(factor)).sum() + 0.5 * deviations @ deviations
        slope = np.outer(weights, weights) - inverse
        pairs = slope[self._pairs] * self._times
        gradient = np.concatenate(
            [
                inverse2 * (self._distances @ (pairs * decay * (1.0 + r) * (5.0 / 3.0))),
                [2.0 * pairs @ bend, 2.0 * trend2 * (pairs @ self._products), 2.0 * noise2 * np.trace(slope)],
            ]
        )
        return float(loss), -0.5 * gradient + deviations / self._deviation
