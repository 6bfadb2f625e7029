"""The errors of the device packages: one tree, every message names the thing and the cure."""

from __future__ import annotations


class EdgeError(Exception):
    """Base of every error this project raises on purpose; its text is one line fit for a user."""


class ConfigError(EdgeError):
    """A configuration or plan file says something that cannot be used."""


class BundleError(EdgeError):
    """A bundle cannot be read, verified or run."""


class DataError(EdgeError):
    """Local data does not fit what a bundle expects."""


class MessageError(EdgeError):
    """A received message is malformed, oversize or of an unknown schema version."""


class CodecError(EdgeError):
    """An encoded update or model cannot be decoded, or cannot be encoded."""


class TransferError(EdgeError):
    """A blob transfer was refused or delivered wrong bytes."""


class StorageError(EdgeError):
    """Durable storage failed (disk full, read-only, damaged)."""


class TransportError(EdgeError):
    """The broker cannot be used as configured."""


class TrainingError(EdgeError):
    """A job cannot be trained (non-finite loss, wrong hyper-parameter, unusable graph)."""
