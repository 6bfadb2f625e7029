"""What an owner's limits forbid, and which jobs a device cannot afford: each limit, and each unknown."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.config import LimitsConfig
from edge_runtime.agent.hours import LocalTime
from edge_runtime.agent.limit_facts import unknown_facts
from edge_runtime.agent.limits import Known, Rate, cost_of, decline, held, in_force, standing_steps
from edge_runtime.messages import BlobRef, Job, ModelRef, Standing

SHA = "ab" * 32
NOON = LocalTime(day=1, month=1, day_second=43_200.0, week_second=43_200.0, day_left_s=43_200.0, month_left_s=1e6)


def job(**fields) -> Job:
    values = {"run": "r", "assignment": "a", "round": 0, "model_version": 0, "dataset": "d", "deadline_s": 15.0}
    defaults = {"steps": 100, "bundle": BlobRef(sha256=SHA, size_bytes=500_000)}
    model = ModelRef(blobs=[BlobRef(sha256="cd" * 32, size_bytes=1_000_000)])
    return Job(**{**values, **defaults, "model": model, **fields})


def standing(**fields) -> Standing:
    bundle = BlobRef(sha256=SHA, size_bytes=500_000)
    return Standing(**{"run": "r", "assignment": "a", "dataset": "d", "bundle": bundle, "max_steps": 100, **fields})


def rate(step_s: float | None = None, step_joules: float | None = None) -> dict[str, Rate]:
    return {SHA: Rate(step_s, step_joules)}


NOW = [  # limits, what is known, limit, words of the reason, seconds
    ({"max_temperature_c": 80}, {"temperature_c": 81.0}, "heat", "limits.max_temperature_c = 80", 300),
    ({"max_temperature_c": 80}, {"temperature_c": 80.0}, None, "", 0),
    ({"max_temperature_c": 80}, {}, None, "", 0),
    ({"battery_reserve_percent": 30}, {"battery_percent": 29.0}, "battery", "battery_reserve_percent = 30", 900),
    (
        {"battery_reserve_percent": 30},
        {"battery_percent": 29.0, "on_external_power": False},
        "battery",
        "battery at 29 %",
        900,
    ),
    ({"battery_reserve_percent": 30}, {"battery_percent": 29.0, "on_external_power": True}, None, "", 0),
    ({"battery_reserve_percent": 30}, {"on_external_power": False}, None, "", 0),
    ({"min_free_memory_mb": 100}, {"free_memory_bytes": 99e6}, "memory", "99 MB of free memory", 300),
    ({"min_free_memory_mb": 100}, {"free_memory_bytes": 101e6}, None, "", 0),
    ({"only_when_charging": True}, {"on_external_power": False}, "charging", "limits.only_when_charging", 900),
    ({"only_when_charging": True}, {"on_external_power": True}, None, "", 0),
    (
        {"only_when_charging": True},
        {},
        "charging",
        "external power is unknown here, and limits.only_when_charging",
        900,
    ),
    ({"only_unmetered": True}, {"link_metered": True}, "metered", "limits.only_unmetered", 900),
    ({"only_unmetered": True}, {"link_metered": False}, None, "", 0),
    ({"only_unmetered": True}, {}, "metered", "is unknown here, and limits.only_unmetered is set", 900),
    ({"hours": "22:00-06:00"}, {"local": NOON}, "hours", "12:00 is outside limits.hours = 22:00-06:00", 36_000),
    ({"hours": "22:00-06:00, 11:30-12:01"}, {"local": NOON}, None, "", 0),
    ({"hours": "22:00-06:00"}, {}, None, "", 0),
    ({"joules_per_day": 500}, {"joules_today": 500.0, "local": NOON}, "joules", "joules_per_day = 500", 43_200),
    ({"joules_per_day": 500}, {"joules_today": 501.0}, "joules", "501 J were drawn today", 900),
    ({"joules_per_day": 500}, {"joules_today": 499.0}, None, "", 0),
    ({"data_mb_per_month": 5}, {"month_bytes": 5_000_000, "local": NOON}, "data", "data_mb_per_month = 5", 1e6),
    ({"data_mb_per_month": 5}, {"month_bytes": 4_999_999}, None, "", 0),
    ({}, {"temperature_c": 200.0, "battery_percent": 0.0, "free_memory_bytes": 0.0}, None, "", 0),
]


@pytest.mark.parametrize(("limits", "known", "limit", "said", "for_s"), NOW)
def test_a_limit_forbids_all_training_by_name(limits, known, limit, said, for_s):
    """Only a limit that is set forbids training, and an unknown value only where the owner would pay for it (power, the
    link); the reason names figure and key."""
    found = held(Known(**known), LimitsConfig(**limits))
    if limit is None:
        assert found is None
    else:
        assert (found.limit, found.for_s) == (limit, for_s)
        assert said in found.reason
        assert found.keeps_work == (limit != "memory")
        assert decline(job(), Known(**known), LimitsConfig(**limits)) == found


COSTS = [  # limits, what is known, fields of the job, words of the reason
    ({}, {"rates": rate(step_s=0.7)}, {}, "would take about 70 s here (100 steps in 70 s"),
    ({}, {"rates": rate(step_s=0.5)}, {}, ""),
    ({}, {"rates": rate(step_s=0.5), "down_kbit_s": 1000.0, "fetch_bytes": 1_500_000}, {}, "transfers 12 s"),
    ({}, {"rates": rate(step_s=0.55), "up_kbit_s": 1000.0}, {"codec": "raw"}, "transfers 8 s"),
    ({}, {"rates": rate(step_s=0.55), "up_kbit_s": 1000.0}, {"codec": "sparse"}, ""),
    ({}, {"up_kbit_s": 1.0}, {"codec": "sparse", "byte_budget": 10_000}, "transfers 80 s"),
    ({}, {"rate": Rate(step_s=0.7)}, {}, "would take about 70 s"),
    ({}, {"rates": rate(step_s=0.7)}, {"steps": None, "epochs": 2}, ""),
    ({}, {"rates": rate(step_s=0.7), "samples": {"d": 1600}}, {"steps": None, "epochs": 2}, "100 steps"),
    ({}, {"rates": rate(step_s=0.7), "samples": {"d": 1600}}, {"role": "anchor", "max_samples": 400}, ""),
    ({}, {"rates": rate(step_s=0.7), "samples": {"d": 3200}}, {"role": "anchor"}, "100 steps"),
    ({}, {"rates": rate(step_s=7.0)}, {"steps": None}, ""),
    ({"job_joules": 5}, {"rates": rate(step_joules=6.0)}, {}, "limits.job_joules = 5"),
    ({"job_joules": 5}, {"rates": rate(step_joules=4.0)}, {}, ""),
    ({"joules_per_day": 500}, {"rates": rate(step_joules=6.0)}, {}, "about 600 J, and 500 J are left of limits."),
    ({"joules_per_day": 500}, {"rates": rate(step_joules=3.0), "joules_today": 300.0}, {}, "200 J are left"),
    ({"joules_per_day": 500}, {"rates": rate(step_joules=4.0), "joules_today": 99.0}, {}, ""),
    ({"joules_per_day": 500}, {"rates": rate(step_joules=6.0)}, {"joule_limit": 400.0}, ""),
    ({"joules_per_day": 500, "job_joules": 400}, {"rates": rate(step_joules=6.0)}, {}, ""),
    ({"joules_per_day": 500}, {"joules_per_mb_up": 501.0}, {"codec": "raw"}, "501 J"),
    (
        {"battery_reserve_percent": 30},
        {"battery_percent": 31.0, "battery_wh": 10.0, "rates": rate(step_joules=4.0)},
        {},
        "leave the battery at 29.9 %, under limits.battery_reserve_percent = 30",
    ),
    ({"battery_reserve_percent": 30}, {"battery_percent": 31.0, "rates": rate(step_joules=4.0)}, {}, ""),
    ({"battery_reserve_percent": 30}, {"battery_percent": 31.0, "battery_wh": 10.0}, {}, ""),
    (
        {"battery_reserve_percent": 30},
        {"battery_percent": 31.0, "battery_wh": 10.0, "rates": rate(step_joules=4.0), "on_external_power": True},
        {},
        "",
    ),
    ({}, {"battery_percent": 1.0, "battery_wh": 10.0, "rates": rate(step_joules=4.0)}, {}, "leave the battery at 0.0"),
    (
        {"data_mb_per_month": 5},
        {"month_bytes": 3_000_000, "fetch_bytes": 1_500_000},
        {"codec": "raw"},
        "move about 2.5 MB, and 2 MB are left of limits.data_mb_per_month = 5",
    ),
    ({"data_mb_per_month": 5}, {"month_bytes": 3_000_000, "fetch_bytes": 900_000}, {"byte_budget": 1000}, ""),
    ({}, {"free_memory_bytes": 1.4e6}, {}, "bundle and model alone take 1.5 MB"),
    ({"min_free_memory_mb": 1}, {"free_memory_bytes": 2.4e6}, {}, "limits.min_free_memory_mb = 1"),
    ({}, {"free_memory_bytes": 1.6e6}, {}, ""),
]


@pytest.mark.parametrize(("limits", "known", "fields", "said"), COSTS)
def test_a_job_that_costs_too_much_is_declined_by_name(limits, known, fields, said):
    """Time, joules, battery, bytes and memory, each against what there is; what is unknown forbids nothing."""
    found = decline(job(**fields), Known(**known), LimitsConfig(**limits))
    assert (found is not None) == bool(said)
    if found is not None:
        assert said in found.reason
        assert found.for_s > 0
        assert found.limit == ""  # another job might be taken


VALUES = st.none() | st.floats(0, 1e6)


@given(
    percent=st.floats(0, 100),
    more=st.floats(0, 100),
    known=st.fixed_dictionaries(
        {"battery_wh": VALUES, "temperature_c": VALUES, "free_memory_bytes": VALUES, "up_kbit_s": VALUES}
        | {"on_external_power": st.none() | st.booleans()}
    ),
    reserve=st.none() | st.floats(0, 100),
    rates=st.tuples(VALUES, VALUES),
)
def test_more_battery_never_declines_more(percent, more, known, reserve, rates):
    """What is taken with little in the battery is taken with more; nothing is ever taken below the reserve."""
    limits = LimitsConfig(battery_reserve_percent=reserve)
    low = Known(battery_percent=percent, rates=rate(*rates), **known)
    high = msgspec.structs.replace(low, battery_percent=min(100.0, percent + more))
    if decline(job(), low, limits) is None:
        assert decline(job(), high, limits) is None
        assert reserve is None or low.on_external_power or percent >= reserve
    assert standing_steps(standing(), low, limits) <= standing_steps(standing(), high, limits)


def test_cost_is_what_is_known_of_it():
    """Steps, transfers and bytes add up; without figures a job costs nothing that is known."""
    known = Known(
        rates=rate(0.5, 2.0),
        fetch_bytes=1_000_000,
        up_kbit_s=8000.0,
        down_kbit_s=8000.0,
        joules_per_mb_up=5.0,
        joules_per_mb_down=3.0,
    )
    cost = cost_of(job(), known)
    assert (cost.steps, cost.train_s, cost.transfer_s, cost.moved_bytes) == (100, 50.0, 2.0, 2_000_000)
    assert (cost.joules, cost.step_joules, cost.memory_bytes) == (208.0, 2.0, 1_500_000)
    bare = cost_of(job(codec="sparse"), Known())
    assert (bare.train_s, bare.transfer_s, bare.joules, bare.moved_bytes) == (0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("limits", "known", "fields", "steps"),
    [
        ({}, {}, {}, 100),
        ({"max_temperature_c": 80}, {"temperature_c": 81.0}, {}, 0),
        ({"max_temperature_c": 80}, {"temperature_c": 76.0}, {}, 25),
        ({"max_temperature_c": 80}, {"temperature_c": 79.99}, {"min_steps": 10}, 10),
        ({"joules_per_day": 130}, {"rates": rate(step_joules=2.0)}, {}, 50),
        ({"joules_per_day": 130}, {"rates": rate(step_joules=2.0)}, {"min_steps": 60}, 60),
        ({"joules_per_day": 130}, {"rates": rate(step_joules=2.0)}, {"min_steps": 70}, 0),
        ({"joules_per_day": 1}, {"rates": rate(step_joules=2.0)}, {}, 0),
        ({"battery_reserve_percent": 30}, {"battery_percent": 29.0}, {}, 0),
        (
            {"battery_reserve_percent": 30},
            {"battery_percent": 31.0, "battery_wh": 1.0, "rates": rate(step_joules=1.0)},
            {},
            25,
        ),
        ({"hours": "11:00-12:01"}, {"local": NOON, "rates": rate(step_s=1.0)}, {}, 50),
        ({"hours": "11:00-12:01"}, {"local": NOON}, {}, 100),
        ({"hours": "13:00-14:00"}, {"local": NOON}, {}, 0),
    ],
)
def test_a_device_chooses_as_many_steps_as_it_can_afford(limits, known, fields, steps):
    """All, half, a quarter ... of the steps: what battery, day, heat and hours leave room for, or none."""
    assert standing_steps(standing(**fields), Known(**known), LimitsConfig(**limits)) == steps


def test_owners_are_warned_of_limits_whose_fact_is_unknown():
    """One line for each, with its cure: those that decline every job, and those that do not hold."""
    every = LimitsConfig(
        only_when_charging=True,
        only_unmetered=True,
        battery_reserve_percent=20.0,
        max_temperature_c=80.0,
        hours="22:00-06:00",
    )
    power, link, battery, heat, hours = unknown_facts(Known(), every, None)
    for line, key, cure in ((power, "only_when_charging", "on_external_power"), (link, "only_unmetered", "[link]")):
        assert line.startswith(f"limits.{key} declines every job: ")
        assert cure in line
    for line, key, cure in (
        (battery, "battery_reserve_percent", "battery_percent, in the file that [telemetry] file names"),
        (heat, "max_temperature_c", "temperature_c"),
        (hours, "hours", "time synchronisation"),
    ):
        assert line.startswith(f"limits.{key} does not hold: ")
        assert cure in line
    known = Known(on_external_power=False, link_metered=True, battery_percent=5.0, temperature_c=90.0, local=NOON)
    assert unknown_facts(known, every, None) == unknown_facts(Known(), LimitsConfig(), None) == []


def test_limits_in_force_are_listed():
    """Those that are set, as the file has them."""
    limits = LimitsConfig(only_unmetered=True, hours="22:00-06:00", joules_per_day=500.0)
    assert in_force(limits) == ["only_unmetered = true", 'hours = "22:00-06:00"', "joules_per_day = 500"]
    assert in_force(LimitsConfig()) == []
