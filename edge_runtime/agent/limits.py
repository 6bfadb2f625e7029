"""What the owner's limits forbid, and which jobs a device cannot afford: pure decisions about what is known.

What is not known forbids nothing: a device without a thermometer has no thermal cap, one without a sensor of energy no
limit of joules. But who wants to train on external power or an unmetered link only must not pay for what the device
does not know: these two hold until it is known (:mod:`.limit_facts` tells the owner). A job's cost is what is known of
it at least, so a job is never declined for a guess.

Limits that end a job early and keep its work (joules of a job) do not decline it, as long as one step fits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edge_runtime.agent.hours import LocalTime, hours_left_s, hours_wait_s, parse_hours

if TYPE_CHECKING:
    from edge_runtime.agent.config import LimitsConfig
    from edge_runtime.messages import Declines, Job, Standing

MB = 1_000_000
RETRY_S = 900.0  # when to ask again, where nothing says when it will be otherwise
RECOVERY_S = 300.0  # likewise, of heat and memory
DEADLINES_LATE = 4.0  # a late update counts still; one that would be as late as that is work for nothing
MARGIN_C = 10.0  # below this margin to the thermal cap a device that chooses its own steps takes fewer
_LIMITS = (
    "only_when_charging",
    "only_unmetered",
    "hours",
    "battery_reserve_percent",
    "max_temperature_c",
    "min_free_memory_mb",
    "job_joules",
    "joules_per_day",
    "data_mb_per_month",
)
_KBIT_BYTES = 125.0
_JOULES_PER_WH = 3600.0


class Rate(NamedTuple):
    """What one training step takes here; None: unknown."""

    step_s: float | None = None
    step_joules: float | None = None


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What a device knows of itself at one moment; None: it cannot know.

    ``rates`` are by bundle (SHA-256), ``rate`` is of any other; ``samples`` by dataset; ``fetch_bytes`` would have to
    come for the job that is asked about. ``joules_today`` were drawn by jobs, ``month_bytes`` went over the link.
    ``local`` is None where the clock was never set.
    """

    battery_percent: float | None = None
    on_external_power: bool | None = None
    battery_wh: float | None = None
    temperature_c: float | None = None
    free_memory_bytes: float | None = None
    link_metered: bool | None = None
    up_kbit_s: float | None = None
    down_kbit_s: float | None = None
    joules_per_mb_up: float | None = None
    joules_per_mb_down: float | None = None
    rates: dict[str, Rate] = {}
    rate: Rate = Rate()
    samples: dict[str, int] = {}
    fetch_bytes: int | None = None
    joules_today: float = 0.0
    month_bytes: int = 0
    local: LocalTime | None = None

    def rate_of(self, bundle: str) -> Rate:
        """What one step of a bundle takes."""
        return self.rates.get(bundle, self.rate)


class Decline(NamedTuple):
    """Why a job is declined, and for about how long it would be. ``limit``: the owner's, if any job would be.

    ``keeps_work``: what runs may end after its step and send what it reached. ``slow``: by what a step took before.
    """

    reason: str
    for_s: float
    limit: Declines = ""
    keeps_work: bool = True
    slow: bool = False


class Cost(NamedTuple):
    """What a job takes at least. ``step_joules``: of one step."""

    steps: int = 0
    train_s: float = 0.0
    transfer_s: float = 0.0
    joules: float = 0.0
    step_joules: float = 0.0
    moved_bytes: int = 0
    memory_bytes: int = 0


def held(known: Known, limits: LimitsConfig) -> Decline | None:
    """The owner's limit that forbids all training now, the most urgent first; None: it may run."""
    free, heat, battery = known.free_memory_bytes, known.temperature_c, known.battery_percent
    least_mb, cap_c, reserve = limits.min_free_memory_mb, limits.max_temperature_c, limits.battery_reserve_percent
    if least_mb is not None and free is not None and free < least_mb * MB:
        short = f"{free / MB:.0f} MB of free memory is under limits.min_free_memory_mb = {least_mb:g}"
        return Decline(short, RECOVERY_S, "memory", keeps_work=False)  # to encode takes memory too
    if cap_c is not None and heat is not None and heat > cap_c:
        hot = f"{heat:.0f} degrees C is over limits.max_temperature_c = {cap_c:g}"
        return Decline(hot, RECOVERY_S, "heat")
    if reserve is not None and battery is not None and known.on_external_power is not True and battery < reserve:
        low = f"battery at {battery:.0f} % is under limits.battery_reserve_percent = {reserve:g}"
        return Decline(low, RETRY_S, "battery")
    if limits.only_when_charging and known.on_external_power is not True:
        power = "no external power" if known.on_external_power is False else "external power is unknown here"
        return Decline(f"{power}, and limits.only_when_charging is set", RETRY_S, "charging")
    if limits.only_unmetered and known.link_metered is not False:
        link = "the link is metered" if known.link_metered else "whether the link is metered is unknown here"
        return Decline(f"{link}, and limits.only_unmetered is set", RETRY_S, "metered")
    return _held_by_time(known, limits)


