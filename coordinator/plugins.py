"""Plug-ins by name: the built-in ones, and what installed packages offer through Python entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from coordinator.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

T = TypeVar("T")


class Registry(Generic[T]):
    """Factories by name. A built-in name cannot be taken over by an installed package.

    Args:
        kind: what error messages call one of them, as "selector".
        group: entry point group, as "coordinator.selectors".
        builtin: factories that take the plug-in's options and raise ValueError for an unusable one.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, Callable[[Mapping[str, float]], T]]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = builtin

    def names(self) -> list[str]:
        """All names that :meth:`create` knows, sorted."""
        return sorted({*self._builtin, *(point.name for point in entry_points(group=self.group))})

    def create(self, name: str, options: Mapping[str, float], handed: Mapping[str, float] | None = None) -> T:
        """A new plug-in with the user's options; ``handed`` are others that it gets, and errors do not name.

        Raises:
            PluginError: no such name, or options it does not take.
        """
        factory = self._builtin.get(name)
        if factory is None:
            factory = self._installed(name)
        try:
            return factory({**(handed or {}), **options})
        except (TypeError, ValueError) as error:
            raise PluginError(f"{self.kind} {name!r} cannot be used with options {dict(options)}: {error}") from error

    def _installed(self, name: str) -> Callable[[Mapping[str, float]], T]:
        for point in entry_points(group=self.group, name=name):
            try:
                factory: Callable[[Mapping[str, float]], T] = point.load()
            except (ImportError, AttributeError) as error:
                raise PluginError(f"{self.kind} {name!r} of {point.value} cannot be loaded: {error}") from error
            return factory
        raise PluginError(f"no {self.kind} is called {name!r}; there are: {', '.join(self.names())}")


def check_options(
    options: Mapping[str, float], known: Mapping[str, float], handed: Collection[str] = ()
) -> dict[str, float]:
    """``known`` defaults overlaid with ``options``; those of them that are ``handed`` over are no user's to give.

    Raises:
        ValueError: an option nobody knows.
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(sorted(set(known) - set(handed))) or "no options"
        raise ValueError(f"unknown {', '.join(unknown)}; it takes {takes}")
    return {**known, **options}
