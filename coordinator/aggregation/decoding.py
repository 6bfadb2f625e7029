"""Updates from bytes to numbers, in this process or in a task of another one."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from coordinator.errors import ModelError
from coordinator.model_blobs import held_vector, mapped
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.pipeline import decode
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from coordinator.aggregation.base import ServerMethod, Sums, Vector
    from coordinator.executors.base import Executor, Shared
    from edge_runtime.compression import Layout, Update
    from edge_runtime.messages import Role, UpdateId

T = TypeVar("T")

HELD_IN_MEMORY = 2  # models that updates of a predicting codec are relative to; most are of one version


def channels_of(method: ServerMethod, role: Role) -> tuple[str, ...]:
    """Names of the vectors in an update of this role.

    Raises:
        CodecError: the method does not know the role.
    """
    if role == "trainer":
        return method.channels
    if role not in method.roles:
        raise CodecError(f"server method {method.name!r} takes no update of role {role!r}")
    return method.roles[role]


def decode_update(
    payload: bytes | memoryview | Path,
    method: ServerMethod,
    layout: Layout,
    *,
    update: UpdateId,
    version: int,
    role: Role = "trainer",
    max_norm: float | None = None,
    held: Callable[[int], Vector] | None = None,
) -> dict[str, Update]:
    """The decoded update, finite, of ``[layout.size]`` by channel.

    Args:
        payload: a container, or the file that holds it.
        method: says which channels there must be.
        layout: of the model.
        update: whose bytes they must be.
        version: of the model that they must be relative to.
        role: of its assignment.
        max_norm: the largest L2 norm of a channel's buffers, and of all else in it; None: any.
        held: gives the model of a version as devices hold it; asked only where the codec predicts from it.

    Raises:
        CodecError: it cannot be decoded, or is not what the method wants.
        ModelError: the model that it is relative to is not in the store.
    """
    source = Source(update, version, role, payload)
    return Decoder(layout, {role: channels_of(method, role)}, held).decode(source, max_norm=max_norm)


class Source(NamedTuple):
    """One encoded update. ``payload`` is its container, or the file that holds it."""

    update: UpdateId
    version: int
    role: Role
    payload: bytes | memoryview | Path

    def portable(self, executor: Executor) -> Source:
        """As a task of an executor can read it: with its bytes, unless it sees the files of this machine."""
        if executor.local or isinstance(self.payload, bytes):
            return self
        data = self.payload.read_bytes() if isinstance(self.payload, Path) else bytes(self.payload)
        return self._replace(payload=data)


class Models:
    """The models that devices hold, by version, read from their files when asked. Goes to other processes as paths.

    Args:
        paths: files by version, or what an executor shares of them.
        layout: of the models.
        channels: what the files of a lossless downlink hold.
        lossless: whether the downlink is; else the files are snapshots of the shared model.
    """

    def __init__(
        self, paths: Mapping[int, Path | Shared], layout: Layout, channels: tuple[str, ...], *, lossless: bool
    ) -> None:
        self._paths, self._layout, self._channels, self._lossless = dict(paths), layout, channels, lossless
        self._recent: dict[int, Vector] = {}

    def __call__(self, version: int) -> Vector:
        """Float32 ``[layout.size]``.

        Raises:
            ModelError: there is no such file.
            CodecError: it cannot be decoded.
        """
        vector = self._recent.pop(version, None)
        if vector is None:
            known = self._paths.get(version)
            path = known if known is None or isinstance(known, Path) else known.path()
            if path is None or not path.is_file():
                raise ModelError(f"model version {version} as devices hold it is not in the store; was it deleted?")
            vector = held_vector(path, version, self._layout, self._channels, lossless=self._lossless)
        self._recent[version] = vector
        while len(self._recent) > HELD_IN_MEMORY:
            del self._recent[next(iter(self._recent))]
        return vector

    @contextmanager
    def shared(self, executor: Executor, versions: Iterable[int]) -> Iterator[Models]:
        """These versions for processes that do not see the files; one that is not in the store is missed when read."""
        paths = {version: self._paths.get(version) for version in set(versions)}
        files = {version: path for version, path in paths.items() if isinstance(path, Path) and path.is_file()}
        shared = {version: executor.share(path.read_bytes()) for version, path in sorted(files.items())}
        try:
            yield Models(shared, self._layout, self._channels, lossless=self._lossless)
        finally:
            for entry in shared.values():
                executor.release(entry)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read."""
        return {**self.__dict__, "_recent": {}}


class Decoder:
    """Decodes updates of one method; can be sent to other processes if ``held`` can.

    Args:
        layout: of every channel.
        channels: names of the vectors in an update, by role.
        held: gives the model of a version as devices hold it; None: no codec may predict.
    """

    def __init__(
        self, layout: Layout, channels: Mapping[Role, tuple[str, ...]], held: Callable[[int], Vector] | None
    ) -> None:
        self.layout, self.channels, self._held = layout, dict(channels), held

    @contextmanager
    def portable(self, executor: Executor, sources: Iterable[Source]) -> Iterator[Decoder]:
        """This decoder as tasks of an executor can use it for these updates, until they have ended."""
        if executor.local or not isinstance(self._held, Models):
            yield self
            return
        with self._held.shared(executor, (source.version for source in sources)) as held:
            yield Decoder(self.layout, self.channels, held)

    def decode(self, source: Source, *, max_norm: float | None = None) -> dict[str, Update]:
        """See :func:`decode_update`."""
        data = mapped(source.payload) if isinstance(source.payload, Path) else source.payload
        layouts = dict.fromkeys(self.channels[source.role], self.layout)
        held, version = self._held, source.version
        reference = None if held is None else lambda: held(version)
        limit = math.inf if max_norm is None else max_norm
        tag = update_tag(source.update)
        return decode(data, layouts, base_version=source.version, tag=tag, max_norm=limit, reference=reference)

    def named(self, source: Source) -> dict[str, Update]:
        """The same, with the update's name in front of what is wrong with it."""
        try:
            return self.decode(source)
        except (CodecError, OSError) as error:
            raise CodecError(f"update {source.update}: {error}") from error


def sum_block(decoder: Decoder, channel: str, sources: Sequence[Source], weights: Sequence[float]) -> Sums:
    """``sum(weight * update[channel])`` in this order, float64 ``[layout.size]``; a task.

    Raises:
        CodecError: an update cannot be decoded; the message names it.
        ModelError: the model that it is relative to is not in the store.
    """
    total = np.zeros(decoder.layout.size, np.float64)
    for source, weight in zip(sources, weights, strict=True):
        decoder.named(source)[channel].add_to(total, weight)
    return total


def map_block(decoder: Decoder, channel: str, sources: Sequence[Source], function: Callable[[Update], T]) -> list[T]:
    """``function(update[channel])`` of each; a task. Raises as :func:`sum_block`."""
    return [function(decoder.named(source)[channel]) for source in sources]