def decline(job: Job, known: Known, limits: LimitsConfig) -> Decline | None:
    """Why this job is declined now; None: it is taken."""
    return held(known, limits) or _unaffordable(cost_of(job, known), known, limits, job.deadline_s)


def standing_steps(standing: Standing, known: Known, limits: LimitsConfig) -> int:
    """How many steps of a standing assignment this device takes now: the most it can afford; 0: none.

    Of ``max_steps``, half of it, a quarter, ... ``min_steps``: the first that fits joules, battery, data and the hours
    that are left; fewer, too, when the device is close to its thermal cap.
    """
    if held(known, limits) is not None:
        return 0
    share = 1.0
    if limits.max_temperature_c is not None and known.temperature_c is not None:
        share = min(1.0, max(0.0, (limits.max_temperature_c - known.temperature_c) / MARGIN_C))
    left_s = _hours_left_s(known, limits)
    steps = standing.max_steps
    while True:
        cost = _trains(steps, known.rate_of(standing.bundle.sha256))
        fits = steps <= max(standing.min_steps, share * standing.max_steps) and cost.train_s <= left_s
        if fits and _unaffordable(cost, known, limits) is None:
            return steps
        if steps <= standing.min_steps:
            return 0
        steps = max(standing.min_steps, steps // 2)


def cost_of(job: Job, known: Known) -> Cost:
    """What a job takes at least, by what is known: steps of its bundle here, transfers, bytes."""
    fetch_bytes = known.fetch_bytes or 0
    whole_bytes = job.model.blobs[0].size_bytes if job.model.base is None and job.model.blobs else 0
    trained = _trains(_steps_of(job, known.samples.get(job.dataset)), known.rate_of(job.bundle.sha256))
    send_bytes = 0
    if job.epochs is not None or job.steps is not None:
        send_bytes = job.byte_budget or (whole_bytes if job.codec == "raw" else 0)
    up, down = known.joules_per_mb_up, known.joules_per_mb_down
    radio_joules = send_bytes / MB * (up or 0.0) + fetch_bytes / MB * (down or 0.0)
    transfer_s = _seconds(fetch_bytes, known.down_kbit_s) + _seconds(send_bytes, known.up_kbit_s)
    return trained._replace(
        transfer_s=transfer_s,
        joules=min(trained.joules, job.joule_limit or math.inf) + radio_joules,
        moved_bytes=fetch_bytes + send_bytes,
        memory_bytes=job.bundle.size_bytes + sum(blob.size_bytes for blob in job.model.blobs),
    )


def in_force(limits: LimitsConfig) -> list[str]:
    """The owner's limits that are set, as ``agent.toml`` has them."""
    values = {name: getattr(limits, name) for name in _LIMITS}
    return [_line(name, value) for name, value in values.items() if value not in (None, False)]


def _line(name: str, value: float | str | bool) -> str:
    if value is True:
        return f"{name} = true"
    return f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value:g}"


def _held_by_time(known: Known, limits: LimitsConfig) -> Decline | None:
    """Limits of the hour, the day and the month."""
    local = known.local
    if _hours_left_s(known, limits) <= 0.0 and local is not None and limits.hours is not None:
        at = f"{int(local.day_second // 3600):02d}:{int(local.day_second // 60 % 60):02d}"
        wait_s = hours_wait_s(parse_hours(limits.hours), local.day_second)
        return Decline(f"{at} is outside limits.hours = {limits.hours}", wait_s, "hours")
    drawn, moved_mb = known.joules_today, known.month_bytes / MB
    if limits.joules_per_day is not None and drawn >= limits.joules_per_day:
        spent = f"{drawn:.3g} J were drawn today, and limits.joules_per_day = {limits.joules_per_day:g}"
        return Decline(spent, RETRY_S if local is None else local.day_left_s, "joules")
    if limits.data_mb_per_month is not None and moved_mb >= limits.data_mb_per_month:
        moved = f"{moved_mb:.3g} MB were moved this month, and limits.data_mb_per_month = {limits.data_mb_per_month:g}"
        return Decline(moved, RETRY_S if local is None else local.month_left_s, "data")
    return None


