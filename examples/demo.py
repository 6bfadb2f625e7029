"""The demonstration: eight agents with different shares of handwritten digits train one model over MQTT.

``scripts/demo`` runs it. A broker, a coordinator and eight ``edge-agent`` processes start on this machine, every agent
gets a non-IID share of the digits that scikit-learn carries, and the model is trained without any share leaving its
agent. At the end ``runs/<id>/summary.json`` holds the figures, with what every job drew. Eight agents on one machine
would each measure all of it, so each models what its own CPU time and bytes add to an idle machine, and says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coordinator.report import run_ledger
from coordinator.store import Store
from examples.local_fleet import LocalFleet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
TEST_SHARE = 0.2
DIRICHLET_ALPHA = 0.5  # 0.5: most devices see three or four of the ten digits
PLAN = """name = "digits"
bundle = "{bundle}"
dataset = "digits"
rounds = {rounds}
seed = {seed}
test_set = "test.npz"

[participation]
target = {target}
minimum = 2
over_commit = 1.25
deadline_s = 30.0

[training]
epochs = 2
batch_size = 16
holdout_fraction = 0.1
hyper = {{ lr = 0.05, momentum = 0.9 }}
"""


def load_digits(seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Images float32 ``[n, 1, 8, 8]`` (0 to 16) and labels int64 ``[n]``: for training, and a test set apart."""
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    x = digits.images[:, None].astype(np.float32)
    y = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(y))
    held = int(len(y) * TEST_SHARE)
    test, train = order[:held], order[held:]
    return x[train], y[train], x[test], y[test]


