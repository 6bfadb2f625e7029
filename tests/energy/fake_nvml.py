"""Stands in for the module ``pynvml``, with its names, so that cards need not be there."""

# ruff: noqa: N802

from __future__ import annotations


class FakeNvmlError(Exception):
    """As ``pynvml.NVMLError``: the number of the error in ``value``."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNvml:
    """Stands in for the module ``pynvml``: cards with ``energy_mj``, ``power_mw``, ``reasons``; None: NotSupported."""

    NVMLError = FakeNvmlError
    NVML_CLOCK_SM = 1

    def __init__(self, *cards: dict[str, object], start_error: int | None = None) -> None:
        self.cards = cards
        self.start_error = start_error

    def nvmlInit(self) -> None:
        if self.start_error is not None:
            raise FakeNvmlError(self.start_error)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, object]:
        return self.cards[index]

    def nvmlDeviceGetName(self, card: dict[str, object]) -> object:
        return card.get("name", "NVIDIA GPU")

    def nvmlDeviceGetTotalEnergyConsumption(self, card: dict[str, object]) -> object:
        return self._answer(card, "energy_mj")

    def nvmlDeviceGetPowerUsage(self, card: dict[str, object]) -> object:
        return self._answer(card, "power_mw")

    def nvmlDeviceGetCurrentClocksEventReasons(self, _card: dict[str, object]) -> object:
        raise FakeNvmlError(13)  # NVML_ERROR_FUNCTION_NOT_FOUND, as drivers before 535 say

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: dict[str, object]) -> object:
        return self._answer(card, "reasons")

    def nvmlDeviceGetClockInfo(self, card: dict[str, object], _kind: int) -> object:
        return self._answer(card, "clock_mhz")

    @staticmethod
    def _answer(card: dict[str, object], key: str) -> object:
        if "error" in card:
            raise FakeNvmlError(int(str(card["error"])))
        if card.get(key) is None:
            raise FakeNvmlError(3)  # NVML_ERROR_NOT_SUPPORTED
        return card[key]
