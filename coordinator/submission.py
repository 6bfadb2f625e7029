"""Takes a plan in: checks everything that can be checked here, copies bundle and test set, stores the run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.aggregation import create_method
from coordinator.aggregation.making import make_initial
from coordinator.budget import FLOAT_BYTES, LEAST_BYTES, change_budget, smallest_budget
from coordinator.plan import check_codecs, check_finite, check_mode
from coordinator.run_state import RunState
from coordinator.scheduling import SELECTORS
from edge_runtime.bundle import Bundle
from edge_runtime.compression.pipeline import MODEL_CHANNEL, CodecSpec, encode
from edge_runtime.errors import BundleError, CodecError, ConfigError, DataError, TrainingError
from edge_runtime.messages import BlobRef
from edge_runtime.methods import registry as client_methods

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.plan import Plan
    from coordinator.store import Store
    from edge_runtime.store.blobs import StoredBlob

_PROBE_SCALE = 1e-3
_PROBE_VERSION = 1 << 20  # a header that long will do for any run


def submit(store: Store, plan: Plan, *, now: float | None = None) -> str:
    """Stores a run that the server then takes up; returns its name. ``now`` is unix seconds, by default the clock's.

    Raises:
        BundleError: the bundle cannot be read, or lacks the graphs that the plan needs.
        ConfigError: plan, bundle and methods do not fit one another.
        DataError: the test set does not fit the bundle.
        PluginError: no such selector or server method.
        StorageError: the disk is full.
    """
    path = Path(plan.bundle)
    if path.is_dir():
        raise BundleError(f"{path}: is a folder; devices receive one file, export the bundle as NAME.bundle")
    bundle = Bundle.open(path)
    check_fit(plan, bundle)
    check_budgets(plan, bundle)
    test_set = None
    if plan.test_set is not None:
        check_test_set(plan, bundle)
        test_set = _reference(store.blobs.put_file(Path(plan.test_set)))
    layout = bundle.layout()
    made = make_initial(store.blobs, plan, bundle.initial_vector(), layout)
    state = RunState.start(
        plan.name,
        plan,
        _reference(store.blobs.put_file(path)),
        made.model,
        now=time.time() if now is None else now,
        test_set=test_set,
        down=made.down,
        vector_sha256=made.vector_sha256,
        method_state=made.method_state,
        elements=layout.size,
    )
    return store.submit(plan, state.run)


def check_test_set(plan: Plan, bundle: Bundle) -> None:
    """Whether the plan's test set can be read and fits the bundle.

    Raises:
        DataError: it cannot, or does not; the message names the plan's key.
    """
    from coordinator.evaluation import TestSet

    assert plan.test_set is not None
    path = Path(plan.test_set)
    if not path.is_file():
        raise DataError(f"plan {plan.name!r}: {path} is no file; correct test_set in the plan")
    try:
        TestSet(path, bundle).check()
    except DataError as error:
        text = str(error).removeprefix("dataset 'test_set': ")
        if "agent's configuration" in text:  # the cure of a device's dataset; here only names can be wrong
            text = f"{text.rpartition(';')[0]}; name the arrays x and y"
        raise DataError(f"plan {plan.name!r}: test_set cannot be used: {text}") from error


def check_fit(plan: Plan, bundle: Bundle) -> None:
    """Whether plan, bundle and plug-ins fit one another.

    Raises:
        BundleError: a graph that the plan needs is not in the bundle.
        ConfigError: an unknown codec, method, option or hyper-parameter, or a batch size the graphs do not take.
        PluginError: no such server method, or options it does not take.
    """
    try:
        check_finite(plan)
        check_mode(plan)
    except ConfigError as error:
        raise ConfigError(f"plan {plan.name!r}: {error}") from error
    server = create_method(plan)
    try:
        client = client_methods.create_method(plan.method, plan.options)
        check_codecs(plan)
    except (TrainingError, ConfigError) as error:
        raise ConfigError(f"plan {plan.name!r}: {error}") from error
    if sorted(client.channels) != sorted(server.channels):
        raise ConfigError(
            f"plan {plan.name!r}: method {plan.method!r} sends {', '.join(client.channels)}, server_method "
            f"{plan.server_method!r} takes {', '.join(server.channels)}; choose two that belong together"
        )
    variant = plan.variant if plan.variant is not None else client.variant
    needed = ("train",) if client.gradient_hook() is None else ("gradients", "update")
    for graph in (*needed, *(("evaluate",) if plan.test_set is not None else ())):
        bundle.graph(graph, variant)  # checks it: what no device would take is refused here
    for graph in bundle.manifest.graphs:
        if graph not in needed:
            bundle.graph(graph)
    known = bundle.manifest.optimizer.hyper
    unknown = sorted(set(plan.training.hyper) - set(known))
    if unknown:
        raise ConfigError(
            f"plan {plan.name!r}: training.hyper has {unknown[0]!r}, bundle {bundle.manifest.name!r} knows "
            f"{', '.join(known)}"
        )
    wrong = [name for name, value in plan.training.hyper.items() if value < 0]
    if wrong:
        raise ConfigError(
            f"plan {plan.name!r}: training.hyper.{wrong[0]} is {plan.training.hyper[wrong[0]]:g}; give 0 or more"
        )
    batch = bundle.manifest.batch
    if batch.mode == "fixed" and batch.size != plan.training.batch_size:
        raise ConfigError(
            f"plan {plan.name!r}: training.batch_size is {plan.training.batch_size}, bundle "
            f"{bundle.manifest.name!r} takes batches of {batch.size} only"
        )


def check_budgets(plan: Plan, bundle: Bundle) -> None:
    """Whether the codecs can keep to the bytes that the plan gives them, tried with noise in every element.

    Raises:
        ConfigError: they cannot; the message names the table.
    """
    import numpy as np

    layout = bundle.layout()
    channels = client_methods.create_method(plan.method, plan.options).channels
    up, for_whom = _least_uplink(plan, layout.size * len(channels))
    down = change_budget(plan.downlink.target_ratio, plan.downlink.budget_bytes, layout.size)
    noise = (_PROBE_SCALE * np.random.default_rng(0).standard_normal(layout.size)).astype(np.float32)
    for table, compression, names, budget in (
        ("uplink", plan.uplink, channels, up),
        ("downlink", plan.downlink, (MODEL_CHANNEL,), down),
    ):
        if budget is None:
            continue
        raw_bytes = FLOAT_BYTES * layout.size * len(names)
        spec = CodecSpec(compression.codec, compression.options)
        vectors, layouts = dict.fromkeys(names, noise), dict.fromkeys(names, layout)

        def fits(size: int, spec: CodecSpec = spec, vectors: Any = vectors, layouts: Any = layouts) -> bool:
            try:
                encode(spec, vectors, layouts, budget_bytes=size, base_version=_PROBE_VERSION)
            except CodecError:
                return False
            return True

        ratio = compression.target_ratio
        if (ratio is None or raw_bytes / ratio >= LEAST_BYTES) and fits(budget):
            continue
        least = _least(fits, budget, raw_bytes)
        buffers = layout.only(buffers=True).size
        dense = f" ({buffers} buffers, as of BatchNorm, travel dense)" if buffers else ""
        share = for_whom if table == "uplink" else ""
        wanted = f"target_ratio = {ratio:g}" if ratio is not None else f"budget_bytes = {compression.budget_bytes}"
        raise ConfigError(
            f"plan {plan.name!r}: [{table}] {wanted} is too little for codec {compression.codec!r} and this model"
            f"{dense}; it needs {least} bytes{share}, of {raw_bytes} as float32: a ratio of {raw_bytes / least:.0f}"
        )


def _least_uplink(plan: Plan, elements: int) -> tuple[int | None, str]:
    """The least bytes that any device gets for an update, None where the codec chooses itself; and which devices."""
    budget, rules = smallest_budget(plan.uplink, elements), plan.participation
    if budget is not None and plan.uplink.by_samples:
        return budget, " for the device with the fewest samples"
    share = float(getattr(SELECTORS.create(rules.selector, rules.selector_options), "least_update_share", 1.0))
    if budget is None or share >= 1.0:
        return budget, ""
    words = f" for slow links, where selector {rules.selector!r} has least_update_share = {share:g}"
    return max(LEAST_BYTES, int(budget * share)), words


def _least(fits: Callable[[int], bool], low: int, high: int) -> int:
    """About the least budget that fits, above ``low`` and at most about ``high`` or twice LEAST_BYTES, in bytes."""
    low, high = max(low, LEAST_BYTES - 1), max(high, 2 * LEAST_BYTES)
    if fits(LEAST_BYTES):
        return LEAST_BYTES
    while high > low * 1.05 + 8:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _reference(stored: StoredBlob) -> BlobRef:
    return BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes)
