"""Finds the parameters of :mod:`energy.thor.process` from measured points. Needs SciPy: the extra ``profile``.

Maximum a posteriori: log marginal likelihood with its gradient (Rasmussen and Williams 2006, 5.4.1) plus log-normal
priors, so that a score of points does not pretend to know a length per feature. The block of channels is the one with
the highest posterior. Outliers (a counter that slipped, a burst of other work) get a larger variance, as under a
Student-t noise of 4 degrees of freedom (West 1984, Outlier models and prior distributions in Bayesian linear
regression). How wide intervals must be is found by refitting without a fifth of the points in turn, since leaving
single points out with parameters that were fitted to them promises too much.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from energy.errors import ProfileError, UsageError
from energy.thor.features import BLOCKS, Floats, features
from energy.thor.process import JITTER, LEVEL, PRIOR, Process, prior_length, roofline_terms, standard_frame
from energy.thor.profile import MAX_SPREAD, Fitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.thor.layers import Sizes
    from energy.thor.profile import Family, Profile, Quantity

MINIMUM_POINTS = 4
FOLDS = 5
_TOO_FEW = "too few points to fit "
_BLOCK_POINTS = 120  # enough to tell which block it is
_PREFERRED_BLOCK, _PREFERENCE = 8, 1.0  # of blocks that explain few points alike, this one; in log probability
_ROOFLINE_POINTS = 60  # with more of them, the process knows better than a roofline
_ROBUST_PASSES = 2
_FREEDOM = 4.0
_ITERATIONS = 60
_PRIOR_DEVIATION = 1.0  # of a parameter's logarithm
_FARTHEST = 6.0  # from its prior, in logarithms
_Z90 = 1.6449


class _Data(NamedTuple):
    kind: str
    sizes: Sequence[Sizes]
    costs: Sequence[float]
    relative_errors: Sequence[float]

    def take(self, rows: Sequence[int]) -> _Data:
        errors = [self.relative_errors[row] for row in rows]
        return _Data(self.kind, [self.sizes[row] for row in rows], [self.costs[row] for row in rows], errors)


def fit_profile(profile: Profile, seed: int = 0) -> Profile:
    """Fits every kind and quantity that has points enough, and notes the kinds left out; the rest of the profile stays.

    Raises:
        ProfileError: nothing at all has points enough, or a cost is not positive.
        UsageError: SciPy is not installed.
    """
    fitted = {family.kind: fit_family(family, seed) for family in profile.families if _enough(family)}
    if not fitted:
        raise ProfileError(
            f"too few points to fit any kind, {MINIMUM_POINTS} of one kind are needed; measure more with "
            "edge-energy profile --resume and a larger --budget-s"
        )
    few = [family.kind for family in profile.families if profile.quantity not in _enough(family)]
    notes = [note for note in profile.notes if not note.startswith(_TOO_FEW)]
    notes += [f"{_TOO_FEW}{kind}: {MINIMUM_POINTS} are needed; estimates lack it" for kind in few]
    families = [fitted.get(family.kind, msgspec.structs.replace(family, fitted={})) for family in profile.families]
    return msgspec.structs.replace(profile, families=families, notes=notes)


def fit_family(family: Family, seed: int = 0) -> Family:
    """Fits one kind, for every quantity that it has points enough of.

    Raises:
        ProfileError: too few points of every quantity, or a cost that is not positive.
        UsageError: SciPy is not installed.
    """
    quantities = _enough(family)
    if not quantities:
        raise ProfileError(
            f"{family.kind}: {len(family.points)} points, a model needs {MINIMUM_POINTS}; profile more of its sizes"
        )
    fitted: dict[Quantity, Fitted] = {}
    for quantity in quantities:
        points = [point for point in family.points if quantity in point.costs]
        costs = [point.costs[quantity] for point in points]
        sizes = [point.sizes for point in points]
        means, errors = [cost.mean for cost in costs], [cost.relative_error for cost in costs]
        fitted[quantity] = fit(family.kind, sizes, means, errors, seed=seed)
    return msgspec.structs.replace(family, fitted=fitted)


def _enough(family: Family) -> list[Quantity]:
    """The quantities with points enough to fit."""
    counts = Counter(quantity for point in family.points for quantity in point.costs)
    return sorted(quantity for quantity, count in counts.items() if count >= MINIMUM_POINTS)


def fit(
    kind: str,
    sizes: Sequence[Sizes],
    costs: Sequence[float],
    relative_errors: Sequence[float],
    *,
    seed: int = 0,
    quick: bool = False,
) -> Fitted:
    """Fits one Gaussian process. ``quick``: without finding the spread, for choosing what to measure next.

    Raises:
        ProfileError: too few points, or a cost that is not positive.
        UsageError: SciPy is not installed.
    """
    if len(sizes) < MINIMUM_POINTS:
        raise ProfileError(f"{kind}: {len(sizes)} points, a model needs {MINIMUM_POINTS}; profile more of its sizes")
    if not all(cost > 0 for cost in costs):
        raise ProfileError(f"{kind}: a point costs nothing or less; measure it again or take it out")
    data = _Data(kind, sizes, costs, relative_errors)
    order = [int(row) for row in np.random.default_rng(seed).permutation(len(sizes))]
    block = _block(data.take(order[:_BLOCK_POINTS]))
    parameters = _fit_block(data, block)
    return Fitted(parameters=parameters, spread=1.0 if quick else _spread(data, block, order))


def left_out_error(family: Family, quantity: Quantity) -> float:
    """Median relative error of the family's points, each predicted from the others."""
    return float(np.median(np.abs(np.expm1(-Process.of(family, quantity).left_out().mean))))


