"""Bytes, error and speed of every codec on one real update, against the bound of memoryless coding.

    python -m benchmarks.compression

The update is one local epoch of one device on Fashion-MNIST, from a model that all devices trained for some rounds;
without error feedback, so that codecs see the same vector. ``bytes`` is the whole container. For a sparse update of k
out of n entries, ``bound_bytes`` is ``(log2 C(n, k) + k * H) / 8`` with H the entropy of the values' symbols: what the
best code needs that takes positions as uniform and symbols as independent. Speeds are float32 bytes of the update per
CPU second, the median of some calls on one thread, container and checks included.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.fashion import MODELS, Task, load
from benchmarks.report import MB, parser, print_report
from edge_runtime.compression.fedzip import claimed_bits
from edge_runtime.compression.pipeline import CodecSpec, decode, encode
from edge_runtime.compression.registry import codec_class, codec_names

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from edge_runtime.compression.base import Layout, Update, Value, Vector

WARM_ROUNDS = 3
LR = 0.1
LARGEST_ALPHABET = 4096  # a sparse update with more values than this has no symbols, but numbers


def main() -> int:
    """Runs the benchmark and prints its report."""
    options = _parser().parse_args()
    data = load(options.data)
    results = []
    for model in options.models:
        task = Task(data, model, seed=options.seed)
        delta = real_update(task)
        for codec in options.codecs or codec_names():
            for density in densities(codec):
                measured = measure(codec, density, delta, task.layout, repeats=options.repeats)
                claimed = fedzip_claim(task.layout, delta) if codec == "fedzip" else None
                row = {"model": model, "codec": codec, "density": density, **measured, "claimed_ratio": claimed}
                results.append(row)
                print(results[-1], file=sys.stderr, flush=True)
    print_report("compression", options, results)
    return 0


def densities(codec: str) -> list[float | None]:
    """Shares of entries to measure; None is the codec's own setting."""
    return [0.01, 0.001, None] if "density" in codec_class(codec).defaults else [None]


def real_update(task: Task) -> Vector:
    """One epoch of the device with the most images, float32 ``[layout.size]``, after some rounds of all devices."""
    weights, samples = task.initial, [len(view.train) for view in task.views]
    for round_ in range(WARM_ROUNDS):
        total = np.zeros(task.layout.size)
        for device, count in enumerate(samples):
            total += (task.train(device, weights, round_, LR) - weights) * (count / sum(samples))
        weights = (weights + total).astype(np.float32)
    return task.train(int(np.argmax(samples)), weights, WARM_ROUNDS, LR) - weights


def measure(codec: str, density: float | None, delta: Vector, layout: Layout, *, repeats: int) -> dict[str, Any]:
    """Bytes, error and speed of one codec on ``delta``."""
    cls = codec_class(codec)
    options: dict[str, Value] = {} if density is None else {"density": density}
    if not cls.lossless:
        options["error_feedback"] = False
    spec, layouts = CodecSpec(codec, options), {"delta": layout}
    data = encode(spec, {"delta": delta}, layouts).data
    update = decode(data, layouts)["delta"]
    encode_s = _cpu_s(lambda: encode(spec, {"delta": delta}, layouts), repeats)
    decode_s = _cpu_s(lambda: decode(data, layouts), repeats)
    error = np.linalg.norm(delta.astype(np.float64) - update.vector()) / np.linalg.norm(delta.astype(np.float64))
    bound = bound_bytes(update)
    raw = 4 * layout.size
    return {
        "parameters": layout.size,
        "bytes": len(data),
        "ratio": round(raw / len(data), 1),
        "bound_bytes": None if bound is None else round(bound),
        "bytes_over_bound": None if bound is None else round(len(data) / bound, 3),
        "encode_mb_per_s": round(raw / MB / encode_s, 1),
        "decode_mb_per_s": round(raw / MB / decode_s, 1),
        "relative_l2_error": round(float(error), 4),
    }


def fedzip_claim(layout: Layout, delta: Vector) -> float:
    """The best ratio by the size formulas of FedZip's published script, for the same labels; no code reaches it."""
    layouts = {"delta": layout}
    vector = decode(encode(CodecSpec("fedzip"), {"delta": delta}, layouts).data, layouts)["delta"].vector()
    labels = [np.unique(vector[start:end], return_inverse=True)[1].reshape(-1) for *_, start, end in layout.spans()]
    return round(32 * layout.size / min(claimed_bits(labels).values()), 1)


def bound_bytes(update: Update) -> float | None:
    """The memoryless bound of a sparse update with a small alphabet; None for all others."""
    if update.indices is None or not len(update.values):
        return None
    counts = np.unique(update.values, return_counts=True)[1]
    if len(counts) > LARGEST_ALPHABET:
        return None
    n, k = update.size, len(update.values)
    share = counts / k
    entropy = float(-(share * np.log2(share)).sum())
    positions = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    return (positions + k * entropy) / 8


def _cpu_s(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return max(statistics.median(times), 1e-6)


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--models", nargs="+", choices=MODELS, default=["cnn", "lenet"])
    result.add_argument("--codecs", nargs="+", default=None, help="names; all that are installed by default")
    result.add_argument("--repeats", type=int, default=9, help="calls of which the median counts")
    result.add_argument("--seed", type=int, default=0)
    return result


if __name__ == "__main__":
    sys.exit(main())
