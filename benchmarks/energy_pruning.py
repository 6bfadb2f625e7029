"""Pruning by predicted cost: what a training step costs and how accurate the model is, before and after.

    python -m benchmarks.energy_pruning [--models lenet har] [--share 0.48]

For each model of the zoo, on real data: train it, make probes of its layers, profile this machine, prune to a share of
the predicted cost of a step, train what is left, and meter the training steps of both bundles in turns. Without a
sensor of power or energy the cost is CPU time, and the keys say so. The test sets (Fashion-MNIST's own; the subjects
that the human activity set names as test) are never trained on. ``accuracy_control`` is the unpruned model after the
same further training with the same teacher, so that what pruning costs is told from what training adds.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import fashion
from benchmarks.metering import best_gauge, training_step
from benchmarks.report import parser, print_report
from energy.thor import interleave
from energy.thor.fitting import fit_profile
from energy.thor.machine import describe
from energy.thor.pack import Pack
from energy.thor.profiling import Profiler, Settings

if TYPE_CHECKING:
    import argparse

    from energy.thor.gauge import CpuGauge, MeterGauge
    from energy.thor.profile import Profile
    from exporters._tuning import Samples

BATCH = 32
ROUNDS = 15
TRAIN_EPOCHS = {"lenet": 10, "har": 15}
SETS = {"lenet": "fashion_mnist", "har": "uci_har"}


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    with best_gauge(options.sensor) as gauge:
        results = [result for name in options.models for result in _model(name, options, gauge)]
    print_report("energy_pruning", options, results)
    return 0


def _model(name: str, options: argparse.Namespace, gauge: CpuGauge | MeterGauge) -> list[dict[str, Any]]:
    """One result per seed; the profile is made once, since it depends on sizes alone."""
    import torch

    from examples.model_zoo import MODELS
    from exporters import export_bundle
    from exporters.probes import export_probes

    torch.set_num_threads(1)
    given = MODELS[name]()
    with tempfile.TemporaryDirectory() as work:
        bundle, packed = Path(work) / "model.bundle", Path(work) / "layers.probes"
        export_bundle(given["module"], given["example_input"], bundle, name=name, parity=False)
        export_probes([bundle], packed, per_kind=options.per_kind, seed=options.seed, batch=BATCH, progress=_say)
        profile = _profile(packed, options, gauge)
        seeds = range(options.seed, options.seed + options.seeds)
        return [_one(name, Path(work), profile, gauge, options=options, seed=seed) for seed in seeds]


def _one(
    name: str,
    folder: Path,
    profile: Profile,
    gauge: CpuGauge | MeterGauge,
    *,
    options: argparse.Namespace,
    seed: int,
) -> dict[str, Any]:
    import copy

    import torch

    from examples.model_zoo import MODELS
    from exporters import export_bundle
    from exporters._tuning import Tuning, fine_tune, score
    from exporters.thinning import Task, thin

    train, test = _samples(name, options, seed)
    given = MODELS[name]()
    module, example = given["module"], given["example_input"]
    torch.manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    began_s = time.monotonic()
    _say(f"{name}, seed {seed}: training on {len(train.x)} samples")
    fine_tune(module, train, "cross_entropy", Tuning(TRAIN_EPOCHS[name], learning_rate=0.05, seed=seed))
    trained_s = time.monotonic() - began_s
    task, tuning = Task("cross_entropy", "sgd", train, test, BATCH), Tuning(options.epochs, seed=seed)
    began_s = time.monotonic()
    made = thin(module, example, task, profile, share=options.share, tuning=tuning, progress=_say)
    pruned_s = time.monotonic() - began_s
    control = copy.deepcopy(module)
    fine_tune(control, train, "cross_entropy", tuning, teacher=module)
    _, accuracy_control = score(control, test, "cross_entropy")
    before, after = folder / "before.bundle", folder / "after.bundle"
    export_bundle(module, example, before, name=name, parity=False)
    export_bundle(made.module, example, after, name=name)
    costs = _metered({"before": before, "after": after}, gauge, seed)
    unit = gauge.quantity
    assert made.before.accuracy is not None
    assert made.after.accuracy is not None
    assert accuracy_control is not None
    return {
        "model": name,
        "data": SETS[name],
        "seed": seed,
        "quantity": unit,
        f"{unit}_per_step_before": costs["before"],
        f"{unit}_per_step_after": costs["after"],
        "metered_share": costs["after"] / costs["before"],
        "predicted_share": made.after.step.total / made.before.step.total,
        "accuracy_before": made.before.accuracy,
        "accuracy_control": accuracy_control,
        "accuracy_after": made.after.accuracy,
        "points_lost": 100 * (made.before.accuracy - made.after.accuracy),
        "points_lost_to_control": 100 * (accuracy_control - made.after.accuracy),
        "flops_share": made.after.flops / made.before.flops,
        "parameters_before": made.before.parameters,
        "parameters_after": made.after.parameters,
        "bundle_bytes_before": before.stat().st_size,
        "bundle_bytes_after": after.stat().st_size,
        "training_seconds": round(trained_s, 1),
        "profiling_seconds": round(profile.profiling_seconds, 1),
        "pruning_seconds": round(pruned_s, 1),
    }


def _profile(packed: Path, options: argparse.Namespace, gauge: CpuGauge | MeterGauge) -> Profile:
    pack = Pack(packed)
    try:
        profiler = Profiler(pack, gauge, Settings(BATCH, budget_s=options.budget_s, seed=options.seed), say=_say)
        for points in profiler.batches():
            _say(f"{points} layers measured")
        return fit_profile(profiler.profile(describe(1), time.time()), options.seed)
    finally:
        pack.close()


def _metered(bundles: dict[str, Path], gauge: CpuGauge | MeterGauge, seed: int) -> dict[str, float]:
    """Cost of one training step of each bundle, measured in turns."""
    steppers = {name: training_step(path, BATCH)[1] for name, path in bundles.items()}
    for stepper in steppers.values():
        stepper.warm_up(gauge.window_s)
    anchor = interleave.Anchor(steppers["before"], gauge)
    limits = interleave.Limits(0.0, ROUNDS, ROUNDS)
    found = interleave.measure(steppers, anchor, gauge, random.Random(seed), limits=limits)
    scale = anchor.median(gauge.quantity)
    if scale is None:
        raise SystemExit("the sensor gave no figure; choose another one with --sensor")
    return {name: scale * float(np.median(ratios[gauge.quantity])) for name, ratios in found.items()}


def _samples(name: str, options: argparse.Namespace, seed: int) -> tuple[Samples, Samples]:
    import torch

    from exporters._tuning import Samples

    if name == "lenet":
        data = fashion.load(options.data)
        rows = np.random.default_rng(seed).permutation(len(data["y_train"]))[: options.images]
        arrays = data["x_train"][rows], data["y_train"][rows], data["x_test"], data["y_test"]
    else:
        path = options.data / "uci_har" / "uci_har.npz"
        if not path.exists():
            raise SystemExit(f"{path}: not there; name the folder of the data sets with --data or $EDGE_DATA")
        with np.load(path, allow_pickle=False) as file:
            x, y, held = file["X"].astype(np.float32), file["y"].astype(np.int64), file["src_test"]
        arrays = x[~held], y[~held], x[held], y[held]
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return Samples(tensors[0], tensors[1]), Samples(tensors[2], tensors[3])


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--models", nargs="+", choices=sorted(SETS), default=["lenet", "har"], help="of the zoo")
    result.add_argument("--share", type=float, default=0.48, help="of the predicted cost of a step that may stay")
    result.add_argument("--epochs", type=int, default=6, help="of training after pruning")
    result.add_argument("--images", type=int, default=20_000, help="training images of Fashion-MNIST")
    result.add_argument("--per-kind", type=int, default=24, help="other sizes per kind of layer in the probe pack")
    result.add_argument("--budget-s", type=float, default=90.0, help="time to profile, per model")
    result.add_argument("--sensor", default="auto", help="a name of edge-energy sensors, auto or none")
    result.add_argument("--seed", type=int, default=0, help="the first of them, of everything random")
    result.add_argument("--seeds", type=int, default=2, help="how many")
    return result


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
