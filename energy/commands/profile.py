"""``edge-energy profile``: measures what layers cost on this device, from a probe pack."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.commands import ways
from energy.commands.costs import QUANTITY_NAMES, amount
from energy.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from energy.metering.meter import Meter
    from energy.thor.gauge import CpuGauge, MeterGauge
    from energy.thor.layers import LayerSpec
    from energy.thor.probing import Stepper
    from energy.thor.profile import Family, Metered, Profile, Sensed
    from energy.thor.profiling import Profiler, Settings

DESCRIPTION = """Measures layers of the bundles that a probe pack was made for (edge-export probes) one by one, and
other sizes of the same kinds, until the budget is spent; then fits a model per kind. The profile is written after
every batch: ^C keeps what there is, and --resume goes on. Without a sensor of power or energy the cost is in CPU
seconds, and the profile says so. Nothing else should run on the device meanwhile."""
EXAMPLE = (
    "  edge-energy profile layers.probes -o energy-profile.json --budget-s 600 --anchor resnet8.bundle\n"
    "  edge-energy profile layers.probes -o points.json --measure-only    # on a device without SciPy\n"
    "  edge-energy fit points.json -o energy-profile.json                 # on a workstation"
)

DEFAULT_BUDGET_S = 300.0
IDLE_S = 5.0
ANCHOR_ROUNDS = 5
_ANCHOR_WINDOWS = 2.0  # the longest step, in bursts, of a model that others are compared with in every round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("pack", type=Path, metavar="PACK", help="probe pack of edge-export probes")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("energy-profile.json"), metavar="FILE", help="profile to write"
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        metavar="SECONDS",
        help="time to measure (default: 300, or three times what a fit needs); every kind of layer needs 4 points, and "
        "a budget too small for them is refused with one that does",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples per step (default: what the pack says)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a step (default 1)")
    parser.add_argument(
        "--anchor",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="a whole model to meter beside its layers; corrects estimates by what layers do not explain; repeatable",
    )
    parser.add_argument("--measure-only", action="store_true", help="fit nothing; needs no SciPy")
    parser.add_argument("--resume", action="store_true", help="keep the points that FILE has already")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of values and of the order (default 0)")
    ways.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Profiles; 0 also if it was interrupted, since what was measured is kept."""
    if (
        (options.budget_s is not None and options.budget_s <= 0)
        or options.threads < 1
        or (options.batch is not None and options.batch < 1)
    ):
        raise UsageError("--budget-s, --threads and --batch must be above 0")
    if not options.output.parent.is_dir():
        raise UsageError(f"{options.output}: there is no folder {options.output.parent}; make it, or choose another -o")
    if options.output.is_dir():
        raise UsageError(f"{options.output}: is a folder; name a file with -o")
    if not options.measure_only:
        _need_scipy()
    from energy.thor.pack import Pack

    pack = Pack(options.pack)
    opened = ways.open_ways(options)
    try:
        return _with_sensor(options, pack, opened)
    finally:
        pack.close()


def _with_sensor(options: argparse.Namespace, pack: Any, opened: ways.Ways) -> int:
    from energy.metering.conditions import read_conditions
    from energy.metering.meter import Meter
    from energy.metering.sampler import Sampler
    from energy.thor.gauge import CpuGauge, MeterGauge

    if not opened.ways:
        if options.sensor != "none":
            _say(ways.why_none(opened.found))
        _say("profiling by CPU seconds")
        return _profile(options, pack, CpuGauge(), None)
    meter = Meter(opened.ways, conditions=lambda: read_conditions(options.root), on_change=_say)
    try:
        with Sampler(meter):
            return _profile(options, pack, MeterGauge(meter), meter)
    finally:
        meter.close()


