# ruff: noqa: SLF001  torch keeps the base class of convolutions private
"""Structured channel pruning by what it saves: the channels whose removal buys the most cost per unit of importance.

A network is thinned in small steps. In each, every group of coupled channels (a convolution's outputs, the inputs of
what follows, the normalisation between; Fang et al., "DepGraph", CVPR 2023) offers its least important channels. The
cost saved by removing them, predicted for the whole network as it is then, is divided by their importance: the first
order change of the loss (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019). The best
offer is taken. Cost follows steps of the hardware (blocks of channels), so offers end at multiples of such blocks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from exporters.errors import ExportError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Cost = Callable[[nn.Module], float]
    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]

_BLOCKS = (4, 8)  # offers end at multiples of these; CPU convolutions work in blocks of 4, 8 or 16 channels
_IMPORTANCE_BATCHES = 8
_LEAST_IMPORTANCE = 1e-12


class Removal(NamedTuple):
    """One step: ``removed`` channels of the group of ``layer`` went, ``left`` stay; the model then costs ``cost``."""

    layer: str
    removed: int
    left: int
    cost: float


@dataclass(frozen=True)
class Pruned:
    """A thinner network and the way to it; costs are those of the cost function."""

    module: nn.Module
    cost_before: float
    cost_after: float
    removals: list[Removal] = field(default_factory=list)


class _Offer(NamedTuple):
    value: float
    layer: str
    channels: list[int]
    left: int
    module: nn.Module
    cost: float


def prune_channels(
    module: nn.Module,
    example: torch.Tensor,
    *,
    cost: Cost,
    target: float,
    loss: Loss,
    batches: Batches,
    keep: Sequence[str] = (),
    least_share: float = 0.1,
    on_removal: Callable[[Removal], None] | None = None,
) -> Pruned:
    """Removes channels until ``cost`` is at most ``target``; ``module`` itself is not changed.

    Args:
        module: the network, with the weights that tell what is important.
        example: an input batch, ``[batch, ...]``.
        cost: what a network costs, in any unit; called often.
        target: the cost to reach, in that unit.
        loss: mean loss of outputs and targets.
        batches: gives training batches ``(x, y)`` anew at every call.
        keep: prefixes of layers whose outputs are not to be touched; the layers that make the output never are.
        least_share: every layer keeps at least this share of its channels, and at least 4.
        on_removal: called after every step.

    Raises:
        ExportError: the target cannot be reached, or the network cannot be taken apart.
    """
    now = copy.deepcopy(module)
    least = {name: max(4, math.ceil(least_share * width)) for name, width in _widths(now).items()}
    before = reached = cost(now)
    removals: list[Removal] = []
    while reached > target:
        importance = _Importance(now, loss, batches)
        offers = _offers(now, example, importance, cost=cost, reached=reached, least=least, keep=keep)
        if not offers:
            raise ExportError(
                f"pruning stops at {reached / before:.0%} of the cost, the target is {target / before:.0%}: what is "
                f"left saves nothing or is at {least_share:.0%} of its channels; choose a higher share of the cost"
            )
        best = max(offers, key=lambda offer: offer.value)
        now, reached = best.module, best.cost
        removals.append(Removal(best.layer, len(best.channels), best.left, reached))
        if on_removal is not None:
            on_removal(removals[-1])
    return Pruned(now, before, reached, removals)


def _offers(
    module: nn.Module,
    example: torch.Tensor,
    importance: _Importance,
    *,
    cost: Cost,
    reached: float,
    least: dict[str, int],
    keep: Sequence[str],
) -> list[_Offer]:
    graph = dependencies(module, example)
    names = {part: name for name, part in module.named_modules()}
    ignored = [
        *_output_layers(module, example),
        *(part for part, name in names.items() if name.startswith(tuple(keep))),
    ]
    offers = []
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=[nn.modules.conv._ConvNd, nn.Linear]):
        root, handler = group[0].dep.target.module, group[0].dep.handler
        layer, scores = names[root], importance(group)
        if scores is None:
            continue
        order = torch.argsort(scores).tolist()
        for count in _counts(len(order), least.get(layer, 4)):
            channels = sorted(order[:count])
            thinner = _without(module, example, layer, handler, channels)
            if thinner is None:
                continue
            saved = reached - (price := cost(thinner))
            if saved > 0:
                value = saved / max(float(scores[channels].sum()), _LEAST_IMPORTANCE)
                offers.append(_Offer(value, layer, channels, len(order) - count, thinner, price))
    return offers


def _counts(width: int, least: int) -> list[int]:
    """How many channels to offer: down to the next multiples of the blocks, or one where the layer is narrow."""
    ends = {block * ((width - 1) // block) for block in _BLOCKS} if width > min(_BLOCKS) else {width - 1}
    return sorted(width - end for end in ends if end >= least)


def _without(
    module: nn.Module, example: torch.Tensor, layer: str, handler: Any, channels: list[int]
) -> nn.Module | None:
    """A copy of the network without these channels; None if it no longer computes."""
    thinner = copy.deepcopy(module)
    graph = dependencies(thinner, example)
    group = graph.get_pruning_group(thinner.get_submodule(layer), handler, channels)
    if not graph.check_pruning_group(group):
        return None
    group.prune()
    for parameter in thinner.parameters():
        parameter.grad = None
    try:
        with torch.no_grad():
            thinner.eval()(example)
    except RuntimeError:  # a view with fixed sizes in forward(): this group cannot be thinned
        return None
    return thinner


def dependencies(module: nn.Module, example: torch.Tensor) -> Any:
    """torch-pruning's graph of coupled channels.

    Raises:
        UsageError: the package is not installed.
        ExportError: the network cannot be traced.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise UsageError('pruning needs torch-pruning: pip install "edge-training-runtime[prune]"') from error
    module.eval()
    try:
        return torch_pruning.DependencyGraph().build_dependency(module, example, verbose=False)
    except Exception as error:  # it runs and traces the user's code
        raise ExportError(f"the network cannot be taken apart: {type(error).__name__}: {error}") from error


