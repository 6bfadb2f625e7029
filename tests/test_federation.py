"""Correctness of the federation: what the devices train together is what one would compute by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("onnx")

from coordinator.cli import main as coordinator_cli
from coordinator.model_blobs import read_model
from coordinator.report import run_ledger, run_summary
from edge_runtime.agent.pipe import TrainRequest
from edge_runtime.bundle import Bundle
from edge_runtime.compression.pipeline import decode
from edge_runtime.data.config import DatasetConfig
from edge_runtime.data.holdout import held_out, keys_of_ids, keys_of_rows
from edge_runtime.messages import Job, ModelRef
from edge_runtime.training.base import TrainSettings
from edge_runtime.training.job import JobRunner
from edge_runtime.training.schedule import BatchRule, batches, job_seed
from tests.edge_runtime import toy_bundle
from tests.energy import boards
from tests.support.federation import Federation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.events import AssignmentRow, UpdateRow

pytestmark = [pytest.mark.slow, pytest.mark.mosquitto]
DIGITS = Path(__file__).parents[1] / "examples" / "digits.bundle"
SIZES = {"pi-a": 20, "pi-b": 33, "pi-c": 47, "pi-d": 64}


def plan(bundle: Path, **changes: Any) -> dict[str, Any]:
    """A plan for the toy."""
    fields = {
        "name": "run",
        "bundle": str(bundle),
        "dataset": "d",
        "rounds": 2,
        "seed": 7,
        "retain_updates": "all",
        "participation": {"target": 1, "deadline_s": 60.0},
        "training": {"epochs": 1, "batch_size": 8},
        "uplink": {"codec": "raw"},
        "downlink": {"codec": "raw"},
    }
    return {**fields, **changes}


def toy_data(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Separable data of the toy's shape."""
    x = np.random.default_rng(seed).normal(size=(samples, 4)).astype(np.float32)
    return x, np.argmax(x[:, :3], axis=1).astype(np.int64)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return toy_bundle.write_bundle(tmp_path / "toy.bundle")


@pytest.fixture
def federation(tmp_path: Path, mosquitto: Any) -> Iterator[Federation]:
    with federated(tmp_path / "fed", mosquitto) as made:
        yield made


@contextmanager
def federated(folder: Path, broker: Any = None, **how: Any) -> Iterator[Federation]:
    made = Federation(folder, broker, **how)
    try:
        yield made
    finally:
        made.close()


SLOW = """
import time
from edge_runtime.data import DatasetConfig, open_dataset
def make(config):
    snapshot = open_dataset(DatasetConfig(name=config.name, path=config.options["path"])).snapshot()
    batch = snapshot.batch
    snapshot.batch = lambda indices: (time.sleep(0.03), batch(indices))[1]
    return type("Slow", (), {"snapshot": lambda self: snapshot})()
"""