def _profile(options: argparse.Namespace, pack: Any, gauge: CpuGauge | MeterGauge, meter: Meter | None) -> int:
    from energy.thor.profiling import Profiler, Settings

    settings = Settings(
        batch=options.batch or pack.table.batch,
        threads=options.threads,
        budget_s=options.budget_s or DEFAULT_BUDGET_S,
        seed=options.seed,
        fitted=not options.measure_only,
    )
    job = _Job(options, gauge, meter)
    job.earlier = _earlier(options, gauge, job.sensed)
    known = [] if job.earlier is None else job.earlier.families
    settings = _with_budget(pack, settings, gauge, known, given=options.budget_s is not None)
    wholes = [_whole(path, settings) for path in options.anchor]
    job.idle()
    profiler = Profiler(pack, gauge, settings, anchor=_drift_anchor(wholes, gauge), known=known, say=_say)
    try:
        for points in profiler.batches():
            saved = job.save(profiler, fitted=False)
            in_all = sum(len(family.points) for family in saved.families)
            left_s = max(0.0, settings.budget_s - profiler.seconds)
            _say(f"{points} points new, {profiler.again} measured again, {in_all} in all; {left_s:.0f} s left")
    except KeyboardInterrupt:
        _say("interrupted: keeping what was measured")
    job.idle()
    if wholes:
        job.save(profiler, fitted=False)
        job.meter_wholes(profiler, wholes, settings)
    _tell(options.output, job.save(profiler, fitted=not options.measure_only))
    return 0


def _with_budget(
    pack: Any, settings: Settings, gauge: CpuGauge | MeterGauge, known: list[Family], *, given: bool
) -> Settings:
    """Refuses a given budget that no fit of all kinds can come of, and makes the default one large enough.

    Without a fit, the points of several sessions may do.
    """
    from energy.thor.profiling import budget_need

    need = budget_need(pack, settings, gauge.window_s, known)
    if not given:
        settings = settings._replace(budget_s=max(settings.budget_s, 3 * need.least_s))
    if settings.budget_s >= need.least_s > 0:
        _say(f"{need.least_s:.0f} s of {settings.budget_s:.0f} s are needed for points enough to fit every kind")
    elif settings.fitted and need.least_s > 0:
        raise UsageError(f"{need.refusal(settings.budget_s)}, or --measure-only in several sessions with --resume")
    return settings


def _drift_anchor(wholes: list[_Whole], gauge: CpuGauge | MeterGauge) -> Stepper | None:
    """A whole model feels other load as most do, so it is the best to divide drift out by, unless it takes too long."""
    for whole in wholes:
        whole.stepper.warm_up(gauge.window_s)
        if whole.stepper.seconds <= _ANCHOR_WINDOWS * gauge.window_s:
            return whole.stepper
    return None


class _Whole(NamedTuple):
    """A bundle's training step, and its layers."""

    name: str
    layers: list[LayerSpec]
    stepper: Stepper


class _Job:
    """What is kept beside the points."""

    def __init__(self, options: argparse.Namespace, gauge: CpuGauge | MeterGauge, meter: Meter | None) -> None:
        from energy.thor.machine import describe
        from energy.thor.profile import Sensed

        self._options, self._gauge = options, gauge
        self._device = describe(options.threads, options.root)
        source = None if meter is None else meter.source
        self.sensed = None if source is None else Sensed(**source._asdict())
        self.earlier: Profile | None = None
        self._idle_watts: list[float] = []
        self._metered: list[Metered] = []

    def idle(self) -> None:
        """An idle stretch."""
        from energy.thor.gauge import MeterGauge

        if isinstance(self._gauge, MeterGauge):
            watts = self._gauge.idle(IDLE_S)
            self._idle_watts += [] if watts is None else [watts]

    def save(self, profiler: Profiler, *, fitted: bool) -> Profile:
        """Writes the profile, with what an earlier session had."""
        import msgspec

        from energy.thor.profile import save_profile

        profile = profiler.profile(self._device, time.time())
        watts = sum(self._idle_watts) / len(self._idle_watts) if self._idle_watts else None
        profile = msgspec.structs.replace(profile, sensed=self.sensed, idle_watts=watts, metered=self._metered)
        if self.earlier is not None:
            profile = _merged(self.earlier, profile)
        if fitted:
            from energy.thor.anchoring import anchored
            from energy.thor.fitting import fit_profile

            profile = anchored(fit_profile(profile))
        save_profile(profile, self._options.output)
        return profile

    def meter_wholes(self, profiler: Profiler, wholes: list[_Whole], settings: Settings) -> None:
        """Meters whole models, which set the factor when the profile is fitted."""
        from energy.thor.profile import Metered, MeteredLayer

        graphs = {whole.name: whole.stepper for whole in wholes}
        for stepper in graphs.values():
            stepper.warm_up(self._gauge.window_s)
        _say(f"running {', '.join(graphs)} as a whole")
        costs = profiler.compare(graphs, ANCHOR_ROUNDS)
        for whole in wholes:
            layers = [MeteredLayer(*layer) for layer in whole.layers]
            found = costs[whole.name]
            self._metered.append(Metered(model=whole.name, batch=settings.batch, layers=layers, costs=found))


