"""Runs training-step graphs with onnxruntime as the trainer of a device does, and takes their cost per step.

Sessions have the options of the trainer; inputs and outputs are bound to memory once, so that a step copies nothing.
Values are seeded and small; nothing is fed back, so that no number drifts into denormals, which are slow.

The cost of a graph alone is less than within a network if its inputs still lie in the processor's caches. A
:class:`Stepper` therefore keeps several sets of inputs and takes them in turn, until together they are as large as what
a network moves between two runs of one layer.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from energy.errors import ProfileError, UsageError
from energy.graph_check import check_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from energy.thor.profile import Quantity

_SCALE = 0.1
MAX_INPUT_BYTES = 4 << 30
_FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64}
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
# Hyper-parameters of optimisers that a probe's graph may have as inputs, as the exporter's defaults.
HYPER = {
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
}

# Measured with the layers of seven small networks one by one: their sum was 9 % below the whole with one set of inputs
# each, and within 4 % with 16 MB of them in turn.
FOOTPRINT_BYTES = 16_000_000
MOST_SETS = 8
WARM_UP_S = 0.05


class Reading(NamedTuple):
    """Cost of one burst: steps, and per step what could be taken."""

    steps: int
    costs: dict[Quantity, float]


class Stepper:
    """One graph, ready to run.

    Args:
        data: the ONNX graph.
        batch: size of its dynamic axes.
        threads: of onnxruntime inside an operator.
        seed: of the values.
        limits: integer inputs stay below these; others are 0 or 1.
        hyper: values of scalar inputs by name.
        footprint: bytes that the sets of inputs and outputs shall have together; 0: one set, as for whole networks.

    Raises:
        ProfileError: onnxruntime may not or does not take the graph, or it needs more memory than there is.
        UsageError: onnxruntime is not installed.
    """

    def __init__(
        self,
        data: bytes,
        *,
        batch: int,
        threads: int = 1,
        seed: int = 0,
        limits: Mapping[str, int] | None = None,
        hyper: Mapping[str, float] | None = None,
        footprint: int = FOOTPRINT_BYTES,
    ) -> None:
        self._batch = batch
        self._random = np.random.default_rng(seed)
        self._limits = limits or {}
        self._hyper = {**HYPER, **(hyper or {})}
        self._session = _session(data, threads)
        self._kept: list[Any] = []
        try:
            self._bindings = self._all_bound(footprint)
        except MemoryError as error:
            raise ProfileError("a graph needs more memory than there is; give a smaller --batch") from error
        self._next = 0
        self.steps_per_burst = 1
        self.seconds = 0.0

    def run(self, steps: int) -> None:
        """Runs some steps."""
        run, bindings, count = self._session.run_with_iobinding, self._bindings, len(self._bindings)
        for step in range(self._next, self._next + steps):
            run(bindings[step % count])
        self._next = (self._next + steps) % count

    def warm_up(self, window_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """Runs until a step takes as long as before, then sets the steps of a burst to fill ``window_s`` seconds."""
        steps, ended, last = 1, clock() + WARM_UP_S, float("inf")
        while True:
            began = clock()
            self.run(steps)
            now = clock()
            each = (now - began) / steps
            if now >= ended and each > 0.9 * last:
                break
            last = min(last, each)
            steps = max(1, min(4 * steps, int(WARM_UP_S / 4 / max(each, 1e-9))))
        self.seconds = min(each, last)
        self.steps_per_burst = max(2, round(window_s / max(self.seconds, 1e-9)))

    def _all_bound(self, footprint: int) -> list[Any]:
        """Bindings to as many sets of inputs and outputs as fill ``footprint`` bytes."""
        ports = self._session.get_inputs()
        first = {port.name: self._values(port) for port in ports}
        try:
            results = self._session.run(None, first)
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime has a class per cause and no common one
            raise ProfileError(f"a probe fails in onnxruntime: {_line(error)}; make the pack again") from error
        names = [port.name for port in self._session.get_outputs()]
        if not all(isinstance(array, np.ndarray) for array in results):
            raise ProfileError("a probe's outputs are not all tensors; make the pack again")
        made = dict(zip(names, results, strict=True))
        each = sum(array.nbytes for array in (*first.values(), *made.values()))
        sets = min(MOST_SETS, max(1, -(-footprint // max(each, 1))))
        further = ({port.name: self._values(port) for port in ports} for _ in range(sets - 1))
        return [self._bound(first, made), *(self._bound(given, made) for given in further)]

    def _bound(self, given: Mapping[str, NDArray[Any]], made: Mapping[str, NDArray[Any]]) -> Any:
        import onnxruntime

        binding = self._session.io_binding()
        for name, array in given.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self._kept += [array, value]
            binding.bind_ortvalue_input(name, value)
        for name, array in made.items():
            own = np.empty_like(array)
            value = onnxruntime.OrtValue.ortvalue_from_numpy(own)
            self._kept += [own, value]
            binding.bind_ortvalue_output(name, value)
        return binding

    def _values(self, port: Any) -> NDArray[Any]:
        shape = [size if isinstance(size, int) else self._batch for size in port.shape]
        if not all(0 <= size <= MAX_INPUT_BYTES for size in shape) or 8 * math.prod(shape) > MAX_INPUT_BYTES:
            raise ProfileError(f"a probe wants an input {port.name!r} of shape {shape}, which no layer has")
        if port.type in _FLOATS:
            if not shape:
                return np.asarray(self._hyper.get(port.name, 1.0), _FLOATS[port.type])
            values = self._random.standard_normal(shape, np.float32).astype(_FLOATS[port.type]) * _SCALE
            if port.name == "mask":
                return np.ones_like(values)
            # Variances, of Adam and of BatchNorm, are never negative.
            return np.abs(values) if "_sq." in port.name or port.name.endswith("running_var") else values
        if port.type not in _INTEGERS:
            raise ProfileError(f"a probe wants an input {port.name!r} of {port.type}; make the pack again")
        below = self._limits.get(port.name, 2)
        if below < 1:
            raise ProfileError(f"input {port.name!r} of a probe has {below} values; make the pack or bundle again")
        return np.asarray(self._random.integers(0, below, shape), _INTEGERS[port.type])


def cpu_cost(stepper: Stepper) -> Reading:
    """One burst by the clocks of this process: ``cpu_seconds`` of all its threads, and ``seconds``."""
    steps = stepper.steps_per_burst
    began, began_cpu = time.perf_counter(), time.process_time()
    stepper.run(steps)
    cpu, wall = time.process_time() - began_cpu, time.perf_counter() - began
    return Reading(steps, {"cpu_seconds": cpu / steps, "seconds": wall / steps})


def _session(data: bytes, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UsageError(
            "profiling needs onnxruntime, which is not installed: pip install edge-training-runtime"
        ) from error
    check_graph(data)
    options = session_options(onnxruntime, threads)
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class per cause and no common one
        raise ProfileError(
            f"onnxruntime {onnxruntime.__version__} refuses a graph: {_line(error)}; make it again, or install a newer "
            "onnxruntime"
        ) from error


def session_options(onnxruntime: Any, threads: int) -> Any:
    """As edge_runtime/training/onnx_graph.py has them: another arena, or threads that spin, cost otherwise."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
