"""Opens the database: pragmas, schema version, and errors a user understands."""

from __future__ import annotations

import sqlite3
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from coordinator.errors import StoreError
from coordinator.store import tables

if TYPE_CHECKING:
    from collections.abc import Iterator

BUSY_TIMEOUT_S = 20.0
_LOCK_NUMBER = 0x65646765  # any, as long as it stays the same


def open_database(url: str, synchronous: Literal["FULL", "NORMAL", "OFF"] = "FULL") -> sa.Engine:
    """An engine on a database with the current schema, which is made if there is none.

    SQLite gets one connection, in WAL mode: the store is used by one thread per process, and ``data_version`` then
    tells other processes' changes from its own. ``synchronous`` FULL survives a power cut, OFF is for tests.

    Raises:
        StoreError: not reachable, damaged, or written by newer or older software.
    """
    try:
        address = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise StoreError(f"database URL {url!r} cannot be used: {error}") from error
    with translated(address.render_as_string(hide_password=True)):
        if address.get_backend_name() == "sqlite":
            engine = sa.create_engine(
                address,
                poolclass=StaticPool,
                connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
            )

            @sa.event.listens_for(engine, "connect")
            def set_pragmas(connection: Any, _record: Any) -> None:
                _switch_to_wal(connection)
                connection.execute(f"PRAGMA synchronous={synchronous}")

        else:
            engine = sa.create_engine(address)
        _check_schema(engine, address.render_as_string(hide_password=True))
    return engine


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns database errors into StoreError with one line of text."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        text = str(error.orig).strip().splitlines()[0]
        cure = ""
        if "locked" in text:
            cure = f"; another process held it for over {BUSY_TIMEOUT_S:g} s"
        elif "full" in text or "disk I/O" in text:
            cure = "; free space on the disk, nothing acknowledged was lost"
        raise StoreError(f"{what}: database failed: {text}{cure}") from error
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        raise StoreError(f"{what}: database cannot be used: {error}") from error


def _check_schema(engine: sa.Engine, where: str) -> None:
    with engine.begin() as connection:
        if not sa.inspect(connection).has_table(tables.schema.name):
            _one_at_a_time(connection)
            tables.metadata.create_all(connection)
            made = _insert(engine)(tables.schema).values(version=tables.SCHEMA_VERSION)
            connection.execute(made.on_conflict_do_nothing())
    with engine.connect() as connection:
        found = connection.execute(sa.select(tables.schema.c.version)).scalar_one()
    if found in tables.EXTENDED_VERSIONS:
        found = _extend(engine)
    if found > tables.SCHEMA_VERSION:
        raise StoreError(
            f"{where}: has schema version {found}, this software knows up to {tables.SCHEMA_VERSION}; update "
            "edge-training-runtime on this machine, or use the state folder of the older version"
        )
    if found < tables.SCHEMA_VERSION:
        raise StoreError(
            f"{where}: has schema version {found}, of an older edge-training-runtime than this one (which has "
            f"{tables.SCHEMA_VERSION}); start with another state folder, and read this one with the older version"
        )


def _extend(engine: sa.Engine) -> int:
    """Adds the tables and columns that an older version lacks; the version that is there afterwards."""
    with engine.begin() as connection:
        _one_at_a_time(connection)
        found = int(connection.execute(sa.select(tables.schema.c.version)).scalar_one())
        if found in tables.EXTENDED_VERSIONS:  # still, and not extended by another process meanwhile
            _add_columns(connection)
            tables.metadata.create_all(connection)
            connection.execute(sa.update(tables.schema).values(version=tables.SCHEMA_VERSION))
            found = tables.SCHEMA_VERSION
    return found


def _add_columns(connection: sa.Connection) -> None:
    quote = connection.dialect.identifier_preparer.quote
    for name, added in tables.ADDED.items():
        table = tables.metadata.tables[name]
        for column, value in added.items():
            kind = table.c[column].type.compile(connection.dialect)
            text = f"ALTER TABLE {quote(name)} ADD COLUMN {quote(column)} {kind}"
            if not table.c[column].nullable:  # only with a default, which all rows written from now on bring themselves
                literal = sa.literal(value, table.c[column].type)
                default = literal.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
                text += f" DEFAULT {default} NOT NULL"
            connection.exec_driver_sql(text)


def _switch_to_wal(connection: Any) -> None:
    """SQLite does not wait where another process switches a new database over at the same time."""
    end = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def _one_at_a_time(connection: sa.Connection) -> None:
    """Another process that makes the tables now is waited for; to its end, then they are there."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK_NUMBER})")


def upsert(engine: sa.Engine, table: sa.Table) -> Any:
    """Insert-or-replace by primary key."""
    statement = _insert(engine)(table)
    keys = [column.name for column in table.primary_key]
    changed = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=changed)


def _insert(engine: sa.Engine) -> Any:
    if engine.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert
    from sqlalchemy.dialects import sqlite

    return sqlite.insert
