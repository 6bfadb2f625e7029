"""The page that ``edge-coordinator status`` shows: one run, its last rounds, its joules and the devices."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, Any

from coordinator.report import device_report, failures, round_progress, run_ledger, run_summary
from coordinator.wording import (
    NO_SERVER,
    counted,
    duration,
    energy_words,
    joules,
    number,
    percent,
    saving,
    size,
    source_words,
)

if TYPE_CHECKING:
    from coordinator.store import Store

_HEARTBEAT = ("battery", "heat", "link", "available")  # columns that show what devices say of themselves
_SHOWN_ROUNDS = 10
_SHOWN_DEVICES = 12
_SHOWN_FAILURES = 5
_SHOWN_EARLY = 3
_FIRST_TO_GO = ("late", "on devices", "loss", "seconds")  # columns of the rounds that a narrow terminal can spare


def page(store: Store, run: str, width: int | None = None) -> list[str]:
    """The lines of the page, none longer than ``width`` characters (None: as long as they are)."""
    now = time.time()
    stored = store.run(run)
    summary = run_summary(store, run, now=now)
    lines = [headline(summary)]
    lives = store.server_running(now)
    if stored.row.status == "running":
        lines.append(phase(store, run) if lives else f"{NO_SERVER}; the run waits for one")
    if summary["encode_cpu_ms"] is not None:
        lines.append(
            f"per update: {summary['encode_cpu_ms']:.1f} ms of CPU to encode, {size(summary['written_bytes'])} written "
            "to the device's storage; savings are against float32, packets included, bundles not"
        )
    lines += _energy_lines(summary)
    if summary["stopped_jobs"]:
        lines += _early_lines(run_ledger(store, run, ended_early=_SHOWN_EARLY), summary["stopped_jobs"])
    failed = failures(store, stored)
    lines += [
        f"  {entry['device']} {'declined' if entry['declined'] else 'failed'}: {entry['reason']}"
        for entry in failed[-_SHOWN_FAILURES:]
    ]
    if summary["history"]:
        lines += ["", *_round_table(summary["history"][-_SHOWN_ROUNDS:], width)]
        if not summary["bytes_complete"]:
            lines.append("> at least: the coordinator was restarted, what it had counted before is not in the bytes")
    report = device_report(store, stored)
    if report:
        lines += ["", *device_table(report[:_SHOWN_DEVICES], now, lives=lives)]
        if len(report) > _SHOWN_DEVICES:
            online = sum(entry["online"] for entry in report)
            lines.append(f"... {counted(len(report), 'device')} in all, {online} online; see edge-coordinator devices")
    return fitted(lines, width)


def fitted(lines: list[str], width: int | None) -> list[str]:
    """The lines, those longer than ``width`` broken between words and set in."""
    if width is None:
        return lines
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, max(20, width), subsequent_indent="    ", break_on_hyphens=False) or [""]
    ]


def headline(summary: dict[str, Any]) -> str:
    """The run in one line."""
    rounds = f"{summary['rounds']}/{counted(summary['rounds_planned'], 'round')}"
    accuracy, up, down, bundles = figures(summary)
    reason = f" ({summary['reason']})" if summary["reason"] else ""
    energy = energy_words(summary["energy"])
    return (
        f"{summary['run']}: {summary['status']}{reason}, {rounds}, accuracy {accuracy}, "
        f"{up} up{saving(summary['ratio_up'])}, {down} down{saving(summary['ratio_down'])} "
        f"beside {bundles} of bundles, "
        f"{counted(summary['devices'], 'device')}, {summary['seconds']:.1f} s, "
        f"energy {'unknown' if energy == '-' else energy}"
    )


def phase(store: Store, run: str) -> str:
    """What a running run does now."""
    stored = store.run(run)
    row = stored.row
    if stored.stop_reason is not None:
        return "stopping"
    if row.phase == "selecting":
        fit = [entry for entry in device_report(store, stored) if not entry["unfit"]]
        wanted = stored.plan.participation.target
        held = _held(fit)
        if len(fit) - len(held) >= wanted:
            if store.selections(run, row.round):
                return (
                    f"round {row.round + 1}: its selector chose nobody of {counted(len(fit), 'device')} that fit; "
                    f"edge-coordinator explain {run} {row.round + 1} says why"
                )
            return f"round {row.round + 1} selects among {counted(len(fit), 'device')}"
        why = f", {len(held)} of them held: {'; '.join(held[:_SHOWN_FAILURES])}" if held else ""
        return f"round {row.round + 1} waits for devices: {len(fit)} fit, {wanted} wanted{why}"
    if row.phase == "open":
        counts, rules = round_progress(store, stored), stored.plan.participation
        declined = f", {counts['declined']} declined" if counts["declined"] else ""
        anarchic = rules.mode == "anarchic"
        return (
            f"{'round' if rules.mode == 'synchronous' else f'{rules.mode}, model'} {row.round + 1}: "
            f"{counts['delivered']} of {counted(rules.target, 'update')}, {counted(counts['open'], 'device')} "
            f"{'with a standing assignment' if anarchic else 'at work'}, {counts['failed']} failed{declined}"
            + (f", attempt {row.attempt + 1}" if rules.mode == "synchronous" else "")
        )
    return "makes the next model" if row.phase == "aggregating" else "evaluates the last model"


def device_table(report: list[dict[str, Any]], now: float, *, lives: bool) -> list[str]:
    """One line per device; columns of which no device knows anything are left out."""
    rows = [["device", "state", "last contact", *_HEARTBEAT, "energy", "sensor", "datasets", "note"]]
    for entry in report:
        datasets = ", ".join(
            name if count is None else f"{name} ({count})" for name, count in entry["datasets"].items()
        )
        rows.append(
            [
                entry["device"],
                ("online" if entry["online"] else "offline") if lives else "unknown",
                f"{max(0.0, now - entry['last_contact_unix_s']):.0f} s ago",
                *_heartbeat_words(entry["heartbeat"]),
                energy_words(entry["energy"]) if "energy" in entry else "-",
                source_words(entry["energy_source"]),
                datasets,
                entry["conflict"] or (_note(entry) if entry["online"] else ""),
            ]
        )
    return table(_without(rows, [name for name in (*_HEARTBEAT, "energy", "sensor") if _is_empty(rows, name)]))


def _held(report: list[dict[str, Any]]) -> list[str]:
    """Devices that could take part and are not asked now, each with the reason."""
    return [f"{entry['device']} {reason}" for entry in report if (reason := _hold(entry))]


def _hold(entry: dict[str, Any]) -> str:
    limit = "" if entry["heartbeat"] is None else entry["heartbeat"]["declines"]
    waits = [
        f"{'declined' if pause['declined'] else 'failed'} in {pause['run']}, asked again in {duration(pause['for_s'])}"
        for pause in entry["left_alone"]
    ]
    return "; ".join([*([f"declines jobs: {limit}"] if limit else []), *waits])


def _note(entry: dict[str, Any]) -> str:
    return entry["unfit"] or _hold(entry)


def _heartbeat_words(heartbeat: dict[str, Any] | None) -> list[str]:
    """Battery, temperature, link and availability, as the device says; "-" for what it cannot know."""
    if heartbeat is None:
        return ["-"] * len(_HEARTBEAT)
    battery, heat, margin = (heartbeat[key] for key in ("battery_percent", "temperature_c", "temperature_margin_c"))
    plugged = {True: " plugged in", False: "", None: ""}[heartbeat["on_external_power"]]
    link = "-"
    if heartbeat["up_kbit_s"] is not None or heartbeat["down_kbit_s"] is not None:
        up, down = (_rate(heartbeat[key]) for key in ("up_kbit_s", "down_kbit_s"))
        link = f"{up} up, {down} down"
    if heartbeat["link_metered"]:
        link = "metered" if link == "-" else f"{link}, metered"
    likely = heartbeat["availability_percent"]
    return [
        ("-" if not plugged else plugged.strip()) if battery is None else f"{battery} %{plugged}",
        "-" if heat is None else f"{heat} C" + ("" if margin is None else f", {margin} below its cap"),
        link,
        "-" if likely is None else f"{likely} %",
    ]


def _rate(kbit_s: float | None) -> str:
    return "?" if kbit_s is None else f"{kbit_s / 1000:.3g} Mbit/s"


def figures(summary: dict[str, Any]) -> list[str]:
    """Accuracy, and bytes up, down without bundles, and of bundles."""
    down = {**summary, "bytes_down": summary["bytes_down"] - summary["bytes_bundle"]}
    of_initial = " (initial model)" if summary["accuracy"] is not None and not _measured(summary) else ""
    return [
        f"{accuracy_words(summary)}{of_initial}",
        bytes_words(summary, "bytes_up"),
        bytes_words(down, "bytes_down"),
        size(summary["bytes_bundle"]),
    ]


def _measured(summary: dict[str, Any]) -> bool:
    """Whether a model that the run made was evaluated."""
    return any(entry["accuracy"] is not None for entry in summary["history"])


def accuracy_words(entry: dict[str, Any]) -> str:
    """Accuracy on the test set, else on the devices' hold-outs, which is said."""
    if entry["accuracy"] is None and entry["device_accuracy"] is not None:
        return f"{percent(entry['device_accuracy'])} on devices"
    return percent(entry["accuracy"])


