"""Server optimisers by name: how a round's change becomes a step of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.aggregation.base import ServerOptimizer
from coordinator.aggregation.optimizers.adam import Adam
from coordinator.aggregation.optimizers.fedhyper_g import FedHyperG
from coordinator.aggregation.optimizers.fedhyper_sl import FedHyperSL
from coordinator.aggregation.optimizers.momentum import Momentum
from coordinator.aggregation.optimizers.sgd import Sgd
from coordinator.aggregation.optimizers.yogi import Yogi
from coordinator.plugins import Registry

if TYPE_CHECKING:
    from coordinator.plan import Plan

OPTIMIZERS: Registry[ServerOptimizer] = Registry(
    "server optimizer",
    "coordinator.server_optimizers",
    {cls.name: cls for cls in (Sgd, Momentum, Adam, Yogi, FedHyperG, FedHyperSL)},
)


def create_optimizer(plan: Plan) -> ServerOptimizer:
    """The server optimiser of a plan.

    Raises:
        PluginError: no such optimiser, or options it does not take.
    """
    options = dict(plan.server_optimizer_options)
    if plan.server_optimizer == FedHyperSL.name and "lr" in plan.training.hyper:
        options = {"client_lr": plan.training.hyper["lr"], **options}
    return OPTIMIZERS.create(plan.server_optimizer, options)


__all__ = ["OPTIMIZERS", "ServerOptimizer", "create_optimizer"]
