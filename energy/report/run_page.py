"""The report of a run: what the fleet drew, by device and round, and what accuracy that bought."""

from __future__ import annotations

from typing import TYPE_CHECKING

from energy.report import charts
from energy.report.page import Tile, figure, items, page, section, text, tiles
from energy.report.run_data import PARTS, Drawn, Job, Run, by_device, by_round, drawn
from energy.report.tables import html_table
from energy.report.units import amount, both_words, counted, duration, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from energy.report.tables import Table

MOST_BARS = 30
MOST_COLUMNS = 40
_LOOK = {
    "train_joules": ("train", "training, measured"),
    "train_modelled_joules": ("train-modelled", "training, modelled"),
    "compress_joules": ("compress", "compression, measured"),
    "compress_modelled_joules": ("compress-modelled", "compression, modelled"),
    "other_joules": ("other", "loading and evaluating, measured"),
    "other_modelled_joules": ("other-modelled", "loading and evaluating, modelled"),
    "radio_modelled_joules": ("radio-modelled", "radio, modelled from bytes"),
}


def run_page(run: Run, tables: Sequence[Table], foot: str) -> str:
    """The page of one run; ``tables`` are those of :func:`energy.report.run_data.run_tables`."""
    by_key = {table.key: table for table in tables}
    state = f"{run.status} ({run.reason})" if run.reason else run.status
    lead = f"Energy ledger of a run: {state or 'state unknown'}, {run.rounds} of {run.rounds_planned} rounds closed."
    body = [_tiles(run), *_warnings(run)]
    sums = by_device(run)
    if any(entry.everything > 0 for entry in sums.values()):
        body += [_device_chart(run, sums), _round_chart(run), _accuracy_chart(run)]
    body.append(
        section(
            "Which sensor measured what",
            html_table(by_key["sensors"], cards=True, empty="No device has said what it draws."),
            text(
                "Scope says what a figure is of: a whole board, a module without its carrier, one package, or a model."
            ),
        )
    )
    body.append(section("Devices", html_table(by_key["devices"], cards=True, empty="No job has reported its end.")))
    body.append(section("Rounds", html_table(by_key["rounds"], empty="No round has closed yet.")))
    body.append(_stopped(run))
    return page(f"Energy of run {run.run}", lead, body, foot)


def _tiles(run: Run) -> str:
    sums = drawn(run.jobs)
    measured, modelled = (
        (run.energy.joules, run.energy.modelled_joules)
        if run.ledger is None
        else (
            sums.measured,
            sums.modelled,
        )
    )
    radio = run.energy.radio_modelled_joules if run.ledger is None else sums.radio
    accuracy = run.accuracy if run.accuracy is not None else run.device_accuracy
    return tiles(
        [
            Tile(amount(measured), "measured, loading to compression"),
            Tile(amount(modelled), "modelled, loading to compression"),
            Tile(amount(radio), "radio, modelled from bytes"),
            Tile(f"{sums.jobs - sums.unknown_jobs}/{sums.jobs}", "jobs whose energy is known"),
            Tile(percent(accuracy), "accuracy"),
            Tile(duration(run.seconds), counted(run.devices, "device")),
        ]
    )


def _warnings(run: Run) -> list[str]:
    sums = drawn(run.jobs)
    said = []
    if run.ledger is None:
        said.append(
            "This file has no ledger, so nothing is known of single jobs; "
            "write it anew with: edge-coordinator status RUN --json"
        )
    elif not run.jobs:
        said.append("No job has reported its end yet.")
    elif sums.measured is None and sums.modelled is None:
        said.append("No device said what its jobs drew: they have no sensor and no model. Nothing here is zero.")
    elif sums.unknown_jobs:
        said.append(f"What training drew is unknown for {sums.unknown_jobs} of {sums.jobs} jobs, so it is in no sum.")
    if sums.doubtful_jobs:
        said.append(
            f"The joules of {counted(sums.doubtful_jobs, 'job')} of {sums.jobs} are doubtful, though they are in the "
            "sums: the device throttled, its clocks changed, or a sensor failed. Its log says which."
        )
    if sums.measured is not None and sums.modelled is not None:
        said.append(
            "Some devices measured and some were modelled: these joules are not compared, only put side by side."
        )
    return [text(words, "say") for words in said]


