"""Arrived updates are checked beside the event loop: in order, once, in a thread or in processes."""

from __future__ import annotations

import os
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from coordinator import events as e
from coordinator.aggregation.decoding import Decoder, Source
from coordinator.checking import Check, Checks, damage
from coordinator.executors.local import LocalExecutor
from coordinator.server import Coordinator
from coordinator.settings import ServerSettings
from edge_runtime import messages
from edge_runtime.compression import Layout
from edge_runtime.errors import CodecError
from edge_runtime.transport.loop import Loop
from tests.coordinator import helpers as h
from tests.edge_runtime import toy_bundle

LAYOUT = Layout(("w",), ((4,),))


@pytest.fixture
def loop():
    made = Loop()
    yield made
    made.close()


def named(number):
    return e.UpdateId("run", "a", f"r0-{number}", 0)


def check(number, *, damaged=False, decoder=None):
    """Of a small update; a damaged one has the bytes of another update."""
    data = h.encoded(np.ones(4, np.float32), LAYOUT, named(number + 100 * damaged))
    made = decoder or Decoder(LAYOUT, {"trainer": ("delta",)}, None)
    return Check(Source(named(number), 0, "trainer", data), made, None)


def until(loop, condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        loop.step(0.02)
    assert condition()


class Slow(Decoder):
    """Waits for a sign before it decodes the first update."""

    def __init__(self):
        super().__init__(LAYOUT, {"trainer": ("delta",)}, None)
        self.go = threading.Event()

    def decode(self, source, **how):
        assert self.go.wait(20)
        return super().decode(source, **how)


class Broken(Decoder):
    """A plug-in with a defect."""

    def __init__(self):
        super().__init__(LAYOUT, {"trainer": ("delta",)}, None)

    def decode(self, source, **how):  # noqa: ARG002
        raise ZeroDivisionError("oops")


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_arrival(loop, workers):
    """Whichever process was done first; and each says what is wrong with its update."""
    executor = LocalExecutor(workers) if workers else None
    checks, told = Checks(loop, executor), []
    for number in range(6):
        checks.run(check(number, damaged=number == 3), lambda reason, number=number: told.append((number, reason)))
    assert named(5) in checks
    until(loop, lambda: len(told) == 6)
    assert [number for number, _ in told] == list(range(6))
    assert [number for number, reason in told if reason] == [3]
    assert named(5) not in checks
    checks.close()
    if executor is not None:
        executor.close()


def test_the_loop_goes_on_while_an_update_is_checked(loop):
    """What is slow to decode holds up no device."""
    checks, told, slow = Checks(loop), [], Slow()
    checks.run(check(0, decoder=slow), told.append)
    turns = []
    loop.call_later(0.0, lambda: turns.append(1))
    until(loop, lambda: turns)
    assert told == []
    slow.go.set()
    until(loop, lambda: told)
    assert told == [""]
    checks.close()


def test_a_defect_in_a_plug_in_refuses_the_update_and_nothing_else(loop):
    """The reason names the error; the next update is checked as ever."""
    checks, told = Checks(loop), []
    checks.run(check(0, decoder=Broken()), told.append)
    checks.run(check(1), told.append)
    until(loop, lambda: len(told) == 2)
    assert told == ["could not be checked: ZeroDivisionError: oops", ""]
    checks.close()


def test_what_cannot_be_made_durable_is_not_answered(loop, caplog):
    """A failing disk refuses no update: it stays on its device, and the next one is answered."""
    good, checks, told = check(0), Checks(loop), []
    handle = os.memfd_create("update")
    os.write(handle, good.source.payload)
    undurable = Path(f"/proc/self/fd/{handle}")  # readable, but nothing there can be flushed to a disk
    checks.run(good._replace(source=good.source._replace(payload=undurable)), told.append)
    checks.run(check(1), lambda reason: told.append(("next", reason)))
    until(loop, lambda: told)
    assert told == [("next", "")]
    assert named(0) not in checks
    assert "stays on its device" in caplog.text
    checks.close()
    os.close(handle)


def test_what_cannot_be_decoded_is_said():
    """Bytes of another update, or of none."""
    good = check(1)
    assert damage(good) == ""
    assert damage(good._replace(source=good.source._replace(update=named(2))))
    assert damage(good._replace(source=good.source._replace(payload=b"garbage")))
    with pytest.raises(CodecError):
        good.decoder.decode(good.source._replace(payload=b"garbage"))


@pytest.fixture(params=[0, 1])
def server(tmp_path, request, mosquitto_program, monkeypatch):  # noqa: ARG001 - skips where there is none
    """A server that was made, not started, whose messages go nowhere."""
    made = Coordinator(ServerSettings(state_dir=tmp_path, workers=request.param))
    monkeypatch.setattr(made.link, "publish", lambda *_, **__: True)
    made.link.is_up = True
    yield made
    made.close()


def taken_up(server, **changes):
    """A run that the server has taken up, with an open job: state and job."""
    plan = h.plan(**{"target": 1, "deadline_s": 1e9, **changes})
    state = h.start(plan)
    state.run.run = server.store.submit(plan, state.run)
    bundle = server.store.blobs.put_file(toy_bundle.write_bundle(server.settings.state_dir / "toy.bundle"))
    state.run.bundle = h.BlobRef(sha256=bundle.sha256, size_bytes=bundle.size_bytes)
    server.store.save([state.run])
    server.shell._take_up(server.store.run(state.run.run))
    server._announced(server.clock(), h.device("a", session=str(len(server.shell.runs))))
    state = server.shell.runs[state.run.run]
    (job,) = state.assignments.values()
    return state, job


def offer(server, job, *, damaged=False):
    """The device offers its update, all of it in one message."""
    layout = server.shell.files[job.run].bundle.layout()
    data = h.encoded(np.ones(layout.size, np.float32), layout, h.update_id(job, 5 * damaged))
    first = zlib.crc32(data).to_bytes(4, "little") + data
    message = messages.UpdateOffer(update=h.update_id(job), meta=h.meta(job), first=first)
    server._on_message(f"fl/v1/d/{job.device}/message", messages.encode(message))


def test_an_update_offered_again_while_it_is_checked_counts_once(server, monkeypatch):
    """It is neither fetched nor checked a second time."""
    aggregates = []
    monkeypatch.setattr(server.shell, "_aggregate", lambda _run, effect: aggregates.append(effect))
    state, job = taken_up(server)
    for _ in range(3):
        offer(server, job)
    assert list(state.updates) == []
    assert len(server.shell._checks._running) == 1
    until(server.loop, lambda: aggregates)
    assert [row.update for row in aggregates[0].updates] == [h.update_id(job)]
    offer(server, job)
    assert not server.shell._checks._running


def test_an_update_that_is_damaged_is_refused_and_its_bytes_go(server):
    """By the same check, after which the store keeps nothing of it."""
    state, job = taken_up(server)
    offer(server, job, damaged=True)
    until(server.loop, lambda: state.updates)
    (row,) = state.updates.values()
    assert row.verdict == "refused"
    assert not server.store.blobs.has(row.blob.sha256)


def test_a_run_that_was_put_aside_meanwhile_takes_nothing(server):
    """What was being checked belongs to a state that is gone; the device offers it again and then it counts."""
    state, job = taken_up(server)
    offer(server, job)
    server.shell.runs.pop(job.run)
    stored = server.store.run(job.run)
    until(server.loop, lambda: not server.shell._checks._running)
    server.shell._take_up(stored)
    again = server.shell.runs[job.run]
    assert not again.updates
    assert not state.updates
    offer(server, again.assignments[job.assignment])
    until(server.loop, lambda: again.updates)
    (row,) = again.updates.values()
    assert row.counted_round == 0
