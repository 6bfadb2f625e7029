"""How well the joules of a layer's training step are predicted from other layers, on two hosts (data of others).

Models: ``thor`` is `energy/thor/fitting.py`; ``flops`` one ratio (median) times FLOPs; ``flops_affine`` a straight
line by relative least squares; ``neuralpower`` polynomial terms of the sizes chosen by the lasso (Cai et al., ACML
2017), of raw joules, degree 3 (dense layers 2). 200 rows are held out. The median of the log-normal is the prediction.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from benchmarks import report
from benchmarks.layer_joules import layer_tables
from energy.thor.features import Floats, flops, size_table
from energy.thor.fitting import fit
from energy.thor.process import Process

if TYPE_CHECKING:
    from benchmarks.layer_joules import LayerTable

HELD_OUT, ROWS, SEEDS = 200, (30, 100, 300), 10
DRAWN = 8  # predictions that are timed
Z90 = 1.6449


class Outcome(NamedTuple):
    """Predictions of the held-out rows; ``low`` and ``high`` bound 90 %, if the model has intervals."""

    predicted: Floats
    low: Floats | None
    high: Floats | None
    fit_seconds: float
    predict_ms: float


Model: TypeAlias = Callable[["LayerTable", list[int], list[int]], Outcome]


def thor(table: LayerTable, train: list[int], test: list[int]) -> Outcome:
    """The product: a Gaussian process."""
    sizes, joules = [table.sizes[row] for row in train], [table.joules[row] for row in train]
    hidden = [table.sizes[row] for row in test]
    started = time.perf_counter()
    fitted = fit(table.family, sizes, joules, [0.0] * len(train))
    seconds = time.perf_counter() - started
    process = Process(
        table.family, sizes, joules, [0.0] * len(train), parameters=fitted.parameters, spread=fitted.spread
    )
    found, predict_ms = _timed(lambda: process.predict(hidden))
    half = Z90 * found.deviation
    return Outcome(np.exp(found.mean), np.exp(found.mean - half), np.exp(found.mean + half), seconds, predict_ms)


def ratio(table: LayerTable, train: list[int], test: list[int]) -> Outcome:
    """FLOPs times a constant."""
    work, joules = _work(table), np.array(table.joules)
    started = time.perf_counter()
    constant = np.median(joules[train] / work[train])
    seconds = time.perf_counter() - started
    predicted, predict_ms = _timed(lambda: constant * work[test])
    return Outcome(predicted, None, None, seconds, predict_ms)


def affine(table: LayerTable, train: list[int], test: list[int]) -> Outcome:
    """FLOPs times a constant plus a constant, of the least relative squares."""
    work, joules = _work(table), np.array(table.joules)
    design = np.column_stack([work, np.ones(len(work))])
    started = time.perf_counter()
    weights = np.linalg.lstsq(design[train] / joules[train][:, None], np.ones(len(train)), rcond=None)[0]
    seconds = time.perf_counter() - started
    predicted, predict_ms = _timed(lambda: design[test] @ weights)
    return Outcome(predicted, None, None, seconds, predict_ms)


def neuralpower(table: LayerTable, train: list[int], test: list[int]) -> Outcome:
    """A sparse polynomial of sizes and FLOPs, of raw joules."""
    from sklearn.linear_model import LassoCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    sizes = size_table(table.sizes)
    design = np.column_stack([sizes[:, np.ptp(sizes, axis=0) > 0], _work(table)])
    joules = np.array(table.joules)
    lasso = LassoCV(max_iter=1000, cv=5, alphas=20)
    model = make_pipeline(
        StandardScaler(), PolynomialFeatures(2 if table.kind == "linear" else 3), StandardScaler(), lasso
    )
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lasso says that it did not converge
        model.fit(design[train], joules[train])
    seconds = time.perf_counter() - started
    predicted, predict_ms = _timed(lambda: model.predict(design[test]))
    return Outcome(predicted, None, None, seconds, predict_ms)


MODELS: dict[str, Model] = {"thor": thor, "flops": ratio, "flops_affine": affine, "neuralpower": neuralpower}


def _work(table: LayerTable) -> Floats:
    return np.array([flops(table.family, sizes) for sizes in table.sizes])


def _timed(predict: Callable[[], Any]) -> tuple[Any, float]:
    times = []
    for _ in range(DRAWN):
        started = time.perf_counter()
        found = predict()
        times.append(time.perf_counter() - started)
    return found, 1e3 * float(np.median(times))


def judged(table: LayerTable, name: str, rows: int, seed: int) -> dict[str, float | None]:
    """One model, fitted to ``rows`` rows drawn by ``seed``."""
    order = [int(row) for row in np.random.default_rng(seed).permutation(len(table.joules))]
    test, train = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + rows]
    found = MODELS[name](table, train, test)
    joules = np.array(table.joules)[test]
    errors = np.abs(found.predicted - joules) / joules
    coverage = None
    if found.low is not None and found.high is not None:
        coverage = float(np.mean((found.low <= joules) & (joules <= found.high)))
    return {
        "mape": float(np.mean(errors)),
        "median_error": float(np.median(errors)),
        "coverage_90": coverage,
        "fit_seconds": found.fit_seconds,
        "predict_ms": found.predict_ms,
    }


def mean_of(outcomes: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each figure over seeds; None where a model has none."""
    result: dict[str, float | None] = {}
    for key in outcomes[0]:
        values = [outcome[key] for outcome in outcomes]
        known = [value for value in values if value is not None]
        result[key] = float(np.mean(known)) if known else None
    return result


def main() -> None:
    """Runs the benchmark."""
    parser = report.parser(__doc__)
    parser.add_argument("--seed", type=int, help=f"one seed only; without it the mean over {SEEDS}")
    parser.add_argument("--kinds", nargs="+", help="only these: conv linear pool")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="only these")
    options = parser.parse_args()
    seeds = range(SEEDS) if options.seed is None else [options.seed]
    results: list[dict[str, Any]] = []
    targets = defaultdict(list)
    for table in layer_tables(options.data):
        if options.kinds and table.kind not in options.kinds:
            continue
        for rows in ROWS:
            for name in options.models:
                figures = mean_of([judged(table, name, rows, seed) for seed in seeds])
                results.append({"host": table.host, "kind": table.kind, "rows": rows, "model": name, **figures})
                coverage = figures["coverage_90"]
                inside = "" if coverage is None else f", {coverage:.0%} inside 90 %"
                print(f"{table.host} {table.kind} {rows} {name}: {figures['mape']:.1%}{inside}", flush=True)
                targets[table.kind, rows, name].append(figures["mape"])
    for (kind, rows, name), values in targets.items():
        print(f"mean of hosts: {kind} {rows} {name}: {np.mean([v for v in values if v is not None]):.1%}")
    report.print_report("energy_estimator", options, results)


if __name__ == "__main__":
    main()
