"""The plan of a run: what `edge-coordinator submit` reads from TOML."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from edge_runtime.errors import CodecError, ConfigError
from edge_runtime.files import load_toml
from edge_runtime.messages import Name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge_runtime.compression.base import Codec

DEFAULT_CODEC = "default"  # both ways, where a plan names none


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every device does with its data. Exactly one of ``epochs`` and ``steps``.

    A selector may give a weak device fewer steps, but not less than ``min_steps``.
    A device that knows what it draws ends a job early at ``job_joules``, and what it reached counts by its samples.
    """

    epochs: Annotated[int, msgspec.Meta(ge=1)] | None = None
    steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    min_steps: Annotated[int, msgspec.Meta(ge=1)] = 1
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 32
    last_batch: Literal["keep", "drop"] = "keep"
    hyper: dict[str, float] = {}
    holdout_fraction: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    max_samples: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_age_s: float | None = None
    job_joules: Annotated[float, msgspec.Meta(gt=0.0)] | None = None


class Participation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who takes part in a round and how long the coordinator waits.

    ``mode`` "synchronous" has rounds, as below. "buffered" (FedBuff) keeps ``concurrency`` devices training, each from
    the newest model, and makes a model of every ``target`` updates, whatever their version. In "anarchic" runs every
    eligible device, at most ``concurrency`` if that is given, holds a standing assignment and decides itself when it
    trains and for how many of at most ``training.steps`` steps, ``interval_s`` apart; every ``target`` updates make a
    model.

    ``target`` updates close a round at once; ``ceil(target * over_commit)`` devices are asked. At the deadline a round
    closes with at least ``minimum`` updates, else it asks again, ``attempts`` times in all, and then the run fails.
    A late update counts up to ``max_staleness`` versions after its own, weighted ``(1 + staleness) ** -exponent``.
    """

    mode: Literal["synchronous", "buffered", "anarchic"] = "synchronous"
    concurrency: Annotated[int, msgspec.Meta(ge=1)] | None = None
    interval_s: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    selector: str = "random"
    selector_options: dict[str, float] = {}
    target: Annotated[int, msgspec.Meta(ge=1)]
    minimum: Annotated[int, msgspec.Meta(ge=1)] = 1
    over_commit: Annotated[float, msgspec.Meta(ge=1.0)] = 1.0
    deadline_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    attempts: Annotated[int, msgspec.Meta(ge=1)] = 5
    max_staleness: Annotated[int, msgspec.Meta(ge=0)] = 5
    staleness_exponent: Annotated[float, msgspec.Meta(ge=0.0)] = 0.5


class Uplink(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How updates are encoded, and the bytes that one may take.

    ``target_ratio`` (float32 bytes over encoded bytes) or ``budget_bytes`` of an update; neither: the codec's own
    choice. ``by_samples`` gives a device bytes in proportion to its samples, the mean of the fleet getting the budget.
    Over the first ``warmup_rounds`` rounds the ratio grows exponentially (Lin et al., "Deep Gradient Compression",
    ICLR 2018, section 3.3). An update with an L2 norm above ``max_norm`` is refused; devices with a lossy codec stay
    below it. ``options`` are the codec's, and ``clip_norm``, ``momentum`` and ``error_feedback``.
    """

    codec: str = DEFAULT_CODEC
    target_ratio: Annotated[float, msgspec.Meta(ge=1.0)] | None = None
    budget_bytes: Annotated[int, msgspec.Meta(ge=64)] | None = None
    options: dict[str, bool | int | float | str] = {}
    by_samples: bool = False
    warmup_rounds: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_norm: Annotated[float, msgspec.Meta(gt=0.0)] | None = None


