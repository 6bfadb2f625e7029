"""Commands of ``edge-coordinator`` that do one thing and return its exit code."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from coordinator.errors import ModelError, PluginError
from coordinator.wording import NO_SERVER, counted
from edge_runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    import argparse

    from coordinator.store import Store, StoredRun
    from edge_runtime.messages import BlobRef


def open_store(options: argparse.Namespace, *, create: bool = False) -> Store:
    """The store that the options name."""
    from coordinator.store import Store

    return Store(options.state, options.database, create=create)


def print_json(value: Any) -> None:
    """One JSON value on one line."""
    print(msgspec.json.encode(value).decode(), flush=True)


def submit(options: argparse.Namespace) -> int:
    """Checks a plan and stores it as a run."""
    from coordinator.hints import hints
    from coordinator.plan import load_plan
    from coordinator.submission import submit as submit_plan

    plan = load_plan(options.plan)
    store = open_store(options, create=True)
    try:
        run = submit_plan(store, plan)
    except (ConfigError, DataError, PluginError) as error:  # they name the plan, as there may be no file
        said = str(error).removeprefix(f"plan {plan.name!r}: ")
        raise type(error)(f"{options.plan}: {said}") from error
    for hint in hints(plan):
        print(f"hint: {hint}", file=sys.stderr, flush=True)
    if options.json:
        print_json({"run": run})
    else:
        lives = store.server_running(time.time())
        then = (
            f"the server on {options.state} takes it up"
            if lives
            else f"{NO_SERVER}; edge-coordinator serve takes it up"
        )
        print(f"submitted {run}; {then}", flush=True)
    if not options.watch:
        return 0
    from coordinator.cli_status import watch

    return watch(store, run, as_json=options.json)


def explain(options: argparse.Namespace) -> int:
    """Says why each device was chosen for a round, or not."""
    from coordinator.explain import explanation, explanation_lines

    told = explanation(open_store(options), options.run, options.round - 1, options.device)
    if options.json:
        print_json({"run": options.run, "selections": told})
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(explanation_lines(told, options.run, width)))
    return 0


def stop(options: argparse.Namespace) -> int:
    """Asks the server to end a run."""
    store = open_store(options)
    stored = store.run(options.run)
    ended = stored.row.status != "running"
    if not ended:
        store.request_stop(options.run, options.reason)
    if options.json:
        print_json({"run": options.run, "status": stored.row.status, "stop_requested": not ended})
    else:
        print(f"{options.run} has already ended ({stored.row.status})" if ended else f"{options.run}: asked to stop")
    return 0


def model(options: argparse.Namespace) -> int:
    """Writes a model version to a file."""
    from coordinator.model_blobs import read_model
    from coordinator.model_export import check_suffix, write_model
    from edge_runtime.bundle import Bundle

    check_suffix(options.output)
    store = open_store(options)
    stored = store.run(options.run)
    version = stored.row.version if options.version is None else options.version
    reference = _version(store, stored, version)
    if stored.plan.retain_updates != "all" and not store.blobs.has(reference.sha256):
        raise ModelError(
            f"version {version} of run {options.run!r} was not kept; the initial and the latest models are. To keep "
            'them all set retain_updates = "all" in the plan'
        )
    bundle = Bundle.open(store.blobs.path(stored.row.bundle.sha256))
    vector = read_model(store.blobs, reference, bundle.layout())
    write_model(bundle, vector, options.output)
    if options.json:
        print_json({"run": options.run, "version": version, "path": str(options.output)})
    else:
        print(f"{options.output}: version {version} of {options.run}")
    return 0


def _version(store: Store, stored: StoredRun, version: int) -> BlobRef:
    row = stored.row
    if version == row.version:
        return row.model
    if version == 0:
        return row.initial_model
    for entry in store.rounds(row.run, version - 1):
        if entry.version == version:
            return entry.model
    raise ConfigError(f"run {row.run!r} has no model version {version}; it has 0 to {row.version}")


def verify(options: argparse.Namespace) -> int:
    """Builds every model again and compares hashes; 1 if one differs."""
    from coordinator.aggregation.making import recompute
    from edge_runtime.bundle import Bundle

    store = open_store(options)
    stored = store.run(options.run)
    if stored.plan.retain_updates != "all":
        raise ModelError(
            f'run {options.run!r} did not keep its updates; set retain_updates = "all" in the plan of runs to verify'
        )
    bundle = Bundle.open(store.blobs.path(stored.row.bundle.sha256))
    rounds = ((row, store.counted_updates(options.run, row.round)) for row in store.rounds(options.run))
    different, count = [], 0
    roles = store.roles(options.run)
    for made in recompute(store.blobs, stored.plan, stored.row, rounds, bundle.layout(), roles=roles):
        row = made.round
        count += 1
        if sys.stderr.isatty():
            print(f"\rversion {row.version} of {stored.row.version}", end="", file=sys.stderr, flush=True)
        if not made.same:
            different.append(row.version)
            pairs = ((made.model_sha256, row.model.sha256), (made.vector_sha256, row.vector_sha256))
            computed, there = next((mine, theirs) for mine, theirs in pairs if mine != theirs)
            print(
                f"version {row.version}: {(computed or 'nothing')[:12]} computed, {(there or 'nothing')[:12]} stored",
                file=sys.stderr,
            )
    if count and sys.stderr.isatty():
        print(file=sys.stderr)
    if options.json:
        print_json({"run": options.run, "versions": count, "different": different})
    else:
        print(f"{options.run}: {count - len(different)} of {counted(count, 'version')} made again bit for bit")
    return 1 if different else 0
