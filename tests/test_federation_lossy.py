"""A federation that loses bits both ways: what devices hold, what comes back to them, and what it costs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("onnx")

from coordinator.aggregation.making import recompute
from coordinator.model_blobs import read_shared
from coordinator.plan import DEFAULT_CODEC
from coordinator.report import run_summary
from edge_runtime.bundle import Bundle
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import decode
from edge_runtime.messages import Job, JobStatus, Verdict
from tests.support.federation import Federation

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.mosquitto]
DIGITS = Path(__file__).parents[1] / "examples" / "digits.bundle"
DEADLINE_S = 20.0


@pytest.fixture
def federation(tmp_path: Path, mosquitto: Any) -> Iterator[Federation]:
    made = Federation(tmp_path / "fed", mosquitto)
    yield made
    made.close()


def digits(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise of the shape of digits: here it only matters that updates differ."""
    random = np.random.default_rng(seed)
    return random.uniform(0, 16, (samples, 1, 8, 8)).astype(np.float32), random.integers(0, 10, samples)


def plan(**changes: Any) -> dict[str, Any]:
    fields = {
        "name": "lossy",
        "bundle": str(DIGITS),
        "dataset": "d",
        "rounds": 4,
        "seed": 3,
        "retain_updates": "all",
        "participation": {"target": 2, "minimum": 1, "deadline_s": DEADLINE_S},
        "training": {"epochs": 1, "batch_size": 16},
        "uplink": {"target_ratio": 20.0},
        "downlink": {"target_ratio": 20.0, "chain": 3},
    }
    return {**fields, **changes}


def test_bytes_reported_are_those_of_the_link(federation: Federation) -> None:
    """Up and down, every packet of the run and no other, acknowledged; and far fewer than float32 would take."""
    for seed, device in enumerate("ab"):
        federation.agent(device, digits(40, seed))
    run = federation.submit(**plan())
    federation.finish(run)
    federation.until(lambda: not any(agent.state.updates for agent in federation.agents.values()), "the last verdicts")
    packets = [packet for of_device in federation.packets.values() for packet in of_device]
    ours = [packet for packet in packets if not packet.topic.endswith(("/state", "/heartbeat", "b/coordinator"))]
    summary = run_summary(federation.store, run)
    up, down = ([packet.size_bytes for packet in ours if packet.up == up] for up in (True, False))
    assert summary["bytes_up"] == sum(up) + 4 * len(down)
    assert summary["bytes_down"] == sum(down) + 4 * len(up)
    chunks = [packet for packet in ours if packet.topic.endswith("/chunk") or "/blob/" in packet.topic]
    assert summary["bytes_bundle"] == sum(packet.size_bytes for packet in chunks) > 2 * DIGITS.stat().st_size
    assert summary["ratio_up"] > 10
    assert summary["ratio_down"] > 10
    assert summary["written_bytes"] > 0
    assert summary["encode_cpu_ms"] >= 0
    layout, stored = Bundle.open(DIGITS).layout(), federation.store.run(run)
    rounds = [(row, federation.store.counted_updates(run, row.round)) for row in federation.store.rounds(run)]
    assert all(made.same for made in recompute(federation.store.blobs, stored.plan, stored.row, rounds, layout))


