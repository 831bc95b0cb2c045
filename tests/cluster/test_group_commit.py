"""Works that share a transaction are each all or nothing and meet the database as it is."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from attribution.errors import Rejected, Unavailable
from attribution.hashing import sha256
from cluster.charges import Charge, capture
from cluster.database import connect, reading, writing
from cluster.group_commit import GroupCommit
from cluster.tables import ChargeRow, PayerRow
from tests.cluster.money import assert_money_adds_up, draft, funded_account, hold


@pytest.fixture
def writer(engine: Engine) -> Iterator[GroupCommit]:
    writer = GroupCommit(engine)
    yield writer
    writer.close()


def test_those_that_exceed_the_credit_are_refused_and_no_other(engine: Engine, writer: GroupCommit) -> None:
    """Ninety requests of 10 gwei by six threads against a credit of 500."""
    with writing(engine) as session:
        account = funded_account(session, 500)
    asked: list[tuple[bytes, Future[Charge]]] = []

    def ask(thread: int) -> None:
        for number in range(15):
            request_id = sha256(f"{thread}/{number}".encode())
            asked.append((request_id, writer.submit(lambda s, key=request_id: hold(s, account, key, 10))))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    refusals = [future.exception(30) for _, future in asked]
    kept = {key.hex() for (key, _), refusal in zip(asked, refusals, strict=True) if refusal is None}
    assert len(kept) == 50
    assert {getattr(refusal, "code", None) for refusal in refusals} == {None, "insufficient_credit"}
    captures = [writer.submit(lambda s, key=key: capture(s, bytes.fromhex(key), draft(7), 5)) for key in kept]
    assert sorted(each.result(30).payer_seq for each in captures) == list(range(1, 51))
    with reading(engine) as session:
        assert set(session.scalars(select(ChargeRow.request_id)).all()) == kept
    assert_money_adds_up(engine)


def test_a_work_that_breaks_leaves_no_trace_and_the_others_whole(engine: Engine, writer: GroupCommit) -> None:
    with writing(engine) as session:
        account = funded_account(session, 500)
    begun = threading.Event()

    def first(session: Session) -> None:
        begun.wait(10)  # until the others wait behind it: they share a transaction then

    def breaks(session: Session) -> None:
        hold(session, account, sha256(b"broken"), 100)
        raise Rejected("no", "no")

    def violates(session: Session) -> None:
        hold(session, account, sha256(b"violating"), 100)
        session.add(PayerRow(payer=session.scalar(select(PayerRow.payer))))
        session.flush()

    blocking = writer.submit(first)
    good = [writer.submit(lambda s, n=n: hold(s, account, sha256(bytes([n])), 10)) for n in range(2)]
    bad = [writer.submit(breaks), writer.submit(violates)]
    good.append(writer.submit(lambda s: hold(s, account, sha256(b"last"), 10)))
    begun.set()
    blocking.result(30)
    assert all(each.result(30).is_new for each in good)
    assert all(each.exception(30) is not None for each in bad)
    with reading(engine) as session:
        assert session.scalar(select(func.count()).select_from(ChargeRow)) == 3
    assert_money_adds_up(engine)


def test_each_work_meets_rows_as_they_are(engine: Engine, writer: GroupCommit) -> None:
    """Also where an earlier one of the group read the same row as an object, and a statement changed it."""
    with writing(engine) as session:
        account = funded_account(session, 500)
    begun = threading.Event()

    def reserved(session: Session) -> int:
        payer = session.scalars(select(PayerRow)).one()
        return payer.reserved_gwei

    blocking = writer.submit(lambda _: begun.wait(10))
    before = writer.submit(reserved)
    writer.submit(lambda s: hold(s, account, sha256(b"x"), 10))
    after = writer.submit(reserved)
    begun.set()
    assert blocking.result(30)
    assert (before.result(30), after.result(30)) == (0, 10)


def test_where_the_database_is_away_everybody_hears_of_it() -> None:
    writer = GroupCommit(connect("postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=2"))
    futures = [writer.submit(lambda _: None) for _ in range(3)]
    assert all(isinstance(each.exception(60), Unavailable) for each in futures)
    writer.close()
    with pytest.raises(AssertionError, match="closed"):
        writer.submit(lambda _: None)