def _block(data: _Data) -> int:
    """The block of channels with the highest posterior."""
    found: list[tuple[float, int]] = []
    seen: list[Floats] = []
    for block in BLOCKS:
        table = features(data.kind, data.sizes, block)
        if not any(np.array_equal(table, other) for other in seen):  # no channels to round up
            seen.append(table)
            problem = _Problem(data, table)
            loss, _ = problem.loss(problem.solve(problem.mean))
            found.append((loss - (_PREFERENCE if block == _PREFERRED_BLOCK else 0.0), block))
    return min(found)[1]


def _fit_block(data: _Data, block: int) -> dict[str, list[float]]:
    problem = _Problem(data, features(data.kind, data.sizes, block))
    logs = problem.solve(problem.mean)
    for _ in range(_ROBUST_PASSES):
        parameters = problem.parameters(logs, block)
        residual, deviation = _process(data, parameters).left_out()
        squares = (residual / deviation) ** 2
        problem.expect(residual, np.maximum(1.0, (_FREEDOM + squares) / (_FREEDOM + 1.0)))
        logs = problem.solve(logs)
    return problem.parameters(logs, block)


def _process(data: _Data, parameters: dict[str, list[float]], spread: float = 1.0) -> Process:
    return Process(data.kind, data.sizes, data.costs, data.relative_errors, parameters=parameters, spread=spread)


