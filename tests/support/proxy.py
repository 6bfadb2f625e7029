"""A TCP proxy on loopback that is as bad as a cellular link: slow, far away, and cut now and then.

One thread, one selector. Rate and delay are per connection and direction; cuts end every connection at once with a
reset, at random intervals from a seed. ``cut()`` cuts now.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import socket
import struct
import threading
import time
from collections import deque
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
READ_BYTES = 16_384
BUFFER_LIMIT_BYTES = 256 * 1024  # more than that and the sender feels it


class _Pipe:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.waiting_bytes = 0
        self.free_at = 0.0
        self.ended = False


class Proxy:
    """Forwards connections to ``target_port``.

    Args:
        rate_bytes_s: 0: as fast as it goes.
        delay_s: one way.
        cut_every_s: mean time between cuts; 0: none.
        seed: of the cuts.
    """

    def __init__(
        self, target_port: int, *, rate_bytes_s: float = 0, delay_s: float = 0, cut_every_s: float = 0, seed: int = 0
    ) -> None:
        self.rate_bytes_s, self.delay_s, self.cut_every_s = rate_bytes_s, delay_s, cut_every_s
        self.cuts = 0
        self.forwarded_bytes = 0
        self._random = Random(seed)
        self._target_port = target_port
        self._listener = socket.create_server((HOST, 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._pipes: list[_Pipe] = []
        self._commands: deque[str] = deque()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._order = itertools.count()
        self._due: list[tuple[float, int, _Pipe]] = []
        self._next_cut = time.monotonic() + self._pause()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Ends all connections now."""
        self._command("cut")

    def close(self) -> None:
        """Ends the proxy."""
        self._command("close")
        self._thread.join(timeout=5)

    def _command(self, name: str) -> None:
        self._commands.append(name)
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def _pause(self) -> float:
        return self._random.expovariate(1 / self.cut_every_s) if self.cut_every_s else 1e9

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            if now >= self._next_cut:
                self._cut_all()
                self._next_cut = now + self._pause()
            self._send_due(now)
            wait_s = min(self._next_cut, self._due[0][0] if self._due else 1e9) - time.monotonic()
            for key, _ in self._selector.select(max(0.0, min(wait_s, 60.0))):
                if key.fileobj is self._wake:
                    self._wake.recv(4096)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.data in self._pipes:
                    self._read(key.data)
            while self._commands:
                if self._commands.popleft() == "cut":
                    self._cut_all()
                else:
                    self._end()
                    return

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection((HOST, self._target_port), timeout=2)
            except OSError:
                client.close()
                return
            for sock in (client, server):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target in ((client, server), (server, client)):
                pipe = _Pipe(source, target)
                self._pipes.append(pipe)
                self._selector.register(source, selectors.EVENT_READ, pipe)

    def _read(self, pipe: _Pipe) -> None:
        try:
            data = pipe.source.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        now = time.monotonic()
        if not data:
            pipe.ended = True
            self._selector.unregister(pipe.source)
        pipe.free_at = max(pipe.free_at, now) + (len(data) / self.rate_bytes_s if self.rate_bytes_s else 0)
        pipe.waiting.append((pipe.free_at + self.delay_s, data))
        pipe.waiting_bytes += len(data)
        heapq.heappush(self._due, (pipe.free_at + self.delay_s, next(self._order), pipe))
        if pipe.waiting_bytes > BUFFER_LIMIT_BYTES and not pipe.ended:
            self._selector.unregister(pipe.source)

    def _send_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            at, order, pipe = heapq.heappop(self._due)
            if pipe not in self._pipes:
                continue
            _, data = pipe.waiting[0]
            if not data:
                self._close_pair(pipe)
                continue
            try:
                sent = pipe.target.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close_pair(pipe)
                continue
            self.forwarded_bytes += sent
            was_full = pipe.waiting_bytes > BUFFER_LIMIT_BYTES
            pipe.waiting_bytes -= sent
            if sent < len(data):
                pipe.waiting[0] = (at, data[sent:])
                heapq.heappush(self._due, (now + 0.005, order, pipe))
            else:
                pipe.waiting.popleft()
            if was_full and pipe.waiting_bytes <= BUFFER_LIMIT_BYTES and not pipe.ended:
                self._selector.register(pipe.source, selectors.EVENT_READ, pipe)

    def _close_pair(self, pipe: _Pipe, *, reset: bool = False) -> None:
        for other in [other for other in self._pipes if other.source in (pipe.source, pipe.target)]:
            self._pipes.remove(other)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(other.source)
            if reset:
                linger = struct.pack("ii", 1, 0)
                with contextlib.suppress(OSError):
                    other.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            other.source.close()

    def _cut_all(self) -> None:
        self.cuts += bool(self._pipes)
        while self._pipes:
            self._close_pair(self._pipes[0], reset=True)

    def _end(self) -> None:
        self._cut_all()
        self._listener.close()
        self._selector.close()
        self._wake.close()
        self._waker.close()