class Downlink(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models reach devices: whole with a lossless codec, else as a chain of changes of a shared model.

    ``target_ratio`` or ``budget_bytes`` are those of one change. The last ``chain`` changes are kept for devices that
    missed some.
    """

    codec: str = DEFAULT_CODEC
    target_ratio: Annotated[float, msgspec.Meta(ge=1.0)] | None = None
    budget_bytes: Annotated[int, msgspec.Meta(ge=64)] | None = None
    options: dict[str, bool | int | float | str] = {}
    chain: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 64


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. ``bundle`` and ``test_set`` are paths on the machine that submits; both are copied into the store."""

    name: Name
    bundle: str
    dataset: Name
    rounds: Annotated[int, msgspec.Meta(ge=1)]
    participation: Participation
    training: Training
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    priority: int = 0
    method: str = "fedavg"
    options: dict[str, float] = {}
    server_method: str = "fedavg"
    server_options: dict[str, float] = {}
    server_optimizer: str = "sgd"
    server_optimizer_options: dict[str, float] = {}
    uplink: Uplink = Uplink()
    downlink: Downlink = Downlink()
    variant: str | None = None
    evaluate_on_devices: bool = True
    test_set: str | None = None
    evaluate_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    retain_updates: Literal["round", "all"] = "round"


def load_plan(path: Path) -> Plan:
    """Reads a plan; relative paths inside count from the plan's folder.

    Raises:
        ConfigError: unreadable, no TOML, an unknown key or codec, a value of the wrong type or range, or contradictory
            values.
    """
    plan = load_toml(path, Plan)
    if (plan.training.epochs is None) == (plan.training.steps is None):
        raise ConfigError(f"{path}: set exactly one of training.epochs and training.steps")
    if plan.participation.minimum > plan.participation.target:
        raise ConfigError(f"{path}: participation.minimum is above participation.target")
    try:
        check_finite(plan)
        check_mode(plan)
        check_codecs(plan)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    folder = path.parent
    return msgspec.structs.replace(
        plan,
        bundle=str(folder / plan.bundle),
        test_set=None if plan.test_set is None else str(folder / plan.test_set),
    )


def check_mode(plan: Plan) -> None:
    """Whether the keys of the mode of participation fit one another.

    Raises:
        ConfigError: they do not; the message names them.
    """
    rules, training = plan.participation, plan.training
    if rules.mode == "synchronous" and rules.concurrency is not None:
        raise ConfigError('participation.concurrency is for mode "buffered" and "anarchic"; leave it out')
    if rules.mode != "anarchic" and rules.interval_s:
        raise ConfigError('participation.interval_s is for mode "anarchic"; leave it out')
    if rules.mode == "anarchic" and training.steps is None:
        raise ConfigError('mode "anarchic" needs training.steps, the most that a device may take; give it, not epochs')
    if training.steps is not None and training.min_steps > training.steps:
        raise ConfigError("training.min_steps is above training.steps")


def step_bounds(plan: Plan) -> tuple[int, int]:
    """The least and the most steps of a job in an anarchic run."""
    most = plan.training.steps or 1
    return min(plan.training.min_steps, most), most


def check_finite(plan: Plan) -> None:
    """Whether all numbers are finite: TOML knows others, the stored plan does not.

    Raises:
        ConfigError: one is not; the message names it.
    """
    for key, value in _numbers("", msgspec.to_builtins(plan)):
        if not math.isfinite(value):
            raise ConfigError(f"{key} is {value}; give a finite number, or leave it out")


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(f"{key}.{name}" if key else name, part)
    elif isinstance(value, float):
        yield key, value


def check_codecs(plan: Plan) -> None:
    """Whether codecs, their options and budgets can be used.

    Raises:
        ConfigError: an unknown codec or option, or values that contradict one another.
    """
    from edge_runtime.compression.pipeline import CodecSpec, check_spec
    from edge_runtime.compression.registry import codec_class

    for table, part in (("uplink", plan.uplink), ("downlink", plan.downlink)):
        if "max_norm" in part.options:
            cure = "set max_norm in [uplink] itself" if table == "uplink" else "there is max_norm in [uplink]"
            raise ConfigError(f"{table}: no option 'max_norm'; {cure}")
        try:
            check_spec(CodecSpec(part.codec, part.options))
        except CodecError as error:
            raise ConfigError(f"{table}: {error}") from error
        if part.target_ratio is not None and part.budget_bytes is not None:
            raise ConfigError(f"{table}: set one of target_ratio and budget_bytes, or neither")
        if part.target_ratio is not None or part.budget_bytes is not None:
            _check_rate_control(table, part, codec_class(part.codec))
    if (plan.uplink.by_samples or plan.uplink.warmup_rounds) and not (
        plan.uplink.target_ratio is not None or plan.uplink.budget_bytes is not None
    ):
        raise ConfigError("uplink: by_samples and warmup_rounds need target_ratio or budget_bytes")
    stateful = sorted({"error_feedback", "momentum"} & set(plan.downlink.options))
    if stateful:
        raise ConfigError(f"downlink: no option {stateful[0]!r}; what was not sent stays in the server's model anyway")


def _check_rate_control(table: str, part: Uplink | Downlink, codec: type[Codec]) -> None:
    given = "target_ratio" if part.target_ratio is not None else "budget_bytes"
    if codec.lossless:
        raise ConfigError(f"{table}: codec {part.codec!r} loses nothing, so it keeps no target_ratio or budget_bytes")
    if not codec.keeps_budget:
        raise ConfigError(
            f"{table}: codec {part.codec!r} has no rate control, so it cannot keep {given}; leave {given} out, or "
            f"choose one that has it, as {DEFAULT_CODEC!r}"
        )
    if part.options.get("target_ratio"):
        raise ConfigError(f"{table}: set one of {given} and options.target_ratio, not both")
    fixed = "options.density" if part.options.get("density") else ""
    if part.options.get("family") == "exact":
        fixed = "options.family = 'exact'"
    if fixed:
        raise ConfigError(f"{table}: {fixed} decides how many bytes it takes, not {given}; leave one of them out")


def is_lossless(codec: str) -> bool:
    """Whether a codec gives every bit back."""
    from edge_runtime.compression.registry import codec_class

    return codec_class(codec).lossless
