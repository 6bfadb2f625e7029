"""Server side of the learning methods, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.aggregation.base import ServerMethod, State, Vector
from coordinator.aggregation.fedavg import FedAvg
from coordinator.aggregation.fedavgm import FedAvgM
from coordinator.plugins import Registry

if TYPE_CHECKING:
    from coordinator.plan import Plan

METHODS: Registry[ServerMethod] = Registry(
    "server method",
    "coordinator.methods",
    {FedAvg.name: FedAvg.from_options, FedAvgM.name: FedAvgM.from_options},
)


def create_method(plan: Plan) -> ServerMethod:
    """The server method of a plan.

    Raises:
        PluginError: no such method, or options it does not take.
    """
    exponent = plan.participation.staleness_exponent
    return METHODS.create(plan.server_method, {"staleness_exponent": exponent, **plan.server_options})


__all__ = ["METHODS", "ServerMethod", "State", "Vector", "create_method"]
