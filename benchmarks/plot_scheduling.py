"""Draws accuracy against modelled energy from the curves of ``benchmarks.scheduling`` or ``benchmarks.anarchic``.

    python -m benchmarks.scheduling --curves CURVES.json > REPORT.json
    python -m benchmarks.plot_scheduling CURVES.json --output docs/figures/scheduling.png

One panel per data set: watt-hours of the whole fleet, from the device model of the traces, against accuracy on the test
set. A line is the median over seeds of a policy's accuracy at that energy (the mean of three evaluated models in a row,
as in the report), as far as most seeds got; the band of the first and the last policy is between the quartiles. Needs
``pip install matplotlib``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.participation_figures import Point, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

GRID = 300


def main() -> int:
    """Writes the picture."""
    options = _parser().parse_args()
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = [run for path in options.curves for run in json.loads(path.read_text(encoding="utf-8"))]
    datasets = list(dict.fromkeys(run["dataset"] for run in runs))
    policies = list(dict.fromkeys(run["policy"] for run in runs))
    figure, axes = plt.subplots(1, len(datasets), figsize=(5.0 * len(datasets), 4.4), squeeze=False)
    for dataset, panel in zip(datasets, axes[0], strict=True):
        draw(panel, [run for run in runs if run["dataset"] == dataset], policies)
        panel.set_title(dataset, fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3 * len(datasets), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0.0, 0.16 if len(datasets) == 1 else 0.09, 1.0, 1.0))
    figure.savefig(options.output, dpi=110, metadata={"Software": None})
    return 0


def draw(panel: Axes, runs: list[dict[str, Any]], policies: list[str]) -> None:
    """One data set: a line per policy."""
    top, best = max(run["points"][-1][1] for run in runs), 0.0
    grid = np.linspace(0.0, top, GRID)
    for number, policy in enumerate(policies):
        seeds = [at_energy([Point(*point) for point in run["points"]], grid) for run in runs if run["policy"] == policy]
        if not seeds:
            continue
        table = np.array(seeds)
        there = np.isfinite(table).mean(0) > 0.5
        low, middle, high = np.nanquantile(table[:, there], [0.25, 0.5, 0.75], axis=0)
        heavy = number in (0, len(policies) - 1)
        panel.plot(grid[there], 100 * middle, color=f"C{number}", linewidth=2.0 if heavy else 1.0, label=policy)
        if heavy:
            panel.fill_between(grid[there], 100 * low, 100 * high, color=f"C{number}", alpha=0.15, linewidth=0)
        best = max(best, float(np.nanmax(middle)))
    panel.set_ylim(100 * best - 30.0, 100 * best + 1.5)
    panel.set_xlabel("Wh of the fleet, from the device model")
    panel.set_ylabel("test accuracy, %")
    panel.grid(visible=True, alpha=0.25)


def at_energy(points: list[Point], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy of the newest model at each energy; NaN before the first and after the last one."""
    line = smoothed(points)
    energies, accuracies = np.array([point.wh for point in line]), np.array([point.accuracy for point in line])
    at = np.searchsorted(energies, grid, side="right") - 1
    found = accuracies[np.maximum(at, 0)]
    found[(at < 0) | (grid > energies[-1])] = np.nan
    return found


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("curves", nargs="+", type=Path, help="what --curves wrote")
    result.add_argument("--output", type=Path, required=True, help=".png")
    return result


if __name__ == "__main__":
    sys.exit(main())
