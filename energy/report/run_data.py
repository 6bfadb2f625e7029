"""The ledger of a run, as ``edge-coordinator status RUN --json`` or a ``summary.json`` tells it, and its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from energy.report.tables import Column, Table, page_column, text_column
from energy.report.units import amount, both_words, digits, duration, percent, total

if TYPE_CHECKING:
    from collections.abc import Iterable

# Far above what any run comes to, so that sums of rows stay finite, whoever wrote the file.
_Amount = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
MEASURED = ("train_joules", "compress_joules", "other_joules")
MODELLED = ("train_modelled_joules", "compress_modelled_joules", "other_modelled_joules")
PARTS = (*(name for pair in zip(MEASURED, MODELLED, strict=True) for name in pair), "radio_modelled_joules")
ROUND = "round_from_1"  # in tables; in the ledger that is read they count from 0
_JOB_KEYS = (
    *("device", ROUND, "assignment", "status", "sensor", "scope", "quality", "covers"),
    *PARTS,
    *("idle_watts", "idle_modelled_watts", "doubtful", "train_seconds", "steps", "steps_planned", "stopped", "note"),
)
_TEXTS = ("device", "assignment", "status", "sensor", "scope", "quality", "covers", "stopped", "note")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the ledger; None: unknown. ``other``: reading, loading and evaluating."""

    device: str
    round: _Count = 0
    assignment: str = ""
    status: str = ""
    sensor: str | None = None
    scope: str | None = None
    quality: str | None = None
    covers: str | None = None
    train_joules: _Amount | None = None
    compress_joules: _Amount | None = None
    other_joules: _Amount | None = None
    train_modelled_joules: _Amount | None = None
    compress_modelled_joules: _Amount | None = None
    other_modelled_joules: _Amount | None = None
    radio_modelled_joules: _Amount | None = None
    idle_watts: _Amount | None = None
    idle_modelled_watts: _Amount | None = None
    doubtful: bool = False
    train_seconds: _Amount | None = None
    steps: _Count | None = None
    steps_planned: _Count | None = None
    stopped: str = ""
    note: str = ""

    @property
    def known(self) -> bool:
        """Whether it is known what its training drew, or all of a job that did not come to train."""
        figures = (self.train_joules, self.train_modelled_joules, self.other_joules, self.other_modelled_joules)
        return any(value is not None for value in figures)


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One closed round; accuracies are shares."""

    round: _Count
    accuracy: _Share | None = None
    device_accuracy: _Share | None = None
    updates: _Count = 0
    seconds: _Amount | None = None


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator itself summed up."""

    joules: _Amount | None = None
    modelled_joules: _Amount | None = None
    radio_modelled_joules: _Amount | None = None
    measured_jobs: _Count = 0
    modelled_jobs: _Count = 0
    unknown_jobs: _Count = 0
    doubtful_jobs: _Count = 0


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``ledger`` is None in files of versions before there was one."""

    run: str
    status: str = ""
    reason: str = ""
    rounds: _Count = 0
    rounds_planned: _Count = 0
    accuracy: _Share | None = None
    device_accuracy: _Share | None = None
    initial_accuracy: _Share | None = None
    seconds: _Amount | None = None
    devices: _Count = 0
    bytes_up: int | None = None
    bytes_down: int | None = None
    history: list[Round]
    energy: Totals = Totals()
    ledger: list[Job] | None = None

    @property
    def jobs(self) -> list[Job]:
        """The rows of the ledger."""
        return self.ledger or []


class Drawn(NamedTuple):
    """Sums over jobs, joules by part as named in the ledger; None: none was known."""

    jobs: int
    unknown_jobs: int
    doubtful_jobs: int
    stopped_jobs: int
    parts: dict[str, float | None]

    @property
    def measured(self) -> float | None:
        """Joules from loading to compression that were measured."""
        return total(self.parts[name] for name in MEASURED)

    @property
    def modelled(self) -> float | None:
        """Joules from loading to compression that were modelled."""
        return total(self.parts[name] for name in MODELLED)

    @property
    def radio(self) -> float | None:
        """Joules of the radio, which are always modelled."""
        return self.parts["radio_modelled_joules"]

    @property
    def everything(self) -> float:
        """All known joules, of either kind: how long a bar is."""
        return total(self.parts.values()) or 0.0


def drawn(jobs: Iterable[Job]) -> Drawn:
    """What these jobs drew."""
    jobs = list(jobs)
    return Drawn(
        len(jobs),
        sum(not job.known for job in jobs),
        sum(job.doubtful for job in jobs),
        sum(bool(job.stopped) for job in jobs),
        {name: total(getattr(job, name) for job in jobs) for name in PARTS},
    )


def by_device(run: Run) -> dict[str, Drawn]:
    """What every device drew, by its name."""
    groups: dict[str, list[Job]] = {}
    for job in run.jobs:
        groups.setdefault(job.device, []).append(job)
    return {name: drawn(groups[name]) for name in sorted(groups)}


def by_round(run: Run) -> dict[int, Drawn]:
    """What the jobs drew that each round gave out, closed rounds without any included, in order."""
    groups: dict[int, list[Job]] = {entry.round: [] for entry in run.history}
    for job in run.jobs:
        groups.setdefault(job.round, []).append(job)
    return {number: drawn(groups[number]) for number in sorted(groups)}


def run_tables(run: Run) -> list[Table]:
    """``devices``, ``rounds``, ``sensors`` and ``jobs``."""
    return [_devices(run), _rounds(run), _sensors(run), _jobs(run)]


# Columns of joules per part and kind for programs; for people one per part, with the word measured or modelled in it.
_SUMS = (
    Column("jobs", "jobs"),
    Column("unknown_jobs", "energy unknown", in_page=False),
    Column("doubtful_jobs", "doubtful", in_page=False),
    Column("stopped_jobs", "ended early"),
    *(Column(name, name, in_page=False) for name in PARTS),
    page_column("training", "training"),
    page_column("compression", "compression"),
    page_column("other", "loading and evaluating"),
    page_column("radio", "radio"),
)


def _sums(sums: Drawn) -> tuple[Any, ...]:
    words = [both_words(sums.parts[one], sums.parts[other]) for one, other in zip(MEASURED, MODELLED, strict=True)]
    counts = sums.jobs, sums.unknown_jobs, sums.doubtful_jobs, sums.stopped_jobs
    return (*counts, *sums.parts.values(), *words, both_words(None, sums.radio))


def _devices(run: Run) -> Table:
    rows = []
    for name, sums in by_device(run).items():
        of_device = [job for job in run.jobs if job.device == name]
        sensors = sorted({_sensor_words(job) for job in of_device if job.quality is not None or job.sensor is not None})
        seconds = total(job.train_seconds for job in of_device)
        rows.append((name, "; ".join(sensors), seconds, *_sums(sums)))
    columns = (
        text_column("device", "device"),
        text_column("sensors", "by"),
        Column("train_seconds", "training time", duration),
        *_SUMS,
    )
    return Table("devices", columns, rows)


def _rounds(run: Run) -> Table:
    closed = {entry.round: entry for entry in run.history}
    rows = []
    for number, sums in by_round(run).items():
        entry = closed.get(number, Round(round=number))
        rows.append((number + 1, entry.accuracy, entry.device_accuracy, entry.seconds, *_sums(sums)))
    columns = (
        Column(ROUND, "round"),
        Column("accuracy", "accuracy", percent),
        Column("device_accuracy", "on devices", percent),
        Column("seconds", "took", duration),
        *_SUMS,
    )
    return Table("rounds", columns, rows)


def _sensors(run: Run) -> Table:
    groups: dict[tuple[str, str, str, str], list[Job]] = {}
    for job in run.jobs:
        if job.quality is not None or job.known:
            key = (job.sensor or "", job.scope or "", job.quality or "", job.covers or "")
            groups.setdefault(key, []).append(job)
    rows = []
    for key, jobs in sorted(groups.items()):
        sums, names = drawn(jobs), sorted({job.device for job in jobs})
        shown = ", ".join(names[:6]) + (" \u2026" if len(names) > 6 else "")
        rows.append((*key, len(names), shown, len(jobs), sums.measured, sums.modelled))
    columns = (
        text_column("sensor", "sensor"),
        text_column("scope", "scope"),
        text_column("quality", "quality"),
        text_column("covers", "covers"),
        Column("devices", "devices", in_page=False),
        text_column("device_names", "devices"),
        Column("jobs", "jobs"),
        Column("joules", "measured", amount),
        Column("modelled_joules", "modelled", amount),
    )
    return Table("sensors", columns, rows)


def _jobs(run: Run) -> Table:
    shows = {"idle_watts": digits, "idle_modelled_watts": digits}
    columns = tuple(
        text_column(key, key) if key in _TEXTS else Column(key, key, shows.get(key, str)) for key in _JOB_KEYS
    )
    rows = [tuple(job.round + 1 if key == ROUND else getattr(job, key) for key in _JOB_KEYS) for job in run.jobs]
    return Table("jobs", columns, rows)


def _sensor_words(job: Job) -> str:
    if job.quality == "modelled" or job.scope == "modelled":
        return "modelled" if job.sensor in (None, "modelled") else f"{job.sensor} (modelled)"
    return f"{job.sensor or 'unnamed'} ({job.scope or 'unknown scope'})"
