"""Profiles the layers of one device: which to measure, in what order, until the budget is spent.

Every kind begins with a few sizes that fill the space of the layers that will be asked about. Then the kinds whose
uncertainty weighs most in the user's models get more, each time the sizes that take most of it away
(:mod:`energy.thor.active`). The last part of the budget goes to all of them again, in another order and
company: other load on the machine does not move all kinds alike, so rounds at one time only would take it for the
layer's. Without SciPy the choice works on what is believed of a kind before anything was measured.
"""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from energy.errors import ProfileError
from energy.thor import interleave
from energy.thor.features import flops
from energy.thor.fitting import MINIMUM_POINTS
from energy.thor.gauge import MeterGauge
from energy.thor.kinds import Kind, Measured
from energy.thor.probing import Stepper
from energy.thor.profile import Family, Profile, Quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from energy.thor.gauge import CpuGauge
    from energy.thor.pack import Pack, Probe
    from energy.thor.profile import Device

START_POINTS = 4
NEXT_KINDS = 4
NEXT_POINTS = 4
TOGETHER = 16  # graphs measured against each other in the same rounds
MOST_POINTS = 60
FIRST_SHARE = 0.6  # of the budget, until points are measured again
MORE_PASSES = 2
# Forward FLOPs of the layer that the others are compared with: a few milliseconds on a small board.
_ANCHOR_FLOPS = 3e7


class Settings(NamedTuple):
    """How to profile.

    ``budget_s``: wall time to measure in. ``roles``: which probes of the pack may be measured. ``fitted``: the choice
    may use SciPy. ``most``: points per kind. ``limits``: how well each point is measured.
    """

    batch: int
    threads: int = 1
    budget_s: float = 300.0
    seed: int = 0
    roles: tuple[str, ...] = ("layer", "candidate")
    fitted: bool = True
    most: int = MOST_POINTS
    limits: interleave.Limits = interleave.Limits()


class Need(NamedTuple):
    """What a budget has to do. ``each_s``: seconds of one point; ``least_s``: of all that are needed to fit."""

    kinds: int
    window_s: float
    each_s: float
    least_s: float
    advised_s: float

    def refusal(self, budget_s: float) -> str:
        """A budget that is too small, and one that would do."""
        return (
            f"{budget_s:.0f} s are too few for {MINIMUM_POINTS} points of each of {self.kinds} kinds of layers with "
            f"bursts of {self.window_s:g} s; give --budget-s {math.ceil(self.advised_s)} or more"
        )


def budget_need(pack: Pack, settings: Settings, window_s: float, known: list[Family]) -> Need:
    """What it takes to fit every kind of ``pack``, beside the points that are ``known``, in bursts of ``window_s``."""
    each_s = window_s * settings.limits.minimum * (1 + 3 / TOGETHER)  # the anchor twice, and the empty graph
    there: dict[str, int] = {}
    for probe in pack.table.probes:
        if probe.kind and probe.role in settings.roles:
            there[probe.kind] = there.get(probe.kind, 0) + 1
    had = {family.kind: len(family.points) for family in known}
    missing = {kind: max(0, MINIMUM_POINTS - had.get(kind, 0)) for kind in there}
    least = sum(min(count, there[kind]) for kind, count in missing.items())
    advised_s = each_s * sum(missing.values()) * (1 + 1 / MINIMUM_POINTS)
    return Need(sum(count > 0 for count in missing.values()), window_s, each_s, each_s * least, advised_s)