@pytest.mark.parametrize("codec", [DEFAULT_CODEC, "topk"])
def test_devices_that_miss_versions_or_lose_them_come_to_the_same_model(federation: Federation, codec: str) -> None:
    """One that was away gets the changes it missed; one that lost what it held says so and gets a whole model."""
    fed, data = federation, digits(50, 2)
    fed.agent("a", digits(40, 1), hold=True)
    fed.agent("b", data)
    ways_of = {table: {**plan()[table], "codec": codec} for table in ("uplink", "downlink")}
    run = fed.submit(**plan(rounds=8, **ways_of))

    def work_of_b(number: int) -> None:
        fed.until(
            lambda: any(row.device == "b" and row.status == "received" for row in fed.store.assignments(run, number)),
            f"the update of b in round {number}",
        )

    def leave() -> None:
        fed.stop("b")
        fed.until(lambda: not fed.coordinator.fleet.get("b").online, "b to be gone")

    def close(number: int) -> None:
        fed.release("a")
        fed.until(lambda: fed.row(run).version > number, f"round {number} to close")

    for number in range(8):
        fed.until(lambda: "a" in fed.held, f"the update of a in round {number}")
        if number == 4:
            fed.agent("b", data)
        if number not in (2, 3):
            work_of_b(number)
        if number == 1:
            leave()
        if number == 5:
            leave()
            shutil.rmtree(fed.folder / "b" / "state" / "models")
            fed.agent("b", data)
            fed.until(lambda: fed.coordinator.fleet.get("b").online, "b to be back")
        close(number)
    fed.finish(run)
    rounds = fed.store.rounds(run)
    ways = {jobs[0].round: [(job.model.base, len(job.model.blobs)) for job in jobs] for jobs in jobs_of(fed, "b")}
    assert ways == {
        0: [(0, 0)],
        1: [(0, 1)],
        4: [(1, 3)],
        5: [(4, 1)],
        6: [(5, 1), (None, 1)],
        7: [(6, 1)],
    }
    (refusal,) = [packet.message for packet in fed.packets["b"] if packet.up and isinstance(packet.message, JobStatus)]
    assert refusal.status == "rejected"
    assert "version 5" in refusal.reason
    statuses = [row.status for number in range(8) for row in fed.store.assignments(run, number)]
    assert set(statuses) == {"received"}
    layout = Bundle.open(DIGITS).layout()
    hashes = {rounds[6].vector_sha256, read_shared(fed.store.blobs, rounds[6].down, 7, layout).sha256()}
    for home in "ab":
        hashes.add(SharedModel.decode(fed.agents[home].models.path(run, 7).read_bytes(), layout).sha256())
    assert len(hashes) == 1


def test_an_update_of_a_forgotten_assignment_is_refused_and_its_device_goes_on(federation: Federation) -> None:
    """Finished, then away until its assignment was cancelled and forgotten: one refusal, and it takes part again."""
    fed = federation
    fed.agent("a", digits(40, 1))
    fed.agent("b", digits(40, 2), hold=True)
    participation = {"target": 2, "minimum": 1, "deadline_s": 2.0, "max_staleness": 0}
    run = fed.submit(**plan(rounds=2000, participation=participation))
    fed.until(lambda: "b" in fed.held, "the update of b")
    (late,) = fed.agents["b"].state.updates
    fed.stop("b")
    fed.until(lambda: fed.row(run).version >= 4, "rounds without b")
    assert late.assignment not in fed.coordinator.shell.runs[run].assignments
    fed.agent("b", digits(40, 2))

    def verdicts() -> list[Verdict]:
        told = [packet.message for packet in fed.packets["b"] if not packet.up]
        return [message for message in told if isinstance(message, Verdict)]

    fed.until(lambda: any(verdict.counted for verdict in verdicts()), "an update of b that counts")
    assert verdicts()[0].update == late
    assert not verdicts()[0].counted
    assert "too long ago" in verdicts()[0].reason


@pytest.mark.parametrize("codec", [DEFAULT_CODEC, "topk", "int8"])
def test_updates_over_the_largest_norm_are_cut_down(federation: Federation, codec: str) -> None:
    """None is refused, so that every device takes part in every round; the rest of an update waits on its device."""
    for seed, device in enumerate("ab"):
        federation.agent(device, digits(40, seed))
    free = federation.submit(**plan(name="free", rounds=1, uplink={"codec": "topk", "target_ratio": 20.0}))
    federation.finish(free)
    limit = min(norms_of(federation, free)) / 4
    run = federation.submit(**plan(uplink={"codec": codec, "max_norm": limit}))
    federation.finish(run)
    assert [row.updates for row in federation.store.rounds(run)] == [2] * 4
    assert "refused" not in federation.store.update_counts(run)
    if codec == "topk":
        assert all(0.5 * limit < norm <= limit for norm in norms_of(federation, run))


def norms_of(fed: Federation, run: str) -> list[float]:
    """L2 norms of the counted updates."""
    layouts = {"delta": Bundle.open(DIGITS).layout()}
    counted = [row for entry in fed.store.rounds(run) for row in fed.store.counted_updates(run, entry.round)]
    return [decode(fed.store.blobs.path(row.blob.sha256).read_bytes(), layouts)["delta"].norm() for row in counted]


def jobs_of(fed: Federation, device: str) -> list[list[Job]]:
    """What a device was told, by assignment, without mere repetitions."""
    found: dict[str, list[Job]] = {}
    for packet in fed.packets[device]:
        if isinstance(packet.message, Job):
            told = found.setdefault(packet.message.assignment, [])
            if packet.message.model not in [job.model for job in told]:
                told.append(packet.message)
    return list(found.values())
