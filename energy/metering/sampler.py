"""A thread that samples a meter, for programs that have no loop of their own to do so."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from energy.errors import EnergyError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from energy.metering.meter import Meter

INTERVAL_S = 0.1  # faster sensors gain nothing over windows of a second, and every reading costs energy itself


class Sampler:
    """Samples ``meter`` from a daemon thread while its ``with`` block runs; windows may be opened from any thread.

    Args:
        meter: not sampled by anybody else meanwhile.
        interval_s: time between readings; None: as the meter's sensor likes it, at most 10 Hz.
    """

    def __init__(self, meter: Meter, interval_s: float | None = None) -> None:
        self._meter = meter
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="energy-sampler", daemon=True)
        meter.lock = threading.RLock()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and waits for it.

        Raises:
            EnergyError: the thread had ended by itself, so windows after that lack readings; said once.
        """
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise EnergyError(
                f"sampling ended early with {type(error).__name__} ({error}): figures after that lack readings; "
                "measure again, and report this"
            ) from error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
            return
        with contextlib.suppress(EnergyError):  # the error that is on its way comes first
            self.stop()

    def _run(self) -> None:
        try:
            self._sample()
        except Exception as error:  # noqa: BLE001 - told by stop()
            self._error = error

    def _sample(self) -> None:
        clock = self._meter.clock
        next_s = clock()
        while True:
            # The sensor may have changed, and with it how often reading pays. Readings that are late are not made up.
            interval_s = self._interval_s or max(INTERVAL_S, self._meter.interval_s)
            next_s = max(next_s + interval_s, clock())
            if self._ended.wait(next_s - clock()):
                return
            self._meter.sample()
