"""Whole runs, simulated and really trained, in which some devices lie about their loss."""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np
import pytest

from coordinator.executors.inline import InlineExecutor
from coordinator.plan import Training
from coordinator.simulation import Settings, simulate
from coordinator.simulation.tasks import TrainedUpdate
from tests.coordinator.simulation import helpers as h
from tests.edge_runtime import toy_bundle

DEVICES, TARGET, ROUNDS = 20, 4, 40
LIARS = ("d00", "d10")


class LyingExecutor(InlineExecutor):
    """Trains as any other, and then says another loss for some devices."""

    def __init__(self, loss: float) -> None:
        super().__init__()
        self._loss = loss

    def submit(self, function, *arguments):
        return super().submit(partial(self._told, function), *arguments)

    def _told(self, function, *arguments):
        made = function(*arguments)
        if isinstance(made, TrainedUpdate) and arguments[-1].device in LIARS:
            return made._replace(meta=msgspec.structs.replace(made.meta, loss=self._loss, loss_rms=self._loss))
        return made


def run(folder, selector, options, loss):
    """Accuracy of the last versions, how often a liar was asked, and how often another one; means."""
    np.savez(folder / "test.npz", **np.load(toy_bundle.write_data(folder / "t.npz", 200, seed=5)))
    plan = h.plan(
        folder,
        rounds=ROUNDS,
        target=TARGET,
        selector=selector,
        selector_options=options,
        test_set=str(folder / "test.npz"),
        training=Training(steps=2, batch_size=8, hyper={"lr": 0.05}),
    )
    fleet = h.traces(*(h.device(f"d{number:02}") for number in range(DEVICES)))
    executor = InlineExecutor() if loss is None else LyingExecutor(loss)
    report = simulate(plan, fleet, Settings(seed=1), shares=h.shares(folder, DEVICES), executor=executor)
    executor.close()
    assert report.status == "finished", report.reason
    assert len(report.versions) == ROUNDS + 1
    asked = [[d.asked for d in report.device_reports if (d.device in LIARS) is liar] for liar in (True, False)]
    accuracy = float(np.mean([version.accuracy for version in report.versions[-5:]]))
    return accuracy, *(sum(counts) / len(counts) for counts in asked)


@pytest.mark.parametrize(
    ("selector", "options", "times"),
    [
        ("energy_aware", {}, 2.5),
        ("power_of_choice", {}, 5.0),
        ("oort", {"blacklist_jobs": 10.0}, 2.5),
        ("oort", {}, 8.0),  # without its blacklist it takes in every round whom it finds most useful
    ],
)
def test_two_liars_of_twenty_gain_little_and_cost_little(tmp_path, selector, options, times):
    """A loss of 1e30 is not believed; one of 1e5 brings so many turns of an honest device, and no 3 % of accuracy."""
    honest, _, _ = run(tmp_path, selector, options, None)
    for loss, most in ((1e30, 1.1), (1e5, times)):
        accuracy, liars, others = run(tmp_path, selector, options, loss)
        assert liars <= most * others
        assert accuracy >= honest - 0.03
