"""What a profile holds, as tables: layers, points, kinds, whole models, power. Predictions need NumPy alone."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.errors import ProfileError
from energy.report.tables import Column, Table, page_column, text_column
from energy.report.units import PREDICTED_WORDS, QUANTITY_UNIT, amount, digits, percent, quantity_words
from energy.thor.profile import power_modelled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from energy.thor.profile import Family, Point, Profile, Quantity, Whole

Z_90 = 1.645  # standard deviations of the 90 % interval


class LeftOut(NamedTuple):
    """One measured layer, and what all other points of its kind say of it."""

    kind: str
    sizes: dict[str, int]
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Relative."""
        return abs(self.predicted - self.measured) / self.measured

    @property
    def inside(self) -> bool:
        """Whether the 90 % interval holds the measured value."""
        return self.low <= self.measured <= self.high


class LayerCost(NamedTuple):
    """Predicted cost of one layer of a bundle per step, with its 90 % interval."""

    name: str
    kind: str
    mean: float
    low: float
    high: float
    extrapolated: bool


class BundleCost(NamedTuple):
    """Predicted cost of a bundle per step."""

    name: str
    total: float
    low: float
    high: float
    layers: list[LayerCost]


def left_out(family: Family, quantity: Quantity) -> list[LeftOut]:
    """The points of a fitted kind, each predicted from all others; none of a kind that was not fitted.

    Raises:
        ProfileError: the fitted model is damaged.
    """
    points = [point for point in family.points if quantity in point.costs]
    if quantity not in family.fitted or len(points) < 3:
        return []
    from energy.thor.process import Process

    process = Process.of(family, quantity)
    errors = process.left_out()
    found = []
    for point, error, deviation in zip(points, errors.mean.tolist(), errors.deviation.tolist(), strict=True):
        measured, half = point.costs[quantity].mean, Z_90 * process.spread * deviation
        bounds = (measured * math.exp(-error), measured * math.exp(-error - half), measured * math.exp(-error + half))
        if not all(math.isfinite(bound) for bound in bounds):
            raise ProfileError(f"{family.kind}: its model predicts no number; run edge-energy fit on this profile")
        found.append(LeftOut(family.kind, point.sizes, measured, *bounds))
    return found


def profile_tables(profile: Profile, tested: Sequence[LeftOut], bundle: BundleCost | None) -> list[Table]:
    """``kinds``, ``points``, ``wholes``, ``power`` (or ``modelled_power``), ``windows``; ``layers`` of a bundle."""
    tables = [kinds_table(profile, tested), _points(profile), wholes_table(profile), _power(profile), _windows(profile)]
    return tables if bundle is None else [layers_table(profile, bundle), *tables]


def layers_table(profile: Profile, bundle: BundleCost) -> Table:
    """The layers of a bundle."""
    name, unit = profile.quantity, QUANTITY_UNIT[profile.quantity]
    columns = (
        text_column("layer", "layer"),
        text_column("kind", "kind"),
        Column(f"predicted_{name}", f"predicted {PREDICTED_WORDS[name]}", _shower(unit)),
        Column(f"low_{name}", "at least", _shower(unit)),
        Column(f"high_{name}", "at most", _shower(unit)),
        Column("extrapolated", "extrapolated", in_page=False),
        page_column("note", "note"),
    )
    rows = [(*layer, "beyond the profiled sizes" if layer.extrapolated else "") for layer in bundle.layers]
    return Table("layers", columns, rows)


def kinds_table(profile: Profile, tested: Sequence[LeftOut]) -> Table:
    """One row per kind of layer: how many points, over which sizes, at what cost, how well they predict one another."""
    quantity, rows = profile.quantity, []
    for family in profile.families:
        costs = [point.costs[quantity] for point in family.points if quantity in point.costs]
        of_kind = [entry for entry in tested if entry.kind == family.kind]
        rows.append(
            (
                family.kind,
                len(family.points),
                _ranges(family.points),
                min((cost.mean for cost in costs), default=None),
                max((cost.mean for cost in costs), default=None),
                median(cost.relative_error for cost in costs) if costs else None,
                quantity in family.fitted,
                median(entry.error for entry in of_kind) if of_kind else None,
                sum(entry.inside for entry in of_kind) / len(of_kind) if of_kind else None,
            )
        )
    show = _shower(QUANTITY_UNIT[quantity])
    columns = (
        text_column("kind", "kind"),
        Column("points", "points"),
        text_column("sizes", "sizes"),
        Column(f"least_{quantity}", f"least, {quantity_words(quantity)}", show),
        Column(f"most_{quantity}", "most", show),
        Column("measurement_error", "error of measuring", percent),
        Column("fitted", "fitted", lambda value: "yes" if value else "no"),
        Column("left_out_median_error", "error, left out", percent),
        Column("left_out_coverage_90", "inside 90\u00a0% interval", lambda value: percent(value, 0)),
    )
    return Table("kinds", columns, rows)


