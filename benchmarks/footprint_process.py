"""The processes that :mod:`benchmarks.footprint` measures: ``export``, ``idle``, ``ort`` and ``torch``.

They read a number of steps per line and answer one JSON line; ``end`` gives the peak of resident memory.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MB = 1e6
BATCH_SIZE = 32
WARM_UP_STEPS = 5


def main() -> int:
    """Runs one kind of process."""
    kind, what = sys.argv[1:3]
    if kind == "export":
        from examples import model_zoo
        from exporters import export_bundle

        export_bundle(**(getattr(model_zoo, what)() | {"path": Path(sys.argv[3]), "parity": False}))
        return 0
    if kind == "idle":
        began = time.process_time()
        import edge_runtime.training.job  # noqa: F401 - numpy, onnxruntime and what training needs

        _answer({"import_s": round(time.process_time() - began, 3), "rss_mb": _rss_mb()})
        return 0
    step = _torch_step(what) if kind == "torch" else _device_step(what)
    step(WARM_UP_STEPS)
    _answer({})
    for line in sys.stdin:
        if line.strip() == "end":
            break
        _answer({"ms_per_step": statistics.median(step(int(line)))})
    _answer({"peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB, 1)})
    return 0


def _device_step(path: str) -> Callable[[int], list[float]]:
    """Steps through the device's own trainer, on random data of the bundle's shapes."""
    import numpy as np

    from edge_runtime.bundle import Bundle
    from edge_runtime.data.npz import NpzSnapshot
    from edge_runtime.data.view import View, Window
    from edge_runtime.training.base import TrainSettings
    from edge_runtime.training.onnx_trainer import OnnxTrainer

    bundle = Bundle.open(path)
    manifest = bundle.manifest
    random = np.random.default_rng(0)
    x = random.standard_normal((4 * BATCH_SIZE, *manifest.inputs[0].shape)).astype(np.float32)
    y = random.integers(0, manifest.task.classes or 2, 4 * BATCH_SIZE)
    view = View("random", NpzSnapshot(x, y, None, None), manifest, Window())
    trainer = OnnxTrainer(threads=1)
    trainer.load(bundle)
    start = bundle.initial_vector()
    assert "torch" not in sys.modules

    def run(steps: int) -> list[float]:
        times = [time.process_time()]
        settings = TrainSettings(steps=steps, batch_size=BATCH_SIZE, hyper={"lr": 0.001})
        trainer.train(start, view, settings, on_step=lambda *_: times.append(time.process_time()))
        return _gaps_ms(times[1:])

    return run


def _torch_step(model_name: str) -> Callable[[int], list[float]]:
    import torch
    from torch.nn import functional

    from examples import model_zoo

    torch.set_num_threads(1)
    arguments: dict[str, Any] = getattr(model_zoo, model_name)()
    model, example = arguments["module"], arguments["example_input"]
    model.train()
    x = torch.randn(4, BATCH_SIZE, *example.shape[1:])
    y = torch.randint(0, 10, (4, BATCH_SIZE))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def run(steps: int) -> list[float]:
        times = [time.process_time()]
        for number in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[number % 4]), y[number % 4]).backward()
            optimizer.step()
            times.append(time.process_time())
        return _gaps_ms(times)

    return run


def _gaps_ms(times: list[float]) -> list[float]:
    return [1e3 * (after - before) for before, after in pairwise(times)]


def _rss_mb() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) * 1024 / MB, 1)
    raise SystemExit("no VmRSS in /proc/self/status")


def _answer(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