class Profiler:
    """Measures probes of ``pack`` and keeps what was found.

    Args:
        pack: stays open while this is used.
        gauge: takes one burst of steps.
        settings: how to profile.
        anchor: a graph that all are compared with, warmed up here; None: a layer of the pack.
        known: families of an earlier session on the same device; their sizes are not measured again.
        say: told in one line what is measured.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        pack: Pack,
        gauge: CpuGauge | MeterGauge,
        settings: Settings,
        *,
        anchor: Stepper | None = None,
        known: list[Family] | None = None,
        say: Callable[[str], None] = lambda _line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pack, self._gauge, self._settings, self._say, self._clock = pack, gauge, settings, say, clock
        self._rng = random.Random(settings.seed)
        self._began_s = clock()
        self.seconds = 0.0
        self.again = 0  # points that were measured in further rounds
        self.notes: list[str] = []
        self.kinds = self._kinds(known or [])
        self._start = self._start_points(known or [])
        self._empty = self._stepper(self._only("empty"))
        stepper = anchor or self._stepper(self._anchor_probe())
        for one in (self._empty, stepper):
            one.warm_up(gauge.window_s)
        self.anchor = interleave.Anchor(stepper, gauge)
        self._empty_ratios: interleave.Ratios = {}

    def batches(self) -> Iterator[int]:
        """Measures until the budget is spent or nothing is left; yields the number of points after each batch.

        Raises:
            ProfileError: a graph is refused, or the sensor fails for good.
        """
        self._began_s = self._clock()
        for probes in self._schedule():
            self._measure(probes)
            self.seconds = self._clock() - self._began_s
            yield sum(len(kind.done) for kind in self.kinds.values())

    def compare(self, steppers: dict[str, Stepper], rounds: int) -> dict[str, dict[Quantity, float]]:
        """Cost per step of other graphs, warmed up, against the same anchor."""
        limits = interleave.Limits(0.0, rounds, rounds)
        found = interleave.measure(steppers, self.anchor, self._gauge, self._rng, limits=limits)
        costs: dict[str, dict[Quantity, float]] = {name: {} for name in steppers}
        for name, ratios in found.items():
            for quantity, values in ratios.items():
                scale = self.anchor.median(quantity)
                if scale is not None:
                    costs[name][quantity] = float(np.median(values)) * scale
        return costs

    def fixed(self) -> dict[Quantity, float]:
        """Cost of a step that does nothing."""
        found: dict[Quantity, float] = {}
        for quantity, ratios in self._empty_ratios.items():
            scale = self.anchor.median(quantity)
            if scale is not None:
                found[quantity] = float(np.median(ratios)) * scale
        return found

    def families(self) -> list[Family]:
        """Every kind with its points so far."""
        fixed = self.fixed()
        made = [(kind, kind.points(self.anchor, fixed)) for kind in self.kinds.values()]
        return [Family(kind=kind.kind, points=points) for kind, points in made if points]

    def profile(self, device: Device, created_unix_s: float) -> Profile:
        """What was measured, without fitted models."""
        quantity = self._gauge.quantity
        metered = self._gauge if isinstance(self._gauge, MeterGauge) else None
        problems = list(metered.problems) if metered else []
        return Profile(
            device=device,
            quantity=quantity,
            families=self.families(),
            fixed=self.fixed(),
            created_unix_s=created_unix_s,
            profiling_seconds=self.seconds,
            power=list(metered.power) if metered else [],
            windows=list(metered.marks) if metered else [],
            notes=[*self.notes, *problems],
        )

    def _kinds(self, known: list[Family]) -> dict[str, Kind]:
        references = self._pack.references(self._settings.batch)
        found: dict[str, list[Probe]] = {}
        for probe in self._pack.table.probes:
            if probe.kind and probe.role in self._settings.roles:
                found.setdefault(probe.kind, []).append(probe)
        earlier = {family.kind: family.points for family in known}
        for kind, names in self._pack.table.missing.items():
            self.notes.append(f"no probe for {kind} ({', '.join(names[:3])}): its cost is missing from estimates")
        return {
            kind: Kind(kind, probes, references.get(kind, []), self._settings.batch, earlier.get(kind, []))
            for kind, probes in sorted(found.items())
        }

    def _start_points(self, known: list[Family]) -> int:
        """How many points every kind begins with; says so if the budget will not do for models of all kinds."""
        need = budget_need(self._pack, self._settings, self._gauge.window_s, known)
        if self._settings.budget_s < need.least_s:
            self._say(f"{need.refusal(self._settings.budget_s)}, or --resume afterwards")
        share = self._settings.budget_s / (need.each_s * max(len(self.kinds), 1))
        return int(min(START_POINTS, max(MINIMUM_POINTS, share / 2)))

    def _schedule(self) -> Iterator[list[Probe]]:
        for probes in self._plan():
            if self._spent(FIRST_SHARE):
                break
            yield probes
        for _ in range(MORE_PASSES):
            done = [item.probe for kind in self.kinds.values() for item in kind.done]
            self._rng.shuffle(done)
            for start in range(0, len(done), TOGETHER):
                if self._spent():
                    return
                yield done[start : start + TOGETHER]

    def _plan(self) -> Iterator[list[Probe]]:
        """Batches of probes: first some of every kind, then of the kinds that need it most."""
        begun = [self._next(kind, self._start) for kind in self.kinds.values()]
        # In turn, so that kinds are spread over time, and all have some points when the budget ends early.
        first = [probes[turn] for turn in range(self._start) for probes in begun if turn < len(probes)]
        for start in range(0, len(first), TOGETHER):
            yield first[start : start + TOGETHER]
        while True:
            fixed, quantity = self.fixed(), self._gauge.quantity
            needs = {
                kind.kind: kind.need(kind.points(self.anchor, fixed), quantity, fitted=self._settings.fitted)
                for kind in self.kinds.values()
                if kind.left(self._settings.most)
            }
            chosen = sorted(needs, key=lambda name: -needs[name])[:NEXT_KINDS]
            probes = [probe for name in chosen for probe in self._next(self.kinds[name], NEXT_POINTS)]
            if not probes:
                return
            yield probes

    def _next(self, kind: Kind, count: int) -> list[Probe]:
        points = kind.points(self.anchor, self.fixed())
        settings = self._settings
        return kind.next(points, self._gauge.quantity, count, most=settings.most, fitted=settings.fitted)

    def _measure(self, probes: list[Probe]) -> None:
        started_s = self._clock()
        steppers = {str(index): self._stepper(probe) for index, probe in enumerate(probes)}
        for stepper in steppers.values():
            stepper.warm_up(self._gauge.window_s)
        steppers["empty"] = self._empty
        found = interleave.measure(
            steppers, self.anchor, self._gauge, self._rng, limits=self._settings.limits, ended=self._spent
        )
        for quantity, ratios in found.pop("empty").items():
            self._empty_ratios.setdefault(quantity, []).extend(ratios)
        for index, probe in enumerate(probes):
            sizes = probe.spec(self._settings.batch).sizes
            kind = self.kinds[probe.kind]
            self.again += any(item.probe is probe for item in kind.done)
            kind.add(Measured(probe, sizes, found[str(index)]))
        names = ", ".join(sorted({probe.kind for probe in probes}))
        self._say(f"{self._clock() - self._began_s:.0f} s: measured {len(probes)} layers ({names})")
        if isinstance(self._gauge, MeterGauge):
            self._gauge.mark(names, started_s)

    def _stepper(self, probe: Probe) -> Stepper:
        settings = self._settings
        batch = probe.batch or settings.batch
        if batch != settings.batch:
            raise ProfileError(
                f"{probe.kind} ({', '.join(probe.layers)}) takes only batches of {batch}; profile with --batch {batch}"
            )
        data = self._pack.graph(probe)
        return Stepper(data, batch=batch, threads=settings.threads, seed=settings.seed, limits=probe.limits)

    def _only(self, role: str) -> Probe:
        for probe in self._pack.table.probes:
            if probe.role == role:
                return probe
        raise ProfileError(f"the pack has no probe of role {role!r}; make it again with edge-export probes")

    def _anchor_probe(self) -> Probe:
        probes = [probe for probe in self._pack.table.probes if probe.kind and probe.role in {"layer", "candidate"}]
        if not probes:
            raise ProfileError("the pack has no layers; make it again with edge-export probes")
        batch = self._settings.batch
        return min(probes, key=lambda probe: abs(np.log(flops(probe.kind, probe.spec(batch).sizes) / _ANCHOR_FLOPS)))

    def _spent(self, share: float = 1.0) -> bool:
        return self._clock() - self._began_s >= share * self._settings.budget_s
