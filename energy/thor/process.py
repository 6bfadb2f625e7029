"""Gaussian process on the logarithm of a cost: prediction with NumPy alone.

Rasmussen and Williams, Gaussian Processes for Machine Learning (2006): prediction 2.2 and algorithm 2.1, Matern 5/2
with a length per feature 4.2.1 and 5.1, leaving one out 5.4.2. The covariance of two layers is, on standardised
features x, a sum of

* ``trend^2 x.x'`` and a level: carries far from the points; where points are few, x here also has the logarithm of a
  roofline, a cost per step, per operation and per value moved,
* ``signal^2 m(|x - x'| / length)`` with the Matern function m: bends the trend near the points,
* ``step_signal^2 m(|c - c'| / step_length)`` for the number c of input channels, and of output channels: what blocks
  of channels do whatever the other sizes are.

The variance of a point is its own, from its measurement, plus ``noise^2`` for what the features cannot tell, times the
point's ``doubt`` (1; more for outliers, and for small costs). A layer's noise is ``noise^2 + (floor / cost)^2``: meters
err by a share, and by an amount that small layers drown in.

Parameters, all lists of float: ``block`` (of channels), ``columns`` (of :data:`energy.thor.features.FEATURES` in use),
``center`` and ``scale`` (of those columns), ``steps`` (which of them have steps), ``length`` (per column), ``signal``,
``step_length`` and ``step_signal`` (per step), ``trend``, ``noise``, ``floor`` (in units of exp(offset)), ``doubt``
(per point), ``offset`` (log cost that the model is about), ``roofline`` (the three costs in units of exp(offset), then
center and scale of the logarithm; empty or absent: none). Signals, trend and noise are standard deviations of log cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from energy.errors import ProfileError
from energy.thor.features import FEATURES, Floats, features

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from energy.thor.layers import Sizes
    from energy.thor.profile import Family, Quantity

LEVEL = 2.0
JITTER = 1e-8  # keeps the covariance positive in float64
MAX_FLOOR = 1.0  # variance of log cost: beyond it a layer is nothing but noise, and no more so
STEPPED = (FEATURES.index("in_channels"), FEATURES.index("out_channels"))
# Medians of the parameters before anything was measured.
PRIOR = {"signal": 0.5, "step_length": 1.1, "step_signal": 0.18, "trend": 1.0, "noise": 0.06, "floor": 0.03}
_CURE = "run edge-energy fit on this profile"
# What parameters can be: far beyond what a fit ever finds, and still safe to compute with. Zero is none of a signal.
_RANGES = {
    "block": (1.0, 1e6),
    "center": (-1e3, 1e3),
    "scale": (1e-9, 1e6),
    "length": (1e-6, 1e6),
    "signal": (0.0, 1e3),
    "step_length": (1e-6, 1e6),
    "step_signal": (0.0, 1e3),
    "trend": (0.0, 1e3),
    "noise": (0.0, 1e3),
    "floor": (0.0, 1e3),
    "offset": (-200.0, 200.0),
    "doubt": (0.0, 1e24),
}
_LENGTH = 1.1  # times the root of the number of features, which distances grow with


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
            ProfileError: a parameter is missing, has another length than the others or cannot be, or a cost is not
                positive.
        """
        _check(kind, parameters, len(sizes))
        if not all(0 < cost < np.inf for cost in costs):
            raise ProfileError(f"{kind}: a point costs nothing or less; measure it again or take it out")
        value = {name: np.asarray(numbers, dtype=np.float64) for name, numbers in parameters.items()}
        self.kind, self.spread = kind, spread
        self._block, self._columns = int(parameters["block"][0]), value["columns"].astype(np.intp)
        self._center, self._scale = value["center"], value["scale"]
        self._roofline = value.get("roofline", np.empty(0))
        # The roofline is a trend, and bends nothing.
        self._length = np.append(value["length"], [np.inf] * (len(self._roofline) > 0))
        self._steps = list(zip(value["steps"].astype(np.intp), value["step_length"], value["step_signal"], strict=True))
        self._signal, self._trend = parameters["signal"][0], parameters["trend"][0]
        self._noise, self._floor = parameters["noise"][0], parameters["floor"][0]
        self._offset = parameters["offset"][0]
        self._points = self.inputs(sizes)
        own = np.asarray(relative_errors, dtype=np.float64) ** 2
        covariance = self.covariance(self._points, self._points)
        covariance[np.diag_indices_from(covariance)] += own + self._noise**2 * value["doubt"] + JITTER
        try:
            self._inverse: Floats = np.asarray(np.linalg.inv(covariance), dtype=np.float64)
        except np.linalg.LinAlgError as error:
            raise ProfileError(f"{kind}: the model cannot be solved ({error}); {_CURE}") from error
        self._weights: Floats = self._inverse @ (np.log(np.asarray(costs, dtype=np.float64)) - self._offset)
        if not (np.isfinite(self._inverse).all() and np.isfinite(self._weights).all()):
            raise ProfileError(f"{kind}: the model cannot be solved; {_CURE}")

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

    def noise_variance(self, log_cost: Floats) -> Floats:
        """Variance of the log cost of layers of about this cost that no point of other layers can take away."""
        result: Floats = self._noise**2 + np.minimum(
            self._floor**2 * np.exp(2.0 * (self._offset - log_cost)), MAX_FLOOR
        )
        return result

    def inputs(self, sizes: Sequence[Sizes]) -> Floats:
        """Standardised features of layers, float64 ``[layers, columns]``, and the roofline if there is one."""
        table = features(self.kind, sizes, self._block)
        result: Floats = (table[:, self._columns] - self._center) / self._scale
        if len(self._roofline) == 0:
            return result
        slant = np.log(roofline_terms(table) @ self._roofline[:3])
        return np.column_stack([result, (slant - self._roofline[3]) / self._roofline[4]])

    def covariance(self, left: Floats, right: Floats) -> Floats:
        """Prior covariance of log costs, float64 ``[left, right]``; both as :meth:`inputs` gives them."""
        total: Floats = self._trend**2 * left @ right.T + LEVEL**2
        total += self._signal**2 * _matern(left / self._length, right / self._length)
        for column, length, signal in self._steps:
            total += signal**2 * _matern(left[:, [column]] / length, right[:, [column]] / length)
        return total

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
        bends = self._signal**2 + sum(signal**2 for _, _, signal in self._steps)
        prior = self._trend**2 * np.sum(inputs**2, axis=1) + LEVEL**2 + bends
        variance = prior - np.sum(known @ self._inverse * known, axis=1)
        mean = known @ self._weights + self._offset
        deviation = self.spread * np.sqrt(np.maximum(variance, 0.0) + self.noise_variance(mean))
        return Prediction(mean, deviation)

    def left_out(self) -> Prediction:
        """Each point as predicted from all others: measured minus predicted log cost, and its deviation; no spread."""
        precision = np.diag(self._inverse)
        return Prediction(self._weights / precision, 1.0 / np.sqrt(precision))


