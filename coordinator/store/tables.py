"""The tables. Plain columns for what is searched, JSON text for nested values; SQLite and PostgreSQL alike."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
)

SCHEMA_VERSION = 5
EXTENDED_VERSIONS = (3, 4)  # which are taken over: what they lack are tables, and the columns of ADDED

metadata = MetaData()


def _name(column: str, *, key: bool = False) -> Column[Any]:
    return Column(column, String(64), primary_key=key, nullable=False)


def _integer(column: str, *, key: bool = False, nullable: bool = False) -> Column[Any]:
    return Column(column, Integer, primary_key=key, autoincrement=False, nullable=nullable)


def _time(column: str, *, nullable: bool = False) -> Column[Any]:
    return Column(column, Float(53), nullable=nullable)


def _real(column: str, *, nullable: bool = False) -> Column[Any]:
    return Column(column, Float(53), nullable=nullable)


def _count(column: str, *, key: bool = False, nullable: bool = False) -> Column[Any]:
    return Column(column, BigInteger, primary_key=key, autoincrement=False, nullable=nullable)


def _text(column: str, *, nullable: bool = False) -> Column[Any]:
    return Column(column, Text, nullable=nullable)


schema = Table("schema_version", metadata, Column("version", SmallInteger, primary_key=True, autoincrement=False))

runs = Table(
    "runs",
    metadata,
    _name("run", key=True),
    _text("plan"),
    _text("stop_reason", nullable=True),  # set by another process that wants the run to end
    _name("status"),
    _text("reason"),
    _integer("round"),
    _name("phase"),
    _integer("attempt"),
    _time("deadline_unix_s"),
    _integer("version"),
    _text("model"),
    _text("bundle"),
    _text("initial_model"),
    _text("initial_method_state", nullable=True),
    _text("down", nullable=True),
    _text("vector_sha256", nullable=True),
    _text("method_state", nullable=True),
    _text("test_set", nullable=True),
    _text("initial_test", nullable=True),
    _integer("next_assignment"),
    _count("elements"),
    _count("bytes_up"),
    _count("bytes_down"),
    Column("bytes_complete", Boolean, nullable=False),
    _time("submitted_unix_s"),
    _time("opened_unix_s"),
    _time("ended_unix_s", nullable=True),
    _time("short_since_unix_s", nullable=True),
    _text("selector_memory"),
    _text("hyper"),
    _count("places"),
    _count("wanted"),
    _time("select_after_unix_s"),
    _count("next_selection"),
)

assignments = Table(
    "assignments",
    metadata,
    _name("run", key=True),
    _name("assignment", key=True),
    _name("device"),
    _integer("round"),
    _integer("attempt"),
    _integer("version"),
    _text("model"),
    _text("vector_sha256", nullable=True),
    _integer("base_version", nullable=True),
    _integer("epochs", nullable=True),
    _integer("steps", nullable=True),
    _text("variant", nullable=True),
    _text("cut", nullable=True),
    _text("codec"),
    _count("byte_budget", nullable=True),
    _time("deadline_unix_s"),
    _time("assigned_unix_s"),
    _name("status"),
    _text("reason"),
    Column("away", Boolean, nullable=False),
    _name("role"),
    Column("standing", Boolean, nullable=False),
    _count("sequence"),
    Column("pulled", Boolean, nullable=False),
    _count("selection"),
    Index("assignments_by_version", "run", "version"),
)

updates = Table(
    "updates",
    metadata,
    _name("run", key=True),
    _name("device", key=True),
    _name("assignment", key=True),
    _count("sequence", key=True),
    Column("sha256", String(64), nullable=False),
    _text("blob"),
    _text("meta"),
    _time("received_unix_s"),
    _name("verdict"),
    _text("reason"),
    _integer("counted_round", nullable=True),
    _real("weight", nullable=True),
    Index("updates_by_assignment", "run", "assignment"),
    Index("updates_by_round", "run", "counted_round"),
    Index("updates_by_sha256", "sha256"),
)

ledger = Table(  # what jobs drew
    "ledger",
    metadata,
    _name("run", key=True),
    _name("device", key=True),
    _name("assignment", key=True),
    _count("sequence", key=True),
    _integer("round"),
    _text("sensor", nullable=True),
    _text("scope", nullable=True),
    _text("quality", nullable=True),
    _text("covers", nullable=True),
    Column("modelled", Boolean, nullable=False),
    Column("doubtful", Boolean, nullable=False),
    _count("train_mj", nullable=True),
    _count("compress_mj", nullable=True),
    _count("other_mj", nullable=True),
    _count("radio_mj", nullable=True),
    _count("idle_mw", nullable=True),
    _count("train_ms", nullable=True),
    _text("stopped"),
    _text("note"),
)

holdings = Table(  # which version of the shared model a device holds
    "holdings",
    metadata,
    _name("run", key=True),
    _name("device", key=True),
    _integer("version", nullable=True),
)

histories = Table(  # what a run knows of a device from its earlier jobs
    "histories",
    metadata,
    _name("run", key=True),
    _name("device", key=True),
    _integer("asked"),
    _integer("counted"),
    _integer("failures"),
    _integer("last_round"),
    _real("loss_rms", nullable=True),
    _count("samples", nullable=True),
    _real("elapsed_s", nullable=True),
    _real("step_s", nullable=True),
    _real("step_j", nullable=True),
    _real("queue_j"),
    _time("not_before_unix_s"),
    Column("declined", Boolean, nullable=False),
    _integer("cut_off"),
)

selections = Table(  # why devices were chosen or not
    "selections",
    metadata,
    _name("run", key=True),
    _count("number", key=True),
    _integer("round"),
    _integer("attempt"),
    _time("at_unix_s"),
    Column("report", LargeBinary, nullable=False),
    Index("selections_by_round", "run", "round"),
)

method_table = Table(  # the vectors per device of server methods that keep such
    "method_table",
    metadata,
    _name("run", key=True),
    _name("device", key=True),
    Column("sha256", String(64), nullable=False),
    _text("blob"),
    _integer("round"),
    Index("method_table_by_sha256", "sha256"),
)

rounds = Table(
    "rounds",
    metadata,
    _name("run", key=True),
    _integer("round", key=True),
    _integer("version"),
    _text("model"),
    _time("opened_unix_s"),
    _time("closed_unix_s"),
    _integer("updates"),
    _integer("late_updates"),
    _count("samples"),
    _text("down", nullable=True),
    _text("change", nullable=True),
    _text("vector_sha256", nullable=True),
    _text("method_state", nullable=True),
    _count("bytes_up"),
    _count("bytes_down"),
    _count("bytes_bundle"),
    Column("bytes_complete", Boolean, nullable=False),
    _count("encode_cpu_ms"),
    _count("written_bytes"),
    _real("train_loss", nullable=True),
    _text("test", nullable=True),
    _text("devices", nullable=True),
)

devices = Table(
    "devices",
    metadata,
    _name("device", key=True),
    Column("online", Boolean, nullable=False),
    _time("last_contact_unix_s"),
    _text("conflict"),
    _text("state"),
    _text("heartbeat", nullable=True),
)

servers = Table(  # who takes care of the runs at the moment, for other processes to look at
    "servers",
    metadata,
    _name("server", key=True),
    _time("last_seen_unix_s"),
)

# Columns that older versions lack, and what their rows get there.
ADDED: dict[str, dict[str, Any]] = {
    "runs": {
        "selector_memory": "{}",
        "hyper": "{}",
        "places": 0,
        "wanted": 0,
        "select_after_unix_s": 0.0,
        "next_selection": 0,
    },
    "assignments": {"role": "trainer", "standing": False, "sequence": 0, "pulled": False, "selection": -1},
    "devices": {"heartbeat": None},
}
