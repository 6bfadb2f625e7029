"""Whole models that were never profiled, predicted from layers that were: the THOR method on the machine it runs on.

    python -m benchmarks.thor_end_to_end [--budget-s 300] [--sensor auto]

A probe pack is made for six models of `examples.model_zoo`. Layers of the same kinds with other sizes are profiled by
`energy/thor/profiling.py` (never the layers of the judged models), fitted, and summed up for the six models and for
random variants of them. Before, between and after these the same models run as a whole, against the same anchor net,
and at the end so does each of the six models' own layers alone, to see whether they add up. Without a sensor of power
or energy the cost is CPU time, and keys say so.

``additivity_error``: sum of directly measured probes against the whole. ``error`` and ``inside`` (the whole lies in the
90 % interval): with the factor of one anchor, a judged model of another architecture, as means over these anchors;
``predicted``, ``low``, ``high`` and ``..._all_anchors``: with the factor of all five of them.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from benchmarks.metering import best_gauge, training_step
from benchmarks.report import parser, print_report
from energy.thor import interleave
from energy.thor.anchoring import factor_of
from energy.thor.estimate import Estimator
from energy.thor.fitting import fit_profile
from energy.thor.layers import LayerSpec, partition
from energy.thor.machine import describe
from energy.thor.pack import Pack
from energy.thor.probing import Stepper
from energy.thor.process import Process
from energy.thor.profile import Profile, save_profile
from energy.thor.profiling import Profiler, Settings

if TYPE_CHECKING:
    import argparse

    from energy.thor.gauge import CpuGauge, MeterGauge
    from energy.thor.profile import Quantity

BATCH = 32
JUDGED = ("resnet8", "mobile", "har", "lstm", "lenet", "mlp")
SUM_ROUNDS = 9
WHOLES_EVERY = 5  # batches of layers between rounds of whole models
ANCHOR = "anchor"  # half of a LeNet's step is arithmetic, half is memory: it feels other load as most networks do
_KEYS = {"joules": "joules", "modelled_joules": "modelled_joules", "cpu_seconds": "cpu_time", "seconds": "time"}


class Net(NamedTuple):
    """A whole model: its layers, and its training step ready to run."""

    name: str
    architecture: str
    layers: list[LayerSpec]
    stepper: Stepper


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        results = run(options, Path(folder))
    print_report("thor_end_to_end", options, results)
    return 0


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--variants", type=int, default=18, help="nets of random widths")
    arguments.add_argument("--per-kind", type=int, default=36, help="sizes per kind in the pack")
    arguments.add_argument("--budget-s", type=float, default=300.0, help="time to profile in")
    arguments.add_argument("--sensor", default="auto", help="auto, none, or a name from edge-energy sensors")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--save", type=Path, help="keep the profile there")
    return arguments.parse_args()


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One result per model, then the totals."""
    nets, anchor, pack_path = _prepare(options, folder)
    with best_gauge(options.sensor) as gauge:
        return _measured(options, nets, anchor, pack_path, gauge)


def _measured(
    options: argparse.Namespace, nets: list[Net], anchor: Net, pack_path: Path, gauge: CpuGauge | MeterGauge
) -> list[dict[str, Any]]:
    pack = Pack(pack_path)
    quantity = gauge.quantity
    settings = Settings(BATCH, options.threads, options.budget_s, options.seed, roles=("candidate",))
    profiler = Profiler(pack, gauge, settings, anchor=anchor.stepper, say=_say)
    wholes = _Wholes(nets, profiler, gauge, options.seed)
    wholes.take()
    wholes.seconds = 0.0
    for batch, points in enumerate(profiler.batches()):
        _say(f"{points} points")
        if batch % WHOLES_EVERY == 0:
            wholes.take()
    seconds = profiler.seconds - wholes.seconds
    wholes.take()
    _say("running each layer of the six models alone")
    sums = _sums(pack, nets[: len(JUDGED)], profiler, gauge, wholes)
    held = sums.held_out()
    profile = fit_profile(profiler.profile(describe(options.threads), time.time()))
    if options.save is not None:
        save_profile(profile, options.save)
    results = _judge(profile, nets, wholes, sums, quantity)
    layers = _held_out(profile, held, quantity)
    name = _KEYS[quantity]
    judged = [row for row in results if row["model"] in JUDGED]
    totals = {
        "model": "(all)",
        "quantity": quantity,
        f"mape_{name}": _mean(judged, "error"),
        f"mape_{name}_all_anchors": _mean(judged, "error_all_anchors"),
        f"mape_{name}_without_anchor": _mean(judged, "error_without_anchor"),
        f"mape_{name}_variants": _mean([row for row in results if row["model"] not in JUDGED], "error"),
        "additivity_error": _mean(judged, "additivity_error"),
        "coverage": _mean(results, "inside"),
        "coverage_all_anchors": _mean(results, "inside_all_anchors"),
        "models": len(results),
        **layers,
        "profiling_seconds": round(seconds, 1),
        "points": sum(len(family.points) for family in profile.families),
        "kinds": len(profile.families),
    }
    return [*results, totals]


