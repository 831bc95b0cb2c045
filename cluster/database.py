"""Rows: one engine per process, transactions that say whether they write, the library's errors translated.

No transaction may span an await or a network call. SQLite writers take the lock when they begin (``BEGIN
IMMEDIATE``), so a transaction never discovers half-way that it lost; on PostgreSQL the conditional updates of
the callers do that work. A transaction that a lost connection interrupts may or may not have happened:
callers repeat it under the same key."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, Executable, create_engine, event, exc, inspect, text
from sqlalchemy.dialects.postgresql import insert as insert_postgres
from sqlalchemy.dialects.sqlite import insert as insert_sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from attribution.errors import Corrupted, Unavailable
from cluster.tables import Row, table_of

MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x0130_6564  # PostgreSQL advisory lock: two processes that start together migrate once
_WRITES = "openledger_writes"
_RETRYABLE_SQLITE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
}
_CORRUPT_SQLITE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def connect(url: str, *, busy_timeout_s: float = 30.0) -> Engine:
    """An engine for this process. Make it in the process that uses it; it holds at most 15 connections."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _connect_sqlite(url, busy_timeout_s)
    parsed = parsed.set(drivername="postgresql+psycopg")
    engine = create_engine(
        parsed, pool_pre_ping=True, pool_timeout=busy_timeout_s, connect_args={"connect_timeout": 10}
    )
    event.listen(engine, "begin", _begin_postgres)
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """One consistent view; a write inside it is an error of the database."""
    with _transaction(engine, writes=False) as session:
        yield session


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """One transaction: committed when the block ends, rolled back when it raises.

    Raises:
        Unavailable: busy beyond the time-out, or the server is away or overloaded.
        Corrupted: the database file is damaged.
    """
    with _transaction(engine, writes=True) as session:
        yield session


def migrate(url: str) -> None:
    """Bring the schema to the newest revision; safe to call from several processes at once."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = connect(url)
    try:
        with writing(engine) as session:
            connection = session.connection()
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            command.upgrade(migration_config(connection), "head")
    finally:
        engine.dispose()


def insert_new(session: Session, table: type[Row], *rows: dict[str, Any]) -> int:
    """Insert those rows none of whose unique keys exists yet; the others change nothing. Returns how many.

    On PostgreSQL it waits for a racing transaction to end before it answers."""
    connection = session.connection()
    statement = _insert_statement(connection.dialect.name, table)
    return len(connection.execute(statement, list(rows) if len(rows) > 1 else rows[0]).all())


def migration_config(connection: Connection) -> Config:
    """Alembic's view of an open connection; the caller owns the transaction."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


@cache
def _insert_statement(dialect: str, table: type[Row]) -> Executable:
    """Built once: building costs more than running."""
    insert = insert_sqlite if dialect == "sqlite" else insert_postgres
    return insert(table_of(table)).on_conflict_do_nothing().returning(*inspect(table).primary_key)


@contextmanager
def _transaction(engine: Engine, *, writes: bool) -> Iterator[Session]:
    try:
        with Session(engine, expire_on_commit=False) as session:
            session.connection(execution_options={_WRITES: writes})
            yield session
            if writes:
                session.commit()
    except (exc.DBAPIError, exc.TimeoutError) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(error: exc.SQLAlchemyError) -> Unavailable | Corrupted | None:
    """``None`` for what is a bug or an answer (a violated constraint), not a state of the database."""
    if isinstance(error, exc.TimeoutError):
        return Unavailable("database_busy", "no free database connection")
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.Error):
        primary = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if primary in _CORRUPT_SQLITE:
            return Corrupted("database_corrupt", str(cause))
        return Unavailable("database_busy", str(cause)) if primary in _RETRYABLE_SQLITE else None
    is_lost = isinstance(error, exc.OperationalError | exc.InterfaceError) or getattr(
        error, "connection_invalidated", False
    )
    return Unavailable("database_unavailable", str(cause).strip()) if is_lost else None


def _connect_sqlite(url: str, busy_timeout_s: float) -> Engine:
    engine = create_engine(url, pool_timeout=busy_timeout_s, connect_args={"timeout": busy_timeout_s})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, True)
    if connection.info.get(_WRITES) is not writes:  # as the last transaction left this connection
        connection.exec_driver_sql(f"PRAGMA query_only={'OFF' if writes else 'ON'}")
        connection.info[_WRITES] = writes
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgres(connection: Connection) -> None:
    if not connection.get_execution_options().get(_WRITES, True):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