def _spread(data: _Data, block: int, order: Sequence[int]) -> float:
    """What deviations must be multiplied with so that 90 % intervals hold points the model has not seen."""
    residuals: list[float] = []
    folds = min(FOLDS, len(order) // 2)
    for fold in range(folds):
        kept = data.take([row for place, row in enumerate(order) if place % folds != fold])
        hidden = data.take(order[fold::folds])
        found = _process(kept, _fit_block(kept, block)).predict(hidden.sizes)
        deviation = np.hypot(found.deviation, hidden.relative_errors)
        residuals += np.abs((np.log(hidden.costs) - found.mean) / deviation).tolist()
    rank = min(len(residuals), int(np.ceil(0.9 * (len(residuals) + 1))))
    return float(min(max(1.0, sorted(residuals)[rank - 1] / _Z90), MAX_SPREAD))


def _roofline(table: Floats, costs: Floats) -> list[float]:
    """Cost per step, operation and value, none negative, then center and scale of its logarithm; empty if constant."""
    nnls = _scipy("scipy.optimize").nnls
    terms = roofline_terms(table)
    unit = terms.mean(axis=0)
    # Between absolute and relative squares: neither the largest layers alone nor the noise of the smallest.
    root = np.sqrt(costs)
    weights = nnls(terms / unit / root[:, None], root)[0] / unit
    logs = np.log(terms @ weights)
    return [*weights.tolist(), float(logs.mean()), float(logs.std())] if np.ptp(logs) > 1e-6 else []


def _scipy(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            "fitting needs SciPy, which is not installed: pip install 'edge-training-runtime[profile]', or run "
            "edge-energy fit on a workstation"
        ) from error


class _Problem:
    """Negative log posterior of the parameters' logarithms, and its gradient, over the pairs of points.

    Order of the parameters: lengths, signal, length and signal of every step, trend, noise, floor.
    """

    def __init__(self, data: _Data, table: Floats) -> None:
        self._frame = standard_frame(table)
        columns = [int(column) for column in self._frame["columns"]]
        inputs = (table[:, columns] - self._frame["center"]) / self._frame["scale"]
        count, self._size = len(table), len(columns)
        logs = np.log(np.asarray(data.costs, dtype=np.float64))
        self._offset = float(np.median(logs))
        self._roofline = _roofline(table, np.exp(logs - self._offset)) if count <= _ROOFLINE_POINTS else []
        self._target, self._own = logs - self._offset, np.asarray(data.relative_errors, dtype=np.float64) ** 2
        self._doubt: Floats = np.ones(count)
        self._smallness: Floats = np.zeros(count)
        self._pairs = np.triu_indices(count)
        left, right = inputs[self._pairs[0]], inputs[self._pairs[1]]
        distances = np.ascontiguousarray(((left - right) ** 2).T)
        # Every Matern term: its squared distances per column.
        self._terms = [distances, *(distances[[int(step)]] for step in self._frame["steps"])]
        self._products = np.sum(left * right, axis=1)
        if self._roofline:
            slant = np.log(roofline_terms(table) @ self._roofline[:3])
            slant = (slant - self._roofline[3]) / self._roofline[4]
            self._products += slant[self._pairs[0]] * slant[self._pairs[1]]
        self._times = np.where(self._pairs[0] == self._pairs[1], 1.0, 2.0)
        medians = [prior_length(self._size)] * self._size + [PRIOR["signal"]]
        medians += [PRIOR["step_length"], PRIOR["step_signal"]] * len(self._frame["steps"])
        self.mean: Floats = np.log([*medians, PRIOR["trend"], PRIOR["noise"], PRIOR["floor"]])

    def expect(self, residual: Floats, doubt: Floats) -> None:
        """Takes from a first fit by how much each point lies off, in log cost, and how much that is to be doubted.

        How small a cost is, is judged by what the others tell, not by itself.
        """
        self._doubt = doubt
        self._smallness = np.minimum(np.exp(2.0 * (residual - self._target)), 1e6)

    def solve(self, start: Floats) -> Floats:
        """The best parameters from ``start`` on, as logarithms."""
        minimize = _scipy("scipy.optimize").minimize
        bounds = [(mean - _FARTHEST, mean + _FARTHEST) for mean in self.mean]
        options = {"maxiter": _ITERATIONS}
        found = minimize(self.loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return np.asarray(found.x, dtype=np.float64)

    def parameters(self, logs: Floats, block: int) -> dict[str, list[float]]:
        """By the names of :mod:`energy.thor.process`."""
        values, size = np.exp(logs).tolist(), self._size
        named = {"block": [float(block)], **self._frame, "length": values[:size], "signal": [values[size]]}
        named |= {"step_length": values[size + 1 : -3 : 2], "step_signal": values[size + 2 : -3 : 2]}
        named |= {"trend": [values[-3]], "noise": [values[-2]], "floor": [values[-1]], "offset": [self._offset]}
        doubt = self._doubt * (1.0 + (values[-1] / values[-2]) ** 2 * self._smallness)
        return named | {"doubt": doubt.tolist(), "roofline": self._roofline}

    def loss(self, logs: Floats) -> tuple[float, Floats]:
        """Loss and gradient at the logarithms of the parameters."""
        lapack = _scipy("scipy.linalg").lapack
        squares = np.exp(2.0 * logs)
        trend2, noise2, floor2 = squares[-3:]
        total = trend2 * self._products + LEVEL**2
        parts: list[tuple[Floats, Floats, Floats]] = []
        place = 0
        for distances in self._terms:
            inverse2, signal2 = 1.0 / squares[place : place + len(distances)], squares[place + len(distances)]
            r = np.sqrt(5.0 * (inverse2 @ distances))
            decay = signal2 * np.exp(-r)
            parts.append((inverse2, decay * (1.0 + r + r * r / 3.0), decay * (1.0 + r) * (5.0 / 3.0)))
            total = total + parts[-1][1]
            place += len(distances) + 1
        count = len(self._target)
        covariance = np.empty((count, count))
        covariance[self._pairs] = total
        covariance.T[self._pairs] = total
        covariance[np.diag_indices(count)] += self._doubt * (noise2 + floor2 * self._smallness) + self._own + JITTER
        factor, failed = lapack.dpotrf(covariance, lower=1)
        if failed:
            return 1e10, np.zeros_like(logs)
        lower, _ = lapack.dpotri(factor, lower=1)
        inverse = np.tril(lower) + np.tril(lower, -1).T
        weights = inverse @ self._target
        away = (logs - self.mean) / _PRIOR_DEVIATION
        loss = 0.5 * self._target @ weights + np.log(np.diag(factor)).sum() + 0.5 * away @ away
        slope = np.outer(weights, weights) - inverse
        pairs = slope[self._pairs] * self._times
        gradient: list[Floats] = []
        for distances, (inverse2, bend, fall) in zip(self._terms, parts, strict=True):
            gradient += [inverse2 * (distances @ (pairs * fall)), np.array([2.0 * pairs @ bend])]
        single = np.diag(slope) * self._doubt
        last = [trend2 * (pairs @ self._products), noise2 * single.sum(), floor2 * (single @ self._smallness)]
        gradient.append(2.0 * np.array(last))
        return float(loss), -0.5 * np.concatenate(gradient) + away / _PRIOR_DEVIATION