def _device_chart(run: Run, sums: dict[str, Drawn]) -> str:
    ordered = sorted(sums.items(), key=lambda item: -item[1].everything)
    shown, others = ordered[:MOST_BARS], ordered[MOST_BARS:]
    rows = [_bar(name, entry) for name, entry in shown]
    if others:
        names = {name for name, _ in others}
        rest = drawn(job for job in run.jobs if job.device in names)
        rows.append(_bar(f"{len(others)} other devices", rest))

    def draw(width: float) -> str:
        return charts.bars(
            rows,
            "energy",
            "J",
            width=width,
            label="Joules per device, by training, compression, the rest of jobs, and radio",
        )

    caption = "Gross energy of all jobs of a device; figures beside the bars are without radio."
    return section("Joules per device", figure(draw, caption, legend=_legend(run.jobs)))


def _round_chart(run: Run) -> str:
    rounds = by_round(run)

    def draw(width: float) -> str:
        most = MOST_COLUMNS if width >= charts.NARROW_PX else MOST_COLUMNS // 2
        return charts.columns(
            _columns(run, list(rounds), most),
            "energy",
            "J",
            "round" if len(rounds) <= most else "rounds",
            width=width,
            label="Joules per round, by training, compression, the rest of jobs, and radio",
        )

    caption = "By the round that gave a job out, whether its update counted or not."
    return section("Joules per round", figure(draw, caption, legend=_legend(run.jobs)))


def _columns(run: Run, rounds: list[int], most: int) -> list[charts.Bar]:
    """One column per round, or per some rounds together if there are more than ``most``."""
    together = -(-len(rounds) // most)
    by_number: dict[int, list[Job]] = {}
    for job in run.jobs:
        by_number.setdefault(job.round, []).append(job)
    columns = []
    for first in range(0, len(rounds), together):
        group = rounds[first : first + together]
        label = str(group[0] + 1) if len(group) == 1 else f"{group[0] + 1}\u2013{group[-1] + 1}"
        columns.append(_bar(label, drawn(job for number in group for job in by_number.get(number, []))))
    return columns


def _accuracy_chart(run: Run) -> str:
    """Accuracy over all joules spent until the end of each round; empty if no accuracy is known."""
    on_devices = all(entry.accuracy is None for entry in run.history)
    spent, spots = 0.0, []
    sums = by_round(run)
    measured = modelled = False
    if run.initial_accuracy is not None and not on_devices:
        spots.append(
            charts.Spot(0.0, 100 * run.initial_accuracy, f"before the first round: {percent(run.initial_accuracy)}")
        )
    for entry in sorted(run.history, key=lambda entry: entry.round):
        of_round = sums[entry.round]
        spent += of_round.everything
        measured |= of_round.measured is not None
        modelled |= of_round.modelled is not None or of_round.radio is not None
        accuracy = entry.device_accuracy if on_devices else entry.accuracy
        if accuracy is not None:
            words = f"after round {entry.round + 1}: {percent(accuracy)}, {amount(spent)}"
            spots.append(charts.Spot(spent, 100 * accuracy, words))
    if len(spots) < 2 or spent <= 0:
        return ""
    kind = "measured + modelled" if measured and modelled else "measured" if measured else "modelled"
    of = "the devices' hold-outs" if on_devices else "the test set"

    def draw(width: float) -> str:
        return charts.curve(
            spots, f"joules spent, {kind}", "J", "accuracy, %", width=width, label=f"Accuracy on {of} over energy"
        )

    caption = f"Accuracy on {of} after each round, over the joules of all jobs until then ({kind}, radio included)."
    return section("Accuracy for energy", figure(draw, caption))


def _stopped(run: Run) -> str:
    lines = [
        f"{job.device}, {job.assignment}: {words}"
        for job in run.jobs
        for words in (f"ended early{_steps(job)}, {job.stopped} ({job.status})" if job.stopped else "", job.note)
        if words
    ]
    if not lines:
        return ""
    more = [f"and {len(lines) - 40} more; they are all in the files of --csv"] if len(lines) > 40 else []
    return section("Jobs that ended early, or said what cannot be", items([*lines[:40], *more]))


def _steps(job: Job) -> str:
    if job.steps is None:
        return ""
    return f" after {counted(job.steps, 'step')}" + (f" of {job.steps_planned}" if job.steps_planned else "")


def _bar(label: str, sums: Drawn) -> charts.Bar:
    parts = []
    for name in PARTS:
        value = sums.parts[name]
        if value:
            css, words = _LOOK[name]
            parts.append(charts.Part(value, css, f"{amount(value)} {words}"))
    doubt = f" ({sums.doubtful_jobs} doubtful)" if sums.doubtful_jobs else ""
    return charts.Bar(label, tuple(parts), both_words(sums.measured, sums.modelled) + doubt)


def _legend(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    return [look for name, look in _LOOK.items() if any(getattr(job, name) for job in jobs)]
