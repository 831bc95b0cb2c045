"""Transactions: all or nothing, readers never write, losses are ``Unavailable``, migrations match rows."""

import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from attribution.errors import Corrupted, Unavailable
from cluster.database import connect, migrate, reading, writing
from cluster.tables import ContributorRow, PayerRow, Row

A_BILLION_TOKENS_GWEI = 10**18


def contributor(number: int) -> ContributorRow:
    return ContributorRow(contributor_id=f"{number:064x}", wallet=f"{number:040x}", label="x")


def test_a_write_is_all_or_nothing(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError), writing(engine) as session:
        session.add(contributor(1))
        session.flush()
        _ = 1 // 0
    with writing(engine) as session:
        session.add(contributor(2))
    with reading(engine) as session:
        assert session.scalars(select(ContributorRow.label)).all() == ["x"]


def test_a_reader_cannot_write(engine: Engine) -> None:
    with pytest.raises(DBAPIError), reading(engine) as session:
        session.add(contributor(1))
        session.flush()
    with writing(engine) as session:  # the connection is usable for writing again
        session.add(contributor(1))


def test_a_reader_sees_one_moment(engine: Engine) -> None:
    with reading(engine) as session:
        before = session.scalars(select(ContributorRow)).all()
        with writing(engine) as other:
            other.add(contributor(1))
        assert session.scalars(select(ContributorRow)).all() == before


def test_a_broken_constraint_is_not_a_database_down(engine: Engine) -> None:
    with pytest.raises(IntegrityError), writing(engine) as session:
        session.add_all([contributor(1), contributor(1)])


def test_a_billion_tokens_fit(engine: Engine) -> None:
    with writing(engine) as session:
        session.add(PayerRow(payer="00" * 20, deposited_gwei=A_BILLION_TOKENS_GWEI))
    with reading(engine) as session:
        assert session.scalar(select(PayerRow.deposited_gwei)) == A_BILLION_TOKENS_GWEI
        assert session.scalar(select(PayerRow.deposited_gwei + 1)) == A_BILLION_TOKENS_GWEI + 1


def test_migrations_build_what_the_rows_declare(engine: Engine) -> None:
    """Fails when ``cluster/tables.py`` changed without a migration: ``alembic revision --autogenerate``."""
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Row.metadata) == []


def test_migrating_twice_changes_nothing(database_url: str, engine: Engine) -> None:
    with writing(engine) as session:
        session.add(contributor(1))
    migrate(database_url)
    with reading(engine) as session:
        assert session.scalar(select(ContributorRow.wallet)) == f"{1:040x}"


def test_sqlite_is_set_up_for_durability(sqlite_url: str) -> None:
    migrate(sqlite_url)
    with reading(connect(sqlite_url)) as session:
        found = [
            session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert found == ["wal", 2, 1]


def test_a_held_lock_is_unavailable(sqlite_url: str) -> None:
    migrate(sqlite_url)
    engine = connect(sqlite_url, busy_timeout_s=0.05)
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as refusal, writing(engine) as session:
        session.add(contributor(1))
    assert refusal.value.code == "database_busy"
    holder.close()


def test_a_damaged_file_is_corrupted(tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Corrupted), reading(connect(f"sqlite:///{tmp_path}/bad.db")) as session:
        session.execute(text("SELECT 1"))


def test_no_server_is_unavailable(tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable),
        reading(connect(f"postgresql://postgres:@/postgres?host={tmp_path}")) as session,
    ):
        session.execute(text("SELECT 1"))