def test_what_speaks_against_a_job_reaches_the_ledger(
    federation: Federation, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A board that throttles says so with its joules, and the coordinator marks them; the other one's are beside it."""
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the workers
    data = toy_bundle.write_data(tmp_path / "d.npz", 60)
    for name, step in (("pi-a", 0), ("pi-b", 3)):
        root = boards.orin_nano(tmp_path / name)
        boards.cooling(root, [("cpufreq-cpu0", step)])
        slow = DatasetConfig(name="d", factory="slow:make", options={"path": str(data)})
        federation.agent(name, slow, energy_root=root)
    rules = {"target": 2, "minimum": 2, "deadline_s": 60.0}
    run = federation.submit(**plan(toy, rounds=1, participation=rules, training={"steps": 15}))
    federation.finish(run)
    rows = {row["device"]: row for row in run_ledger(federation.store, run)}
    assert [row["sensor"] for row in rows.values()] == ["jetson", "jetson"]
    assert rows["pi-b"]["doubtful"]
    assert rows["pi-b"]["other_joules"] > 0
    energy = run_summary(federation.store, run)["energy"]
    assert energy["doubtful_jobs"] == sum(row["doubtful"] for row in rows.values())
    parts = [row[key] for row in rows.values() for key in ("train_joules", "compress_joules", "other_joules")]
    assert energy["joules"] == pytest.approx(sum(part for part in parts if part is not None))


def model_of(fed: Federation, run: str, version: int | None = None) -> np.ndarray:
    """The vector of a model version, the latest by default."""
    row = fed.row(run)
    bundle = Bundle.open(fed.store.blobs.path(row.bundle.sha256))
    blobs = {0: row.initial_model, **{entry.version: entry.model for entry in fed.store.rounds(run)}}
    return read_model(fed.store.blobs, blobs[row.version if version is None else version], bundle.layout())


def delta_of(fed: Federation, update: UpdateRow, bundle: Bundle) -> np.ndarray:
    data = fed.store.blobs.path(update.blob.sha256).read_bytes()
    return decode(data, {"delta": bundle.layout()})["delta"].vector()


def test_one_device_equals_plain_torch(federation: Federation) -> None:
    """One device with all data trains what torch trains on the same batches, its optimiser made anew each round."""
    torch = pytest.importorskip("torch")
    from sklearn.datasets import load_digits

    from examples.digits import build

    digits = load_digits()
    x, y = digits.images[:300, None].astype(np.float32), digits.target[:300].astype(np.int64)
    federation.agent("pi", (x, y))
    training = {"epochs": 1, "batch_size": 16, "hyper": {"lr": 0.05, "momentum": 0.9}}
    run = federation.submit(**plan(DIGITS, rounds=3, training=training))
    federation.finish(run)
    bundle = Bundle.open(DIGITS)
    module = build()["module"]
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in bundle.initial_tensors().items()})
    for round_ in range(3):
        (assignment,) = federation.store.assignments(run, round_)
        settings = TrainSettings(epochs=1, batch_size=16, seed=job_seed(7, "pi", assignment.assignment))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        for rows in batches(300, settings, BatchRule(minimum=bundle.manifest.batch.minimum)):
            optimizer.zero_grad()
            logits = module(torch.from_numpy(x[rows] / 16))
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(y[rows])).backward()
            optimizer.step()
        state = {name: value.numpy() for name, value in module.state_dict().items()}
        found = bundle.layout().split(model_of(federation, run, round_ + 1))
        assert found.keys() == state.keys()
        for name, tensor in found.items():
            np.testing.assert_allclose(tensor, state[name], atol=5e-5, rtol=1e-3, err_msg=f"round {round_}: {name}")


def test_many_devices_equal_fedavg_in_any_order(tmp_path: Path, mosquitto: Any, toy: Path) -> None:
    """Four devices of different size give the same bits in every order of arrival, and these are FedAvg's."""
    finals, devices = [], list(SIZES)
    for number, order in enumerate([devices, devices[::-1], [devices[n] for n in (2, 0, 3, 1)]]):
        with federated(tmp_path / f"order-{number}", mosquitto) as fed:
            for seed, (device, size) in enumerate(SIZES.items()):
                fed.agent(device, toy_data(size, seed), hold=True)
            participation = {"target": 4, "minimum": 4, "deadline_s": 60.0}
            run = fed.submit(**plan(toy, participation=participation))
            for round_ in range(2):
                fed.until(lambda fed=fed: len(fed.held) == 4, "all updates")
                for count, device in enumerate(order, 1):
                    fed.release(device)
                    fed.until(lambda: came(fed, run, round_) >= count, f"the update of {device}")  # noqa: B023
                fed.until(lambda: fed.row(run).version > round_, "the round to close")  # noqa: B023
            fed.finish(run)
            finals.append(model_of(fed, run).tobytes())
            if number == 0:
                check_fedavg(fed, run, toy, tmp_path)
    assert finals[0] == finals[1] == finals[2]


def came(fed: Federation, run: str, round_: int) -> int:
    return sum(row.status == "received" for row in fed.store.assignments(run, round_))


def check_fedavg(fed: Federation, run: str, toy: Path, folder: Path) -> None:
    """Twenty lines of NumPy, from the stored updates and from models trained here without any federation."""
    bundle = Bundle.open(toy)
    model = bundle.initial_vector()
    runner = JobRunner()
    for round_ in range(2):
        total, weights = np.zeros(len(model), np.float64), 0.0
        updates = {row.update.device: row for row in fed.store.counted_updates(run, round_)}
        assignments = {row.device: row for row in fed.store.assignments(run, round_)}
        assert updates.keys() == assignments.keys() == SIZES.keys()
        for device in sorted(SIZES, key=lambda name: updates[name].update):
            delta = delta_of(fed, updates[device], bundle)
            alone = train_alone(runner, fed, assignments[device], bundle, folder)
            assert np.array_equal(delta, alone), f"round {round_}, {device}: not what the device trains by itself"
            total += SIZES[device] * delta.astype(np.float64)
            weights += SIZES[device]
        model = (model + total / weights).astype(np.float32)
        stored = model_of(fed, run, round_ + 1)
        np.testing.assert_allclose(stored, model, rtol=1e-6, atol=1e-8)
        model = stored


