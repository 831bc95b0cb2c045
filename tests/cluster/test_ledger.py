"""Double entry: what goes in sums to zero, twice is once, and a contradiction stops everything."""

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from attribution.errors import Corrupted
from cluster.database import reading, writing
from cluster.ledger import Entry, balance, imbalance, post
from cluster.tables import LedgerEntryRow

A_BILLION_TOKENS_GWEI = 10**18


def test_balances_are_the_sums_of_entries(engine: Engine) -> None:
    with writing(engine) as session:
        post(session, "1", (Entry("a", -5), Entry("b", 5)), "x", 0)
        post(session, "2", (Entry("a", -7), Entry("b", 4), Entry("c", 3), Entry("d", 0)), "x", 0)
    with reading(engine) as session:
        assert [balance(session, name) for name in "abcde"] == [-12, 9, 3, 0, 0]
        assert imbalance(session) == {}


def test_a_posting_counts_once(engine: Engine) -> None:
    entries = (Entry("a", -5), Entry("b", 5))
    for _ in range(2):
        with writing(engine) as session:
            post(session, "1", entries, "x", 0)
            post(session, "1", entries[::-1], "x", 9)
    with reading(engine) as session:
        assert balance(session, "b") == 5


@pytest.mark.parametrize(
    "other",
    [(Entry("a", -6), Entry("b", 6)), (Entry("a", -5), Entry("c", 5)), (Entry("d", -5), Entry("e", 5))],
)
def test_a_posting_with_other_entries_is_corrupted(engine: Engine, other: tuple[Entry, ...]) -> None:
    with writing(engine) as session:
        post(session, "1", (Entry("a", -5), Entry("b", 5)), "x", 0)
    with pytest.raises(Corrupted) as refusal, writing(engine) as session:
        post(session, "1", other, "x", 0)
    assert refusal.value.code == "posting_differs"
    with reading(engine) as session:
        assert [balance(session, name) for name in "abcde"] == [-5, 5, 0, 0, 0]


@pytest.mark.parametrize(
    "entries", [(Entry("a", 1),), (Entry("a", 1), Entry("b", -2)), (Entry("a", 1), Entry("a", -1))]
)
def test_entries_that_do_not_balance_are_a_bug(engine: Engine, entries: tuple[Entry, ...]) -> None:
    with writing(engine) as session, pytest.raises(AssertionError):
        post(session, "1", entries, "x", 0)


def test_a_write_past_the_ledger_shows(engine: Engine) -> None:
    with writing(engine) as session:
        session.add(LedgerEntryRow(posting="bad", ledger_account="a", amount_gwei=3, ref="x", created_at=0))
    with reading(engine) as session:
        assert imbalance(session) == {"bad": 3}


@given(amounts=st.lists(st.integers(-A_BILLION_TOKENS_GWEI, A_BILLION_TOKENS_GWEI), min_size=1, max_size=5))
@hypothesis_settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_a_billion_tokens_move_exactly(engine: Engine, amounts: list[int]) -> None:
    posting = repr(amounts)
    entries = [Entry(f"{posting}:{n}", amount) for n, amount in enumerate(amounts)]
    with writing(engine) as session:
        post(session, posting, [*entries, Entry("world", -sum(amounts))], "x", 0)
        assert [balance(session, entry.ledger_account) for entry in entries] == amounts
