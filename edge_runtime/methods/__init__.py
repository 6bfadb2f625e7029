"""Client methods: FedAvg and what devices can do instead, one file each."""

from edge_runtime.methods.base import ClientMethod
from edge_runtime.methods.registry import create_method, method_class, method_names

__all__ = ["ClientMethod", "create_method", "method_class", "method_names"]
