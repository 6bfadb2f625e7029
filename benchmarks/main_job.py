"""The main job on real data: phones of 21 people learn activities together, tested on nine other people.

    python -m benchmarks.main_job --data FOLDER/uci_har --devices 30

One agent process per training subject, a coordinator, a broker: the programs a user starts. The model is a 1-D CNN with
GroupNorm: every device holds one person, whose batch statistics are not those of the next. Devices train with Adam, and
the server adds momentum (FedAvgM). The centralised model is the same network in plain PyTorch on the pooled data of the
same subjects, with the same optimiser and as many passes over the data as the devices make.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import parser, print_report
from examples.local_fleet import LocalFleet

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray
    from torch import nn

TEST_SUBJECTS = (2, 4, 9, 10, 12, 13, 18, 20, 24)  # the set's own test subjects
MODEL_INPUT = (9, 128)
PLAN = """name = "activities"
bundle = "har.bundle"
dataset = "windows"
rounds = {rounds}
seed = {seed}
test_set = "test.npz"
evaluate_on_devices = false
server_optimizer = "momentum"
server_optimizer_options = {{ momentum = {server_momentum} }}

[participation]
target = {devices}
minimum = {devices}
deadline_s = 300.0

[training]
epochs = {epochs}
batch_size = {batch_size}
hyper = {{ lr = {lr} }}
{tables}"""


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    path = options.data / "uci_har.npz" if options.data.name == "uci_har" else options.data / "uci_har" / "uci_har.npz"
    if not path.exists():
        raise SystemExit(f"{path}: not there; name the folder of the data sets with --data or $EDGE_DATA")
    with np.load(path, allow_pickle=False) as file:
        x, y, subject = file["X"].astype(np.float32), file["y"].astype(np.int64), file["subject"]
    held = np.isin(subject, TEST_SUBJECTS)
    train_subjects = list(np.unique(subject[~held]))[: options.devices]
    shares = {f"subject-{number:02d}": (x[subject == number], y[subject == number]) for number in train_subjects}
    federated = run_federated(options, shares, (x[held], y[held]))
    pooled = np.isin(subject, train_subjects)
    began = time.monotonic()
    accuracy = train_centralised(options, (x[pooled], y[pooled]), (x[held], y[held]))
    result = {
        "devices": len(train_subjects),
        "train_windows": int(pooled.sum()),
        "test_windows": int(held.sum()),
        "local_epochs": options.epochs,
        "accuracy_federated": round(federated["accuracy"], 4),
        "accuracy_centralised": round(accuracy, 4),
        "accuracy_initial": round(federated["initial_accuracy"], 4),
        "rounds": federated["rounds"],
        "bytes_up": federated["bytes_up"],
        "bytes_down": federated["bytes_down"],
        "bytes_bundle": federated["bytes_bundle"],
        "ratio_up": federated["ratio_up"],
        "ratio_down": federated["ratio_down"],
        "encode_cpu_ms_per_update": federated["encode_cpu_ms"],
        "written_bytes_per_update": federated["written_bytes"],
        "seconds": round(federated["seconds"], 1),
        "seconds_centralised": round(time.monotonic() - began, 1),
    }
    print_report("main_job", options, [result])
    return 0


def activity_cnn(seed: int) -> nn.Module:
    """Windows float32 ``[batch, 9, 128]`` to logits ``[batch, 6]``."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(9, 32, 5, padding=2),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 5, padding=2),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 6),
    )


def run_federated(
    options: argparse.Namespace,
    shares: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    test: tuple[NDArray[Any], NDArray[Any]],
) -> dict[str, Any]:
    """Trains over MQTT; gives the run's summary."""
    import torch

    from exporters import export_bundle

    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        model = activity_cnn(options.seed)
        example = torch.randn(options.batch_size, *MODEL_INPUT)
        export_bundle(model, example, folder / "har.bundle", name="activities", optimizer="adam")
        np.savez(folder / "test.npz", x=test[0], y=test[1])
        plan = PLAN.format(
            rounds=options.rounds,
            seed=options.seed,
            tables=_tables(options),
            devices=len(shares),
            epochs=options.epochs,
            batch_size=options.batch_size,
            lr=options.lr,
            server_momentum=options.server_momentum,
        )
        (folder / "plan.toml").write_text(plan)
        fleet = LocalFleet(folder)
        try:
            fleet.start_coordinator()
            for device, (x, y) in shares.items():
                fleet.start_agent(device, "windows", x, y)
            run = fleet.command("submit", str(folder / "plan.toml"))["run"]
            summary = fleet.follow(run, 1000.0, _show_round)
        finally:
            fleet.end()
    if summary["status"] != "finished":
        raise SystemExit(f"run {run} {summary['status']}: {summary['reason']}")
    return summary


def train_centralised(
    options: argparse.Namespace,
    train: tuple[NDArray[Any], NDArray[Any]],
    test: tuple[NDArray[Any], NDArray[Any]],
) -> float:
    """Accuracy on the test subjects of the same model trained by PyTorch on the pooled data."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    model = activity_cnn(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    x, y = (torch.from_numpy(part) for part in train)
    model.train()
    for _ in range(options.rounds * options.epochs):
        for rows in torch.randperm(len(y)).split(options.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        predicted = model(torch.from_numpy(test[0])).argmax(1).numpy()
    return float((predicted == test[1]).mean())


def _tables(options: argparse.Namespace) -> str:
    """The plan's tables of codecs, where they are not the product's default."""
    text = ""
    for table, codec, ratio in (
        ("uplink", options.codec, options.ratio),
        ("downlink", options.downlink_codec, options.downlink_ratio),
    ):
        text += f"\n[{table}]\n" if codec or ratio else ""
        text += f'codec = "{codec}"\n' if codec else ""
        text += f"target_ratio = {ratio}\n" if ratio else ""
    return text


def _show_round(entry: dict[str, Any]) -> None:
    accuracy = "" if entry["accuracy"] is None else f", accuracy {entry['accuracy']:.4f}"
    print(
        f"round {entry['round'] + 1}: {entry['updates']} updates{accuracy}, {entry['seconds']:.2f} s", file=sys.stderr
    )


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--devices", type=int, default=30, help="at most so many; 21 of the 30 subjects train")
    result.add_argument("--rounds", type=int, default=60, help="federated rounds")
    result.add_argument("--epochs", type=int, default=1, help="passes of a device over its data in a round")
    result.add_argument("--batch-size", type=int, default=32, help="samples in a step")
    result.add_argument("--lr", type=float, default=0.002, help="learning rate of Adam, on devices and centralised")
    result.add_argument("--server-momentum", type=float, default=0.8, help="momentum of FedAvgM")
    result.add_argument("--codec", help="codec of the updates (default: the product's)")
    result.add_argument("--ratio", type=float, help="float32 bytes of an update over its own (default: the codec's)")
    result.add_argument("--downlink-codec", help="codec of the models (default: the product's)")
    result.add_argument("--downlink-ratio", type=float, help="the same of the changes of the model")
    result.add_argument("--seed", type=int, default=1, help="of the run and the centralised training")
    result.add_argument("--work", type=Path, default=None, help="folder on a real disk for the state")
    return result


if __name__ == "__main__":
    sys.exit(main())
