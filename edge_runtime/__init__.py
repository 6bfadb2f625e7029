"""The device side: agent, bundle, messages, codecs. Nothing heavy is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.agent.config import AgentConfig, load_agent_config
    from edge_runtime.agent.daemon import Agent
    from edge_runtime.bundle import Bundle
    from edge_runtime.compression import Codec
    from edge_runtime.data import Dataset
    from edge_runtime.errors import EdgeError
    from edge_runtime.methods import ClientMethod
    from edge_runtime.training.base import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Agent": "edge_runtime.agent.daemon",
    "AgentConfig": "edge_runtime.agent.config",
    "Bundle": "edge_runtime.bundle",
    "ClientMethod": "edge_runtime.methods",
    "Dataset": "edge_runtime.data",
    "EdgeError": "edge_runtime.errors",
    "Codec": "edge_runtime.compression",
    "Trainer": "edge_runtime.training.base",
    "load_agent_config": "edge_runtime.agent.config",
}

__all__ = [
    "Agent",
    "AgentConfig",
    "Bundle",
    "ClientMethod",
    "Codec",
    "Dataset",
    "EdgeError",
    "Trainer",
    "__version__",
    "load_agent_config",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")
    return getattr(import_module(home), name)