def _merged(earlier: Profile, now: Profile) -> Profile:
    """What both sessions found; the points of the earlier one are in ``now`` already."""
    import msgspec

    again, here = {model.model for model in now.metered}, {family.kind for family in now.families}
    offset_s = earlier.profiling_seconds
    return msgspec.structs.replace(
        now,
        families=[*now.families, *(family for family in earlier.families if family.kind not in here)],
        profiling_seconds=offset_s + now.profiling_seconds,
        idle_watts=earlier.idle_watts if now.idle_watts is None else now.idle_watts,
        metered=[*(model for model in earlier.metered if model.model not in again), *now.metered],
        power=[*earlier.power, *(type(one)(offset_s + one.at_s, one.watts) for one in now.power)],
        windows=[
            *earlier.windows,
            *(type(one)(one.name, offset_s + one.start_s, offset_s + one.end_s) for one in now.windows),
        ],
        notes=list(dict.fromkeys([*earlier.notes, *now.notes])),
    )


def _need_scipy() -> None:
    import importlib.util

    if importlib.util.find_spec("scipy") is None:
        raise UsageError(
            "fitting needs SciPy, which is not installed: pip install 'edge-training-runtime[profile]', or give "
            "--measure-only and run edge-energy fit on a workstation"
        )


def _earlier(options: argparse.Namespace, gauge: CpuGauge | MeterGauge, sensed: Sensed | None) -> Profile | None:
    """The profile of an earlier session, if it was on this device, by the same sensor and software."""
    from energy.thor.profile import load_profile

    if not options.output.exists():
        return None
    if not options.resume:
        raise UsageError(f"{options.output} exists; give --resume to go on with it, or another -o")
    from energy.thor.machine import describe

    earlier, here = load_profile(options.output), describe(options.threads, options.root)
    pairs = [(name, getattr(earlier.device, name), getattr(here, name)) for name in ("name", "power_mode", "threads")]
    pairs += [("cost", earlier.quantity, gauge.quantity)]
    pairs += [("onnxruntime", earlier.device.software.get("onnxruntime"), here.software.get("onnxruntime"))]
    for name in ("sensor", "scope", "covers"):
        pairs.append((name, getattr(earlier.sensed, name, None), getattr(sensed, name, None)))
    for name, was, now in pairs:
        if was != now:
            raise UsageError(f"{options.output} is of {name} {was!r}, this would add {now!r}; choose another -o")
    return earlier


def _whole(path: Path, settings: Settings) -> _Whole:
    """The training step of a bundle, ready to run, and its layers."""
    from energy.thor.bundle import bundle_step
    from energy.thor.probing import Stepper

    step = bundle_step(path, settings.batch)
    stepper = Stepper(
        step.graph,
        batch=settings.batch,
        threads=settings.threads,
        limits=step.limits,
        hyper=step.hyper,
        footprint=0,
    )
    return _Whole(step.name, step.layers, stepper)


def _tell(path: Path, profile: Profile) -> None:
    points = sum(len(family.points) for family in profile.families)
    kinds, seconds = len(profile.families), profile.profiling_seconds
    print(f"{path}: {points} points of {kinds} kinds in {seconds:.0f} s, in {QUANTITY_NAMES[profile.quantity]}")
    for whole in profile.wholes:
        error = whole.predicted / whole.measured - 1
        measured, predicted = amount(whole.measured, whole.quantity), amount(whole.predicted, whole.quantity)
        found = f"{QUANTITY_NAMES[whole.quantity]} measured {measured}, its layers say {predicted}"
        print(f"  {whole.model}: {found} ({error:+.1%})")
    for note in profile.notes:
        print(f"  note: {note}")


def _say(line: str) -> None:
    print(f"edge-energy: {line}", file=sys.stderr, flush=True)
