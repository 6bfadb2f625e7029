"""From a file to its report: reads a profile or a run, makes tables, page and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from energy.errors import ProfileError, UsageError
from energy.report.run_data import Run, drawn, run_tables
from energy.report.tables import rounded
from energy.thor.profile import FORMAT, load_profile, power_modelled

if TYPE_CHECKING:
    from pathlib import Path

    from energy.report.profile_data import BundleCost
    from energy.report.tables import Table
    from energy.thor.profile import Profile

LARGEST_BYTES = 512 * 1024 * 1024


class Report(NamedTuple):
    """A report in all its forms. ``data`` is what the JSON file holds."""

    html: str
    tables: list[Table]
    data: dict[str, Any]


class _Header(msgspec.Struct):
    format: str = ""
    run: str | None = None


def read(path: Path) -> Profile | Run:
    """A profile, or a run as ``edge-coordinator status RUN --json`` or a ``summary.json`` tells it.

    Raises:
        ProfileError: neither, damaged, or of a newer version.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ProfileError(f"{path}: is larger than any profile or summary; name the right file")
        data = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); name a profile or the JSON of a run") from error
    try:
        header = msgspec.json.decode(data, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileError(
            f"{path}: is neither a profile nor the JSON of a run ({error}); make one with edge-energy profile or "
            "edge-coordinator status RUN --json"
        ) from error
    if header.format == FORMAT:
        return load_profile(path)
    if header.run is None:
        raise ProfileError(
            f"{path}: is neither a profile nor the JSON of a run; make one with edge-energy profile or "
            "edge-coordinator status RUN --json"
        )
    try:
        return msgspec.json.decode(data, type=Run)
    except msgspec.MsgspecError as error:
        raise ProfileError(
            f"{path}: is no usable JSON of a run: {error}; write it anew with edge-coordinator"
        ) from error


def report_run(run: Run, foot: str = "") -> Report:
    """The report of a run."""
    from energy.report.run_page import run_page

    tables = run_tables(run)
    sums = drawn(run.jobs)
    data = {
        "report": "run",
        "run": run.run,
        "status": run.status,
        "joules": rounded(sums.measured),
        "modelled_joules": rounded(sums.modelled),
        "radio_modelled_joules": rounded(sums.radio),
        "jobs_of_unknown_energy": sums.unknown_jobs,
        "doubtful_jobs": sums.doubtful_jobs,
        **{table.key: table.records() for table in tables},
    }
    return Report(run_page(run, tables, foot), tables, data)


def report_profile(profile: Profile, bundle: BundleCost | None = None, foot: str = "") -> Report:
    """The report of a profile; with the predicted cost of a bundle's layers, if one is given.

    Raises:
        ProfileError: a fitted model of the profile is damaged.
    """
    from energy.report.profile_data import left_out, profile_tables
    from energy.report.profile_page import profile_page

    tested = [entry for family in profile.families for entry in left_out(family, profile.quantity)]
    tables = profile_tables(profile, tested, bundle)
    watts = "idle_modelled_watts" if power_modelled(profile) else "idle_watts"
    data: dict[str, Any] = {
        "report": "profile",
        "device": msgspec.to_builtins(profile.device),
        "quantity": profile.quantity,
        "sensed": msgspec.to_builtins(profile.sensed),
        "profiling_seconds": profile.profiling_seconds,
        watts: profile.idle_watts,
        "notes": profile.notes,
        **{table.key: table.records() for table in tables},
    }
    if bundle is not None:
        name = profile.quantity
        data["bundle"] = {
            "name": bundle.name,
            f"predicted_{name}": bundle.total,
            f"low_{name}": bundle.low,
            f"high_{name}": bundle.high,
        }
    return Report(profile_page(profile, tested, bundle, tables, foot), tables, data)


def write(path: Path, text: str, option: str) -> None:
    """Writes one file, whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another file for {option}") from error
