"""A dataset as one job sees it: checked against the bundle, windowed, hold-out apart, preprocessed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.data.holdout import held_out
from edge_runtime.errors import BundleError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.bundle.manifest import Input, Manifest, Preprocessing
    from edge_runtime.data.base import Array, Indices, Snapshot

_CHUNK = 4096  # rows that are looked at in one go where all are looked at
_CHECK_BYTES = 1 << 24


@dataclass(frozen=True)
class Window:
    """Which samples count: the newest ``max_samples``, those not older than ``max_age_s`` seconds; a hold-out share."""

    holdout_fraction: float = 0.0
    max_samples: int | None = None
    max_age_s: float | None = None


class View:
    """Samples of one snapshot for one model.

    Attributes:
        train: row indices to train on, ascending.
        holdout: row indices held out, ascending; empty if the fraction is 0.
    """

    def __init__(
        self, name: str, snapshot: Snapshot, manifest: Manifest, window: Window, *, now_unix_s: float = 0.0
    ) -> None:
        """Checks shapes, types, times and label ranges; values are checked batch by batch as they are used.

        Raises:
            DataError: the data does not fit the bundle, or nothing is left to train on.
            BundleError: the manifest asks for inputs that cannot be made from a dataset.
        """
        if len(manifest.inputs) != 1:
            raise BundleError(f"bundle {manifest.name!r} has {len(manifest.inputs)} inputs; a dataset gives one")
        self.name = name
        self._inputs = (manifest.inputs[0], manifest.target)
        self.samples = len(snapshot)
        self._snapshot = snapshot
        if self.samples == 0:
            raise DataError(f"dataset {name!r} is empty; nothing to train on until data arrives")
        x, y = self._stored_batch(np.zeros(1, np.int64))
        self._x = _Converter(name, "x", manifest.inputs[0], x)
        self._y = _Converter(name, "y", manifest.target, y)
        self._classes = manifest.task.classes if manifest.target.dtype == "int64" else None
        self.train, self.holdout = self._split(window, now_unix_s)
        if self._classes is not None:
            self._check_labels(self._classes)

    def read(self, indices: Indices, x: Array, y: Array) -> None:
        """Fills ``x[:len(indices)]`` and ``y[:len(indices)]``, of the bundle's dtypes, with preprocessed samples.

        Raises:
            DataError: a value is NaN or infinite; the message names the first such sample.
        """
        stored_x, stored_y = self._stored_batch(indices)
        self._x.convert(stored_x, x[: len(indices)], indices)
        self._y.convert(stored_y, y[: len(indices)], indices)

    def check_values(self) -> None:
        """Reads every sample once, as training would; raises like :meth:`read`."""
        bytes_per_row = sum(math.prod(entry.shape) * 8 for entry in self._inputs)
        count = max(1, min(_CHUNK, _CHECK_BYTES // max(1, bytes_per_row)))
        x, y = (np.empty((count, *entry.shape), entry.dtype) for entry in self._inputs)
        rows = np.concatenate([self.train, self.holdout])
        for start in range(0, len(rows), count):
            self.read(rows[start : start + count], x, y)

    def _stored_batch(self, indices: Indices) -> tuple[Array, Array]:
        try:
            x, y = self._snapshot.batch(indices)
            return np.asarray(x), np.asarray(y)
        except DataError:
            raise
        except Exception as error:  # the user's own dataset class, or a disk that fails under a map
            raise DataError(f"dataset {self.name!r}: reading failed: {type(error).__name__}: {error}") from error

    def _split(self, window: Window, now_unix_s: float) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        chosen = self._windowed(window, now_unix_s)
        empty = np.empty(0, np.int32)
        if window.holdout_fraction <= 0:
            return chosen, empty
        first, stop = int(chosen[0]), int(chosen[-1]) + 1
        keys = [self._snapshot.keys(at, min(at + _CHUNK, stop)) for at in range(first, stop, _CHUNK)]
        held = held_out(np.concatenate(keys), window.holdout_fraction)[chosen - first]
        return chosen[~held], chosen[held]

    def _windowed(self, window: Window, now_unix_s: float) -> NDArray[np.int32]:
        chosen = np.arange(self.samples, dtype=np.int32)
        times = self._snapshot.times()
        if window.max_age_s is not None:
            if times is None:
                raise DataError(
                    f"dataset {self.name!r} has no sample times, but the job asks for max_age_s; set time in the "
                    "agent's configuration or leave max_age_s out"
                )
            chosen = chosen[times >= now_unix_s - window.max_age_s]
            if len(chosen) == 0:
                raise DataError(
                    f"dataset {self.name!r}: none of {self.samples} samples is younger than {window.max_age_s:g} s; "
                    "collect new data or widen the window"
                )
        if window.max_samples is not None and window.max_samples < len(chosen):
            if times is not None:
                chosen = chosen[np.argsort(times[chosen], kind="stable")]
            chosen = np.sort(chosen[-window.max_samples :])
        return chosen

    def _check_labels(self, classes: int) -> None:
        low, high = 0, 0
        rows = np.concatenate([self.train, self.holdout])
        for start in range(0, len(rows), _CHUNK):
            labels = self._snapshot.targets(rows[start : start + _CHUNK])
            low, high = min(low, int(labels.min())), max(high, int(labels.max()))
            if low < 0 or high >= classes:
                first = rows[
                    start + int(np.argmax(((labels < 0) | (labels >= classes)).reshape(len(labels), -1).any(1)))
                ]
                raise DataError(
                    f"dataset {self.name!r}: label {low if low < 0 else high} of sample {first} is out of range, the "
                    f"bundle has classes 0 to {classes - 1}; relabel the data or export a bundle with more classes"
                )


class _Converter:
    """Casts and preprocesses one input; ``(v * scale - mean) / std`` of all steps is one ``v * a + b``."""

    def __init__(self, dataset: str, what: str, expected: Input, sample: Array) -> None:
        self._where = f"dataset {dataset!r}: {what}"
        shape, dtype = tuple(sample.shape[1:]), sample.dtype
        if shape != expected.shape:
            raise DataError(
                f"{self._where} has samples of shape {shape}, the bundle expects {expected.shape}; reshape the data or "
                "export the bundle for this shape"
            )
        allowed = "iub" if expected.dtype == "int64" else "fiub"
        if dtype.kind not in allowed:
            cure = "store whole numbers, for instance int64" if expected.dtype == "int64" else "store numbers"
            raise DataError(f"{self._where} has type {dtype}, the bundle expects {expected.dtype}; {cure}")
        self._affine = _affine(expected)
        self._may_be_infinite = dtype.kind == "f"

    def convert(self, stored: Array, out: Array, indices: Indices) -> None:
        if stored.shape != out.shape:
            raise DataError(f"{self._where} gave a batch of shape {stored.shape}, expected {out.shape}")
        with np.errstate(all="ignore"):  # what overflows float32 is found below
            if self._affine is None:
                np.copyto(out, stored, casting="unsafe")
            else:
                np.multiply(stored, self._affine[0], out=out, dtype=np.float32, casting="unsafe")
                out += self._affine[1]
        if self._may_be_infinite and out.size and not _all_finite(out):
            bad = ~np.isfinite(out.reshape(len(out), -1)).all(1)
            raise DataError(
                f"{self._where} of sample {indices[int(np.argmax(bad))]} is NaN or infinite, or becomes so as float32; "
                "repair or delete the sample"
            )


def _all_finite(values: NDArray[Any]) -> bool:
    return values.dtype.kind != "f" or (math.isfinite(values.min()) and math.isfinite(values.max()))


def _affine(expected: Input) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    if not expected.preprocessing:
        return None
    if expected.dtype != "float32":
        raise BundleError(f"manifest.json: input {expected.name!r} of {expected.dtype} cannot be preprocessed")
    a: NDArray[np.float64] = np.ones(())
    b: NDArray[np.float64] = np.zeros(())
    for step in expected.preprocessing:
        mean, std = _per_channel(expected, step, step.mean), _per_channel(expected, step, step.std)
        with np.errstate(all="ignore"):
            a, b = a * step.scale / std, (b * step.scale - mean) / std
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise BundleError(f"manifest.json: preprocessing of {expected.name!r} divides by zero or is not finite")
    return a.astype(np.float32), b.astype(np.float32)


def _per_channel(expected: Input, step: Preprocessing, values: list[float]) -> NDArray[np.float64]:
    """One value for all, or one per channel; the channel is the first axis of a sample."""
    if len(values) == 1:
        return np.asarray(values[0], np.float64)
    if not expected.shape or len(values) != expected.shape[0]:
        raise BundleError(
            f"manifest.json: preprocessing of {expected.name!r} has {len(step.mean)} means and {len(step.std)} "
            f"deviations, samples have the shape {expected.shape}"
        )
    return np.asarray(values, np.float64).reshape(-1, *[1] * (len(expected.shape) - 1))
