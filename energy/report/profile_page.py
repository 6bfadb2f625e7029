"""The report of a profile: what layers cost, how well that is predicted, and how it was measured."""

from __future__ import annotations

from datetime import datetime, timezone
from statistics import median
from typing import TYPE_CHECKING

from energy.report import charts
from energy.report.page import Tile, figure, items, page, section, text, tiles
from energy.report.profile_data import error_of
from energy.report.tables import html_table
from energy.report.units import (
    PREDICTED_WORDS,
    QUANTITY_UNIT,
    amount,
    counted,
    digits,
    duration,
    percent,
    quantity_words,
)
from energy.thor.profile import power_modelled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.report.profile_data import BundleCost, LeftOut
    from energy.report.tables import Table
    from energy.thor.profile import Profile, Whole

MOST_BARS = 60
_CSS = {"joules": "train", "modelled_joules": "train-modelled", "cpu_seconds": "radio", "seconds": "radio"}


def profile_page(
    profile: Profile, tested: Sequence[LeftOut], bundle: BundleCost | None, tables: Sequence[Table], foot: str
) -> str:
    """The page of one profile; ``tables`` are those of :func:`energy.report.profile_data.profile_tables`."""
    by_key = {table.key: table for table in tables}
    device = profile.device
    made = datetime.fromtimestamp(profile.created_unix_s, timezone.utc)
    day = f", made {made:%Y-%m-%d %H:%M} UTC" if profile.created_unix_s > 0 else ""
    mode = f", power mode {device.power_mode}" if device.power_mode else ""
    threads = counted(device.threads, "thread")
    lead = f"{device.board}, {device.cpu}, {threads}{mode}{day}."
    body = [
        _tiles(profile),
        _what(profile),
        "" if bundle is None else _layers(profile, bundle, by_key["layers"]),
        _wholes(profile, by_key["wholes"]),
        _left_out(profile, tested),
        _spread(profile),
        section(
            "Kinds of layers",
            html_table(by_key["kinds"], cards=True, empty="No layer has been measured yet."),
            _about_errors(),
        ),
        _power(profile),
        _sensor(profile),
    ]
    if profile.notes:
        body.append(section("Notes", items(profile.notes)))
    if device.software:
        body.append(section("Software", items([f"{name} {version}" for name, version in device.software.items()])))
    return page(f"Energy profile of {device.name}", lead, body, foot)


def _unit(profile: Profile) -> str:
    return QUANTITY_UNIT[profile.quantity]


def _tiles(profile: Profile) -> str:
    points = sum(len(family.points) for family in profile.families)
    judged = [error for whole in _judged(profile) if (error := error_of(whole)) is not None]
    entries = [
        Tile(str(points), f"layers measured, of {len(profile.families)} kinds"),
        Tile(duration(profile.profiling_seconds), "of profiling"),
    ]
    if judged:
        mean = sum(map(abs, judged)) / len(judged)
        entries.append(Tile(percent(mean), f"mean error over {counted(len(judged), 'whole model')}"))
    if profile.idle_watts is not None:
        words = "idle, modelled" if power_modelled(profile) else "idle, measured"
        entries.append(Tile(f"{digits(profile.idle_watts)} W", words))
    factor = profile.factor.get(profile.quantity)
    if factor is not None:
        error = profile.factor_error.get(profile.quantity)
        spread = "" if error is None else f" \u00b1 {percent(error)}"
        entries.append(Tile(digits(factor), f"factor of whole models{spread}"))
    return tiles(entries)


def _what(profile: Profile) -> str:
    match profile.quantity:
        case "joules":
            return ""
        case "modelled_joules":
            words = "No joule here was measured: they are modelled from utilisation or nominal watts."
        case "cpu_seconds":
            words = "This device had no power sensor: costs are CPU seconds per step, not joules."
        case _:
            words = "Costs are wall seconds per step, not joules."
    return text(words, "say")


def _layers(profile: Profile, bundle: BundleCost, table: Table) -> str:
    unit, css = _unit(profile), _CSS[profile.quantity]
    ordered = bundle.layers
    shown = sorted(range(len(ordered)), key=lambda index: -ordered[index].mean)[:MOST_BARS]
    rows = []
    for index in sorted(shown):
        layer = ordered[index]
        words = f"{amount(layer.mean, unit)}, {layer.kind}"
        label = f"{layer.name} \u00b7 {layer.kind}"
        value = amount(layer.mean, unit) + (" *" if layer.extrapolated else "")
        rows.append(charts.Bar(label, (charts.Part(layer.mean, css, words),), value, layer.low, layer.high))
    left = len(ordered) - len(rows)

    def draw(width: float) -> str:
        title = f"predicted {PREDICTED_WORDS[profile.quantity]} per step"
        return charts.bars(rows, title, unit, width=width, label=f"Cost per layer of {bundle.name}")

    caption = (
        f"{bundle.name}: {amount(bundle.total, unit)} per training step, 90 % interval {amount(bundle.low, unit)} to "
        f"{amount(bundle.high, unit)}. Layers in the order of the model; lines are 90 % intervals."
        + (f" {left} cheaper layers are in the table only." if left else "")
        + (" * beyond the sizes that were profiled." if any(layer.extrapolated for layer in ordered) else "")
    )
    return section(f"Layers of {bundle.name}", figure(draw, caption), html_table(table))


