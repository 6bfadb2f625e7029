"""Server methods with tables and roles, and optimisers that set what devices do, over MQTT with real agents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coordinator.aggregation.making import recompute
from edge_runtime.bundle import Bundle
from tests.edge_runtime import toy_bundle
from tests.support.federation import Federation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.mosquitto]
DEVICES = {"pi-a": 20, "pi-b": 33, "pi-c": 47}
ROUNDS = 4


@pytest.fixture
def federation(tmp_path: Path, mosquitto: Any) -> Iterator[Federation]:
    made = Federation(tmp_path / "fed", mosquitto)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("changes", "choice", "roles"),
    [
        ({"server_method": "fedamd", "method": "fedamd"}, {"anchor_probability": 0.5}, {"trainer", "anchor"}),
        ({"server_method": "afa_cs"}, {}, {"trainer"}),
        (
            {
                "server_method": "nna",
                "server_options": {"byzantine": 1},
                "server_optimizer": "fedhyper_sl",
                "server_optimizer_options": {"client_lr": 0.01, "normalised": 1},
            },
            {},
            {"trainer"},
        ),
    ],
)
def test_every_method_runs_and_its_models_can_be_made_again(
    federation: Federation, tmp_path: Path, changes: dict[str, Any], choice: dict[str, float], roles: set[str]
) -> None:
    """Jobs, roles, what goes down beside the model, tables and hyper-parameters: all versions come out again."""
    bundle = Bundle.open(toy_bundle.write_bundle(tmp_path / "toy.bundle"))
    for number, (device, samples) in enumerate(DEVICES.items()):
        x = np.random.default_rng(number).normal(size=(samples, 4)).astype(np.float32)
        federation.agent(device, (x, np.argmax(x[:, :3], axis=1).astype(np.int64)))
    federation.until(
        lambda: sum(device.online for device in federation.coordinator.fleet.devices()) == len(DEVICES), "all devices"
    )
    run = federation.submit(
        **{
            "name": "run",
            "bundle": str(bundle.path),
            "dataset": "d",
            "rounds": ROUNDS,
            "seed": 3,
            "retain_updates": "all",
            "participation": {"target": 3, "minimum": 3, "deadline_s": 60.0, "selector_options": choice},
            "training": {"steps": 4, "batch_size": 8},
            "uplink": {"codec": "raw"},
            "downlink": {"codec": "zstd"},
            **changes,
        }
    )
    federation.finish(run)
    stored, row = federation.store.run(run), federation.row(run)
    found = {entry.role for number in range(ROUNDS) for entry in federation.store.assignments(run, number)}
    assert found == roles
    rounds = [(entry, federation.store.counted_updates(run, entry.round)) for entry in federation.store.rounds(run)]
    assert [len(updates) for _, updates in rounds] == [3] * ROUNDS
    again = recompute(
        federation.store.blobs, stored.plan, row, rounds, bundle.layout(), roles=federation.store.roles(run)
    )
    assert [made.same for made in again] == [True] * ROUNDS
    assert row.model != row.initial_model
    assert set(row.hyper) == ({"lr"} if "server_optimizer" in changes else set())
