"""One graph in onnxruntime, bound to memory that numpy owns: a step copies no parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnxruntime

from edge_runtime.errors import BundleError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edge_runtime.bundle import Bundle

    OrtValue: TypeAlias = Any

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}


def shared(array: NDArray[Any]) -> OrtValue:
    """An OrtValue on the memory of ``array``, so that writing one is writing the other."""
    value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    if array.size and value.data_ptr() != array.ctypes.data:
        raise TrainingError(
            f"onnxruntime {onnxruntime.__version__} copies its inputs; install a version this project lists"
        )
    return value


class OnnxGraph:
    """A session made from verified bytes, and bindings of its inputs and outputs.

    Attributes:
        inputs, outputs: names, as the session has them.
        fixed_batch: the size of the batch axis where the graph fixes it, else None.
        has_mask: whether padding can be masked.
    """

    def __init__(self, bundle: Bundle, name: str, variant: str | None, threads: int) -> None:
        """Raises BundleError if onnxruntime does not take the graph."""
        self._where = f"{bundle.path}: graph {name!r}"
        data = bundle.graph(name, variant)
        try:
            self._session = onnxruntime.InferenceSession(data, _options(threads), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(
                f"{self._where}: onnxruntime {onnxruntime.__version__} refuses it: {_line(error)}"
            ) from error
        self._ports = {port.name: port for port in self._session.get_inputs()}
        self.inputs = list(self._ports)
        self.outputs = [port.name for port in self._session.get_outputs()]
        batch = self._ports["x"].shape[0] if "x" in self._ports and self._ports["x"].shape else None
        self.fixed_batch = batch if isinstance(batch, int) else None
        self.has_mask = "mask" in self._ports

    def bind(self, inputs: Mapping[str, OrtValue], outputs: Mapping[str, OrtValue]) -> Any:
        """A binding for :meth:`run`; takes from both tables what the graph has.

        Raises:
            BundleError: the graph has an input or output that is in neither table, or of another type or shape.
        """
        for name, port in self._ports.items():
            self._check(name, port, inputs.get(name))
        for name in self.outputs:
            if name not in outputs:
                raise BundleError(f"{self._where}: gives an output {name!r} that the manifest does not explain")
        binding = self._session.io_binding()
        try:
            for name in self._ports:
                binding.bind_ortvalue_input(name, inputs[name])
            for name in self.outputs:
                binding.bind_ortvalue_output(name, outputs[name])
        except Exception as error:
            raise BundleError(f"{self._where}: cannot be bound: {_line(error)}") from error
        return binding

    def _check(self, name: str, port: Any, value: OrtValue | None) -> None:
        if value is None:
            raise BundleError(f"{self._where}: wants an input {name!r} that the manifest does not explain")
        shape, found = value.shape(), value.data_type()
        pairs = zip(port.shape, shape, strict=False)
        fits = len(shape) == len(port.shape) and all(not isinstance(want, int) or want == have for want, have in pairs)
        if found != port.type or not fits:
            raise BundleError(
                f"{self._where}: input {name!r} is {_DTYPES.get(port.type, port.type)} {port.shape}, the manifest "
                f"gives {_DTYPES.get(found, found)} {shape}; export the bundle again"
            )

    def run(self, binding: Any) -> None:
        """Runs the graph once; raises TrainingError if onnxruntime fails."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise TrainingError(f"{self._where}: failed in onnxruntime: {_line(error)}") from error


def scalar(dtype: type[np.generic], value: float = 0) -> NDArray[Any]:
    """A 0-dimensional array that graphs read or write in place."""
    return np.full((), value, dtype)


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # 39 MB less at the peak of a ResNet-8, at the same speed
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
