"""The heartbeat: small whatever it says, and honest about what is unknown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import MessageError
from edge_runtime.heartbeat import from_telemetry, heartbeat_of
from edge_runtime.messages import (
    DECLINES,
    HEARTBEAT_LIMIT_BYTES,
    Heartbeat,
    Telemetry,
    decode_heartbeat,
    encode_heartbeat,
)

ANY = st.none() | st.floats() | st.sampled_from([0.0, -1.0, 1e-9, 1e30, 4.3e9, -40.0, 126.9, 200.0])
TRUTH = st.none() | st.booleans()
TELEMETRY = st.builds(
    Telemetry,
    uptime_s=st.floats(),
    clock_unix_s=st.floats(),
    clock_synchronised=TRUTH,
    cpu_percent=ANY,
    free_memory_bytes=st.none() | st.integers(0, 1 << 70),
    temperature_c=ANY,
    battery_percent=ANY,
    on_external_power=TRUTH,
)
FIELDS = st.fixed_dictionaries(
    {
        "declines": st.sampled_from(DECLINES),
        "link_metered": TRUTH,
        "bundle_sha256": st.sampled_from(["", "ff" * 32, "no hash"]),
    }
    | dict.fromkeys(["max_temperature_c", "reserve_percent", "up_kbit_s", "down_kbit_s", "step_s", "step_joules"], ANY)
    | dict.fromkeys(["availability", "data_left_bytes", "joules_left"], ANY)
)


@given(telemetry=TELEMETRY, fields=FIELDS)
def test_a_heartbeat_fits_whatever_a_device_measures(telemetry, fields):
    """Absurd, infinite and missing values make no heartbeat of over 64 bytes, and all of them decode again."""
    made = heartbeat_of(telemetry, **fields)
    data = encode_heartbeat(made)
    assert 0 < len(data) <= HEARTBEAT_LIMIT_BYTES
    assert decode_heartbeat(data) == made


def test_units_are_those_of_the_wire():
    """Seconds become microseconds, bytes 10^6 bytes, shares per cent; a battery is rounded down,
    budgets up: one of less than a whole unit is not used up."""
    telemetry = Telemetry(
        uptime_s=12.6,
        clock_unix_s=1.8e9,
        cpu_percent=33.4,
        free_memory_bytes=1_499_999_999,
        temperature_c=61.4,
        battery_percent=59.9,
        on_external_power=False,
    )
    made = heartbeat_of(
        telemetry,
        declines="heat",
        max_temperature_c=75.0,
        reserve_percent=20.0,
        link_metered=True,
        up_kbit_s=1500.4,
        bundle_sha256="0a0b0c0d" + "00" * 28,
        step_s=0.0125,
        step_joules=1e-9,
        availability=0.755,
        data_left_bytes=2_900_000.0,
        joules_left=99.9,
    )
    assert made == Heartbeat(
        uptime_s=13,
        clock_unix_s=1_800_000_000,
        on_external_power=False,
        link_metered=True,
        declines=DECLINES.index("heat"),
        cpu_percent=33,
        free_memory_mb=1500,
        temperature_c=61,
        temperature_margin_c=13,
        battery_percent=59,
        reserve_percent=20,
        up_kbit_s=1500,
        bundle=bytes((10, 11, 12, 13)),
        step_us=12_500,
        step_uj=1,
        availability_percent=76,
        data_left_mb=3,
        joules_left=100,
    )


def test_a_small_budget_is_not_none_and_a_spent_one_is():
    """Half a joule and half a megabyte that are left read as 1; nothing left, or too much used, as 0."""
    small = heartbeat_of(Telemetry(uptime_s=1.0, clock_unix_s=1.8e9), joules_left=0.4, data_left_bytes=5e5)
    assert (small.joules_left, small.data_left_mb) == (1, 1)
    spent = heartbeat_of(Telemetry(uptime_s=1.0, clock_unix_s=1.8e9), joules_left=0.0, data_left_bytes=-5.0)
    assert (spent.joules_left, spent.data_left_mb) == (0, 0)


def test_unknown_stays_unknown():
    """What a device cannot measure is None in the heartbeat too, also of an older agent's telemetry."""
    made = from_telemetry(Telemetry(uptime_s=1.0, clock_unix_s=math.nan))
    assert made == Heartbeat(uptime_s=1)


def test_a_heartbeat_that_is_none_is_refused():
    """Wrong types, values out of range and oversize packets are refused; more fields of a newer device are not."""
    for data in (b"", b"\xc1", b"\x93\x01\x00\xa1x", encode_heartbeat(Heartbeat()) * 50):
        with pytest.raises(MessageError, match="heartbeat"):
            decode_heartbeat(data)
    longer = bytearray(encode_heartbeat(Heartbeat(uptime_s=7)))
    longer[2] += 1
    assert decode_heartbeat(bytes(longer) + b"\x05").uptime_s == 7


GOLDEN = Path(__file__).parent / "golden" / "heartbeat.json"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bare", Heartbeat()),
        (
            "full",
            Heartbeat(
                uptime_s=86_400,
                clock_unix_s=1_800_000_000,
                clock_synchronised=True,
                on_external_power=False,
                link_metered=True,
                declines=DECLINES.index("battery"),
                cpu_percent=12,
                free_memory_mb=350,
                temperature_c=-5,
                temperature_margin_c=80,
                battery_percent=17,
                reserve_percent=20,
                up_kbit_s=2400,
                down_kbit_s=20_000,
                bundle=b"\x01\x23\x45\x67",
                step_us=12_500,
                step_uj=31_000,
                availability_percent=75,
                data_left_mb=412,
                joules_left=900,
            ),
        ),
    ],
)
def test_golden_bytes_decode_and_encode_equal(name, said):
    """Yesterday's heartbeats still decode to the same, and encode to the same bytes."""
    golden = bytes.fromhex(json.loads(GOLDEN.read_text(encoding="ascii"))[name])
    assert decode_heartbeat(golden) == said
    assert encode_heartbeat(said) == golden
