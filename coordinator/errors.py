"""The errors of the coordinator, in the same tree as the device's."""

from __future__ import annotations

from edge_runtime.errors import EdgeError


class CoordinatorError(EdgeError):
    """Base of the coordinator's own errors."""


class UnknownRunError(CoordinatorError):
    """No run of that name is in the state folder."""


class PluginError(CoordinatorError):
    """A selector or server method cannot be found or does not fit its protocol."""


class StoreError(CoordinatorError):
    """The database cannot be used (newer schema, locked, not reachable)."""


class ModelError(CoordinatorError):
    """A stored model cannot be read, evaluated or written in the wanted format."""


class ExecutorError(CoordinatorError):
    """The process that ran a task died, or its result cannot be sent."""
