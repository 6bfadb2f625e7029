"""Which layers to measure: error after 16, 32 and 48 chosen ones, for five rules (data of two hosts, of others).

``integrated_variance`` is what ``edge-energy profile`` does, by its own code (`energy/thor/kinds.py`): the first 4
layers from the prior, then 4 at a time. ``random`` and ``max_variance`` (the layer that the model is least sure of:
MacKay 1992, as THOR does) start from 8 random layers; ``random_same_start`` and ``max_variance_same_start`` from the
first 4 of ``integrated_variance``, which tells how much of its gain is the start. All fit the same model again every 4
layers. Errors are of 300 held-out layers with a last fit: ``mape``, each layer alike, and ``cost_weighted_error``, the
sum of absolute errors over the sum of joules, which whole models feel. ``within_one_point``: of the best of the first
three.

References are other layers of the pool, sizes only; on a device they are the layers of the user's models. Which kind
gets more points is not judged: with fewer kinds than profiling takes at a time, each has its turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.layer_joules import layer_tables
from energy.thor.fitting import fit
from energy.thor.interleave import Anchor
from energy.thor.kinds import Kind, Measured
from energy.thor.layers import LayerSpec
from energy.thor.pack import Probe
from energy.thor.probing import Reading
from energy.thor.process import Process
from energy.thor.profiling import NEXT_POINTS, START_POINTS

if TYPE_CHECKING:
    from benchmarks.layer_joules import LayerTable

HELD_OUT, RANDOM_START = 300, 8
POINTS = (16, 32, 48)
REFERENCES = 300
JUDGED = ("random", "max_variance", "integrated_variance")
RULES = (*JUDGED, "random_same_start", "max_variance_same_start")
KINDS = ("conv", "linear")


class Errors(NamedTuple):
    """Of the held-out layers, as fractions."""

    mape: float
    cost_weighted_error: float


class Chooser:
    """The choice of ``kind`` among the layers of ``pool``, which it knows by their row."""

    def __init__(self, table: LayerTable, pool: list[int]) -> None:
        self._table = table
        self._rows = {str(row): row for row in pool}
        probes = [
            Probe(file=name, role="candidate", kind=table.family, sizes=table.sizes[row])
            for name, row in self._rows.items()
        ]
        self._probes = {int(probe.file): probe for probe in probes}
        references = [LayerSpec(str(row), table.family, table.sizes[row]) for row in pool[-REFERENCES:]]
        self._kind = Kind(table.family, probes, references, 1, [])
        # Costs are ratios to an anchor: to one of a joule.
        self._anchor = Anchor(None, lambda _stepper: Reading(1, {"joules": 1.0}))  # type: ignore[arg-type]
        self._anchor.take()

    def next(self, count: int) -> list[int]:
        """Rows to measure next."""
        points = self._kind.points(self._anchor, {})
        return [int(probe.file) for probe in self._kind.next(points, "joules", count, most=max(POINTS))]

    def tell(self, rows: list[int]) -> None:
        """These rows were measured, twice with the same result."""
        for row in rows:
            probe, joules = self._probes[row], self._table.joules[row]
            self._kind.done.append(Measured(probe, probe.spec(1).sizes, {"joules": [joules, joules]}))


def errors_of(table: LayerTable, rule: str, seed: int) -> dict[int, Errors]:
    """Errors of the held-out layers after each number of points."""
    order = [int(row) for row in np.random.default_rng(seed).permutation(len(table.joules))]
    test, pool = order[:HELD_OUT], order[HELD_OUT:]
    chooser = Chooser(table, pool)
    chosen = pool[:RANDOM_START] if rule in {"random", "max_variance"} else chooser.next(START_POINTS)
    chooser.tell(chosen)
    found: dict[int, Errors] = {}
    for points in POINTS:
        while len(chosen) < points:
            count = min(NEXT_POINTS, points - len(chosen))
            chosen += chooser.next(count) if rule == "integrated_variance" else _next(rule, table, chosen, pool, count)
            chooser.tell(chosen[-count:])
        found[points] = _errors(table, _fitted(table, chosen), test)
    return found


def _next(rule: str, table: LayerTable, chosen: list[int], pool: list[int], count: int) -> list[int]:
    taken = set(chosen)
    rest = [row for row in pool if row not in taken]
    if rule.startswith("random"):
        return rest[:count]
    deviation = _fitted(table, chosen).predict([table.sizes[row] for row in rest]).deviation
    return [rest[place] for place in np.argsort(-deviation)[:count]]


def _fitted(table: LayerTable, rows: list[int]) -> Process:
    sizes, joules, errors = [table.sizes[row] for row in rows], [table.joules[row] for row in rows], [0.0] * len(rows)
    fitted = fit(table.family, sizes, joules, errors, quick=True)
    return Process(table.family, sizes, joules, errors, parameters=fitted.parameters)


def _errors(table: LayerTable, process: Process, rows: list[int]) -> Errors:
    joules = np.array(table.joules)[rows]
    missed = np.abs(np.exp(process.predict([table.sizes[row] for row in rows]).mean) - joules)
    return Errors(float(np.mean(missed / joules)), float(missed.sum() / joules.sum()))


def main() -> None:
    """Runs the benchmark."""
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=6, help="repetitions with other held-out layers")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for table in layer_tables(options.data):
        if table.kind not in KINDS:
            continue
        errors = {rule: [errors_of(table, rule, seed) for seed in range(options.seeds)] for rule in RULES}
        for points in POINTS:
            cell = {rule: [found[points] for found in errors[rule]] for rule in RULES}
            means = {rule: Errors(*np.mean(values, axis=0).tolist()) for rule, values in cell.items()}
            for rule, mean in means.items():
                row = {"host": table.host, "kind": table.kind, "points": points, "rule": rule, **mean._asdict()}
                row["worst_seed_mape"] = max(one.mape for one in cell[rule])
                best = Errors(*np.min([means[one] for one in JUDGED], axis=0).tolist())
                row["within_one_point"] = mean.mape <= best.mape + 0.01
                row["within_one_point_cost_weighted"] = mean.cost_weighted_error <= best.cost_weighted_error + 0.01
                results.append(row)
            text = ", ".join(f"{rule} {mean.mape:.1%} ({mean.cost_weighted_error:.1%})" for rule, mean in means.items())
            print(f"{table.host} {table.kind} {points}: {text}", flush=True)
    report.print_report("energy_active", options, results)


if __name__ == "__main__":
    main()
