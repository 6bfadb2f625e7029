"""``edge-energy report``: a profile or the ledger of a run as one page, CSV and JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from energy.errors import UsageError

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """Writes one self-contained page (no scripts, nothing fetched) about a profile (what layers cost, how
well that is predicted, how it was measured) or about a run (what each device drew in each round, and what accuracy
that bought)."""
EXAMPLE = """  edge-energy report energy-profile.json --bundle model.bundle -o report.html
  edge-coordinator status digits-1 --json > run.json && edge-energy report run.json -o run.html --csv tables"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its options."""
    parser.add_argument(
        "file",
        type=Path,
        metavar="PROFILE|RUN",
        help="energy-profile.json; or what edge-coordinator status RUN --json prints, or a summary.json",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page (HTML)")
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help="also write every table as FOLDER/NAME.csv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all tables into one JSON file")
    parser.add_argument(
        "--bundle", type=Path, metavar="BUNDLE", help="show what the layers of this bundle cost (profile)"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples per step of that bundle (default 32)")


def run(options: argparse.Namespace) -> int:
    """Writes what was asked for."""
    from energy.report.build import read, report_profile, report_run, write
    from energy.report.tables import write_csv
    from energy.thor.profile import Profile

    if options.batch is not None and options.batch < 1:
        raise UsageError("--batch takes a whole number from 1")
    if options.batch is not None and options.bundle is None:
        raise UsageError("--batch belongs to --bundle BUNDLE")
    foot = f"edge-energy report of {options.file.name}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
    found = read(options.file)
    if isinstance(found, Profile):
        cost = None
        if options.bundle is not None:
            from energy.report.bundle import bundle_cost

            cost = bundle_cost(found, options.bundle, options.batch)
        report = report_profile(found, cost, foot)
    elif options.bundle is not None:
        raise UsageError(f"{options.file}: is a run, and --bundle belongs to a profile; leave --bundle out")
    else:
        report = report_run(found, foot)
    write(options.output, report.html, "-o")
    print(options.output)
    if options.csv is not None:
        for path in write_csv(report.tables, options.csv):
            print(path)
    if options.json is not None:
        write(options.json, json.dumps(report.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "--json")
        print(options.json)
    return 0