def shares(labels: NDArray[Any], devices: int, seed: int) -> list[NDArray[Any]]:
    """Row numbers per device; the mix of labels follows a Dirichlet distribution, every device gets at least 20."""
    random = np.random.default_rng(seed)
    while True:
        parts: list[list[int]] = [[] for _ in range(devices)]
        for label in np.unique(labels):
            rows = random.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(random.dirichlet([DIRICHLET_ALPHA] * devices))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(piece.tolist())
        if min(len(part) for part in parts) >= 20:
            return [np.array(sorted(part)) for part in parts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; 0 if the run finished."""
    options = _parser().parse_args(arguments)
    folder = options.runs / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    x, y, test_x, test_y = load_digits(options.seed)
    np.savez(folder / "test.npz", x=test_x, y=test_y)
    shutil.copy(HERE / "digits.bundle", folder / "digits.bundle")
    target = max(2, options.devices - 2)
    plan = PLAN.format(bundle="digits.bundle", rounds=options.rounds, seed=options.seed, target=target)
    (folder / "plan.toml").write_text(plan)
    parts = shares(y, options.devices, options.seed)
    _say(f"{len(y)} training digits on {options.devices} devices, {len(test_y)} test digits that no device holds")
    started = time.monotonic()
    fleet = LocalFleet(folder)
    try:
        connection = fleet.start_coordinator()
        _say(f"broker {connection['broker']} at {connection['url']}")
        for number, rows in enumerate(parts):
            device = f"device-{number:02d}"
            fleet.start_agent(device, "digits", x[rows], y[rows])
            mix = ", ".join(
                f"{label}:{count}" for label, count in enumerate(np.bincount(y[rows], minlength=10)) if count
            )
            _say(f"  {device}  {len(rows):4d} digits  {mix}")
        run = fleet.command("submit", str(folder / "plan.toml"))["run"]
        summary = fleet.follow(run, options.timeout_s, _show_round)
        store = Store(fleet.state, create=False)
        summary["ledger"] = run_ledger(store, run)
        store.close()
        fleet.command("model", run, "-o", str(folder / "model.onnx"))
    finally:
        fleet.end()
    summary["wall_s"] = round(time.monotonic() - started, 2)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _table(summary)
    _say(f"\nsummary: {folder / 'summary.json'}\nmodel:   {folder / 'model.onnx'}\nlogs:    {folder / 'logs'}")
    return 0 if summary["status"] == "finished" else 1


def _show_round(entry: dict[str, Any]) -> None:
    energy = "".join(
        f"  {entry['energy'][key]:5.2f} J {word}"
        for key, word in (("joules", "measured"), ("modelled_joules", "modelled"))
        if entry["energy"][key] is not None
    )
    energy += " ?" if entry["energy"]["doubtful_jobs"] else ""
    accuracy = "" if entry["accuracy"] is None else f"accuracy {entry['accuracy']:6.1%}  "
    up, down = entry["bytes_up"] / 1e3, entry["bytes_down"] / 1e3
    _say(
        f"  round {entry['round'] + 1:3d}  {accuracy}{entry['updates']:2d} updates  "
        f"up {up:7.1f} kB  down {down:7.1f} kB  {entry['seconds']:5.2f} s{energy}"
    )


def _table(summary: dict[str, Any]) -> None:
    updates = sum(entry["updates"] for entry in summary["history"])
    dense = 4 * summary["elements"] * updates
    models = summary["bytes_down"] - summary["bytes_bundle"]
    _say("")
    for key in ("run", "status", "accuracy", "rounds", "devices", "seconds"):
        value = summary[key]
        _say(
            f"  {key:12s} {value:.{4 if key == 'accuracy' else 1}f}"
            if isinstance(value, float)
            else f"  {key:12s} {value}"
        )
    if updates:
        _say(f"\n  {'':12s} {'sent':>12s} {'as float32':>12s} {'saving':>8s}")
        for name, sent, ratio in (
            ("updates up", summary["bytes_up"], summary["ratio_up"]),
            ("models down", models, summary["ratio_down"]),
        ):
            _say(f"  {name:12s} {sent / 1e3:9.1f} kB {dense / 1e3:9.1f} kB {ratio or 0:7.1f}x")
        _say(f"  {'bundle':12s} {summary['bytes_bundle'] / 1e3:9.1f} kB, fetched once by each device")
        _say(
            f"\n  per update: {summary['encode_cpu_ms']:.1f} ms of CPU to encode, "
            f"{summary['written_bytes'] / 1e3:.1f} kB written to the device's storage"
        )

    _energy(summary)


def _energy(summary: dict[str, Any]) -> None:
    energy, ledger = summary["energy"], summary["ledger"]
    _say(f"\n  {'energy':34s} {'joules':>12s}")
    totals = {"measured": 0.0, "modelled": 0.0}
    rows = [
        ("training", "train_joules", "train_modelled_joules"),
        ("compression", "compress_joules", "compress_modelled_joules"),
        ("loading and evaluating", "other_joules", "other_modelled_joules"),
        ("radio", None, "radio_modelled_joules"),
    ]
    for name, measured, modelled in rows:
        for key, word in ((measured, "measured"), (modelled, "modelled")):
            values = [row[key] for row in ledger if key is not None and row[key] is not None]
            if values:
                totals[word] += sum(values)
                _say(f"  {name + ', ' + word:34s} {sum(values):12.1f} J")
    for word, joules in totals.items():
        if joules > 0:
            _say(f"  {'total, ' + word:34s} {joules:12.1f} J")
    if not any(energy[key] is not None for key in ("joules", "modelled_joules", "radio_modelled_joules")):
        _say("  unknown: no device has a sensor, or watts to model from")
    elif energy["unknown_jobs"]:
        _say(f"  unknown for {energy['unknown_jobs']} of {len(ledger)} jobs")
    if energy["doubtful_jobs"]:
        _say(f"  ? doubtful for {energy['doubtful_jobs']} of {len(ledger)} jobs: their devices' logs say why")
    _sources(ledger)


def _sources(ledger: list[dict[str, Any]]) -> None:
    sources = {(row["sensor"], row["quality"], row["covers"]) for row in ledger if row["quality"] or row["sensor"]}
    for sensor, quality, covers in sorted(sources, key=str):
        by = "by a model" if quality == "modelled" else f"measured by {sensor}"
        _say(f"  {by}: {covers or 'what it covers is not known here'}")
    if any(quality == "modelled" for _, quality, _ in sources):
        _say(
            "  but for the radio they are of the CPU time that the agents added; the first round also loads the models"
        )


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Eight agents train on handwritten digits.")
    parser.add_argument("--devices", type=int, default=8, help="how many agents (default 8)")
    parser.add_argument("--rounds", type=int, default=30, help="how many rounds (default 30)")
    parser.add_argument("--seed", type=int, default=1, help="of the shares and the run (default 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where results go (default ./runs)")
    parser.add_argument("--timeout-s", type=float, default=80.0, help="give up after so many seconds (default 80)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
