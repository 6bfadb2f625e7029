"""The errors of this package: every message names the thing and the cure, in one line fit for a user."""

from __future__ import annotations

from typing import Literal, TypeAlias

Fault: TypeAlias = Literal["absent", "permission", "vanished", "frozen", "implausible", "unsupported"]


class EnergyError(Exception):
    """Base of every error this package raises on purpose."""


class SensorError(EnergyError):
    """A sensor cannot be read. ``fault`` says in which way.

    ``absent``: this machine has none. ``permission``: it is there, and may not be read. ``vanished``: it could be read
    before. ``frozen``: it repeats one value for too long. ``implausible``: negative, not finite, or beyond what the
    sensor can measure. ``unsupported``: it exists and measures no power here.
    """

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class AwaitedError(SensorError):
    """A sensor that is read in the background has nothing new yet; it is worth asking again soon."""

    def __init__(self, message: str) -> None:
        super().__init__("absent", message)


class ProfileError(EnergyError):
    """A profile or probe pack cannot be read, does not fit, or lacks what is asked of it."""


class UsageError(EnergyError):
    """A command was asked for something that it cannot do."""
