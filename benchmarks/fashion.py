"""Fashion-MNIST for the compression benchmarks: two models, label-skewed devices, the device's own trainer.

Everything runs in this process, with the parts that devices and coordinator run: the onnxruntime trainer, codecs,
error feedback, the server methods, the shared model of the downlink, and the messages around the bytes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.bundle import Bundle
from edge_runtime.data.npz import NpzSnapshot
from edge_runtime.data.view import View, Window
from edge_runtime.training.base import TrainSettings
from edge_runtime.training.onnx_trainer import OnnxTrainer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from edge_runtime.compression.base import Vector

MEAN, STD = 0.2860, 0.3530  # of the training images, 0 to 1
CLASSES = 10
EVALUATION_BATCH = 250


def load(folder: Path) -> dict[str, NDArray[Any]]:
    """Images float32 ``[n, 1, 28, 28]``, normalised, and labels int64 ``[n]``: ``x_train, y_train, x_test, y_test``."""
    path = folder / "fashion_mnist" / "fashion_mnist.npz"
    if not path.exists():
        raise SystemExit(f"{path}: not there; name the folder of the data sets with --data or $EDGE_DATA")
    out: dict[str, NDArray[Any]] = {}
    with np.load(path, allow_pickle=False) as file:
        for part in ("train", "test"):
            images = file[f"x_{part}"].reshape(-1, 1, 28, 28).astype(np.float32) / 255
            out[f"x_{part}"] = ((images - MEAN) / STD).astype(np.float32)
            out[f"y_{part}"] = file[f"y_{part}"].astype(np.int64)
    return out


def cnn() -> nn.Module:
    """Two convolutions and a wide dense layer: 1,163,858 parameters."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 2200), nn.ReLU(), nn.Linear(2200, CLASSES),
    )  # fmt: skip


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max-pooling: 61,706 parameters."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES),
    )  # fmt: skip


MODELS = {"cnn": cnn, "lenet": lenet}


class Task:
    """One model with initial parameters of a seed, and the shares of the devices.

    Args:
        data: of :func:`load`.
        model: name in ``MODELS``.
        seed: of the parameters, the images drawn and their split.
        devices: how many shares; those that get no image are left out.
        alpha: of the Dirichlet distribution of labels over devices.
        images: training images in all.
        batch_size: of a step.
    """

    def __init__(
        self,
        data: dict[str, NDArray[Any]],
        model: str,
        *,
        seed: int,
        devices: int = 10,
        alpha: float = 0.3,
        images: int = 4000,
        batch_size: int = 32,
    ) -> None:
        import torch

        from exporters import export_bundle

        torch.manual_seed(seed)
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.bundle"
            example = torch.randn(batch_size, 1, 28, 28)
            export_bundle(MODELS[model](), example, path, name=model, parity=False)
            bundle = Bundle.open(path)
            self.layout = bundle.layout()
            self.initial: Vector = self.layout.flatten(bundle.initial_tensors()).copy()
            self._trainer = OnnxTrainer()
            self._trainer.load(bundle)
            chosen = np.random.default_rng([seed, 1]).permutation(len(data["y_train"]))[:images]
            x, y = data["x_train"][chosen], data["y_train"][chosen]
            shares = dirichlet_shares(y, devices, alpha, seed)
            manifest = bundle.manifest
            self.views = [
                View(f"d{i}", _snapshot(x[rows], y[rows]), manifest, Window()) for i, rows in enumerate(shares)
            ]
            self._test = View("test", _snapshot(data["x_test"], data["y_test"]), manifest, Window())
            self._batch_size, self._seed = batch_size, seed
            self.evaluate(self.initial)  # graphs are read from the bundle when they are first used
            self.train(0, self.initial, 0, 0.0)

    def train(self, device: int, start: Vector, round_: int, lr: float) -> Vector:
        """The weights after one local epoch, float32 ``[layout.size]``, in new memory."""
        settings = TrainSettings(
            epochs=1,
            batch_size=self._batch_size,
            hyper={"lr": lr, "momentum": 0.0},
            seed=(self._seed * 1_000_003 + round_) * 1009 + device,
        )
        trained: Vector = self._trainer.train(start, self.views[device], settings).vector.copy()
        return trained

    def evaluate(self, weights: Vector) -> float:
        """Accuracy on all test images."""
        result = self._trainer.evaluate(weights, self._test, self._test.train, EVALUATION_BATCH)
        assert result is not None
        assert result.correct is not None
        return float(result.correct / result.samples)


def dirichlet_shares(labels: NDArray[Any], devices: int, alpha: float, seed: int) -> list[NDArray[Any]]:
    """Row numbers by device, label-skewed (Hsu et al. 2019); devices without any row are left out."""
    random = np.random.default_rng([seed, 2])
    parts: list[list[NDArray[Any]]] = [[] for _ in range(devices)]
    for label in range(CLASSES):
        rows = random.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(random.dirichlet([alpha] * devices))[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts if sum(map(len, part))]


def _snapshot(x: NDArray[Any], y: NDArray[Any]) -> NpzSnapshot:
    return NpzSnapshot(x, y, None, None)
