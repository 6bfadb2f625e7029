"""``edge-energy prune``: a bundle whose training step costs less, by the profile of the device that will train it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import UsageError

if TYPE_CHECKING:
    import argparse

    import torch
    from torch import nn

    from edge_runtime.bundle.manifest import Manifest
    from exporters._tuning import Samples
    from exporters.thinning import Figures, Task, Thinned

SUMMARY = "remove channels from a model until a step costs less on the device of a profile"
DESCRIPTION = """Removes channels from a trained model until one training step is predicted to cost a given share of
what it did on the profiled device, trains what is left towards the answers of the model that was, and exports it.

Channels go in steps: each takes a layer down to the next multiple of 4 or 8, so that the end may be below the share.
Every layer keeps a tenth of its channels, and at least 4.

SOURCE is MODULE:FUNCTION, as for edge-export bundle; --weights loads what edge-coordinator model wrote. The samples are
an .npz with x and y, as devices hold them; --test is judged, and never trained on. Runs on a workstation with PyTorch:
pip install "edge-training-runtime[prune]"."""
_HELD_OUT, _LEAST_TEST = 0.1, 20
EXAMPLE = (
    "  edge-coordinator model RUN -o trained.safetensors\n"
    "  edge-energy prune my_model:build --weights trained.safetensors --profile energy-profile.json \\\n"
    "      --data train.npz --test test.npz --share 0.5 -o smaller.bundle"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument("source", metavar="SOURCE", help="function that builds the model, as MODULE:FUNCTION")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="the bundle to write")
    parser.add_argument("--profile", type=Path, required=True, help="energy-profile.json of the device")
    parser.add_argument("--data", type=Path, required=True, help="samples to judge channels by and to train on (.npz)")
    parser.add_argument("--test", type=Path, help="samples that are only judged (default: a tenth of --data)")
    parser.add_argument("--weights", type=Path, help="trained parameters (.safetensors); default: those of SOURCE")
    parser.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="of the cost of a step that may stay (default 0.5); steps of whole blocks of channels may end below it",
    )
    parser.add_argument("--epochs", type=int, default=6, help="of training after pruning (default 6)")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of that training (default 0.02)")
    parser.add_argument("--batch", type=int, default=32, help="samples per step on the device (default 32)")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="LAYER", help="leave layers of this prefix whole"
    )
    parser.add_argument("--most-loss", type=float, metavar="POINTS", help="fail if accuracy falls by more than this")
    parser.add_argument("--seed", type=int, default=0, help="of orders and splits (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Prunes, trains, exports and compares; 1 if more accuracy was lost than ``--most-loss``."""
    from edge_runtime.errors import EdgeError
    from energy.errors import EnergyError
    from energy.errors import UsageError as EnergyUsageError

    try:
        return _run(options)
    except UsageError as error:
        raise EnergyUsageError(str(error)) from error
    except EdgeError as error:
        raise EnergyError(str(error)) from error


def _check_files(options: argparse.Namespace) -> None:
    """Before minutes go into anything."""
    for name, path in (("--data", options.data), ("--test", options.test), ("--weights", options.weights)):
        if path is not None and not path.exists():
            raise UsageError(f"{name} {path}: there is no such file; correct the path")
    if not options.output.parent.is_dir():
        raise UsageError(f"{options.output}: there is no folder {options.output.parent}; make it, or choose another -o")


def _run(options: argparse.Namespace) -> int:
    _check_files(options)
    try:
        import torch

        from exporters import _source, export_bundle
        from exporters._tuning import Tuning
        from exporters.thinning import Task, thin
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torch_pruning", "onnx", "onnxscript"):
            raise
        cure = 'pip install "edge-training-runtime[prune]"'
        raise UsageError(f"pruning needs {error.name}, which is not installed: {cure}") from error
    from edge_runtime.bundle import Bundle
    from energy.thor.profile import load_profile

    profile = load_profile(options.profile)
    given = _source.load(options.source, None, "float32")
    module: nn.Module = given.pop("module")
    example = torch.as_tensor(given.pop("example_input"))
    if options.weights is not None:
        _load_weights(module, options.weights)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before.bundle"
        export_bundle(module, example, before, **given, parity=False)
        manifest = Bundle.open(before).manifest
        bundle_bytes = before.stat().st_size
    train, test = _samples(options, manifest)
    task = Task(manifest.task.loss, manifest.optimizer.name, train, test, options.batch)
    tuning = Tuning(epochs=options.epochs, learning_rate=options.learning_rate, seed=options.seed)
    keep = tuple(options.keep)
    made = thin(module, example, task, profile, share=options.share, tuning=tuning, keep=keep, progress=_say)
    _say("exporting")
    export_bundle(made.module, example, options.output, **given)
    sizes = bundle_bytes, options.output.stat().st_size
    if options.json:
        print(json.dumps({"bundle": str(options.output), **report(made, task, sizes)}))
    else:
        print("\n".join(table(made, sizes)))
    lost = _lost(made)
    if options.most_loss is not None and lost is not None and lost > options.most_loss:
        _say(f"{lost:.2f} points of accuracy were lost, --most-loss allows {options.most_loss:g}")
        return 1
    return 0