def _hours_left_s(known: Known, limits: LimitsConfig) -> float:
    """How long ``limits.hours`` lets training go on; 0: not now."""
    if limits.hours is None or known.local is None:
        return math.inf
    left_s = hours_left_s(parse_hours(limits.hours), known.local.day_second)
    return math.inf if left_s >= 86_400.0 else left_s


def _unaffordable(cost: Cost, known: Known, limits: LimitsConfig, deadline_s: float = math.inf) -> Decline | None:
    """What a job would take more of than there is."""
    local = known.local
    job_joules = math.inf if limits.job_joules is None else limits.job_joules
    drawn = min(cost.joules, job_joules)  # there it ends
    total_s = cost.train_s + cost.transfer_s
    free, least_mb = known.free_memory_bytes, limits.min_free_memory_mb or 0.0
    if free is not None and cost.memory_bytes > free - least_mb * MB:
        needs = (
            f"bundle and model alone take {cost.memory_bytes / MB:.3g} MB, and {free / MB:.0f} MB of memory are free"
        )
        return Decline(f"{needs} (limits.min_free_memory_mb = {least_mb:g})", RECOVERY_S)
    if total_s > DEADLINES_LATE * deadline_s:
        parts = f"{cost.steps} steps in {cost.train_s:.3g} s, transfers {cost.transfer_s:.3g} s"
        reason = f"the job would take about {total_s:.3g} s here ({parts}), and its deadline is {deadline_s:g} s"
        return Decline(reason, RETRY_S, slow=cost.train_s > cost.transfer_s)
    if cost.step_joules > job_joules:
        return Decline(
            f"one step draws about {cost.step_joules:.3g} J, and limits.job_joules = {job_joules:g}", RETRY_S
        )
    if limits.joules_per_day is not None and drawn > limits.joules_per_day - known.joules_today:
        left = max(0.0, limits.joules_per_day - known.joules_today)
        much = f"the job would draw about {drawn:.3g} J, and {left:.3g} J are left of"
        wait_s = RETRY_S if local is None else local.day_left_s
        return Decline(f"{much} limits.joules_per_day = {limits.joules_per_day:g}", wait_s)
    return _empties_battery(drawn, known, limits) or _moves_too_much(cost.moved_bytes, known, limits)


def _empties_battery(joules: float, known: Known, limits: LimitsConfig) -> Decline | None:
    percent, capacity_wh, reserve = known.battery_percent, known.battery_wh, limits.battery_reserve_percent or 0.0
    if percent is None or not capacity_wh or known.on_external_power is True or joules <= 0.0:
        return None
    after = percent - 100.0 * joules / (capacity_wh * _JOULES_PER_WH)
    if after >= reserve:
        return None
    would = f"the job would draw about {joules:.3g} J and leave the battery at {max(0.0, after):.1f} %"
    return Decline(f"{would}, under limits.battery_reserve_percent = {reserve:g}", RETRY_S)


def _moves_too_much(moved_bytes: int, known: Known, limits: LimitsConfig) -> Decline | None:
    cap_mb = limits.data_mb_per_month
    if cap_mb is None or moved_bytes <= cap_mb * MB - known.month_bytes:
        return None
    left_mb = max(0.0, cap_mb - known.month_bytes / MB)
    much = f"the job would move about {moved_bytes / MB:.3g} MB, and {left_mb:.3g} MB are left of"
    wait_s = RETRY_S if known.local is None else known.local.month_left_s
    return Decline(f"{much} limits.data_mb_per_month = {cap_mb:g}", wait_s)


def _trains(steps: int | None, rate: Rate) -> Cost:
    count = steps or 0
    step_joules = rate.step_joules or 0.0
    return Cost(
        count, count * (rate.step_s or 0.0), joules=count * step_joules, step_joules=step_joules if count else 0.0
    )


def _steps_of(job: Job, samples: int | None) -> int | None:
    """Steps of a job, or batches of an anchor's one pass; None: unknown."""
    if job.steps is not None and job.role == "trainer":
        return job.steps
    if job.epochs is None and job.role == "trainer":
        return 0
    if samples is None:
        return None
    trained = math.floor(samples * (1.0 - job.holdout_fraction))
    trained = trained if job.max_samples is None else min(trained, job.max_samples)
    return math.ceil(trained / job.batch_size) * (1 if job.role == "anchor" else job.epochs or 0)


def _seconds(size_bytes: int, kbit_s: float | None) -> float:
    return size_bytes / (kbit_s * _KBIT_BYTES) if kbit_s else 0.0