def prior(kind: str, sizes: Sequence[Sizes], block: int = 8) -> Process:
    """What is believed of a kind before any point; ``sizes``, the layers in question, give the scale of features."""
    return Process(kind, [], [], [], parameters=prior_parameters(kind, sizes, block))


def prior_parameters(kind: str, sizes: Sequence[Sizes], block: int = 8) -> dict[str, list[float]]:
    """The parameters of :func:`prior`, with no points."""
    table = features(kind, sizes, block)
    frame = standard_frame(table)
    parameters = {
        "block": [float(block)],
        **frame,
        **{name: [PRIOR[name]] for name in ("signal", "trend", "noise", "floor")},
    }
    parameters |= {"length": [prior_length(len(frame["columns"]))] * len(frame["columns"])}
    parameters |= {name: [PRIOR[name]] * len(frame["steps"]) for name in ("step_length", "step_signal")}
    return parameters | {"doubt": [], "offset": [0.0], "roofline": []}


def standard_frame(table: Floats) -> dict[str, list[float]]:
    """The columns of features that vary and do not repeat another one, how to standardise them, which have steps."""
    columns: list[int] = []
    found: list[Floats] = []
    for column in range(table.shape[1]):
        values = table[:, column]
        if len(values) == 0 or np.ptp(values) < 1e-9:
            continue
        values = (values - values.mean()) / values.std()
        if not any(np.allclose(values, other, atol=1e-6) for other in found):
            columns.append(column)
            found.append(values)
    return {
        "columns": [float(column) for column in columns],
        "center": table[:, columns].mean(axis=0).tolist() if columns else [],
        "scale": table[:, columns].std(axis=0).tolist() if columns else [],
        "steps": [float(columns.index(column)) for column in STEPPED if column in columns],
    }


def roofline_terms(table: Floats) -> Floats:
    """What a roofline is a sum of, float64 ``[layers, 3]``: one, operations, values moved."""
    column = {name: np.exp(table[:, index]) for index, name in enumerate(FEATURES)}
    moved = column["input_elements"] + column["output_elements"]
    return np.column_stack([np.ones(len(table)), column["blocked_flops"], moved])


def prior_length(columns: int) -> float:
    """Median length before anything was measured."""
    return float(_LENGTH * np.sqrt(max(columns, 1)))


def _matern(left: Floats, right: Floats) -> Floats:
    """Matern 5/2 correlation of rows that are divided by their lengths already, float64 ``[left, right]``."""
    squares = np.sum(left**2, axis=1)[:, None] + np.sum(right**2, axis=1)[None, :] - 2.0 * left @ right.T
    r = np.sqrt(5.0 * np.maximum(squares, 0.0))
    result: Floats = (1.0 + r + r * r / 3.0) * np.exp(-r)
    return result


def _check(kind: str, parameters: Mapping[str, list[float]], points: int) -> None:
    one = ("block", "signal", "trend", "noise", "floor", "offset")
    per_column, per_step = ("columns", "center", "scale", "length"), ("steps", "step_length", "step_signal")
    missing = [name for name in (*one, *per_column, *per_step, "doubt") if name not in parameters]
    if missing:
        raise ProfileError(f"{kind}: the model lacks {', '.join(missing)}; {_CURE}")
    columns, steps = parameters["columns"], parameters["steps"]
    fits = all(len(parameters[name]) == 1 for name in one)
    fits &= all(len(parameters[name]) == len(columns) for name in per_column)
    fits &= all(len(parameters[name]) == len(steps) for name in per_step)
    fits &= all(0 <= column < len(FEATURES) for column in columns) and len(parameters.get("roofline", [])) in {0, 5}
    if not fits or any(not 0 <= step < len(columns) for step in steps) or parameters["block"][0] < 1:
        raise ProfileError(f"{kind}: the model's parameters do not fit each other; {_CURE}")
    if len(parameters["doubt"]) != points:
        raise ProfileError(f"{kind}: fitted to {len(parameters['doubt'])} points, and there are {points}; {_CURE}")
    for name, (least, most) in _RANGES.items():
        if not all(least <= number <= most for number in parameters[name]):
            raise ProfileError(f"{kind}: {name} of the model is not within {least:g} to {most:g}; {_CURE}")
    roofline = parameters.get("roofline", [])
    if roofline and not (min(roofline[:3]) >= 0 and max(roofline[:3]) > 0 and 1e-9 <= roofline[4] <= 1e6):
        raise ProfileError(f"{kind}: roofline of the model cannot be; {_CURE}")
