"""Faults of a simulated run, drawn by a seed: where the broker is lost, and who crashes when.

Server faults strike at steps of the round machine, so they fall between any two events whatever the virtual times are.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeAlias

import msgspec

from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 10_000  # times that a fault of the server strikes
_RATES = ("agents", "workers", "duplicates")
_Rate: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Kind: TypeAlias = Literal["broker", "coordinator", "clock"]

LONGEST_LOSS_S = 60.0
LONGEST_DOWN_S = 20.0
LARGEST_JUMP_S = 3 * 86_400.0
LONGEST_DELAY_S = 30.0  # of a repeated message, and until a device's clock jumps
JUMPING_DEVICES = 0.3  # that share of them, whenever the coordinator's clock does
HALF = 0.5  # of the coordinator's jumps come without a crash


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often what goes wrong.

    ``broker``: so many losses of the broker. ``coordinator``: crashes, at any effect. ``clock``: so many times the
    coordinator's clock jumps, while it runs or with a crash, and those of some devices soon after; and the clocks of
    all devices are off by hours from the start.
    ``agents`` and ``workers``: the share of jobs during which the agent, or its worker process, dies. ``duplicates``:
    the share of messages that come again later.
    """

    broker: _Count = 0
    coordinator: _Count = 0
    clock: _Count = 0
    agents: _Rate = 0.0
    workers: _Rate = 0.0
    duplicates: _Rate = 0.0


DEFAULT_FAULTS = FaultPlan(broker=2, coordinator=3, clock=1, agents=0.05, workers=0.05, duplicates=0.05)
NO_FAULTS = FaultPlan()


def parse_faults(text: str) -> FaultPlan:
    """From ``broker=2,agents=0.05``, or ``default``, or empty for none.

    Raises:
        ConfigError: an unknown fault, or no number.
    """
    if text == "default":
        return DEFAULT_FAULTS
    if not text:
        return NO_FAULTS
    known = FaultPlan.__struct_fields__
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        if name not in known or not equals:
            raise ConfigError(f"--faults {part!r}: write default, or NAME=NUMBER with {', '.join(known)}")
        try:
            values[name] = float(number)
        except ValueError as error:
            raise ConfigError(f"--faults {part!r}: {number!r} is no number") from error
    for name, value in values.items():
        if name in _RATES and not 0.0 <= value <= 1.0:
            raise ConfigError(f"--faults {name}={value:g}: write a share from 0 to 1, as {name}=0.05")
        if name not in _RATES and not (0 <= value <= MOST and value == int(value)):
            raise ConfigError(f"--faults {name}={value:g}: write how many times, a whole number from 0 to {MOST}")
    return msgspec.convert(values, FaultPlan, strict=False)


class JobFault(NamedTuple):
    """The ``kind`` of what strikes a job after a ``share`` of its time."""

    kind: Literal["agents", "workers"]
    share: float


class Faults:
    """The faults of one run.

    Args:
        plan: how many.
        seed: draws them.
        expected_steps: about so many steps the round machine will do; server faults fall in these.
        strike: called at a server fault.
    """

    def __init__(self, plan: FaultPlan, seed: int, expected_steps: int, strike: Callable[[Kind, Random], None]) -> None:
        self.plan = plan
        self.struck: dict[str, int] = {}
        self._seen: set[tuple[str, int]] = set()
        self._strike = strike
        self._server, self._jobs, self._messages = (
            Random(f"{seed}/faults/{purpose}") for purpose in ("server", "jobs", "messages")
        )
        counts: dict[Kind, int] = {"broker": plan.broker, "coordinator": plan.coordinator, "clock": plan.clock}
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        at = sorted(self._server.randrange(2, max(3, expected_steps)) for _ in kinds)
        self._server.shuffle(kinds)
        self._due = list(zip(at, kinds, strict=True))[::-1]

    def at_step(self, number: int) -> None:
        """The round machine is about to take its step of this number."""
        if self._due and number >= self._due[-1][0]:
            _, kind = self._due.pop()
            self.note(kind)
            self._strike(kind, self._server)

    def of_job(self, job: tuple[str, int]) -> JobFault | None:
        """What strikes the job that begins now; once a job, also where it begins again."""
        plan = self.plan
        if job in self._seen or not (plan.agents or plan.workers):
            return None
        self._seen.add(job)
        draw, share = self._jobs.random(), self._jobs.random()
        if draw < plan.agents:
            return JobFault("agents", share)
        return JobFault("workers", share) if draw < plan.agents + plan.workers else None

    def repeat_after_s(self) -> float | None:
        """How long after the message that is sent now it comes again; None: never."""
        if not self.plan.duplicates or self._messages.random() >= self.plan.duplicates:
            return None
        self.note("duplicates")
        return self._messages.uniform(0.0, LONGEST_DELAY_S)

    def note(self, kind: str) -> None:
        """Counts a fault that struck."""
        self.struck[kind] = self.struck.get(kind, 0) + 1
