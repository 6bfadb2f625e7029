"""The parity gate: the exported graphs in onnxruntime against eager torch, before a bundle leaves the workstation.

Every step starts from torch's own state, so that what is compared is one step and not the chaos of many. The loss,
optimiser and modes of the reference are torch's own (`torch.nn.functional`, `torch.optim`, ``module.train()``).
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime
import torch

from exporters import _losses, _optimizers, _random
from exporters.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from exporters._model import Model

STEPS = 20
TOLERANCE = 1e-5
FUSED_TOLERANCE = 1e-6
# Beside the example's size: one sample, the smallest real batch, an odd number.
DYNAMIC_SIZES = (1, 2, 7)
_LARGEST_BATCH = 8
_MAX_REDRAWS = 20
_NUDGES = 6

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Parity:
    """Largest differences found: absolute, or relative for elements above 1, which float32 cannot hold as finely.

    ``redrawn`` counts batches on which a ReLU or max-pool switched by rounding alone; ``checked_batches`` are the
    sizes at which gradients, evaluation and prediction equal torch's.
    """

    steps: int = 0
    parameters: float = 0.0
    buffers: float = 0.0
    gradients: float = 0.0
    update: float = 0.0
    fused: float = 0.0
    loss: float = 0.0
    evaluate: float = 0.0
    predict: float = 0.0
    redrawn: int = 0
    checked_batches: list[int] = field(default_factory=list)


class Session:
    """A graph in onnxruntime, one thread; feeds only what the graph asks for."""

    def __init__(self, name: str, data: bytes) -> None:
        self._name = name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base class
            raise ExportError(f"onnxruntime refuses the {name} graph: {_first_line(error)}") from error
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """Runs the graph on named arrays."""
        given = {name: feed[name] for name in self.inputs}
        try:
            values = self._session.run(None, given)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run the {self._name} graph: {_first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


class _TooFarError(ExportError):
    def __init__(self, kind: str, name: str, where: str, difference: float, allowed: float) -> None:
        super().__init__(
            f"parity: {kind} differ from torch, worst {name} in {where}, by {difference:.2e} (allowed {allowed:.0e}); "
            "the graph would not train the same model, so nothing was written"
        )
        self.difference = difference


class _Compared(NamedTuple):
    """One batch, the arrays given to the graph, torch's gradients and the graph's outputs."""

    x: torch.Tensor
    y: torch.Tensor
    feed: Arrays
    gradients: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class Exported:
    """What the gate needs of an export: serialised graphs by name, and how they take batches."""

    model: Model
    optimizer: str
    hyper: Mapping[str, float]
    graphs: Mapping[str, bytes]
    batch: int | None
    mask: bool
    minimum: int


class Gate:
    """Compares an export with torch.

    Every check raises ExportError for a difference above 1e-5 (fused step against its two halves: 1e-6) or a value
    that is not finite, and names the worst tensor, the batch or step, and the difference.
    """

    def __init__(self, exported: Exported) -> None:
        self.found = Parity()
        self._exported = exported
        self._model = exported.model
        self._sessions = {name: Session(name, data) for name, data in exported.graphs.items()}
        self._generator = torch.Generator().manual_seed(20)

    def check_sizes(self) -> None:
        """Gradients, buffers, evaluation and prediction at every batch size that can be asked of the graphs."""
        for size in self._sizes():
            try:
                self._check_batch(size)
            except (RuntimeError, ValueError) as error:
                raise ExportError(f"a batch of {size} fails: {type(error).__name__}: {error}") from error
            self.found.checked_batches.append(size)

    def check_steps(self, steps: int = STEPS) -> None:
        """Training steps on random batches, each from the state that torch reached."""
        exported = self._exported
        size = exported.batch or max(min(len(self._model.example), _LARGEST_BATCH), exported.minimum)
        module = self._fresh()
        hyper = _eager_hyper(exported.hyper)
        named = dict(module.named_parameters())
        trained = [named[name] for name in self._model.trainable]
        optimizer = _optimizers.torch_optimizer(exported.optimizer, trained, hyper)
        for step in range(steps):
            hyper["clip_norm"] = 0.05 if step % 2 else 0.0
            self._check_step(step, module, optimizer, size, hyper)
            self.found.steps += 1

    def _sizes(self) -> list[int]:
        """Numbers of real samples; a fixed batch with a mask is padded to its size."""
        exported = self._exported
        if exported.batch is None:
            sizes = sorted({*DYNAMIC_SIZES, len(self._model.example)})
        elif exported.mask:
            sizes = sorted({1, -(-exported.batch // 2), exported.batch})
        else:
            sizes = [exported.batch]
        return [size for size in sizes if size >= exported.minimum]

    # Data and references --------------------------------------------------------------------------------------

    def _data(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        model, generator = self._model, self._generator
        shape = (size, *model.example.shape[1:])
        if model.example.is_floating_point():
            x = torch.randn(shape, generator=generator)
        else:  # numbers of a vocabulary that only the example shows
            flat = model.example.reshape(-1)
            x = flat[torch.randint(0, len(flat), shape, generator=generator)]
        y_shape = (size, *model.target.shape)
        if model.target.classes is not None:
            return x, torch.randint(0, model.target.classes, y_shape, generator=generator)
        if model.loss == "binary_cross_entropy_with_logits":
            return x, torch.randint(0, 2, y_shape, generator=generator).to(torch.float32)
        return x, torch.randn(y_shape, generator=generator)

    def _feed(self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> Arrays:
        named = (*module.named_parameters(), *module.named_buffers())
        feed = {f"p.{name}": value.detach().numpy().copy() for name, value in named}
        feed["x"], feed["y"] = self._padded(x), self._padded(y)
        feed["mask"] = (np.arange(len(feed["x"])) < len(x)).astype(np.float32)
        feed["seed"] = np.asarray(seed, np.int64)
        return feed

    def _padded(self, values: torch.Tensor) -> np.ndarray[Any, Any]:
        """The samples, repeated to a fixed batch where that is larger."""
        batch = self._exported.batch or len(values)
        return values.numpy()[np.arange(batch) % len(values)]

    def _reference_gradients(
        self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int
    ) -> tuple[float, Arrays]:
        """Loss and gradients by torch; leaves the gradients on the module and moves its buffers."""
        module.train()
        for value in module.parameters():
            value.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _random.seeded(seed):
                output = module(torch.from_numpy(self._padded(x)))[: len(x)]
            loss = _losses.reference_loss(self._model.loss, output, y)
            loss.backward()
        named = dict(module.named_parameters())
        gradients = {}
        for name in self._model.trainable:
            gradient = named[name].grad
            assert gradient is not None
            gradients[name] = gradient.detach().numpy().copy()
        return float(loss.detach()), gradients

    def _fresh(self) -> torch.nn.Module:
        module = copy.deepcopy(self._model.module)
        for name, value in module.named_parameters():
            value.requires_grad_(name in self._model.trainable)
        return module

    # Checks ---------------------------------------------------------------------------------------------------

    def _gradients(self, module: torch.nn.Module, size: int, seed: int, where: str) -> _Compared:
        """One batch through torch and the gradients graph, compared.

        A ReLU or max-pool whose inputs are equal up to rounding may switch; then neither gradient is wrong, and
        another batch is drawn. It counts as such only if torch's own gradients move as much when its parameters move
        by a millionth.
        """
        while True:
            x, y = self._data(size)
            feed = self._feed(module, x, y, seed)
            loss, gradients = self._reference_gradients(module, x, y, seed)
            got = self._sessions["gradients"].run(feed)
            try:
                wanted = {f"g.{name}": value for name, value in gradients.items()}
                self._compare("gradients", got, wanted, where)
            except _TooFarError as error:
                self.found.redrawn += 1
                moved = self._movement(module, feed, x, y, seed)
                if self.found.redrawn > _MAX_REDRAWS or moved < error.difference / 4:
                    raise
                _restore(module, feed)
                continue
            self._compare("loss", {"loss": got["loss"]}, {"loss": np.asarray(loss)}, where)
            self._compare("buffers", _all_buffers(feed, got), _buffers(module), where)
            return _Compared(x, y, feed, gradients, got)

    def _movement(self, module: torch.nn.Module, feed: Arrays, x: torch.Tensor, y: torch.Tensor, seed: int) -> float:
        """Largest change of torch's gradients when every parameter changes by about a millionth."""
        _restore(module, feed)
        _, base = self._reference_gradients(module, x, y, seed)
        largest = 0.0
        for _ in range(_NUDGES):
            _restore(module, feed)
            with torch.no_grad():
                for value in module.parameters():
                    value.mul_(1 + 1e-6 * torch.randn(value.shape, generator=self._generator))
            _, moved = self._reference_gradients(module, x, y, seed)
            largest = max(largest, *(float(np.abs(moved[name] - base[name]).max()) for name in base))
        return largest

    def _check_batch(self, size: int) -> None:
        where = f"a batch of {size}"
        compared = self._gradients(self._fresh(), size, size, where)
        x, y = compared.x, compared.y
        module = self._fresh().eval()
        feed = self._feed(module, x, y, seed=0)
        with torch.no_grad():
            output = module(torch.from_numpy(feed["x"]))[:size]
            mean = _losses.reference_loss(self._model.loss, output, y)
            right = _losses.hits(self._model.loss, output, y)
        wanted = {"loss_sum": np.asarray(float(mean) * size), "count": np.asarray(float(size))}
        if right is not None:
            wanted["correct"] = right.sum().numpy()
        self._compare("evaluate", self._sessions["evaluate"].run(feed), wanted, where)
        got = self._sessions["predict"].run(feed)
        self._compare("predict", {"output": got["output"][:size]}, {"output": output.numpy()}, where)

    def _check_step(
        self, step: int, module: torch.nn.Module, optimizer: Any, size: int, hyper: Mapping[str, float]
    ) -> None:
        where = f"step {step + 1}"
        named = dict(module.named_parameters())
        compared = self._gradients(module, size, step, where)
        separate = compared.outputs
        feed = {**compared.feed, **self._slots(optimizer, named)}
        feed.update({name: np.asarray(value, np.float32) for name, value in hyper.items()})
        if hyper["clip_norm"]:
            torch.nn.utils.clip_grad_norm_([named[name] for name in self._model.trainable], hyper["clip_norm"])
        optimizer.step()
        parameters = {f"new.p.{name}": named[name].detach().numpy() for name in self._model.trainable}
        slots = {f"new.{name}": value for name, value in self._slots(optimizer, named).items()}

        # The rule alone, on torch's gradients: an adaptive optimiser would turn rounding near zero into a full step.
        given = {f"g.{name}": value for name, value in compared.gradients.items()}
        ruled = self._sessions["update"].run({**feed, **given})
        self._compare("update", ruled, {**parameters, **slots}, where)

        fused = self._sessions["train"].run(feed)
        if self._exported.optimizer == "sgd":
            self._compare("parameters", {name: fused[name] for name in parameters}, parameters, where)
        own = {name: value for name, value in separate.items() if name.startswith("g.")}
        kept = {name: value for name, value in separate.items() if name not in own}
        halves = {**kept, **self._sessions["update"].run({**feed, **own})}
        self._compare("fused", fused, halves, where, tolerance=FUSED_TOLERANCE)

    def _slots(self, optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]) -> Arrays:
        """Torch's optimiser state by this bundle's slot names; zeros before the first step."""
        kinds = {"momentum": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"}
        shapes = {name: tuple(named[name].shape) for name in self._model.trainable}
        found = {}
        for slot in _optimizers.slots_of(self._exported.optimizer, shapes):
            kind, _, name = slot.name.partition(".")
            state = optimizer.state.get(named[name or self._model.trainable[0]], {})
            value = state.get(kinds[kind])
            array = np.zeros(slot.shape, np.float32) if value is None else value.detach().numpy().copy()
            found[f"s.{slot.name}"] = array.astype(np.float32).reshape(slot.shape)
        return found

    def _compare(
        self,
        kind: str,
        got: Mapping[str, Any],
        wanted: Mapping[str, Any],
        where: str,
        *,
        tolerance: float = TOLERANCE,
    ) -> None:
        """Compares every wanted tensor element by element: absolute up to 1, relative above."""
        for name, reference in wanted.items():
            value = np.asarray(got[name], np.float64)
            if not np.isfinite(value).all():
                raise ExportError(f"parity: {name} is not finite in {where}; check the model with torch on this input")
            if value.size == 0:
                continue
            difference = float((np.abs(value - reference) / np.maximum(1.0, np.abs(reference))).max())
            if difference > tolerance:
                raise _TooFarError(kind, name, where, difference, tolerance)
            setattr(self.found, kind, max(getattr(self.found, kind), difference))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _restore(module: torch.nn.Module, feed: Arrays) -> None:
    """Puts parameters and buffers back to what they were before the batch."""
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            value.copy_(torch.from_numpy(feed[f"p.{name}"]))


def _buffers(module: torch.nn.Module) -> Arrays:
    """float32 buffers as torch left them; integer ones (counters) are not trained."""
    named = module.named_buffers()
    return {f"new.p.{name}": value.numpy() for name, value in named if value.is_floating_point()}


def _all_buffers(feed: Arrays, outputs: Arrays) -> Arrays:
    """Every tensor after the step: what the graph returns, and what it leaves as it was given."""
    return {f"new.{name}": value for name, value in feed.items() if name.startswith("p.")} | {
        name: value for name, value in outputs.items() if name.startswith("new.p.")
    }


def _eager_hyper(defaults: Mapping[str, float]) -> dict[str, float]:
    """Hyper-parameters of the check: every term of the optimiser takes part, at a rate that stays clear of chaos."""
    hyper = dict(defaults)
    hyper["lr"] = min(hyper["lr"], 0.01) or 0.01
    hyper["weight_decay"] = hyper["weight_decay"] or 1e-3
    if "momentum" in hyper:
        hyper["momentum"] = hyper["momentum"] or 0.9
    # torch gets the numbers that reach the graph: as float32, 1 - beta2 is 1.3e-5 off what was written
    return {name: float(np.float32(value)) for name, value in hyper.items()}
