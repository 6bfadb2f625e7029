"""Random masks that torch and the exported graph compute alike: a counter hash of (seed, stream, element).

The usual generators keep state and have no ONNX form. A hash needs neither: element ``i`` of stream ``n`` (one per
dropout call, in the order of the forward pass) is a function of three integers. Every value stays below 2^31, so that
products fit int64 and no unsigned or shift operator is needed, which onnxruntime has for few types.

Mixing steps and multipliers follow C. Wellons, "Prospecting for Hash Functions" (lowbias32), shortened to 31 bits;
the second key enters between the rounds, so that two streams are not shifted or reordered copies of each other.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exporters.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MASK = 2**31 - 1
LAST_SHIFT = 16
SECOND = 0x5BD1E995
_GOLDEN = 0x9E3779B1

aten = torch.ops.aten


class Round(NamedTuple):
    """One step: fold the high bits down by ``shift``, multiply by ``factor``."""

    shift: int
    factor: int


ROUNDS = (Round(16, 0x7FEB352D), Round(15, 0x046CA68B))


def stream_key(stream: int) -> int:
    """Number mixed with the seed for one dropout call."""
    return ((stream + 1) * _GOLDEN) & MASK


def threshold(keep: float) -> int:
    """Hashes below this number keep their element."""
    return round(keep * 2**31)


def _folded(value: torch.Tensor, shift: int) -> torch.Tensor:
    return value ^ (value >> shift)


def _mixed(value: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    for step in ROUNDS:
        value = ((_folded(value, step.shift) * step.factor) & MASK) ^ key
    return _folded(value, LAST_SHIFT)


def bernoulli(like: torch.Tensor, seed: torch.Tensor, stream: int, keep: float) -> torch.Tensor:
    """A tensor like ``like`` of ones (probability ``keep``) and zeros; ``seed`` is an int64 scalar."""
    low = seed & MASK
    high = ((seed - low) >> 31) & MASK
    first = _mixed(low ^ stream_key(stream), high)
    second = _mixed(first, torch.tensor(SECOND))
    index = torch.arange(like.numel())
    kept = _mixed(index ^ first, second) < threshold(keep)
    return kept.to(like.dtype).reshape(like.shape)


class SeededDropout(TorchDispatchMode):
    """Replaces torch's Bernoulli draws by `bernoulli`.

    Works in eager execution (the reference of the parity check) and while tracing, so both count streams alike. In a
    trace any other random operator is refused by name.
    """

    def __init__(
        self, seed: torch.Tensor, draw: Callable[..., torch.Tensor], layer: Callable[[], str] | None = None
    ) -> None:
        """``draw`` is `bernoulli` or the operator that stands for it in a trace, where ``layer()`` names the module."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._draw = draw
        self._layer = layer
        self.streams = 0
        self.places: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operator below autograd."""
        del types
        kwargs = kwargs or {}
        if self._layer is not None:
            self._look_at(func, self._layer() or "(root)")
        if func is aten.bernoulli_.float:
            return args[0].copy_(self._noise(args[0], args[1] if len(args) > 1 else kwargs.get("p", 0.5)))
        if func is aten.bernoulli.p:
            return self._noise(args[0], args[1])
        if func is aten.native_dropout.default:
            x, probability, train = args
            if train is False or probability == 0:
                return x.clone(), torch.ones_like(x, dtype=torch.bool)
            noise = self._noise(x, 1 - probability)
            return x * noise * (1 / (1 - probability) if probability < 1 else 0.0), noise.to(torch.bool)
        return func(*args, **kwargs)

    def _look_at(self, func: Any, layer: str) -> None:
        self.places.setdefault(str(func.overloadpacket), layer)
        drawn = func in {aten.bernoulli_.float, aten.bernoulli.p, aten.native_dropout.default}
        if torch.Tag.nondeterministic_seeded in func.tags and not drawn:
            raise ExportError(
                f"layer {layer!r} draws random numbers by {func}; only dropout is supported, so replace the draw by "
                "torch.nn.functional.dropout of a tensor of ones, or take the layer out"
            )

    def _noise(self, like: torch.Tensor, keep: float) -> torch.Tensor:
        self.streams += 1
        return self._draw(like, self._seed, self.streams - 1, float(keep))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[SeededDropout]:
    """Eager torch with the masks that a graph draws for ``seed``."""
    with SeededDropout(torch.tensor(seed), bernoulli) as mode:
        yield mode