def report(made: Thinned, task: Task, bundle_bytes: tuple[int, int]) -> dict[str, Any]:
    """Both networks as JSON; costs are keyed by their quantity, so that what was modelled says so."""
    return {
        "quantity": made.quantity,
        "batch": task.batch,
        "before": _json(made, made.before, bundle_bytes[0]),
        "after": _json(made, made.after, bundle_bytes[1]),
        "removals": [step._asdict() for step in made.removals],
    }


def table(made: Thinned, bundle_bytes: tuple[int, int]) -> list[str]:
    """Before and after, as lines of text."""
    from energy.commands.costs import QUANTITY_NAMES, amount

    name = f"predicted {QUANTITY_NAMES[made.quantity]} per step"
    rows = [["", "before", "after", "left"]]
    one, other = made.before, made.after
    costs = [amount(figures.step.total, made.quantity) for figures in (one, other)]
    rows.append([name, *costs, f"{other.step.total / one.step.total:.0%}"])
    rows.append(["  90 % interval", _span(one), _span(other), ""])
    for label, a, b in (
        ("FLOPs per sample", one.flops, other.flops),
        ("parameters", one.parameters, other.parameters),
        ("bundle, bytes", *bundle_bytes),
    ):
        rows.append([label, f"{a:,}", f"{b:,}", f"{b / a:.0%}"])
    if one.accuracy is not None and other.accuracy is not None:
        rows.append(["accuracy", f"{one.accuracy:.2%}", f"{other.accuracy:.2%}", f"{-(_lost(made) or 0):+.2f} points"])
    rows.append(["loss", f"{one.loss:.4f}", f"{other.loss:.4f}", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(
            text.rjust(width) if at else text.ljust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _span(figures: Figures) -> str:
    from energy.commands.costs import amount

    return " to ".join(amount(value, figures.step.quantity) for value in (figures.step.low, figures.step.high))


def _lost(made: Thinned) -> float | None:
    if made.before.accuracy is None or made.after.accuracy is None:
        return None
    return 100 * (made.before.accuracy - made.after.accuracy)


def _json(made: Thinned, figures: Figures, bundle_bytes: int) -> dict[str, Any]:
    return {
        f"predicted_{made.quantity}_per_step": figures.step.total,
        f"low_{made.quantity}_per_step": figures.step.low,
        f"high_{made.quantity}_per_step": figures.step.high,
        "flops_per_sample": figures.flops,
        "parameters": figures.parameters,
        "bundle_bytes": bundle_bytes,
        "accuracy": figures.accuracy,
        "loss": figures.loss,
    }


def _load_weights(module: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, torch.Tensor] = load_file(path)
        module.load_state_dict(found)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); correct --weights") from error
    except SafetensorError as error:
        raise UsageError(f"{path}: is no safetensors file ({error}); write it with edge-coordinator model") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path}: does not fit the model of SOURCE ({reason}); build the same model") from error


def _samples(options: argparse.Namespace, manifest: Manifest) -> tuple[Samples, Samples]:
    """Preprocessed as a device would; without ``--test`` every tenth sample is held out by its content."""
    if options.test is not None:
        return _read(options.data, manifest, 0.0)[0], _read(options.test, manifest, 0.0)[0]
    train, test = _read(options.data, manifest, _HELD_OUT)
    if len(test.x) < _LEAST_TEST:
        raise UsageError(
            f"{options.data}: a tenth of it, {len(test.x)} samples, is too little to judge accuracy by; give more, or "
            "name samples that are not trained on with --test"
        )
    return train, test


def _read(path: Path, manifest: Manifest, held_out: float) -> tuple[Samples, Samples]:
    import numpy as np
    import torch

    from edge_runtime.data import open_dataset
    from edge_runtime.data.config import DatasetConfig
    from edge_runtime.data.view import View, Window
    from edge_runtime.errors import DataError
    from exporters._tuning import Samples

    try:
        snapshot = open_dataset(DatasetConfig(name="samples", path=str(path)), code_dir="").snapshot()
    except DataError as error:  # its cures are for the agent's configuration
        reason = str(error).partition(";")[0].removeprefix("dataset 'samples': ")
        raise UsageError(f"{reason}; name an .npz with x and y, as devices hold them") from error
    view = View(path.stem, snapshot, manifest, Window(holdout_fraction=held_out))
    found = []
    for rows in (view.train, view.holdout):
        x = np.empty((len(rows), *manifest.inputs[0].shape), manifest.inputs[0].dtype)
        y = np.empty((len(rows), *manifest.target.shape), manifest.target.dtype)
        if len(rows):
            view.read(rows, x, y)
        found.append(Samples(torch.from_numpy(x), torch.from_numpy(y)))
    return found[0], found[1]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
