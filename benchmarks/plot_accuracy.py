"""Draws accuracy against bytes from reports of ``benchmarks.accuracy_vs_bytes``.

    python -m benchmarks.plot_accuracy REPORT.json ... --output docs/accuracy_vs_bytes.png

One panel per report: bytes of one update as sent (logarithmic) against accuracy, a bar for the spread of the paired
differences to uncompressed training. Needs ``pip install matplotlib``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^v<>PXph*"
NAMES = {
    "fp32": "float32",
    "default": "default, both ways",
    "default-up": "default",
    "default-double": "default, twice the ratio",
    "fedzip": "FedZip",
    "fedzip-feedback": "FedZip + feedback",
    "topk": "top-k, float32 values",
    "eden": "EDEN, 1 bit",
    "sign": "sign",
    "stc": "STC",
}


def main() -> int:
    """Writes the picture."""
    options = _parser().parse_args()
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "accuracy"  # the same reports give the same file
    from matplotlib import pyplot as plt

    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.reports]
    figure, axes = plt.subplots(1, len(reports), figsize=(6.0 * len(reports), 5.6), squeeze=False)
    for report, panel in zip(reports, axes[0], strict=True):
        draw(panel, report)
    figure.tight_layout()
    figure.savefig(
        options.output, dpi=110, metadata={"Software": None} if options.output.suffix == ".png" else {"Date": None}
    )
    return 0


def draw(axes: Axes, report: dict[str, Any]) -> None:
    """One report: a point per codec."""
    arguments = report["arguments"]
    updates = arguments["devices"] * arguments["rounds"]
    for number, result in enumerate(report["results"]):
        size, accuracy = result["bytes_up"] / updates, 100 * result["accuracy"]
        interval = result["difference_interval"]
        base = 100 * result["accuracy_fp32"]
        if result["codec"] == "fp32":
            axes.axhline(accuracy, color="0.75", linewidth=1, zorder=0)
        error = None if interval is None else [[accuracy - (base + interval[0])], [base + interval[1] - accuracy]]
        name, ratio = NAMES.get(result["codec"], result["codec"]), result["ratio_up"]
        axes.errorbar(
            size,
            accuracy,
            bars(error),
            fmt=MARKERS[number % len(MARKERS)],
            color=f"C{number % 10}",
            capsize=3,
            markersize=7,
            label=f"{name}: {ratio:,.0f}x",
        )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize=8, frameon=False)
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("bytes of an update, packets included")
    axes.set_ylabel("test accuracy, %")
    counts = ", ".join(f"{arguments[key]} {key}" for key in ("devices", "rounds", "seeds"))
    axes.set_title(f"{arguments['model']}, {counts}", fontsize=10)
    axes.grid(visible=True, which="major", alpha=0.25)


def bars(interval: list[list[float]] | None) -> list[list[float]] | None:
    """Lengths of the bars; what rounding made negative is zero."""
    return None if interval is None else [[max(0.0, value) for value in side] for side in interval]


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("reports", nargs="+", type=Path, help="what the benchmark printed, as files")
    result.add_argument("--output", type=Path, required=True, help=".png or .svg")
    return result


if __name__ == "__main__":
    sys.exit(main())