def bytes_words(entry: dict[str, Any], key: str) -> str:
    """A number of bytes; with ">" where a restart lost count."""
    return size(entry[key]) if entry["bytes_complete"] else f">{size(entry[key])}"


def table(rows: list[list[str]]) -> list[str]:
    """The rows in columns, the first being their names."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _energy_lines(summary: dict[str, Any]) -> list[str]:
    """What the headline's joules are of, and of how many jobs nothing is known."""
    energy = summary["energy"]
    jobs = energy["measured_jobs"] + energy["modelled_jobs"]
    lines = []
    if jobs:
        radio = energy["radio_modelled_joules"]
        lines.append(
            f"energy: {energy_words(energy)}, for {counted(jobs, 'job')} from loading to compression"
            + (f"; what training drew is unknown for {energy['unknown_jobs']} more" if energy["unknown_jobs"] else "")
            + (f"; radio {joules(radio)} modelled" if radio is not None else "")
        )
    if energy["doubtful_jobs"]:
        lines.append(
            f"? the joules of {counted(energy['doubtful_jobs'], 'job')} are doubtful (throttled, clocks that changed, "
            "a sensor that failed); the logs of the devices tell why"
        )
    return lines


def _early_lines(ledger: list[dict[str, Any]], jobs: int) -> list[str]:
    """How many jobs ended early, and of the last ones who, after which step, and why."""
    more = f"; the last {len(ledger)}, all are in status --json" if jobs > len(ledger) else ""
    lines = [f"{counted(jobs, 'job')} ended early, at a limit{more}:"]
    for entry in ledger:
        steps, planned = entry["steps"], entry["steps_planned"]
        done = "" if steps is None else f" after {counted(steps, 'step')}" + (f" of {planned}" if planned else "")
        lines.append(f"  {entry['device']}, round {entry['round'] + 1}, ended{done}: {entry['stopped']}")
    return lines


