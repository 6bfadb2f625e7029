"""The cost of a whole model from the profile of a device: a sum of layers, with an interval that holds.

``total = factor * (fixed + sum of calls * layer)``. Each layer is log-normal. Layers of one kind share what their
Gaussian process does not know, so their posterior covariance enters, not only their variances; kinds are independent
of each other, and the factor's error is shared by all. The sum is taken for log-normal with the same mean and variance
(Fenton 1960, The sum of log-normal probability distributions in scatter transmission systems), which gives the
90 % interval in closed form.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from energy.errors import ProfileError
from energy.thor.features import Floats, flops, size_table
from energy.thor.process import Process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.thor.layers import LayerSpec
    from energy.thor.profile import Family, Profile, Quantity

Z90 = 1.6449  # half of a normal 90 % interval
FAR = 1.5  # a size so many times beyond the profiled ones is extrapolated


class LayerEstimate(NamedTuple):
    """All calls of one layer in one step. ``extrapolated``: a size lies far outside of what was profiled."""

    name: str
    kind: str
    mean: float
    low: float
    high: float
    extrapolated: bool


class Estimate(NamedTuple):
    """One training step of a model; ``low`` and ``high`` bound the 90 % interval of ``total``.

    Attributes:
        quantity: what is estimated; its unit is joules or seconds.
        total, low, high: of the whole step.
        fixed: part of the total that no layer explains.
        layers: in the order asked for; their means and ``fixed`` add up to ``total``.
        missing: kinds that the profile does not know; they are not in the total.
        missing_share: their share of the forward FLOPs.
    """

    quantity: Quantity
    total: float
    low: float
    high: float
    fixed: float
    layers: tuple[LayerEstimate, ...]
    missing: tuple[str, ...] = ()
    missing_share: float = 0.0


class _Known(NamedTuple):
    process: Process
    low: Floats
    high: Floats


class Estimator:
    """A loaded profile; estimates in a millisecond or so."""

    def __init__(self, profile: Profile, quantity: Quantity | None = None) -> None:
        """Prepares every family that was fitted for ``quantity`` (None: the one that the profile reports).

        Raises:
            ProfileError: no family was fitted for it, or a model is damaged.
        """
        self.quantity: Quantity = quantity or profile.quantity
        families = [family for family in profile.families if self.quantity in family.fitted]
        if not families:
            raise ProfileError(f"this profile has no fitted model of {self.quantity}; run edge-energy fit on it")
        self._known = {family.kind: _load(family, self.quantity) for family in families}
        self._fixed = profile.fixed.get(self.quantity, 0.0)
        self._factor = profile.factor.get(self.quantity, 1.0)
        self._factor_error = profile.factor_error.get(self.quantity, 0.0)

    def estimate(self, layers: Sequence[LayerSpec], *, allow_missing: bool = False) -> Estimate:
        """One training step of a model with these layers.

        Raises:
            ProfileError: a kind of layer was never profiled, and ``allow_missing`` is false; or a model predicts no
                finite number.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return self._estimate(layers, allow_missing)

    def _estimate(self, layers: Sequence[LayerSpec], allow_missing: bool) -> Estimate:
        missing = sorted({layer.kind for layer in layers} - set(self._known))
        if missing and not allow_missing:
            raise ProfileError(
                f"this profile knows no {', '.join(missing)}; profile the device with probes of this bundle"
            )
        parts: dict[int, LayerEstimate] = {}
        variance = 0.0
        for kind, known in self._known.items():
            rows = [index for index, layer in enumerate(layers) if layer.kind == kind]
            if rows:
                found, part = self._kind(known, [layers[row] for row in rows])
                parts |= dict(zip(rows, found, strict=True))
                variance += part
        fixed = self._factor * self._fixed
        total = fixed + sum(part.mean for part in parts.values())
        variance += (self._factor_error * total) ** 2
        low, high = _interval(total - fixed, variance)
        _finite("the model", total, low, high)
        work = [layer.calls * flops(layer.kind, layer.sizes) for layer in layers]
        lost = sum(amount for amount, layer in zip(work, layers, strict=True) if layer.kind in missing)
        return Estimate(
            self.quantity,
            total,
            fixed + low,
            fixed + high,
            fixed,
            tuple(parts[index] for index in sorted(parts)),
            tuple(missing),
            lost / sum(work) if missing else 0.0,
        )

    def _kind(self, known: _Known, layers: Sequence[LayerSpec]) -> tuple[list[LayerEstimate], float]:
        """Layers of one kind, and the variance of their sum."""
        process = known.process
        log_mean, shared = process.posterior([layer.sizes for layer in layers])
        table = size_table([layer.sizes for layer in layers])
        same = (table[:, None, :] == table[None, :, :]).all(axis=2)
        # Layers of the same sizes deviate together: they run the same code.
        covariance = _bounded(shared + np.where(same, process.noise_variance(log_mean)[:, None], 0.0))
        calls = np.array([layer.calls for layer in layers], dtype=np.float64)
        means = self._factor * calls * np.exp(log_mean + np.diag(covariance) / 2.0)
        spread = _bounded(covariance * process.spread**2)
        variance = float(means @ np.expm1(spread) @ means)
        beyond = (table > known.high * FAR) | (table < known.low / FAR)
        far: list[bool] = np.any(beyond, axis=1).tolist()
        own: list[float] = (means**2 * np.expm1(np.diag(spread))).tolist()
        found = []
        for layer, mean, part, extrapolated in zip(layers, means.tolist(), own, far, strict=True):
            bounds = _interval(mean, part)
            _finite(layer.name, mean, *bounds)
            found.append(LayerEstimate(layer.name, layer.kind, mean, *bounds, extrapolated))
        return found, variance


def estimate(
    profile: Profile, layers: Sequence[LayerSpec], quantity: Quantity | None = None, *, allow_missing: bool = False
) -> Estimate:
    """One training step of one model; for many models make one :class:`Estimator`.

    Raises:
        ProfileError: no fitted model, or a kind of layer was never profiled.
    """
    return Estimator(profile, quantity).estimate(layers, allow_missing=allow_missing)


def _load(family: Family, quantity: Quantity) -> _Known:
    table = size_table([point.sizes for point in family.points if quantity in point.costs])
    return _Known(Process.of(family, quantity), table.min(axis=0), table.max(axis=0))


def _finite(name: str, *numbers: float) -> None:
    if not all(math.isfinite(number) for number in numbers):
        raise ProfileError(
            f"{name}: this profile predicts no finite cost for its sizes; profile more points of such sizes, or run "
            "edge-energy fit on the profile"
        )


def _bounded(covariance: Floats) -> Floats:
    """Deviations of at most one in the logarithm: beyond, the mean of a log-normal says more of its tail than of it.

    Only layers far outside of what was profiled are that uncertain; they are marked as extrapolated.
    """
    scale = 1.0 / np.sqrt(np.maximum(np.diag(covariance), 1.0))
    bounded: Floats = covariance * np.outer(scale, scale)
    return bounded


def _interval(mean: float, variance: float) -> tuple[float, float]:
    """The 90 % interval of a log-normal with this mean and variance."""
    if mean <= 0:
        return mean, mean
    sigma2 = float(np.log1p(variance / mean**2))
    middle = np.log(mean) - sigma2 / 2.0
    return float(np.exp(middle - Z90 * sigma2**0.5)), float(np.exp(middle + Z90 * sigma2**0.5))
