"""Messages: golden bytes, versions, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import messages as m
from edge_runtime.errors import MessageError

GOLDEN = Path(__file__).parent / "golden" / "messages.json"
SHA = "0123456789abcdef" * 4
BLOB = m.BlobRef(sha256=SHA, size_bytes=240_000)
UPDATE = m.UpdateId("run-1", "pi-7", "a3", 0)

DEVICE_SAYS = {
    "telemetry": m.Telemetry(uptime_s=12.5, clock_unix_s=1.8e9, cpu_percent=3.0, free_memory_bytes=7),
    "state": m.DeviceState(
        device="pi-7",
        online=True,
        session="s",
        instance="i",
        software="0.1.0",
        platform="Linux aarch64",
        codecs=["raw"],
        methods=["fedavg"],
        backends=["onnxruntime"],
        datasets=[m.DatasetInfo(name="digits", samples=500)],
        limits=m.Limits(blob_bytes=1000, worker_memory_bytes=0),
    ),
    "status": m.JobStatus(run="run-1", assignment="a3", status="failed", reason="no data"),
    "offer": m.UpdateOffer(
        update=UPDATE,
        blob=BLOB,
        meta=m.UpdateMeta(
            round=3,
            model_version=2,
            samples=100,
            steps=8,
            loss=0.5,
            train_ms=1500,
            encode_cpu_ms=12,
            written_bytes=4000,
            evaluation=m.Evaluation(samples=10, loss_sum=4.0, correct=7),
        ),
    ),
    "offer-whole": m.UpdateOffer(
        update=UPDATE,
        meta=m.UpdateMeta(round=3, model_version=2, samples=100, steps=8),
        first=b"\x00\x01\x02\x03data",
    ),
    "state-with-sensor": m.DeviceState(
        device="pi-7",
        online=True,
        session="s",
        instance="i",
        energy=m.EnergySource(sensor="jetson-ina3221", scope="board", quality="power", covers="all"),
    ),
    "status-with-energy": m.JobStatus(
        run="run-1", assignment="a3", status="failed", reason="NaN", energy=m.EnergyUse(train_mj=900, modelled=True)
    ),
    "offer-with-energy": m.UpdateOffer(
        update=UPDATE,
        meta=m.UpdateMeta(
            round=3,
            model_version=2,
            samples=100,
            steps=8,
            energy=m.EnergyUse(
                train_mj=120_500, compress_mj=310, other_mj=900, radio_mj=44, idle_mw=2700, sensor="rapl"
            ),
            stopped="joules",
        ),
    ),
    "state-with-abilities": m.DeviceState(
        device="pi-7", online=True, session="s", instance="i", abilities=["anchor", "standing"], battery_wh=18.5
    ),
    "status-declined": m.JobStatus(
        run="run-1", assignment="a3", status="rejected", reason="battery at 12 %", declined_s=900.0
    ),
    "offer-with-loss": m.UpdateOffer(
        update=m.UpdateId("run-1", "pi-7", "a3", 12),
        meta=m.UpdateMeta(round=3, model_version=2, samples=100, steps=8, loss=0.5, loss_rms=0.75),
    ),
    "pull": m.Pull(run="run-1", assignment="a3", sequence=12, steps=40),
    "need": m.Need(sha256=SHA, ranges=[(0, 2), (5, 1)]),
    "gone": m.Gone(sha256=SHA),
}
COORDINATOR_SAYS = {
    "coordinator": m.CoordinatorState(online=True, session="c", software="0.1.0"),
    "job": m.Job(
        run="run-1",
        assignment="a3",
        round=3,
        model_version=2,
        bundle=BLOB,
        model=m.ModelRef(blobs=[BLOB]),
        dataset="digits",
        deadline_s=60.0,
        epochs=1,
        hyper={"lr": 0.1},
        options={"mu": 0.01},
    ),
    "job-chained": m.Job(
        run="run-1",
        assignment="a4",
        round=3,
        model_version=2,
        bundle=BLOB,
        model=m.ModelRef(base=1, blobs=[m.BlobRef(sha256=SHA, size_bytes=5)], vector_sha256=SHA),
        inline=b"bytes",
        dataset="digits",
        deadline_s=60.0,
        steps=5,
        codec="topk",
        codec_options={"density": 0.01},
        byte_budget=500,
    ),
    "job-limited": m.Job(
        run="run-1",
        assignment="a5",
        round=3,
        model_version=2,
        bundle=BLOB,
        model=m.ModelRef(blobs=[BLOB]),
        dataset="digits",
        deadline_s=60.0,
        epochs=1,
        joule_limit=12.5,
    ),
    "job-anchor": m.Job(
        run="run-1",
        assignment="a6",
        round=3,
        model_version=2,
        bundle=BLOB,
        model=m.ModelRef(blobs=[BLOB]),
        dataset="digits",
        deadline_s=60.0,
        epochs=1,
        role="anchor",
        sequence=7,
    ),
    "standing": m.Standing(run="run-1", assignment="a3", dataset="digits", bundle=BLOB, max_steps=40),
    "standing-again": m.Standing(
        run="run-1",
        assignment="a3",
        sequence=13,
        dataset="digits",
        bundle=BLOB,
        min_steps=5,
        max_steps=40,
        interval_s=600.0,
    ),
    "cancel": m.Cancel(run="run-1", assignment="a3", reason="late"),
    "need": m.Need(sha256=SHA, ranges=[(0, 2)]),
    "gone": m.Gone(sha256=SHA),
    "done": m.Done(update=UPDATE),
    "verdict": m.Verdict(update=UPDATE, counted=False, reason="too old"),
    "verdict-that-ends": m.Verdict(update=UPDATE, counted=True, ends=True),
}
ALL = [("device", name, message) for name, message in DEVICE_SAYS.items()] + [
    ("coordinator", name, message) for name, message in COORDINATOR_SAYS.items()
]
EACH, IDS = [(side, message) for side, _, message in ALL], [f"{side}/{name}" for side, name, _ in ALL]
DECODE = {"device": m.decode_from_device, "coordinator": m.decode_from_coordinator}


def changed(message: m.Message, **fields: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.to_builtins(message, builtin_types=(bytes,)) | fields)


@pytest.mark.parametrize(("side", "name", "message"), ALL)
def test_golden_bytes_decode_and_encode_alike(side, name, message):
    """Yesterday's bytes of every message type still decode to the same message, and it encodes to the same map.

    Not to the same bytes: the header of a map with over 15 possible fields is longer, also where few are sent.
    """
    golden = bytes.fromhex(json.loads(GOLDEN.read_text(encoding="ascii"))[f"{side}/{name}"])
    assert DECODE[side](golden) == message
    ours, theirs = (msgspec.msgpack.decode(data) for data in (m.encode(message), golden))
    assert list(ours.items()) == list(theirs.items())


def test_golden_file_holds_every_message_type():
    """No message type was added without its golden bytes."""
    types = {type(message) for _, _, message in ALL}
    assert types == set(m.FromDevice.__args__) | set(m.FromCoordinator.__args__)
    assert set(json.loads(GOLDEN.read_text(encoding="ascii"))) == {f"{side}/{name}" for side, name, _ in ALL}


@pytest.mark.parametrize(("side", "message"), EACH, ids=IDS)
def test_unknown_fields_are_ignored(side, message):
    """A newer peer may send fields that are not known here."""
    assert DECODE[side](changed(message, from_the_future={"deep": [1, 2]})) == message


@pytest.mark.parametrize(
    ("side", "message", "field", "value"),
    [
        ("device", DEVICE_SAYS["state"], "online", "yes"),
        ("device", DEVICE_SAYS["telemetry"], "free_memory_bytes", -1),
        ("device", DEVICE_SAYS["need"], "sha256", "short"),
        ("device", DEVICE_SAYS["offer"], "u", ["run-1", "pi-7", "a/3", 0]),
        ("coordinator", COORDINATOR_SAYS["job"], "e", 0),
        ("coordinator", COORDINATOR_SAYS["job"], "r", "a/b"),
        ("coordinator", COORDINATOR_SAYS["job"], "x", "soon"),
        ("coordinator", COORDINATOR_SAYS["job"], "lb", "shuffle"),
        ("coordinator", COORDINATOR_SAYS["verdict"], "counted", 1),
    ],
)
def test_wrong_value_is_refused_by_name(side, message, field, value):
    """A field of the wrong type or outside its range is refused, and the error names it as it travels."""
    with pytest.raises(MessageError, match=rf"\$\.{field}"):
        DECODE[side](changed(message, **{field: value}))


@pytest.mark.parametrize(("side", "message"), EACH, ids=IDS)
def test_schema_versions(side, message):
    """One newer schema version works; two newer, none and an older one are refused with the cure."""
    assert DECODE[side](changed(message, v=m.SCHEMA_VERSION + 1))
    for version in (m.SCHEMA_VERSION + 2, m.OLDEST_SCHEMA_VERSION - 1, -1, 1 << 63):
        with pytest.raises(MessageError, match=r"version .* refused|update the older side"):
            DECODE[side](changed(message, v=version))
    without = msgspec.to_builtins(message, builtin_types=(bytes,))
    del without["v"]
    with pytest.raises(MessageError, match="version 0"):
        DECODE[side](msgspec.msgpack.encode(without))


@pytest.mark.parametrize("name", sorted(set(COORDINATOR_SAYS) - set(DEVICE_SAYS)))
def test_device_may_not_speak_for_the_coordinator(name):
    """A job, verdict or other word of the coordinator is refused when a device sends it."""
    with pytest.raises(MessageError, match=name.partition("-")[0]):
        m.decode_from_device(m.encode(COORDINATOR_SAYS[name]))


@pytest.mark.parametrize("name", sorted(set(DEVICE_SAYS) - set(COORDINATOR_SAYS)))
def test_coordinator_may_not_speak_for_a_device(name):
    """Announcements, offers and other words of devices are refused when the coordinator sends them."""
    with pytest.raises(MessageError, match=name.partition("-")[0]):
        m.decode_from_coordinator(m.encode(DEVICE_SAYS[name]))


def test_oversize_is_refused_on_both_ends():
    """A message over one packet is neither sent nor read."""
    offer = msgspec.structs.replace(DEVICE_SAYS["offer"], first=bytes(m.MESSAGE_LIMIT_BYTES))
    with pytest.raises(MessageError, match="over the packet limit"):
        m.encode(offer)
    with pytest.raises(MessageError, match="the limit is"):
        m.decode_from_device(msgspec.msgpack.encode(offer))


def test_the_envelope_of_an_update_is_small():
    """Around an update of a few hundred bytes the message counts: what has its default does not travel."""
    offer = DEVICE_SAYS["offer-whole"]
    assert len(m.encode(offer)) - len(offer.first) < 52
    chained = COORDINATOR_SAYS["job-chained"]
    assert len(m.encode(chained)) - len(chained.inline) < 325


def test_numbers_that_are_no_numbers_survive_the_wire_as_such():
    """NaN and infinity decode as floats; whoever uses a duration must check it (the job machine does)."""
    job = msgspec.structs.replace(COORDINATOR_SAYS["job"], deadline_s=math.nan)
    assert math.isnan(m.decode_from_coordinator(m.encode(job)).deadline_s)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x91\x01",
        b"\x82\xa1v\x01\xa1t\xa4nope",
        b"\x82\xa1v\x01\xa1t\xa2\xff\xfe",
        b"\x82\xa1v\x01\xa1x" + b"\x91" * 50_000 + b"\x01",
        b"\xdf\xff\xff\xff\xff",
    ],
    ids=["empty", "reserved", "no fields", "array", "unknown type", "no UTF-8", "deep nesting", "huge map"],
)
def test_malformed_bytes_are_a_message_error(data):
    """Whatever the bytes are, the answer is one error of our own."""
    for decode in DECODE.values():
        with pytest.raises(MessageError):
            decode(data)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_garbage_is_never_more_than_a_message_error(data):
    """Random bytes, and golden messages with random damage, decode or raise MessageError."""
    side, _, message = data.draw(st.sampled_from(ALL))
    raw = bytearray(m.encode(message))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = data.draw(st.one_of(st.just(bytes(raw)), st.just(bytes(raw[: len(raw) // 2])), st.binary(max_size=60)))
    try:
        DECODE[side](raw)
    except MessageError:
        return
