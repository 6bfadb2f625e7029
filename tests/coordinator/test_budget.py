"""Bytes of an assignment: from ratio or budget, by samples, and growing tighter over the first rounds."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from coordinator import events as e
from coordinator.budget import change_budget, smallest_budget, update_budget, warmed_up
from coordinator.plan import Downlink, Uplink, check_codecs, check_finite
from coordinator.rounds import step
from coordinator.scheduling import Selection
from coordinator.scheduling.random import RandomSelector
from coordinator.submission import check_budgets
from edge_runtime.compression import Layout
from edge_runtime.compression.pipeline import CodecSpec, encode
from edge_runtime.errors import ConfigError
from edge_runtime.messages import DatasetInfo
from tests.coordinator import helpers as h

ELEMENTS = 10_000


def test_a_ratio_is_of_float32_and_a_budget_is_what_it_says():
    """Without either the codec chooses."""
    assert update_budget(Uplink(codec="topk"), 0, ELEMENTS) is None
    assert update_budget(Uplink(codec="topk", target_ratio=100.0), 7, ELEMENTS) == 400
    assert update_budget(Uplink(codec="topk", budget_bytes=777), 7, ELEMENTS) == 777
    assert update_budget(Uplink(codec="topk", target_ratio=1e9), 7, ELEMENTS) == 64
    assert (change_budget(None, None, ELEMENTS), change_budget(None, 900, ELEMENTS)) == (None, 900)
    assert change_budget(50.0, None, ELEMENTS) == 800


@pytest.mark.parametrize("limit", [{"target_ratio": 100.0}, {"budget_bytes": 400}])
def test_bytes_follow_the_samples_and_add_up_to_the_same(limit):
    """A device with three times the mean gets three times the bytes; one that did not count gets the mean."""
    uplink = Uplink(codec="topk", by_samples=True, **limit)
    samples = [30, 60, 90, 300, 120]
    budgets = [update_budget(uplink, 0, ELEMENTS, count, 120.0) for count in samples]
    assert budgets == [100, 200, 300, 1000, 400]
    assert update_budget(uplink, 0, ELEMENTS, None, 120.0) == 400
    assert update_budget(uplink, 0, ELEMENTS, 10, None) == 400
    assert update_budget(uplink, 0, ELEMENTS, 1, 120.0) == smallest_budget(uplink, ELEMENTS) == 64
    wide = Uplink(codec="topk", by_samples=True, target_ratio=10.0)
    assert update_budget(wide, 0, ELEMENTS, 1, 120.0) == smallest_budget(wide, ELEMENTS) == 500  # an eighth of the mean


def test_warm_up_grows_the_ratio_exponentially():
    """From gentle to the target, which holds from then on."""
    ratios = [warmed_up(256.0, round_, 3) for round_ in range(6)]
    assert ratios == pytest.approx([4.0, 16.0, 64.0, 256.0, 256.0, 256.0])
    budgets = [
        update_budget(Uplink(codec="topk", budget_bytes=400, warmup_rounds=1), round_, ELEMENTS) for round_ in (0, 1, 2)
    ]
    assert budgets == [4000, 400, 400]


def fleet(**samples):
    made = h.fleet()
    for name, count in samples.items():
        made.announce(0.0, h.device(name, codecs=["topk", "raw"], datasets=[DatasetInfo(name="digits", samples=count)]))
    return made


def test_assignments_carry_the_plans_budget():
    """By what each device of the fleet announced, and by the round."""
    plan = h.plan(target=3, uplink=Uplink(codec="topk", target_ratio=100.0, by_samples=True))
    rows = h.jobs(step(h.start(plan, elements=ELEMENTS), e.Tick(0.0), fleet(a=10, b=30, c=None)))
    assert {row.device: row.byte_budget for row in rows} == {"a": 200, "b": 600, "c": 400}


def test_a_selector_may_decide_itself(monkeypatch):
    """Its budget wins, and for a codec that is not the plan's the plan's budget means nothing."""
    plan = h.plan(target=3, uplink=Uplink(codec="topk", target_ratio=100.0))
    state = h.start(plan, elements=ELEMENTS)
    changes = {"a": {"byte_budget": 99}, "b": {"codec": "raw"}, "c": {}}

    def select(_self, _now, _fleet, request):
        chosen = [msgspec.structs.replace(request.choice(name), **changes[name]) for name in request.candidates]
        return Selection(choices=chosen)

    monkeypatch.setattr(RandomSelector, "select", select)
    rows = h.jobs(step(state, e.Tick(0.0), fleet(a=1, b=1, c=1)))
    assert {row.device: (row.codec, row.byte_budget) for row in rows} == {
        "a": ("topk", 99),
        "b": ("raw", None),
        "c": ("topk", 400),
    }


class Statistics:
    """A bundle of one small matrix and many running statistics, as BatchNorm has them."""

    def layout(self):
        return Layout(("w", "mean"), ((20, 50), (400,)), frozenset({"mean"}))


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        (
            {"uplink": Uplink(codec="default", budget_bytes=400)},
            r"\[uplink\] budget_bytes = 400 .*400 buffers.* needs 8\d\d bytes, of 5600",
        ),
        (
            {"uplink": Uplink(codec="default", budget_bytes=820)},
            r"\[uplink\] budget_bytes = 820 .*needs 8\d\d bytes.*a ratio of [67]$",
        ),
        ({"uplink": Uplink(codec="sparse", target_ratio=300.0)}, r"\[uplink\] target_ratio = 300 is too little"),
        ({"downlink": Downlink(codec="topk", budget_bytes=100)}, r"\[downlink\] budget_bytes = 100 .*400 buffers"),
        (
            {"uplink": Uplink(codec="default", budget_bytes=1600, by_samples=True)},
            r"\[uplink\] budget_bytes = 1600 .* for the device with the fewest samples",
        ),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused_at_submission(tables, reason):
    """Not by every device in every round; what dense buffers take is named."""
    with pytest.raises(ConfigError, match=reason):
        check_budgets(h.plan(**tables), Statistics())
    check_budgets(h.plan(uplink=Uplink(codec="default", budget_bytes=1000)), Statistics())


@pytest.mark.parametrize("table", ["uplink", "downlink"])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        *(
            ({"codec": name, "target_ratio": 30.0}, "leave target_ratio out")
            for name in ("int4", "half", "fedzip", "eden")
        ),
        ({"codec": "int8", "budget_bytes": 900}, "leave budget_bytes out, or choose one that has it"),
        ({"codec": "sparse", "target_ratio": 9.0, "options": {"density": 0.1}}, "options.density decides"),
        ({"budget_bytes": 900, "options": {"density": 0.1}}, "options.density decides"),
        ({"target_ratio": 9.0, "options": {"family": "exact"}}, "options.family = 'exact' decides"),
        ({"target_ratio": 9.0, "options": {"target_ratio": 8.0}}, "one of target_ratio and options.target_ratio"),
        ({"budget_bytes": 900, "options": {"target_ratio": 8.0}}, "one of budget_bytes and options.target_ratio"),
        ({"options": {"max_norm": 8.0}}, "no option 'max_norm'"),
    ],
)
def test_bytes_that_nothing_keeps_are_refused(table, values, reason):
    """A codec without rate control, or options that decide the bytes by themselves, beside a ratio or a budget."""
    part = {"uplink": Uplink, "downlink": Downlink}[table](**values)
    with pytest.raises(ConfigError, match=f"{table}: .*{reason}"):
        check_codecs(h.plan(**{table: part}))


@pytest.mark.parametrize("codec", ["default", "lowrank", "sparse", "topk", "stc", "randomk", "powersgd"])
def test_codecs_with_rate_control_may_have_a_budget(codec):
    """What passes at submission holds for updates of any content, late in a long run."""
    uplink = Uplink(codec=codec, budget_bytes=2000)
    check_codecs(h.plan(uplink=uplink))
    check_budgets(h.plan(uplink=uplink), Statistics())
    layout = Statistics().layout()
    for seed, scale in enumerate((1e-6, 1e-2, 1.0, 100.0)):
        update = np.random.default_rng(seed).laplace(0, scale, layout.size).astype(np.float32)
        data = encode(CodecSpec(codec), {"delta": update}, {"delta": layout}, budget_bytes=2000, base_version=9999).data
        assert len(data) <= 2000


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    """The stored plan knows none, so a run without the limit would come of it."""
    for plan, name in (
        (h.plan(uplink=Uplink(max_norm=value)), "uplink.max_norm"),
        (h.plan(downlink=Downlink(target_ratio=value)), "downlink.target_ratio"),
        (h.plan(deadline_s=value), "participation.deadline_s"),
        (h.plan(server_options={"lr": value}), "server_options.lr"),
        (h.plan(uplink=Uplink(options={"clip_norm": value})), "uplink.options.clip_norm"),
    ):
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            check_finite(plan)