def _prepare(options: argparse.Namespace, folder: Path) -> tuple[list[Net], Net, Path]:
    """The judged models with their variants, a net to divide drift out by, and the probe pack of the judged ones."""
    import torch

    from benchmarks.random_nets import ARCHITECTURES, build
    from examples.model_zoo import MODELS
    from exporters import export_bundle
    from exporters.probes import export_probes

    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    plan = [(name, name, MODELS[name]()) for name in JUDGED]
    for index in range(options.variants):
        architecture = ARCHITECTURES[index % len(ARCHITECTURES)]
        name = f"{architecture}-{index // len(ARCHITECTURES) + 1}"
        plan.append((name, architecture, build(architecture, name, rng)))
    plan.append((ANCHOR, ANCHOR, build("lenet", ANCHOR, rng)))
    nets = []
    for name, architecture, arguments in plan:
        _say(f"exporting {name}")
        path = folder / f"{name}.bundle"
        export_bundle(path=path, parity=False, **arguments)
        nets.append(_net(name, architecture, path, options.threads))
    pack = folder / "layers.probes"
    bundles = [folder / f"{name}.bundle" for name in JUDGED]
    export_probes(bundles, pack, per_kind=options.per_kind, seed=options.seed, batch=BATCH, progress=_say)
    return nets[:-1], nets[-1], pack


def _net(name: str, architecture: str, path: Path, threads: int) -> Net:
    manifest, stepper = training_step(path, BATCH, threads)
    return Net(name, architecture, partition(manifest, BATCH), stepper)


class _Wholes:
    """Whole models measured against the profiler's anchor, some rounds before and some after the profiling."""

    def __init__(self, nets: list[Net], profiler: Profiler, gauge: CpuGauge | MeterGauge, seed: int) -> None:
        self._nets, self._profiler, self._gauge = nets, profiler, gauge
        self._rng = random.Random(seed)
        self._ratios: dict[str, list[float]] = {net.name: [] for net in nets}
        for net in nets:
            net.stepper.warm_up(gauge.window_s)
        self.seconds = 0.0

    def take(self, names: set[str] | None = None, extra: dict[str, Stepper] | None = None) -> dict[str, list[float]]:
        """One round; with ``extra`` graphs several with these among them, whose ratios are returned."""
        _say("running whole models")
        began = time.monotonic()
        steppers = {net.name: net.stepper for net in self._nets if names is None or net.name in names}
        rounds = SUM_ROUNDS if extra else 1
        limits = interleave.Limits(0.0, rounds, rounds)
        found = interleave.measure(
            {**steppers, **(extra or {})}, self._profiler.anchor, self._gauge, self._rng, limits=limits
        )
        quantity = self._gauge.quantity
        for name in steppers if not extra else ():
            self._ratios[name] += found[name].get(quantity, [])
        self.seconds += time.monotonic() - began
        return {name: found[name].get(quantity, []) for name in found}

    def cost(self, name: str) -> float:
        """Per step."""
        scale = self._profiler.anchor.median(self._gauge.quantity)
        if scale is None or not self._ratios[name]:
            raise SystemExit("the sensor gave no figure for the anchor; choose another one with --sensor")
        return statistics.median(self._ratios[name]) * scale


