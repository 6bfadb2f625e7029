"""A federation under attack: fifteen devices that learn digits, three of which lie; real training, real aggregation."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.aggregation import METHODS
from coordinator.evaluation import TestSet
from edge_runtime.agent.pipe import TrainRequest
from edge_runtime.bundle import Bundle
from edge_runtime.compression.pipeline import decode, encode_model
from edge_runtime.data import DatasetConfig
from edge_runtime.messages import BlobRef, EnergyUse, Job, ModelRef
from edge_runtime.training.job import JobRunner
from tests.coordinator.aggregation.rounds import Sent, Server, plan_of, sent_by, vectors

DIGITS = Path(__file__).parents[3] / "examples" / "digits.bundle"
DEVICES, LIARS, ROUNDS = 15, 3, 4
EARLY_STEPS = 150  # in one place, before the federation: what follows shows sooner
MARGIN = 0.04  # of accuracy, that a robust method may lose against honest devices
BROKEN = 0.5  # accuracy that the plain mean does not reach
ROBUST = {
    "median": {},
    "trimmed_mean": {"fraction": LIARS / DEVICES},
    "krum": {"byzantine": LIARS, "keep": 0},
    "bulyan": {"byzantine": LIARS},
    "nna": {"byzantine": LIARS},
    "norm_clipping": {},
}
ATTACKS = ("sign_flip", "scaling", "label_flip")


class Federation:
    """Devices with eighty digits each; those of the liars also with wrong labels."""

    def __init__(self, folder: Path) -> None:
        datasets = pytest.importorskip("sklearn.datasets")
        digits = datasets.load_digits()
        x, y = digits.images[:, None].astype(np.float32), digits.target.astype(np.int64)
        order = np.random.default_rng(5).permutation(len(x))
        x, y = x[order], y[order]
        self.folder, self.bundle, self.runner = folder, Bundle.open(DIGITS), JobRunner(datasets=2 * DEVICES)
        self.layout, self._trained = self.bundle.layout(), {}
        (folder / "out").mkdir()
        for number in range(DEVICES):
            mine = slice(80 * number, 80 * (number + 1))
            np.savez(folder / f"d{number}.npz", x=x[mine], y=y[mine])
            np.savez(folder / f"d{number}-flipped.npz", x=x[mine], y=9 - y[mine])
        np.savez(folder / "d0-early.npz", x=x[:400], y=y[:400])
        np.savez(folder / "test.npz", x=x[1200:], y=y[1200:])
        self.test_set = TestSet(folder / "test.npz", self.bundle)
        self.start = self.bundle.initial_vector()
        self.start = self.start + self.train(self.server("early", "fedavg", {}, self.start), 0, "-early", EARLY_STEPS)

    def server(self, name: str, method: str, options: dict[str, float], start: np.ndarray) -> Server:
        return Server(self.folder / name, plan_of(method, options), self.layout, base=start)

    def train(self, server: Server, device: int, data: str = "", steps: int = 10) -> np.ndarray:
        """What a device would send; the first round is the same for all."""
        key = (server.model().tobytes(), device, data)
        if key not in self._trained:
            self._trained[key] = self._train(server, device, data, steps)
        return self._trained[key]

    def _train(self, server: Server, device: int, data: str, steps: int) -> np.ndarray:
        model = self.folder / "model"
        model.unlink(missing_ok=True)
        model.write_bytes(encode_model(server.model(), self.layout))
        blob = BlobRef(sha256=self.bundle.sha256, size_bytes=1)
        job = Job(
            run="r",
            assignment=f"a{server.version}",
            round=server.version,
            model_version=server.version,
            dataset="d",
            deadline_s=9.0,
            steps=steps,
            batch_size=16,
            bundle=blob,
            model=ModelRef(blobs=[blob]),
            evaluate=False,
        )
        request = TrainRequest(
            job=job,
            device=f"d{device}",
            bundle_path=str(DIGITS),
            model_paths=[str(model)],
            output_folder=str(self.folder / "out"),
            dataset=DatasetConfig(name="d", path=str(self.folder / f"d{device}{data}.npz")),
        )
        done = self.runner.run(request)
        path = Path(done.path)
        delta = decode(path.read_bytes(), {"delta": self.layout})["delta"].vector()
        path.unlink()
        return delta

    def accuracy(self, name: str, attack: str, method: str, options: dict[str, float]) -> float:
        """After all rounds, on digits that no device holds; 0 where the model left the numbers."""
        server = self.server(f"{name}-{attack}", method, options, self.start)
        for _ in range(ROUNDS):
            sent = [Sent(f"d{n:02}", self.train(server, n), samples=80) for n in range(LIARS, DEVICES)]
            server.round([*sent, *(self.lie(server, n, attack) for n in range(LIARS))])
        result = self.test_set.evaluate(server.model())
        return result.correct / result.samples

    def lie(self, server: Server, device: int, attack: str) -> Sent:
        """What one of the liars sends; who flips labels also claims ten times its samples."""
        delta = self.train(server, device, "-flipped" if attack == "label_flip" else "")
        samples = 800 if attack == "label_flip" else 80
        factor = {"sign_flip": -5.0, "scaling": 100.0}.get(attack, 1.0)
        return Sent(f"d{device:02}", delta * np.float32(factor), samples=samples)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return Federation(tmp_path_factory.mktemp("attacks"))


@pytest.fixture(scope="module")
def honest(federation):
    return federation.accuracy("honest", "none", "fedavg", {})


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_plain_mean_breaks(federation, honest, attack):
    """Without a robust method three liars of fifteen ruin what honest devices learn."""
    assert honest > 0.9
    assert federation.accuracy("fedavg", attack, "fedavg", {}) < BROKEN


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ROBUST)
def test_robust_methods_hold(federation, honest, name, attack):
    """Each stays within the margin of a federation without liars."""
    assert federation.accuracy(name, attack, name, ROBUST[name]) >= honest - MARGIN


@pytest.mark.parametrize("name", METHODS.names())
def test_no_server_method_reads_the_losses_that_devices_report(tmp_path, name):
    """Aggregation alone: whom the selectors ask under that lie is shown with them, by a run of the round machine."""
    models = []
    for lie in (None, 1e30):
        server = Server(tmp_path / str(lie), plan_of(name))
        rows = server.rows(sent_by(vectors(7)))
        for row in rows[:LIARS]:
            energy = EnergyUse(train_mj=0, sensor="none")
            row.meta = msgspec.structs.replace(row.meta, loss=lie, loss_rms=lie, energy=None if lie is None else energy)
        server.aggregate(rows, members=7)
        models.append(server.model().tobytes())
    assert models[0] == models[1]