def _judged(profile: Profile) -> list[Whole]:
    """Whole models that prove something: no anchors, and of the quantity that the profile reports."""
    return [whole for whole in profile.wholes if not whole.anchor and whole.quantity == profile.quantity]


def _wholes(profile: Profile, table: Table) -> str:
    wholes = [whole for whole in profile.wholes if whole.quantity == profile.quantity and whole.measured > 0]
    heading = "Whole models: predicted against metered"
    if not wholes:
        words = (
            "No whole model was metered beside the layers, so nothing here shows how well sums of layers predict one."
        )
        return section(heading, text(words))
    rows = []
    for whole in wholes:
        ratio = whole.predicted / whole.measured
        inside = whole.low <= whole.measured <= whole.high
        css = "anchor" if whole.anchor else "dot" if inside else "outside"
        words = f"metered {amount(whole.measured, _unit(profile))}, predicted {amount(whole.predicted, _unit(profile))}"
        said = "anchor" if whole.anchor else f"{100 * (ratio - 1):+.1f} %"
        part = charts.Part(ratio, css, words)
        bounds = whole.low / whole.measured, whole.high / whole.measured
        rows.append(charts.Bar(f"{whole.model}, batch {whole.batch}", (part,), said, *bounds))

    def draw(width: float) -> str:
        label = "Prediction over measurement of whole models with 90 % intervals"
        return charts.ratios(rows, "predicted over metered", width=width, label=label)

    judged = _judged(profile)
    held = sum(whole.low <= whole.measured <= whole.high for whole in judged)
    caption = (
        "1 means that the prediction is what was metered; lines are 90 % intervals. "
        f"{held} of {len(judged)} metered values lie inside. An anchor set the profile's factor and proves nothing."
    )
    legend = [("dot", "inside its interval"), ("outside", "outside"), ("anchor", "anchor")]
    return section(heading, figure(draw, caption, legend=legend), html_table(table, cards=True))


def _left_out(profile: Profile, tested: Sequence[LeftOut]) -> str:
    if not tested:
        return ""
    unit = _unit(profile)
    spots = [
        charts.Spot(
            entry.measured,
            entry.predicted,
            f"{entry.kind}: measured {amount(entry.measured, unit)}, predicted {amount(entry.predicted, unit)}",
            "dot" if entry.inside else "outside",
            entry.low,
            entry.high,
        )
        for entry in tested
    ]

    def draw(width: float) -> str:
        titles = f"{_per_step(profile)}, alone", "predicted from the others"
        return charts.against(spots, *titles, unit, width=width, label="Predicted against measured cost of layers")

    inside = len([entry for entry in tested if entry.inside])
    caption = (
        f"Each of {len(tested)} layers predicted from all other layers of its kind: median error "
        f"{percent(median(entry.error for entry in tested))}; {percent(inside / len(tested), 0)} lie inside their 90 % "
        "interval. On the dashed line both are equal."
    )
    legend = [("dot", "inside its interval"), ("outside", "outside")]
    return section("Layers: predicted against measured", figure(draw, caption, legend=legend))


def _spread(profile: Profile) -> str:
    unit, quantity = _unit(profile), profile.quantity
    rows = []
    for family in profile.families:
        spots = [
            charts.Spot(cost.mean, 0.0, f"{amount(cost.mean, unit)}: {_sizes(point.sizes)}")
            for point in family.points
            if (cost := point.costs.get(quantity)) is not None and cost.mean > 0
        ]
        if spots:
            rows.append((f"{family.kind} ({len(spots)})", spots))
    if not rows:
        return ""

    def draw(width: float) -> str:
        label = "Measured cost of every layer by kind"
        return charts.strips(rows, _per_step(profile), unit, width=width, label=label)

    caption = "Every layer that was measured alone, by kind; the number of layers stands behind the kind."
    return section("What was measured", figure(draw, caption))


def _per_step(profile: Profile) -> str:
    return f"{quantity_words(profile.quantity)} per step"


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sizes.items())


def _about_errors() -> str:
    return text(
        "Error of measuring: median relative standard error of a point. Error, left out: median error of a layer "
        "predicted from all others of its kind.",
        "soft",
    )


def _power(profile: Profile) -> str:
    heading = "Power over time"
    if not profile.power:
        return section(
            heading, text("No power was recorded: there was no sensor, or the profile was made without one.")
        )
    samples = sorted((sample.at_s, sample.watts) for sample in profile.power)
    windows = [(mark.name, mark.start_s, mark.end_s) for mark in profile.windows]
    title = "modelled power" if power_modelled(profile) else "power"

    def draw(width: float) -> str:
        label = "Power over time with the windows of the profiling"
        return charts.power(samples, windows, profile.idle_watts, title, width=width, label=label)

    caption = (
        f"{len(windows)} windows below the curve; shaded where one was open. Mean and range of what falls together."
    )
    return section(heading, figure(draw, caption))


def _sensor(profile: Profile) -> str:
    sensed = profile.sensed
    heading = "Which sensor measured what"
    if sensed is None:
        words = "No power sensor: only times were measured, by the clocks of the operating system."
        return section(heading, text(words))
    kind = "modelled" if power_modelled(profile) else "measured"
    lines = [
        f"Sensor: {sensed.sensor} ({kind})",
        f"Scope: {sensed.scope}",
        f"Quality: {sensed.quality}",
        f"Covers: {sensed.covers or 'not stated'}",
        "Seconds and CPU seconds: clocks of the operating system",
    ]
    return section(heading, items(lines))
