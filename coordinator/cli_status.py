"""``edge-coordinator status``, ``runs`` and ``devices``: what the database knows, once or followed live."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from coordinator.cli_commands import open_store, print_json
from coordinator.errors import UnknownRunError
from coordinator.report import device_report, failures, round_progress, run_ledger, run_summary
from coordinator.status_page import accuracy_words, bytes_words, device_table, figures, headline, page, phase, table
from coordinator.wording import NO_SERVER, counted, energy_words, number

if TYPE_CHECKING:
    import argparse

    from coordinator.store import Store, StoredRun

POLL_S = 0.5


def status(options: argparse.Namespace) -> int:
    """Shows one run with its last rounds and the devices."""
    store = open_store(options)
    run = options.run or _latest(store)
    if options.watch:
        return watch(store, run, as_json=options.json)
    if options.json:
        print_json(_everything(store, run))
    else:
        print("\n".join(page(store, run, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)))
    return 0


def runs(options: argparse.Namespace) -> int:
    """Lists all runs."""
    store = open_store(options)
    stored = store.runs()
    if options.json:
        print_json([run_summary(store, entry.row.run) for entry in stored])
        return 0
    rows = [["run", "status", "rounds", "accuracy", "up", "down", "bundles", "energy", "reason"]]
    for entry in stored:
        summary = run_summary(store, entry.row.run)
        rows.append(
            [
                summary["run"],
                summary["status"],
                _rounds(summary),
                *figures(summary),
                energy_words(summary["energy"]),
                summary["reason"],
            ]
        )
    print("\n".join(table(rows)))
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
        lines = device_table(report, now, lives=lives) if report else ["no device has announced itself yet"]
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
            terminal = shutil.get_terminal_size()
            shown = page(store, run, terminal.columns)[: max(1, terminal.lines - 1)]
            sys.stdout.write(f"\x1b[{lines}F\x1b[J" if lines else "")
            sys.stdout.write("\n".join(shown) + "\n")
            sys.stdout.flush()
            lines = len(shown)
        else:
            told = tell_rounds(store, run, told, as_json=as_json)
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
            print_json({**summary, "ledger": run_ledger(store, run)})
        else:
            print(headline(summary), flush=True)
    return 1 if stored.row.status == "failed" else 0


def _waiting(store: Store, run: str) -> str:
    """What a round that has not begun waits for, and why devices that are there cannot take part."""
    report = device_report(store, store.run(run))
    return "; ".join([phase(store, run), *(f"{row['device']}: {row['unfit']}" for row in report if row["unfit"])][:6])


def _wait(store: Store) -> None:
    for _ in range(10):  # look at least every 5 s: other databases than SQLite always say "changed"
        time.sleep(POLL_S)
        if store.changed():
            return


def tell_rounds(store: Store, run: str, told: int, *, as_json: bool) -> int:
    """Prints the rounds after the first ``told``, once they are evaluated; how many are told then."""
    history = run_summary(store, run)["history"]
    ready = _evaluated(store.run(run), history)
    for entry in history[told:ready]:
        if as_json:
            print_json(entry)
        else:
            known = energy_words(entry["energy"])
            energy = "" if known == "-" else f", {known}"
            print(
                f"round {entry['round'] + 1}: {counted(entry['updates'], 'update')} ({entry['late_updates']} late), "
                f"loss {number(entry['train_loss'])}, accuracy {accuracy_words(entry)}, {entry['seconds']:.2f} s, "
                f"{bytes_words(entry, 'bytes_up')} up, {bytes_words(entry, 'bytes_down')} down{energy}",
                flush=True,
            )
    return max(told, ready)


def _evaluated(stored: StoredRun, history: list[dict[str, Any]]) -> int:
    """How many rounds can be told: those before one whose evaluation is still to come."""
    plan = stored.plan
    if stored.row.status != "running" or plan.test_set is None:
        return len(history)
    for index, entry in enumerate(history):
        due = entry["version"] % plan.evaluate_every == 0 or entry["version"] == plan.rounds
        if due and entry["accuracy"] is None and entry["test_loss"] is None:
            return index
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
        "ledger": run_ledger(store, run),
    }


def _latest(store: Store) -> str:
    stored = store.runs()
    if not stored:
        raise UnknownRunError(f"{store.folder}: holds no runs yet; submit a plan first")
    return stored[-1].row.run


def _rounds(summary: dict[str, Any]) -> str:
    return f"{summary['rounds']}/{summary['rounds_planned']}"
