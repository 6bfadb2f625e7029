"""The tasks of the scheduling benchmarks: data of 120 or so devices, a bundle with a small net, and a test set.

Fashion-MNIST: labels by Dirichlet(0.3), 20 to 400 images a device. UCI HAR: the windows of 21 people, each person's cut
into as many parts in time order as devices share them; tested on the other nine people. CIFAR-10: 768 frozen features
(whitened random patches, pooled), labels by Dirichlet(0.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.main_job import TEST_SUBJECTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

ALPHA = 0.3
PATCH, FILTERS, STRIDE = 6, 96, 2


class Arrays(NamedTuple):
    """Training and test data: x float32 ``[n, ...]``, y int64 ``[n]``; ``group`` is a person, or -1 for all."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    group: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]


class Problem(NamedTuple):
    """A data set with its net, step size, and the two accuracies for which energy and time are told."""

    load: Callable[[Path], Arrays]
    net: Callable[[], nn.Module]
    lr: float
    targets: tuple[float, float]


def fashion(data: Path) -> Arrays:
    """Images 28 x 28 as 784 numbers, normalised; tested on 3,000 of the 10,000 test images."""
    from benchmarks import fashion as source

    parts = source.load(data)
    x, x_test = (parts[key].reshape(len(parts[key]), -1) for key in ("x_train", "x_test"))
    tested = np.random.default_rng(0).choice(len(x_test), 3000, replace=False)
    return Arrays(x, parts["y_train"], np.full(len(x), -1), x_test[tested], parts["y_test"][tested])


def har(data: Path) -> Arrays:
    """Windows of nine channels x 128 samples as the logarithms of their power spectra, normalised: 585 numbers."""
    with _open(data / "uci_har" / "uci_har.npz") as file:
        windows, y, person = file["X"].astype(np.float32), file["y"].astype(np.int64), file["subject"].astype(np.int64)
    spectrum = np.log(np.abs(np.fft.rfft(windows, axis=2)) + 0.01).reshape(len(y), -1)
    held = np.isin(person, TEST_SUBJECTS)
    x, x_test = _normalised(spectrum[~held], spectrum[held])
    return Arrays(x, y[~held], person[~held], x_test, y[held])


def cifar(data: Path) -> Arrays:
    """768 frozen features of CIFAR-10 images, normalised."""
    with _open(data / "cifar10" / "cifar10.npz") as file:
        images, test = file["x_train"], file["x_test"]
        y, y_test = file["y_train"].astype(np.int64), file["y_test"].astype(np.int64)
    project = _random_patches(images[:1000])
    x, x_test = _normalised(_features(images, *project), _features(test, *project))
    return Arrays(x, y, np.full(len(y), -1), x_test, y_test)


def split(arrays: Arrays, devices: int, seed: int) -> list[NDArray[np.intp]]:
    """Rows of the training data by device; people are cut up among devices, else labels are skewed.

    Sizes without people are lognormal, 20 to 400 rows, and scaled down where there is not so much data.
    """
    if arrays.group[0] >= 0:
        return _by_person(arrays.group, devices)
    random = np.random.default_rng([seed, 0xDA7A])
    labels = int(arrays.y.max()) + 1
    pools = [list(random.permutation(np.flatnonzero(arrays.y == label))) for label in range(labels)]
    sizes = np.clip(random.lognormal(4.2, 0.7, devices), 20, 400)
    sizes *= min(1.0, 0.95 * len(arrays.y) / sizes.sum())
    shares = []
    for size in sizes.astype(int):
        wanted = random.multinomial(size, random.dirichlet([ALPHA] * labels))
        rows = [pools[label].pop() for label in range(labels) for _ in range(min(wanted[label], len(pools[label])))]
        while len(rows) < min(size, 20):  # its labels have run out
            rows.append(max(pools, key=len).pop())
        shares.append(np.sort(np.array(rows)))
    return shares


def export(problem: Problem, arrays: Arrays, path: Path, *, batch_size: int, seed: int) -> None:
    """Writes the bundle of a problem, its first parameters drawn from ``seed``."""
    import torch

    from exporters import export_bundle

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    example = torch.randn(batch_size, *arrays.x.shape[1:])
    export_bundle(problem.net(), example, path, name="scheduling", parity=False)


def _by_person(person: NDArray[np.int64], devices: int) -> list[NDArray[np.intp]]:
    people = np.unique(person)
    if devices < len(people):
        people = people[:devices]
    parts = [devices // len(people) + (number < devices % len(people)) for number in range(len(people))]
    return [
        rows
        for who, count in zip(people, parts, strict=True)
        for rows in np.array_split(np.flatnonzero(person == who), count)
    ]


def _mlp(inputs: int, hidden: int, outputs: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    return make


def _open(path: Path) -> Any:
    if not path.exists():
        raise SystemExit(f"{path}: not there; name the folder of the data sets with --data or $EDGE_DATA")
    return np.load(path, allow_pickle=False)


def _normalised(x: NDArray[Any], x_test: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean, spread = x.mean(0), x.std(0) + 1e-3
    return ((x - mean) / spread).astype(np.float32), ((x_test - mean) / spread).astype(np.float32)


def _patches(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Patches of images ``[n, 32, 32, 3]``, each with mean 0 and about unit variance: ``[n, h, w, PATCH² * 3]``."""
    view = np.lib.stride_tricks.sliding_window_view(images, (PATCH, PATCH), axis=(1, 2))[:, ::STRIDE, ::STRIDE]
    flat = view.reshape(*view.shape[:3], -1).astype(np.float32)
    flat -= flat.mean(-1, keepdims=True)
    flat /= np.sqrt(flat.var(-1, keepdims=True) + 10.0)
    return flat


def _random_patches(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean patch, and a matrix that whitens patches and compares them with random ones (Coates et al. 2011)."""
    random = np.random.default_rng(0)
    patches = _patches(images)
    drawn = patches.reshape(-1, patches.shape[-1])
    drawn = drawn[random.choice(len(drawn), 40_000, replace=False)]
    mean = drawn.mean(0)
    values, vectors = np.linalg.eigh(np.cov((drawn - mean).T))
    whitening = (vectors / np.sqrt(values + 0.1)) @ vectors.T
    filters = ((drawn - mean) @ whitening)[random.choice(len(drawn), FILTERS, replace=False)]
    filters /= np.linalg.norm(filters, axis=1, keepdims=True)
    return mean, (whitening @ filters.T).astype(np.float32)


def _features(images: NDArray[np.uint8], mean: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Both signs of every filter's answer over 0.5, averaged over quarters of the image: float32 ``[n, 768]``."""
    found = []
    for first in range(0, len(images), 200):
        answers = (_patches(images[first : first + 200]) - mean) @ matrix
        both = np.concatenate([np.maximum(answers - 0.5, 0), np.maximum(-answers - 0.5, 0)], -1)
        half = both.shape[1] // 2
        quarters = [both[:, rows, columns].mean((1, 2)) for rows in (slice(half), slice(half, None))
                    for columns in (slice(half), slice(half, None))]  # fmt: skip
        found.append(np.concatenate(quarters, 1))
    return np.concatenate(found).astype(np.float32)


PROBLEMS = {
    "fashion_mnist": Problem(fashion, _mlp(784, 32, 10), 0.02, (0.75, 0.79)),
    "uci_har": Problem(har, _mlp(585, 32, 6), 0.02, (0.80, 0.86)),
    "cifar10_features": Problem(cifar, _mlp(768, 32, 10), 0.02, (0.48, 0.52)),
}
