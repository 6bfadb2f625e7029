"""``edge-coordinator status``, ``runs`` and ``devices``: what the database knows, once or followed live."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from coordinator.cli_commands import open_store, print_json
from coordinator.errors import UnknownRunError
from coordinator.report import device_report, failures, round_progress, run_summary
from coordinator.wording import NO_SERVER, counted, percent, saving, size

if TYPE_CHECKING:
    import argparse

    from coordinator.store import Store

POLL_S = 0.5
_SHOWN_ROUNDS = 10
_SHOWN_DEVICES = 12
_SHOWN_FAILURES = 5


def status(options: argparse.Namespace) -> int:
    """Shows one run with its last rounds and the devices."""
    store = open_store(options)
    run = options.run or _latest(store)
    if options.watch:
        return watch(store, run, as_json=options.json)
    if options.json:
        print_json(_everything(store, run))
    else:
        print("\n".join(_page(store, run)))
    return 0


def runs(options: argparse.Namespace) -> int:
    """Lists all runs."""
    store = open_store(options)
    stored = store.runs()
    if options.json:
        print_json([run_summary(store, entry.row.run) for entry in stored])
        return 0
    rows = [["run", "status", "rounds", "accuracy", "up", "down", "reason"]]
    for entry in stored:
        summary = run_summary(store, entry.row.run)
        rows.append([summary["run"], summary["status"], _rounds(summary), *_figures(summary), summary["reason"]])
    print("\n".join(_table(rows)))
    return 0


def devices(options: argparse.Namespace) -> int:
    """Lists the devices as the server last knew them."""
    store = open_store(options)
    report = device_report(store)
    if options.json:
        print_json(report)
    else:
        now = time.time()
        lives = store.server_running(now)
        lines = _device_table(report, now, lives=lives) if report else ["no device has announced itself yet"]
        print("\n".join(lines if lives else [*lines, NO_SERVER]))
    return 0


def watch(store: Store, run: str, *, as_json: bool) -> int:
    """Follows a run until it has ended; 0 if it finished or was stopped, 1 if it failed.

    A terminal gets one page that is redrawn; a pipe gets a line per round, or with ``as_json`` a JSON value per round.
    """
    live = sys.stdout.isatty() and not as_json
    if not live and store.run(run).row.status == "running" and not store.server_running(time.time()):
        print(f"{NO_SERVER}; {run} waits for one", file=sys.stderr)
    told, lines, said = 0, 0, ""
    while True:
        stored = store.run(run)
        if live:
            page = _page(store, run)
            sys.stdout.write(f"\x1b[{lines}F\x1b[J" if lines else "")
            sys.stdout.write("\n".join(page) + "\n")
            sys.stdout.flush()
            lines = len(page)
        else:
            told = _tell_rounds(store, run, told, as_json=as_json)
            waits = _waiting(store, run) if stored.row.phase == "selecting" and not as_json else said
            if waits != said and stored.row.status == "running":
                print(waits, flush=True)
            said = waits
        if stored.row.status != "running":
            break
        _wait(store)
    if not live:
        summary = run_summary(store, run)
        if as_json:
            print_json(summary)
        else:
            print(_headline(summary), flush=True)
    return 1 if stored.row.status == "failed" else 0


def _waiting(store: Store, run: str) -> str:
    """What a round that has not begun waits for, and why devices that are there cannot take part."""
    report = device_report(store, store.run(run))
    return "; ".join([_phase(store, run), *(f"{row['device']}: {row['unfit']}" for row in report if row["unfit"])][:6])


def _wait(store: Store) -> None:
    for _ in range(10):  # look at least every 5 s: other databases than SQLite always say "changed"
        time.sleep(POLL_S)
        if store.changed():
            return


def _tell_rounds(store: Store, run: str, told: int, *, as_json: bool) -> int:
    history = run_summary(store, run)["history"]
    for entry in history[told:]:
        if as_json:
            print_json(entry)
        else:
            accuracy = percent(entry["accuracy"] if entry["accuracy"] is not None else entry["device_accuracy"])
            print(
                f"round {entry['round'] + 1}: {counted(entry['updates'], 'update')} ({entry['late_updates']} late), "
                f"loss {_number(entry['train_loss'])}, accuracy {accuracy}, {entry['seconds']:.2f} s, "
                f"{_bytes(entry, 'bytes_up')} up, {_bytes(entry, 'bytes_down')} down",
                flush=True,
            )
    return len(history)


def _everything(store: Store, run: str) -> dict[str, Any]:
    stored = store.run(run)
    summary = run_summary(store, run, now=time.time())
    return {
        **summary,
        "server_running": store.server_running(time.time()),
        "open_round": round_progress(store, stored),
        "failures": failures(store, stored),
        "fleet": device_report(store, stored),
    }


def _page(store: Store, run: str) -> list[str]:
    now = time.time()
    stored = store.run(run)
    summary = run_summary(store, run, now=now)
    lines = [_headline(summary)]
    lives = store.server_running(now)
    if stored.row.status == "running":
        lines.append(_phase(store, run) if lives else f"{NO_SERVER}; the run waits for one")
    if summary["encode_cpu_ms"] is not None:
        lines.append(
            f"per update: {summary['encode_cpu_ms']:.1f} ms of CPU to encode, {size(summary['written_bytes'])} written "
            "to the device's storage; savings are against float32, packets included, bundles not"
        )
    failed = failures(store, stored)
    lines += [f"  {entry['device']} failed: {entry['reason']}" for entry in failed[-_SHOWN_FAILURES:]]
    history = summary["history"][-_SHOWN_ROUNDS:]
    if history:
        rows = [["round", "updates", "late", "loss", "accuracy", "on devices", "seconds", "up", "down"]]
        rows += [
            [
                str(entry["round"] + 1),
                str(entry["updates"]),
                str(entry["late_updates"]),
                _number(entry["train_loss"]),
                percent(entry["accuracy"]),
                percent(entry["device_accuracy"]),
                f"{entry['seconds']:.2f}",
                _bytes(entry, "bytes_up"),
                _bytes(entry, "bytes_down"),
            ]
            for entry in history
        ]
        lines += ["", *_table(rows)]
        if not summary["bytes_complete"]:
            lines.append("> at least: the coordinator was restarted, what it had counted before is not in the bytes")
    report = device_report(store, stored)
    if report:
        lines += ["", *_device_table(report[:_SHOWN_DEVICES], now, lives=lives)]
        if len(report) > _SHOWN_DEVICES:
            online = sum(entry["online"] for entry in report)
            lines.append(f"... {counted(len(report), 'device')} in all, {online} online; see edge-coordinator devices")
    return lines


def _headline(summary: dict[str, Any]) -> str:
    rounds = f"{summary['rounds']}/{counted(summary['rounds_planned'], 'round')}"
    accuracy, up, _ = _figures(summary)
    down = _bytes({**summary, "bytes_down": summary["bytes_down"] - summary["bytes_bundle"]}, "bytes_down")
    reason = f" ({summary['reason']})" if summary["reason"] else ""
    return (
        f"{summary['run']}: {summary['status']}{reason}, {rounds}, accuracy {accuracy}, "
        f"{up} up{saving(summary['ratio_up'])}, {down} down{saving(summary['ratio_down'])} "
        f"beside {size(summary['bytes_bundle'])} of bundles, "
        f"{counted(summary['devices'], 'device')}, {summary['seconds']:.1f} s"
    )


def _phase(store: Store, run: str) -> str:
    stored = store.run(run)
    row = stored.row
    if stored.stop_reason is not None:
        return "stopping"
    if row.phase == "selecting":
        fit = [entry for entry in device_report(store, stored) if not entry["unfit"]]
        wanted = stored.plan.participation.target
        return f"round {row.round + 1} waits for devices: {len(fit)} fit, {wanted} wanted"
    if row.phase == "open":
        counts = round_progress(store, stored)
        return (
            f"round {row.round + 1}: {counts['delivered']} of {counted(stored.plan.participation.target, 'update')}, "
            f"{counted(counts['open'], 'device')} at work, {counts['failed']} failed, attempt {row.attempt + 1}"
        )
    return "makes the next model" if row.phase == "aggregating" else "evaluates the last model"


def _device_table(report: list[dict[str, Any]], now: float, *, lives: bool) -> list[str]:
    rows = [["device", "state", "last contact", "datasets", "note"]]
    for entry in report:
        datasets = ", ".join(
            name if count is None else f"{name} ({count})" for name, count in entry["datasets"].items()
        )
        note = entry["conflict"] or (entry["unfit"] if entry["online"] else "")
        state = ("online" if entry["online"] else "offline") if lives else "unknown"
        rows.append(
            [entry["device"], state, f"{max(0.0, now - entry['last_contact_unix_s']):.0f} s ago", datasets, note]
        )
    return _table(rows)


def _latest(store: Store) -> str:
    stored = store.runs()
    if not stored:
        raise UnknownRunError(f"{store.folder}: holds no runs yet; submit a plan first")
    return stored[-1].row.run


def _rounds(summary: dict[str, Any]) -> str:
    return f"{summary['rounds']}/{summary['rounds_planned']}"


def _figures(summary: dict[str, Any]) -> list[str]:
    accuracy = summary["accuracy"] if summary["accuracy"] is not None else summary["device_accuracy"]
    return [percent(accuracy), _bytes(summary, "bytes_up"), _bytes(summary, "bytes_down")]


def _bytes(entry: dict[str, Any], key: str) -> str:
    return size(entry[key]) if entry["bytes_complete"] else f">{size(entry[key])}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
