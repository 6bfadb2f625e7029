"""The plan of a run: what `edge-coordinator submit` reads from TOML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edge_runtime.errors import ConfigError
from edge_runtime.files import load_toml
from edge_runtime.messages import Name

if TYPE_CHECKING:
    from pathlib import Path


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every device does with its data. Exactly one of ``epochs`` and ``steps``."""

    epochs: Annotated[int, msgspec.Meta(ge=1)] | None = None
    steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 32
    last_batch: Literal["keep", "drop"] = "keep"
    hyper: dict[str, float] = {}
    holdout_fraction: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    max_samples: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_age_s: float | None = None


class Participation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who takes part in a round and how long the coordinator waits.

    ``target`` updates close a round at once; ``ceil(target * over_commit)`` devices are asked. At the deadline a round
    closes with at least ``minimum`` updates, else it asks again, ``attempts`` times in all, and then the run fails.
    A late update counts up to ``max_staleness`` versions after its own, weighted ``(1 + staleness) ** -exponent``.
    """

    selector: str = "random"
    selector_options: dict[str, float] = {}
    target: Annotated[int, msgspec.Meta(ge=1)]
    minimum: Annotated[int, msgspec.Meta(ge=1)] = 1
    over_commit: Annotated[float, msgspec.Meta(ge=1.0)] = 1.0
    deadline_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    attempts: Annotated[int, msgspec.Meta(ge=1)] = 5
    max_staleness: Annotated[int, msgspec.Meta(ge=0)] = 5
    staleness_exponent: Annotated[float, msgspec.Meta(ge=0.0)] = 0.5


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
    codec: str = "raw"
    downlink_codec: str = "raw"
    variant: str | None = None
    evaluate_on_devices: bool = True
    test_set: str | None = None
    evaluate_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    retain_updates: Literal["round", "all"] = "round"


def load_plan(path: Path) -> Plan:
    """Reads a plan; relative paths inside count from the plan's folder.

    Raises:
        ConfigError: unreadable, no TOML, an unknown key, a value of the wrong type or range, or contradictory values.
    """
    plan = load_toml(path, Plan)
    if (plan.training.epochs is None) == (plan.training.steps is None):
        raise ConfigError(f"{path}: set exactly one of training.epochs and training.steps")
    if plan.participation.minimum > plan.participation.target:
        raise ConfigError(f"{path}: participation.minimum is above participation.target")
    folder = path.parent
    return msgspec.structs.replace(
        plan,
        bundle=str(folder / plan.bundle),
        test_set=None if plan.test_set is None else str(folder / plan.test_set),
    )
