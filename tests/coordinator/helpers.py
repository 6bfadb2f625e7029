"""Short ways to make plans, devices and events."""

from __future__ import annotations

from coordinator import events as e
from coordinator.fleet import Fleet
from coordinator.plan import Downlink, Participation, Plan, Training, Uplink
from coordinator.run_state import RunState
from edge_runtime.compression.container import update_tag
from edge_runtime.compression.pipeline import CodecSpec, encode
from edge_runtime.messages import BlobRef, DatasetInfo, DeviceState, UpdateId, UpdateMeta


def blob(number: int, size_bytes: int = 100) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size_bytes=size_bytes)


def plan(**changes) -> Plan:
    participation = {"target": 2, "deadline_s": 100.0}
    participation |= {key: changes.pop(key) for key in list(changes) if key in Participation.__struct_fields__}
    values = {
        "name": "test",
        "bundle": "x.bundle",
        "dataset": "digits",
        "rounds": 2,
        "participation": Participation(**participation),
        "training": Training(epochs=1),
        "uplink": Uplink(codec="raw"),
        "downlink": Downlink(codec="raw"),
    }
    return Plan(**{**values, **changes})


def device(name: str, *, online: bool = True, session: str = "s1", instance: str = "i1", **changes) -> DeviceState:
    values = {"codecs": ["raw"], "methods": ["fedavg"], "datasets": [DatasetInfo(name="digits", samples=10)]}
    return DeviceState(device=name, online=online, session=session, instance=instance, **{**values, **changes})


def fleet(*names: str) -> Fleet:
    made = Fleet()
    for name in names:
        made.announce(0.0, device(name))
    return made


def start(a_plan: Plan, **changes) -> RunState:
    return RunState.start("run", a_plan, blob(1), blob(2), **changes)


def meta(row: e.AssignmentRow, samples: int = 10, **changes) -> UpdateMeta:
    return UpdateMeta(**{"round": row.round, "model_version": row.version, "samples": samples, "steps": 1, **changes})


def update_id(row: e.AssignmentRow, sequence: int = 0) -> UpdateId:
    return UpdateId(row.run, row.device, row.assignment, sequence)


def encoded(vector, layout, update: UpdateId, *, version: int = 0, codec: str = "raw", **how) -> bytes:
    """An update as its device encodes it."""
    spec = CodecSpec(codec, how.pop("options", {}))
    return encode(spec, {"delta": vector}, {"delta": layout}, base_version=version, tag=update_tag(update), **how).data


def aggregate(round_: int, made, rows) -> e.Aggregate:
    """The effect that makes the next version from ``made``, as the round machine gives it."""
    held = {round_: made.down or made.model}
    return e.Aggregate("run", round_, round_, made.model, rows, held, made.method_state)


def arrived(row: e.AssignmentRow, now: float = 1.0, *, sequence: int = 0, number: int = 7, **changes):
    return e.UpdateArrived(now, update_id(row, sequence), blob(number), meta(row, **changes))


def jobs(effects) -> list[e.AssignmentRow]:
    return [effect.assignment for effect in effects if isinstance(effect, e.SendJob)]


def of(kind, effects) -> list:
    return [effect for effect in effects if isinstance(effect, kind)]


def one(kind, effects):
    (effect,) = of(kind, effects)
    return effect
