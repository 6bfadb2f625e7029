"""The event loop."""

from __future__ import annotations

import os
import threading

import pytest

from edge_runtime.transport.loop import READ, Loop


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def loop(clock):
    loop = Loop(clock)
    yield loop
    loop.close()


def test_timers_run_in_order_of_time_then_of_asking(loop, clock):
    """Due timers run by time, and those of one time in the order they were set."""
    said = []
    for delay_s, name in ((2, "c"), (1, "a"), (1, "b"), (9, "never")):
        loop.call_later(delay_s, lambda name=name: said.append(name))
    loop.step(0)
    assert said == []
    clock.now = 2.0
    loop.step(0)
    assert said == ["a", "b", "c"]


def test_cancelled_timer_is_forgotten(loop, clock):
    """A cancelled timer does not run, cancelling twice or late is harmless, and an earlier timer may cancel a later."""
    said = []
    later = loop.call_later(2, lambda: said.append("later"))
    first = loop.call_later(1, later.cancel)
    clock.now = 3.0
    loop.step(0)
    first.cancel()
    later.cancel()
    assert said == []


def test_call_soon_runs_before_waiting_and_between_timers(loop, clock):
    """What a timer asks for soon happens before the next timer."""
    said = []
    loop.call_later(1, lambda: loop.call_soon(lambda: said.append("soon")))
    loop.call_later(1, lambda: said.append("timer"))
    clock.now = 1.0
    loop.step(0)
    assert said == ["soon", "timer"]


def test_call_from_another_thread_wakes_the_loop(loop):
    """A waiting loop runs what another thread hands it, thousands of times without a full pipe blocking anyone."""
    said = []

    def work():
        for number in range(20_000):
            loop.call_threadsafe(lambda number=number: said.append(number))
        loop.stop()

    thread = threading.Thread(target=work)
    thread.start()
    loop.run()
    thread.join()
    loop.step(0)
    assert said == list(range(20_000))


def test_stop_before_run_is_kept(loop):
    """A signal that comes during set-up ends the loop as soon as it runs; the run after that runs."""
    loop.stop()
    loop.run()
    said = []
    loop.call_soon(lambda: (said.append(1), loop.stop()))
    loop.run()
    assert said == [1]


def test_call_after_close_is_harmless(clock):
    """A late call from another thread writes into no file that took over the number of the pipe."""
    loop = Loop(clock)
    loop.close()
    loop.call_threadsafe(lambda: None)
    loop.stop()


def test_file_closed_by_an_earlier_callback_is_not_called(loop):
    """Of two ready files the one called first may close the other."""
    pipes = [os.pipe() for _ in range(2)]
    called = []

    def ready(mine, other):
        def act(_events):
            called.append(mine)
            loop.unwatch(other)
            loop.unwatch(mine)

        return act

    for (mine, _), (other, _) in (pipes, pipes[::-1]):
        loop.watch(mine, READ, ready(mine, other))
    for _, write in pipes:
        os.write(write, b"x")
    loop.step(0)
    loop.step(0)
    assert len(called) == 1
    for fds in pipes:
        for fd in fds:
            os.close(fd)


def test_number_of_a_closed_file_given_to_a_new_one_is_not_called(loop):
    """A new file that takes over the number of one closed in the same batch does not get its event."""
    pipes = [os.pipe() for _ in range(2)]
    fresh = []
    called = []

    def act(mine, other):
        def ready(_events):
            loop.unwatch(mine)
            loop.unwatch(other)
            os.close(other)
            read, write = os.pipe()
            fresh.extend((read, write))
            if read != other:
                os.dup2(read, other)
                fresh.append(other)
            loop.watch(other, READ, lambda _events: called.append("fresh"))

        return ready

    (a, aw), (b, bw) = pipes
    loop.watch(a, READ, act(a, b))
    loop.watch(b, READ, act(b, a))
    os.write(aw, b"x")
    os.write(bw, b"x")
    loop.step(0)
    loop.step(0)
    assert called == []
    for fd in {aw, bw, *fresh, a, b}:
        try:
            os.close(fd)
        except OSError:
            continue


def test_error_of_a_callback_ends_run(loop):
    """An unexpected error is not swallowed: it passes to whoever runs the loop."""
    loop.call_soon(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.run()