def wholes_table(profile: Profile) -> Table:
    """Whole models: what was measured, and what was predicted; columns for each quantity that there is."""
    quantities = sorted({whole.quantity for whole in profile.wholes})
    columns = [text_column("model", "model"), Column("batch", "batch"), Column("anchor", "anchor", in_page=False)]
    for name in quantities:
        show = _shower(QUANTITY_UNIT[name])
        columns += [
            Column(_measured_key(name), f"metered, {quantity_words(name)}", show),
            Column(f"predicted_{name}", "predicted", show),
            Column(f"low_{name}", "at least", show),
            Column(f"high_{name}", "at most", show),
        ]
    columns += [
        Column("relative_error", "error", lambda value: f"{100 * value:+.1f}\u00a0%"),
        Column("inside", "inside", in_page=False),
        page_column("note", "90\u00a0% interval"),
    ]
    rows = []
    for whole in profile.wholes:
        values: list[Any] = [whole.model, whole.batch, whole.anchor]
        for name in quantities:
            here = (whole.measured, whole.predicted, whole.low, whole.high)
            values += here if name == whole.quantity else (None,) * 4
        inside = whole.low <= whole.measured <= whole.high
        note = "anchor" if whole.anchor else "holds it" if inside else "misses it"
        rows.append((*values, error_of(whole), inside, note))
    return Table("wholes", tuple(columns), rows)


def error_of(whole: Whole) -> float | None:
    """Relative error of a prediction, with its sign; None if nothing was measured."""
    return (whole.predicted - whole.measured) / whole.measured if whole.measured > 0 else None


def _points(profile: Profile) -> Table:
    points = [(family.kind, point) for family in profile.families for point in family.points]
    sizes = sorted({name for _, point in points for name in point.sizes})
    quantities = sorted({name for _, point in points for name in point.costs})
    columns = [text_column("kind", "kind"), *(Column(name, name) for name in sizes)]
    for name in quantities:
        columns += [Column(name, name), Column(f"{name}_relative_error", name), Column(f"{name}_repeats", name)]
    rows = []
    for kind, point in points:
        values: list[Any] = [kind, *(point.sizes.get(name, 1) for name in sizes)]
        for name in quantities:
            cost = point.costs.get(name)
            values += (None, None, None) if cost is None else (cost.mean, cost.relative_error, cost.repeats)
        rows.append(tuple(values))
    return Table("points", tuple(columns), rows)


def _power(profile: Profile) -> Table:
    modelled = power_modelled(profile)
    watts = "modelled_watts" if modelled else "watts"
    columns = (Column("at_seconds", "at"), Column(watts, watts, digits))
    return Table(
        "modelled_power" if modelled else "power", columns, [(sample.at_s, sample.watts) for sample in profile.power]
    )


def _windows(profile: Profile) -> Table:
    columns = (text_column("window", "window"), Column("start_seconds", "from"), Column("end_seconds", "to"))
    return Table("windows", columns, [(mark.name, mark.start_s, mark.end_s) for mark in profile.windows])


def _ranges(points: Sequence[Point]) -> str:
    """The sizes that vary, and between what."""
    parts = []
    for name in sorted({name for point in points for name in point.sizes}):
        values = [point.sizes.get(name, 1) for point in points]
        words = name.replace("_", " ")
        if min(values) != max(values):
            parts.append(f"{words} {min(values)}\u2013{max(values)}")
        elif min(values) != 1:
            parts.append(f"{words} {min(values)}")
    return ", ".join(parts)


def _measured_key(quantity: str) -> str:
    return quantity if quantity != "joules" else "measured_joules"


def _shower(unit: str) -> Callable[[Any], str]:
    return lambda value: amount(value, unit)
