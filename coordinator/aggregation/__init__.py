"""Server side of the learning methods, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.aggregation.afa_cd import AfaCd
from coordinator.aggregation.afa_cs import AfaCs
from coordinator.aggregation.base import ServerMethod, ServerOptimizer, State, Vector
from coordinator.aggregation.bulyan import Bulyan
from coordinator.aggregation.fedamd import FedAmd
from coordinator.aggregation.fedavg import FedAvg
from coordinator.aggregation.fedbuff import FedBuff
from coordinator.aggregation.krum import Krum
from coordinator.aggregation.median import Median
from coordinator.aggregation.nna import Nna
from coordinator.aggregation.norm_clipping import NormClipping
from coordinator.aggregation.optimizers import OPTIMIZERS, create_optimizer
from coordinator.aggregation.refl import Refl
from coordinator.aggregation.trimmed_mean import TrimmedMean
from coordinator.errors import PluginError
from coordinator.plugins import Registry

if TYPE_CHECKING:
    from coordinator.plan import Plan

METHODS: Registry[ServerMethod] = Registry(
    "server method",
    "coordinator.methods",
    {
        cls.name: cls
        for cls in (
            *(FedAvg, Refl, FedBuff, AfaCd, AfaCs, FedAmd),
            *(Median, TrimmedMean, Krum, Bulyan, Nna, NormClipping),
        )
    },
)


def create_method(plan: Plan) -> ServerMethod:
    """The server method of a plan.

    Raises:
        PluginError: no such method, or options it does not take.
    """
    handed = {"staleness_exponent": plan.participation.staleness_exponent}
    for name in plan.server_options:
        if name in handed:
            raise PluginError(f"server_options.{name}: set {name} in [participation] instead")
    return METHODS.create(plan.server_method, plan.server_options, handed)


__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "ServerMethod",
    "ServerOptimizer",
    "State",
    "Vector",
    "create_method",
    "create_optimizer",
]