class _Sums:
    """Layers of the judged models, measured alone and summed up."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.whole: dict[str, float] = {}
        self.layers: dict[tuple[str, tuple[tuple[str, int], ...]], float] = {}

    def held_out(self) -> list[tuple[str, dict[str, int], float]]:
        """Kind, sizes and cost of each distinct layer."""
        return [(kind, dict(sizes), cost) for (kind, sizes), cost in self.layers.items()]


def _sums(pack: Pack, nets: list[Net], profiler: Profiler, gauge: CpuGauge | MeterGauge, wholes: _Wholes) -> _Sums:
    """Each model's layers in the same rounds as the model itself."""
    sums = _Sums()
    quantity = gauge.quantity
    probes = {}
    for probe in pack.table.probes:
        if probe.role == "layer":
            probes[probe.kind, tuple(sorted(probe.spec(BATCH).sizes.items()))] = probe
    fixed = profiler.fixed()[quantity]
    for net in nets:
        calls: dict[Any, int] = {}
        for layer in net.layers:
            key = layer.kind, tuple(sorted(layer.sizes.items()))
            calls[key] = calls.get(key, 0) + layer.calls
        steppers = {}
        for index, key in enumerate(calls):
            steppers[f"#{index}"] = Stepper(pack.graph(probes[key]), batch=BATCH, limits=probes[key].limits)
            steppers[f"#{index}"].warm_up(gauge.window_s)
        ratios = wholes.take({net.name}, steppers)
        scale = profiler.anchor.median(quantity) or math.nan
        total = fixed
        for index, (key, count) in enumerate(calls.items()):
            cost = interleave.cost(ratios[f"#{index}"], scale, fixed, probes[key].runs).mean
            sums.layers[key] = cost
            total += count * cost
        sums.total[net.name] = total
        sums.whole[net.name] = statistics.median(ratios[net.name]) * scale
    return sums


def _judge(profile: Profile, nets: list[Net], wholes: _Wholes, sums: _Sums, quantity: Quantity) -> list[dict[str, Any]]:
    plain = Estimator(profile, quantity)
    predicted = {net.name: plain.estimate(net.layers) for net in nets}
    logs = {net.name: math.log(wholes.cost(net.name) / predicted[net.name].total) for net in nets}
    rows = []
    for net in nets:
        # Factors come from the judged models of the other architectures: each of them alone, and all of them.
        others = [logs[name] for name in JUDGED if name != net.architecture]
        whole = wholes.cost(net.name)
        singles = [_with_factor(profile, quantity, [other]).estimate(net.layers) for other in others]
        found = _with_factor(profile, quantity, others).estimate(net.layers)
        row: dict[str, Any] = {
            "model": net.name,
            "quantity": quantity,
            "whole": whole,
            "error": statistics.fmean(abs(one.total / whole - 1) for one in singles),
            "inside": statistics.fmean(one.low <= whole <= one.high for one in singles),
            "predicted": found.total,
            "low": found.low,
            "high": found.high,
            "error_all_anchors": abs(found.total / whole - 1),
            "inside_all_anchors": float(found.low <= whole <= found.high),
            "predicted_without_anchor": predicted[net.name].total,
            "error_without_anchor": abs(predicted[net.name].total / whole - 1),
            "extrapolated": sum(layer.extrapolated for layer in found.layers),
        }
        if net.name in sums.total:
            row["sum_of_probes"] = sums.total[net.name]
            row["additivity_error"] = abs(sums.total[net.name] / sums.whole[net.name] - 1)
            row["additivity_signed"] = sums.total[net.name] / sums.whole[net.name] - 1
        rows.append(row)
    return rows


def _with_factor(profile: Profile, quantity: Quantity, log_ratios: list[float]) -> Estimator:
    factor, error = factor_of(log_ratios)
    corrected = msgspec.structs.replace(profile, factor={quantity: factor}, factor_error={quantity: error})
    return Estimator(corrected, quantity)


def _held_out(profile: Profile, held: list[tuple[str, dict[str, int], float]], quantity: Quantity) -> dict[str, Any]:
    """Layers of the judged models, each predicted without having been profiled."""
    families = {family.kind: Process.of(family, quantity) for family in profile.families if quantity in family.fitted}
    errors, inside = [], []
    for kind, sizes, cost in held:
        mean, deviation = (float(value[0]) for value in families[kind].predict([sizes]))
        errors.append(abs(math.exp(mean) / cost - 1))
        inside.append(abs(math.log(cost) - mean) <= 1.645 * deviation)
    return {
        "held_out_layers": len(held),
        "held_out_mape": statistics.fmean(errors),
        "held_out_median_error": statistics.median(errors),
        "coverage_layers": statistics.fmean(inside),
    }


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