class _Importance:
    """First-order change of the loss if a channel went, summed over the parameters coupled to it."""

    def __init__(self, module: nn.Module, loss: Loss, batches: Batches) -> None:
        import torch_pruning

        module.zero_grad()
        module.eval()  # running statistics stay as they are
        count = 0
        for x, y in batches():
            loss(module(x), y).backward()
            count += 1
            if count == _IMPORTANCE_BATCHES:
                break
        if count == 0:
            raise UsageError("there are no training batches to judge channels by; give more data")
        self._score = torch_pruning.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)

    def __call__(self, group: Any) -> torch.Tensor | None:
        scores: torch.Tensor | None = self._score(group)
        return scores


def _widths(module: nn.Module) -> dict[str, int]:
    return {
        name: part.out_features if isinstance(part, nn.Linear) else part.out_channels
        for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd))
    }


def _output_layers(module: nn.Module, example: torch.Tensor) -> list[nn.Module]:
    """Layers whose channels are the model's outputs: those that the output depends on without another in between."""
    found: list[nn.Module] = []
    owner: dict[int, nn.Module] = {}
    kept: list[Any] = []  # else another node might get the number of one that is gone

    def record(part: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            owner[id(output.grad_fn)] = part
            kept.append(output.grad_fn)

    layers = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd))]
    handles = [part.register_forward_hook(record) for part in layers]
    try:
        with torch.enable_grad():
            waiting = [module.eval()(example).grad_fn]
    finally:
        for handle in handles:
            handle.remove()
    seen: set[int] = set()
    while waiting:
        step = waiting.pop()
        if step is None or id(step) in seen:
            continue
        seen.add(id(step))
        if id(step) in owner:
            found.append(owner[id(step)])
        else:
            waiting += [entry for entry, _ in step.next_functions]
    return found