def train_alone(
    runner: JobRunner, fed: Federation, row: AssignmentRow, bundle: Bundle, folder: Path, **changes: Any
) -> np.ndarray:
    """What a device trains for an assignment, done here."""
    fields = {"epochs": 1, "batch_size": 8, "seed": 7, "dataset": "d", "deadline_s": 9.0, "evaluate": False}
    stored = fed.row(row.run)
    job = Job(
        run=row.run,
        assignment=row.assignment,
        round=row.round,
        model_version=row.version,
        bundle=stored.bundle,
        model=ModelRef(blobs=[row.model]),
        **{**fields, **changes},
    )
    folder = folder / "alone"
    folder.mkdir(exist_ok=True)
    request = TrainRequest(
        job=job,
        device=row.device,
        bundle_path=str(fed.store.blobs.path(stored.bundle.sha256)),
        model_paths=[str(fed.store.blobs.path(row.model.sha256))],
        output_folder=str(folder),
        dataset=fed.agents[row.device].config.data[0],
    )
    return decode(Path(runner.run(request).path).read_bytes(), {"delta": bundle.layout()})["delta"].vector()


def test_evaluations_agree_with_numpy_and_the_model_predicts(
    federation: Federation, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hold-outs and test set give NumPy's figures; the exported ONNX and safetensors reproduce the accuracy."""
    data = {device: toy_data(size, seed) for seed, (device, size) in enumerate(SIZES.items())}
    for device, arrays in data.items():
        federation.agent(device, arrays)
    test_x, test_y = toy_data(151, 99)
    np.savez(tmp_path / "test.npz", x=test_x, y=test_y)
    participation = {"target": 4, "minimum": 4, "deadline_s": 60.0}
    training = {"epochs": 2, "batch_size": 8, "holdout_fraction": 0.25}
    given = plan(toy, participation=participation, training=training, test_set=str(tmp_path / "test.npz"))
    run = federation.submit(**given)
    federation.finish(run)
    bundle = Bundle.open(toy)

    def figures(version: int, x: np.ndarray, y: np.ndarray) -> tuple[float, int]:
        model = bundle.layout().split(model_of(federation, run, version).astype(np.float64))
        logits = x @ model["w"] + model["b"]
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return -np.log(chances[np.arange(len(y)), y]).sum(), int((logits.argmax(1) == y).sum())

    masks = {device: held_out(keys_of_ids(range(len(y))), 0.25) for device, (_, y) in data.items()}
    held_x = np.concatenate([x[masks[device]] for device, (x, _) in data.items()])
    held_y = np.concatenate([y[masks[device]] for device, (_, y) in data.items()])
    for row in federation.store.rounds(run):
        loss, correct = figures(row.version, test_x, test_y)
        assert (row.test.samples, row.test.correct) == (151, correct)
        assert row.test.loss_sum == pytest.approx(loss, rel=1e-4)
        loss, correct = figures(row.version - 1, held_x, held_y)
        assert (row.devices.samples, row.devices.correct) == (len(held_y), correct)
        assert row.devices.loss_sum == pytest.approx(loss, rel=1e-4)
        assert row.samples == sum(SIZES.values()) - len(held_y)
    state = ["--state", str(tmp_path / "fed" / "coordinator")]
    for suffix in ("onnx", "safetensors"):
        assert coordinator_cli(["model", run, "-o", str(tmp_path / f"model.{suffix}"), *state]) == 0
    capsys.readouterr()
    assert coordinator_cli(["status", run, "--json", *state]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    script = (
        "import sys, numpy as np, onnxruntime as o\n"
        "d = np.load(sys.argv[2]); s = o.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "print((s.run(None, {s.get_inputs()[0].name: d['x']})[0].argmax(1) == d['y']).mean())"
    )
    files = [str(tmp_path / "model.onnx"), str(tmp_path / "test.npz")]
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(accuracy, abs=1e-12)
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    logits = test_x @ tensors["w"] + tensors["b"]
    assert (logits.argmax(1) == test_y).mean() == pytest.approx(accuracy, abs=1e-12)


def test_digits_of_the_command_line_predict_as_the_run_says(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A convolutional network with preprocessing: the ONNX file, fed as its metadata says, has the run's accuracy."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = digits.images[:, None].astype(np.float32), digits.target.astype(np.int64)
    np.savez(tmp_path / "test.npz", x=x[1200:], y=y[1200:])
    for number in range(2):
        federation.agent(f"pi-{number}", (x[number:800:2], y[number:800:2]))
    participation = {"target": 2, "minimum": 2, "deadline_s": 60.0}
    given = plan(DIGITS, participation=participation, training={"epochs": 2, "batch_size": 16})
    run = federation.submit(**given, test_set=str(tmp_path / "test.npz"))
    federation.finish(run)
    state = ["--state", str(tmp_path / "fed" / "coordinator")]
    assert coordinator_cli(["model", run, "-o", str(tmp_path / "model.onnx"), *state]) == 0
    capsys.readouterr()
    assert coordinator_cli(["status", run, "--json", *state]) == 0
    summary = json.loads(capsys.readouterr().out)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (steps,) = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"]).values()
    fed_x = x[1200:]
    for step in steps:
        fed_x = ((fed_x * step["scale"] - step.get("mean", 0)) / step.get("std", 1)).astype(np.float32)
    found = session.run(None, {session.get_inputs()[0].name: fed_x})[0].argmax(1)
    assert (found == y[1200:]).mean() == pytest.approx(summary["accuracy"], abs=1e-12)
    assert summary["accuracy"] > 0.5


def test_late_updates_count_with_their_staleness(federation: Federation, toy: Path) -> None:
    """An update that misses its round enters the next one with samples / sqrt(2), and the model is made of that."""
    for device, size in (("pi-a", 20), ("pi-b", 33), ("pi-slow", 47)):
        federation.agent(device, toy_data(size, size), hold=True)
    participation = {"target": 2, "minimum": 2, "over_commit": 1.5, "deadline_s": 60.0}
    run = federation.submit(**plan(toy, participation=participation))
    federation.until(lambda: len(federation.held) == 3, "three updates")
    for device in ("pi-a", "pi-b"):
        federation.release(device)
    federation.until(lambda: federation.row(run).version == 1, "round 0 to close")
    federation.until(lambda: {"pi-a", "pi-b"} <= federation.held.keys(), "updates of round 1")
    federation.release("pi-slow")
    federation.until(lambda: came(federation, run, 0) == 3, "the late update")
    for device in ("pi-a", "pi-b"):
        federation.release(device)
    federation.finish(run)
    first, second = federation.store.rounds(run)
    assert (first.updates, first.late_updates, second.updates, second.late_updates) == (2, 0, 3, 1)
    bundle, total, weights = Bundle.open(toy), 0.0, 0.0
    for row in federation.store.counted_updates(run, 1):
        weight = {"pi-a": 20, "pi-b": 33, "pi-slow": 47 / 2**0.5}[row.update.device]
        assert row.weight == pytest.approx(weight, rel=1e-12)
        total = total + weight * delta_of(federation, row, bundle).astype(np.float64)
        weights += weight
    expected = model_of(federation, run, 1) + total / weights
    np.testing.assert_allclose(model_of(federation, run, 2), expected, rtol=1e-5, atol=1e-7)


def test_zstd_changes_no_bit(federation: Federation, toy: Path) -> None:
    """The same run with zstd both ways makes the same models as without, of other bytes on the wire."""
    federation.agent("pi", toy_data(40, 1))
    codecs = [{"name": codec, "uplink": {"codec": codec}, "downlink": {"codec": codec}} for codec in ("raw", "zstd")]
    runs = [federation.submit(**plan(toy, **changes)) for changes in codecs]
    federation.finish(*runs)
    models = [[row.model.sha256 for row in federation.store.rounds(run)] for run in runs]
    assert models[0] == models[1]
    sent = [federation.store.counted_updates(run, 0)[0].blob.sha256 for run in runs]
    assert sent[0] != sent[1]
    assert federation.store.assignments(runs[0], 0)[0].model != federation.store.assignments(runs[1], 0)[0].model


def test_equal_runs_at_once_keep_each_others_models(federation: Federation, toy: Path) -> None:
    """Two equal runs make equal models and updates; when one cleans up, the other still has what it needs."""
    federation.agent("pi", toy_data(20, 1))
    participation = {"target": 1, "deadline_s": 60.0, "max_staleness": 0}
    given = plan(toy, rounds=9, retain_updates="round", participation=participation)
    short, long = federation.submit(**{**given, "rounds": 4}), federation.submit(**given)
    federation.finish(short, long)
    assert model_of(federation, short, 4).tobytes() == model_of(federation, long, 4).tobytes()
    again = federation.submit(**given)
    federation.finish(again)
    assert model_of(federation, again).tobytes() == model_of(federation, long).tobytes()


def test_priority_decides_and_stop_cancels(federation: Federation, toy: Path, tmp_path: Path) -> None:
    """A device with two jobs waiting takes the more important one; a stopped run's job is ended on the device."""
    agent = federation.agent("pi", toy_data(20, 1))
    endless = plan(toy, name="endless", training={"steps": 100_000_000, "batch_size": 8})
    first = federation.submit(**endless)
    federation.until(lambda: agent.state.running is not None, "the first job")
    low = federation.submit(**plan(toy, name="low", rounds=1, priority=1))
    high = federation.submit(**plan(toy, name="high", rounds=1, priority=5))
    federation.until(lambda: len(agent.state.jobs) == 3, "three jobs on one device")
    federation.until(lambda: all(not entry.missing for entry in agent.state.jobs.values()), "their models")
    worker = agent.supervisor.pid
    state = ["--state", str(tmp_path / "fed" / "coordinator")]
    assert coordinator_cli(["stop", first, "--reason", "enough", *state]) == 0
    federation.finish(low, high)
    row = federation.row(first)
    assert (row.status, row.reason) == ("stopped", "enough")
    assert [entry.status for entry in federation.store.assignments(first, 0)] == ["cancelled"]
    assert agent.state.jobs == {}
    assert agent.supervisor.pid != worker, "the cancelled job's worker is still there"
    times = [federation.store.counted_updates(run, 0)[0].received_unix_s for run in (high, low)]
    assert times[0] < times[1]


def test_amqtt_is_a_broker_too(tmp_path: Path, toy: Path) -> None:
    """Without mosquitto the coordinator's own broker carries a whole run."""
    with federated(tmp_path / "fed", embedded="amqtt") as fed:
        assert fed.connection["broker"] == "amqtt"
        for seed, device in enumerate(("pi-a", "pi-b")):
            fed.agent(device, toy_data(30, seed))
        run = fed.submit(**plan(toy, participation={"target": 2, "minimum": 2, "deadline_s": 60.0}))
        fed.finish(run)
        assert [row.updates for row in fed.store.rounds(run)] == [2, 2]


def add_shard(folder: Path, number: int, samples: int) -> None:
    """Appends a shard, its target first."""
    x, y = toy_data(samples, 50 + number)
    np.save(folder / f"y_{number:03}.npy", y)
    np.save(folder / f"x_{number:03}.npy", x)


def test_growing_data_is_used_from_the_next_round_on(federation: Federation, toy: Path, tmp_path: Path) -> None:
    """A shard that appears between rounds is trained on in the next one, and the old hold-out stays held out."""
    folder = tmp_path / "shards"
    folder.mkdir()
    sizes = [30, 25, 40]
    add_shard(folder, 0, sizes[0])
    federation.agent("pi", DatasetConfig(name="d", path=str(folder)), hold=True)
    run = federation.submit(**plan(toy, rounds=3, training={"epochs": 1, "batch_size": 8, "holdout_fraction": 0.3}))
    for round_ in range(3):
        federation.until(lambda: "pi" in federation.held, "the update")
        if round_ < 2:
            add_shard(folder, round_ + 1, sizes[round_ + 1])
        federation.release("pi")
        federation.until(lambda: federation.row(run).version > round_, "the round")  # noqa: B023
    federation.finish(run)
    held = [held_out(keys_of_rows(f"_{number:03}", 0, size), 0.3) for number, size in enumerate(sizes)]
    for round_ in range(3):
        (update,) = federation.store.counted_updates(run, round_)
        apart = np.concatenate(held[: round_ + 1])
        assert (update.meta.samples, update.meta.evaluation.samples) == (np.sum(~apart), np.sum(apart))


def test_data_that_comes_inside_a_job_waits_for_the_next(tmp_path: Path) -> None:
    """A job sees the samples that were there when it began: its update is the same with and without new ones."""
    from tests.edge_runtime.toy_jobs import ToyJobs

    toy = ToyJobs(tmp_path)
    results = []
    for grows in (False, True):
        folder = tmp_path / f"grows-{grows}"
        folder.mkdir()
        add_shard(folder, 0, 30)
        runner, dataset = JobRunner(), DatasetConfig(name="d", path=str(folder))

        def on_step(step: int, _total: int, _loss: float, folder: Path = folder, grows: bool = grows) -> None:
            if grows and step == 1:
                add_shard(folder, 1, 20)

        done = runner.run(toy.request(dataset=dataset), on_step)
        results.append(toy.read(done))
        again = runner.run(toy.request(dataset=dataset, assignment="b"))
        assert (done.meta.samples, again.meta.samples) == (30, 50 if grows else 30)
    assert results[0] == results[1]
