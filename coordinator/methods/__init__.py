"""Server side of the learning methods, by name."""

from __future__ import annotations

from coordinator.methods.base import ServerMethod, State, Vector
from coordinator.methods.fedavg import FedAvg
from coordinator.plugins import Registry

METHODS: Registry[ServerMethod] = Registry("server method", "coordinator.methods", {FedAvg.name: FedAvg.from_options})

__all__ = ["METHODS", "ServerMethod", "State", "Vector"]
