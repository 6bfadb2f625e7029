"""``edge-energy profile``: measures what layers cost on this device, from a probe pack."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.commands import ways
from energy.errors import ProfileError, UsageError
from energy.layers import LayerSpec, partition

if TYPE_CHECKING:
    import argparse

    from energy.gauge import CpuGauge, MeterGauge
    from energy.meter import Meter
    from energy.probing import Stepper
    from energy.profile import Family, Profile
    from energy.profiling import Profiler, Settings

DESCRIPTION = """Measures layers of the bundles that a probe pack was made for (edge-export probes) one by one, and
other sizes of the same kinds, until the budget is spent; then fits a model per kind. The profile is written after
every batch: ^C keeps what there is, and --resume goes on. Without a sensor of power or energy the cost is CPU time, and
the profile says so. Nothing else should run on the device meanwhile."""
EXAMPLE = (
    "  edge-energy profile layers.probes -o energy-profile.json --budget-s 600 --anchor resnet8.bundle\n"
    "  edge-energy profile layers.probes -o points.json --measure-only    # on a device without SciPy\n"
    "  edge-energy fit points.json -o energy-profile.json                 # on a workstation"
)

IDLE_S = 5.0
ANCHOR_ROUNDS = 5
_ANCHOR_WINDOWS = 2.0  # the longest step, in bursts, of a model that others are compared with in every round
_UNITS = {
    "joules": "joules",
    "modelled_joules": "modelled joules",
    "cpu_seconds": "CPU seconds",
    "seconds": "seconds",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("pack", type=Path, metavar="PACK", help="probe pack of edge-export probes")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("energy-profile.json"), metavar="FILE", help="profile to write"
    )
    parser.add_argument(
        "--budget-s", type=float, default=300.0, metavar="SECONDS", help="time to measure (default 300)"
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
    if options.budget_s <= 0 or options.threads < 1 or (options.batch is not None and options.batch < 1):
        raise UsageError("--budget-s, --threads and --batch must be above 0")
    if options.measure_only and options.anchor:
        raise UsageError("--anchor needs the fitted models; leave out --measure-only, or give the anchor when fitting")
    if not options.measure_only:
        _need_scipy()
    from energy.pack import Pack

    pack = Pack(options.pack)
    opened = ways.open_ways(options)
    try:
        return _with_sensor(options, pack, opened)
    finally:
        pack.close()


def _with_sensor(options: argparse.Namespace, pack: Any, opened: ways.Ways) -> int:
    from energy.conditions import read_conditions
    from energy.gauge import CpuGauge, MeterGauge
    from energy.meter import Meter
    from energy.sampler import Sampler

    if not opened.ways:
        if options.sensor != "none":
            _say(ways.why_none(opened.found))
        _say("profiling by CPU time")
        return _profile(options, pack, CpuGauge(), None)
    meter = Meter(opened.ways, conditions=lambda: read_conditions(options.root), on_change=_say)
    try:
        with Sampler(meter):
            return _profile(options, pack, MeterGauge(meter), meter)
    finally:
        meter.close()


def _profile(options: argparse.Namespace, pack: Any, gauge: CpuGauge | MeterGauge, meter: Meter | None) -> int:
    from energy.profiling import Profiler, Settings

    settings = Settings(
        batch=options.batch or pack.table.batch,
        threads=options.threads,
        budget_s=options.budget_s,
        seed=options.seed,
        fitted=not options.measure_only,
    )
    wholes = [_whole(path, settings) for path in options.anchor]
    known = _known(options, gauge)
    job = _Job(options, gauge, meter)
    job.idle()
    profiler = Profiler(pack, gauge, settings, anchor=_drift_anchor(wholes, gauge), known=known, say=_say)
    try:
        for points in profiler.batches():
            job.save(profiler, fitted=False)
            _say(f"{points} points, {options.budget_s - profiler.seconds:.0f} s left")
    except KeyboardInterrupt:
        _say("interrupted: keeping what was measured")
    job.idle()
    profile = job.save(profiler, fitted=not options.measure_only)
    if wholes:
        profile = job.anchored(profiler, profile, wholes, settings)
    _tell(options.output, profile)
    return 0


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
        from energy.machine import describe

        self._options, self._gauge, self._meter = options, gauge, meter
        self._device = describe(options.threads, options.root)
        self._idle_watts: list[float] = []

    def idle(self) -> None:
        """An idle stretch."""
        from energy.gauge import MeterGauge

        if isinstance(self._gauge, MeterGauge):
            watts = self._gauge.idle(IDLE_S)
            self._idle_watts += [] if watts is None else [watts]

    def save(self, profiler: Profiler, *, fitted: bool) -> Profile:
        """Writes the profile."""
        import msgspec

        from energy.profile import Sensed, save_profile

        profile = profiler.profile(self._device, time.time())
        source = None if self._meter is None else self._meter.source
        sensed = None if source is None else Sensed(**source._asdict())
        watts = sum(self._idle_watts) / len(self._idle_watts) if self._idle_watts else None
        profile = msgspec.structs.replace(profile, sensed=sensed, idle_watts=watts)
        if fitted:
            profile = _fit(profile)
        save_profile(profile, self._options.output)
        return profile

    def anchored(self, profiler: Profiler, profile: Profile, wholes: list[_Whole], settings: Settings) -> Profile:
        """Meters whole models, and sets the factor by them."""
        from energy.anchoring import anchored
        from energy.profile import save_profile

        graphs = {whole.name: whole.stepper for whole in wholes}
        for stepper in graphs.values():
            stepper.warm_up(self._gauge.window_s)
        _say(f"running {', '.join(graphs)} as a whole")
        costs = profiler.compare(graphs, ANCHOR_ROUNDS)
        layers = {whole.name: whole.layers for whole in wholes}
        profile = anchored(profile, layers, costs, settings.batch)
        save_profile(profile, self._options.output)
        return profile


def _need_scipy() -> None:
    import importlib.util

    if importlib.util.find_spec("scipy") is None:
        raise UsageError(
            "fitting needs SciPy, which is not installed: pip install 'edge-training-runtime[profile]', or give "
            "--measure-only and run edge-energy fit on a workstation"
        )


def _fit(profile: Profile) -> Profile:
    """Fits the kinds that have points enough, and names the others."""
    import msgspec

    from energy.fitting import MINIMUM_POINTS, fit_profile

    few = [family.kind for family in profile.families if len(family.points) < MINIMUM_POINTS]
    enough = [family for family in profile.families if family.kind not in few]
    if not enough:
        raise ProfileError("too few points to fit any kind; give a larger --budget-s")
    notes = [f"too few points to fit {kind}: {MINIMUM_POINTS} are needed" for kind in few]
    fitted = fit_profile(msgspec.structs.replace(profile, families=enough))
    rest = [family for family in profile.families if family.kind in few]
    return msgspec.structs.replace(fitted, families=[*fitted.families, *rest], notes=[*profile.notes, *notes])


def _known(options: argparse.Namespace, gauge: CpuGauge | MeterGauge) -> list[Family]:
    """Families of an earlier session, if it was on this device and by the same cost."""
    from energy.profile import load_profile

    if not options.output.exists():
        return []
    if not options.resume:
        raise UsageError(f"{options.output} exists; give --resume to go on with it, or another -o")
    from energy.machine import describe

    earlier, here = load_profile(options.output), describe(options.threads, options.root)
    for name in ("name", "power_mode", "threads"):
        if getattr(earlier.device, name) != getattr(here, name):
            raise UsageError(
                f"{options.output} is of {name} {getattr(earlier.device, name)!r}, this is {getattr(here, name)!r}; "
                "choose another -o"
            )
    if earlier.quantity != gauge.quantity:
        raise UsageError(f"{options.output} has {earlier.quantity}, this would add {gauge.quantity}; choose another -o")
    return earlier.families


def _whole(path: Path, settings: Settings) -> _Whole:
    """Reads ``train.onnx`` and the manifest of a bundle, and checks the former's SHA-256."""
    from energy.probing import Stepper

    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read("manifest.json"))
            data = archive.read("train.onnx")
        listed = manifest["files"]["train.onnx"]["sha256"]
        limits = {"y": int(manifest["task"]["classes"] or 2)}
        name, hyper = str(manifest["name"]), dict(manifest["optimizer"]["hyper"])
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: is no bundle that can be metered ({error}); name one of edge-export bundle"
        ) from error
    if hashlib.sha256(data).hexdigest() != listed:
        raise UsageError(f"{path}: train.onnx does not match its SHA-256; copy the bundle again")
    layers = partition(manifest, settings.batch)
    embedded = next((layer for layer in layers if layer.kind == "embedding"), None)
    if embedded is not None:
        limits["x"] = embedded.sizes.get("in_channels", 1)
    stepper = Stepper(data, batch=settings.batch, threads=settings.threads, limits=limits, hyper=hyper, footprint=0)
    return _Whole(name, layers, stepper)


def _tell(path: Path, profile: Profile) -> None:
    points = sum(len(family.points) for family in profile.families)
    kinds, seconds = len(profile.families), profile.profiling_seconds
    print(f"{path}: {points} points of {kinds} kinds in {seconds:.0f} s, in {_UNITS[profile.quantity]}")
    for whole in profile.wholes:
        error = whole.predicted / whole.measured - 1
        found = f"measured {whole.measured:.3g} {_UNITS[whole.quantity]}, its layers say {whole.predicted:.3g}"
        print(f"  {whole.model}: {found} ({error:+.1%})")
    for note in profile.notes:
        print(f"  note: {note}")


def _say(line: str) -> None:
    print(f"edge-energy: {line}", file=sys.stderr, flush=True)
