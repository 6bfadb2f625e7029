"""Gaussian process on the logarithm of a cost: prediction with NumPy alone.

Rasmussen and Williams, Gaussian Processes for Machine Learning (2006): prediction 2.2 and algorithm 2.1, Matern 5/2
with a length per feature 4.2.1 and 5.1, leaving one out 5.4.2. The covariance of two layers is

    signal^2 (1 + r + r^2 / 3) exp(-r) + trend^2 x.x' + level^2,    r = sqrt(5) |(x - x') / length|

on standardised features x: the straight trend carries far from the points, the Matern term bends it near them. The
variance of a point is its own, from its measurement, plus ``noise``^2 for what the features cannot tell.

Parameters, all lists of float: ``block`` (of channels), ``columns`` (of :data:`energy.features.FEATURES` in use),
``center`` and ``scale`` (of those columns), ``length``, ``signal``, ``trend``, ``noise`` (standard deviations of log
cost), ``offset`` (log cost that the model is about).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from energy.errors import ProfileError
from energy.features import FEATURES, Floats, features

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from energy.layers import Sizes
    from energy.profile import Family, Quantity

LEVEL = 2.0
JITTER = 1e-8  # keeps the covariance positive in float64
_NAMES = ("block", "columns", "center", "scale", "length", "signal", "trend", "noise", "offset")


# Medians of the parameters before anything was measured, in units of log cost and of standardised features.
PRIOR = {"length": np.e, "signal": 0.5, "trend": 1.0, "noise": 0.08}


class Prediction(NamedTuple):
    """Log-normal costs of layers: float64 ``[layers]`` each. ``exp(mean)`` is the median cost."""

    mean: Floats
    deviation: Floats


class Process:
    """One kind of layer, one cost. Immutable; safe for several threads."""

    def __init__(
        self,
        kind: str,
        sizes: Sequence[Sizes],
        costs: Sequence[float],
        relative_errors: Sequence[float],
        *,
        parameters: Mapping[str, list[float]],
        spread: float = 1.0,
    ) -> None:
        """Takes points and parameters as a profile holds them; ``spread`` widens the predicted deviations.

        Raises:
            ProfileError: a parameter is missing or has another length than the others, or a cost is not positive.
        """
        _check(kind, parameters)
        self.kind, self.spread = kind, spread
        self._block = int(parameters["block"][0])
        self._columns = np.array(parameters["columns"], dtype=np.intp)
        self._center, self._scale = np.array(parameters["center"]), np.array(parameters["scale"])
        self._length = np.array(parameters["length"])
        self._signal2, self._trend2 = parameters["signal"][0] ** 2, parameters["trend"][0] ** 2
        self._noise2, self._offset = parameters["noise"][0] ** 2, parameters["offset"][0]
        self._points = self.inputs(sizes)
        if not all(cost > 0 for cost in costs):
            raise ProfileError(f"{kind}: a point costs nothing or less; measure it again or take it out")
        target = np.log(np.asarray(costs, dtype=np.float64)) - self._offset
        own = np.asarray(relative_errors, dtype=np.float64) ** 2
        covariance = self.covariance(self._points, self._points)
        covariance[np.diag_indices_from(covariance)] += own + self._noise2 + JITTER
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ target

    @classmethod
    def of(cls, family: Family, quantity: Quantity) -> Process:
        """The fitted model of ``family`` for ``quantity``.

        Raises:
            ProfileError: it was not fitted, or its parameters are damaged.
        """
        if quantity not in family.fitted:
            raise ProfileError(f"{family.kind}: no model of {quantity} in this profile; run edge-energy fit on it")
        points = [point for point in family.points if quantity in point.costs]
        fitted = family.fitted[quantity]
        costs = [point.costs[quantity] for point in points]
        return cls(
            family.kind,
            [point.sizes for point in points],
            [cost.mean for cost in costs],
            [cost.relative_error for cost in costs],
            parameters=fitted.parameters,
            spread=fitted.spread,
        )

    def inputs(self, sizes: Sequence[Sizes]) -> Floats:
        """Standardised features of layers, float64 ``[layers, columns]``."""
        table = features(self.kind, sizes, self._block)[:, self._columns]
        result: Floats = (table - self._center) / self._scale
        return result

    def covariance(self, left: Floats, right: Floats) -> Floats:
        """Prior covariance of log costs, float64 ``[left, right]``; both as :meth:`inputs` gives them."""
        trend: Floats = self._trend2 * left @ right.T + LEVEL**2
        bend = matern(left / self._length, right / self._length, self._signal2)
        return trend + bend

    def posterior(self, sizes: Sequence[Sizes]) -> tuple[Floats, Floats]:
        """Mean ``[layers]`` and covariance ``[layers, layers]`` of log costs given the points.

        Without spread, and without noise: add :attr:`noise_variance` for the cost of one layer.
        """
        inputs = self.inputs(sizes)
        known = self.covariance(inputs, self._points)
        return known @ self._weights + self._offset, self.covariance(inputs, inputs) - known @ self._inverse @ known.T

    def predict(self, sizes: Sequence[Sizes]) -> Prediction:
        """Costs of layers, noise of a layer and spread included."""
        inputs = self.inputs(sizes)
        known = self.covariance(inputs, self._points)
        prior = self._signal2 + self._trend2 * np.sum(inputs**2, axis=1) + LEVEL**2
        variance = prior - np.sum(known @ self._inverse * known, axis=1)
        deviation = self.spread * np.sqrt(np.maximum(variance, 0.0) + self._noise2)
        return Prediction(known @ self._weights + self._offset, deviation)

    def left_out(self) -> Floats:
        """Standardised residuals of each point as predicted from all others, float64 ``[points]``; ignores spread."""
        precision = np.diag(self._inverse)
        return np.asarray(self._weights / np.sqrt(precision), dtype=np.float64)

    @property
    def noise_variance(self) -> float:
        """Variance of log cost that no further point of other layers can take away."""
        return float(self._noise2)


def telling_columns(table: Floats) -> list[int]:
    """Columns of features that vary and do not repeat another one."""
    found: list[int] = []
    standard: list[Floats] = []
    for column in range(table.shape[1]):
        values = table[:, column]
        if np.ptp(values) < 1e-9:
            continue
        values = (values - values.mean()) / values.std()
        if not any(np.allclose(values, other, atol=1e-6) for other in standard):
            found.append(column)
            standard.append(values)
    return found


def prior_length(columns: int) -> float:
    """Median length before anything was measured: distances grow with the number of features, and lengths with it."""
    return float(PRIOR["length"] * np.sqrt(max(columns, 1) / 6.0))


def prior(kind: str, sizes: Sequence[Sizes], block: int = 8) -> Process:
    """What is believed of a kind before any point: ``sizes``, the layers in question, set the scale of its features."""
    table = features(kind, sizes, block)
    columns = telling_columns(table)
    parameters = {
        "block": [float(block)],
        "columns": [float(column) for column in columns],
        "center": table[:, columns].mean(axis=0).tolist(),
        "scale": table[:, columns].std(axis=0).tolist(),
        "length": [prior_length(len(columns))] * len(columns),
        **{name: [PRIOR[name]] for name in ("signal", "trend", "noise")},
        "offset": [0.0],
    }
    return Process(kind, [], [], [], parameters=parameters)


def matern(left: Floats, right: Floats, variance: float) -> Floats:
    """Matern 5/2 covariance of rows that are already divided by their lengths, float64 ``[left, right]``."""
    squares = np.sum(left**2, axis=1)[:, None] + np.sum(right**2, axis=1)[None, :] - 2.0 * left @ right.T
    r = np.sqrt(5.0 * np.maximum(squares, 0.0))
    return np.asarray(variance * (1.0 + r + r * r / 3.0) * np.exp(-r), dtype=np.float64)


def _check(kind: str, parameters: Mapping[str, list[float]]) -> None:
    missing = [name for name in _NAMES if name not in parameters]
    if missing:
        raise ProfileError(f"{kind}: the model lacks {', '.join(missing)}; run edge-energy fit on this profile")
    columns = parameters["columns"]
    if any(len(parameters[name]) != len(columns) for name in ("center", "scale", "length")) or any(
        not 0 <= column < len(FEATURES) for column in columns
    ):
        raise ProfileError(f"{kind}: the model's parameters do not fit each other; run edge-energy fit on this profile")