def _round_table(history: list[dict[str, Any]], width: int | None) -> list[str]:
    rows = [["round", "updates", "late", "loss", "accuracy", "on devices", "seconds", "up", "down", "energy"]]
    rows += [
        [
            str(entry["round"] + 1),
            str(entry["updates"]),
            str(entry["late_updates"]),
            number(entry["train_loss"]),
            percent(entry["accuracy"]),
            percent(entry["device_accuracy"]),
            f"{entry['seconds']:.2f}",
            bytes_words(entry, "bytes_up"),
            bytes_words(entry, "bytes_down"),
            energy_words(entry["energy"]),
        ]
        for entry in history
    ]
    if _is_empty(rows, "energy"):
        rows = _without(rows, ["energy"])
    lines = table(rows)
    for column in _FIRST_TO_GO:
        if width is None or max(map(len, lines)) <= width:
            break
        rows = _without(rows, [column])
        lines = table(rows)
    return lines


def _is_empty(rows: list[list[str]], column: str) -> bool:
    index = rows[0].index(column)
    return all(row[index] == "-" for row in rows[1:])


def _without(rows: list[list[str]], columns: list[str]) -> list[list[str]]:
    keep = [index for index, name in enumerate(rows[0]) if name not in columns]
    return [[row[index] for index in keep] for row in rows]
