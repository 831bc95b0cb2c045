"""The charge state machine: no interleaving overspends, loses, doubles or skips; each refusal by its code."""

import dataclasses
import itertools

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select

from attribution.errors import Rejected
from attribution.hashing import sha256
from cluster.accounts import account_of, open_account, payer_of, record_withdrawing
from cluster.balances import CEILING_MARGIN_S
from cluster.charges import (
    capture,
    charge_of,
    release,
    release_orphans,
    renew,
    reserve,
)
from cluster.database import reading, writing
from cluster.receipts import answer_of_request
from cluster.tables import ReceiptRow, TranscriptRow
from tests.cluster.money import NOW, YEAR_S, assert_money_adds_up, draft, fund, funded_account, hold

R1, R2 = b"\x01" * 32, b"\x02" * 32


def test_a_capture_writes_everything_once(engine: Engine) -> None:
    with writing(engine) as session:
        account_id = funded_account(session)
        hold(session, account_id, R1)
    with writing(engine) as session:
        receipt = capture(session, R1, draft(fee_gwei=30), NOW)
    with writing(engine) as session:
        assert capture(session, R1, draft(fee_gwei=99), NOW + 9) == receipt  # the first result stays
    with reading(engine) as session:
        assert answer_of_request(session, R1)[0] == receipt
        assert (receipt.payer_seq, receipt.hour, receipt.fee_gwei) == (1, NOW // 3600, 30)
        assert session.scalars(select(TranscriptRow.receipt_id)).all() == [receipt.receipt_id.hex()]
        account = account_of(session, account_id)
        assert (account.spent_gwei, account.reserved_gwei) == (30, 0)
    assert_money_adds_up(engine)


def test_credit_ends_at_the_smallest_of_deposit_ceiling_budget_and_withdrawal(engine: Engine) -> None:
    with writing(engine) as session:
        for deposit, ceiling, budget in itertools.permutations((100, 200, 300)):
            withdrawing = deposit // 4 * 3
            payer = fund(session, deposit, ceiling)
            record_withdrawing(session, payer, withdrawing)
            account_id = open_account(session, payer, "x", budget, NOW)
            limit = min(deposit - withdrawing, ceiling, budget)
            with pytest.raises(Rejected) as refusal:
                hold(session, account_id, sha256(payer), limit + 1)
            assert (refusal.value.code, refusal.value.http_status) == ("insufficient_credit", 402)
            assert hold(session, account_id, sha256(payer), limit).is_new


def test_a_refused_reservation_leaves_no_trace_in_a_shared_transaction(engine: Engine) -> None:
    """Group commit: one request's refusal undoes nothing of its neighbours and keeps nothing of its own."""
    with writing(engine) as session:
        rich = funded_account(session, 1000)
        poor = open_account(session, fund(session, 1000), "x", 50, NOW)  # its payer could, its budget cannot
        hold(session, rich, R1)
        with pytest.raises(Rejected, match="50 gwei left"):
            hold(session, poor, R2, 51)
        assert account_of(session, poor).reserved_gwei == 0
        assert payer_of(session, account_of(session, poor).payer).reserved_gwei == 0
    with reading(engine) as session:
        assert charge_of(session, R1).state == "reserved"
        with pytest.raises(Rejected, match="no request"):
            charge_of(session, R2)
    assert_money_adds_up(engine)


@pytest.mark.parametrize("max_gwei", [2**62, 2**63, 2**80])
def test_an_absurd_maximum_is_no_credit(engine: Engine, max_gwei: int) -> None:
    with writing(engine) as session, pytest.raises(Rejected) as refusal:
        hold(session, funded_account(session), R1, max_gwei)
    assert refusal.value.code == "insufficient_credit"


def test_an_expiring_ceiling_reserves_nothing(engine: Engine) -> None:
    """What could not be captured a batch later is not served now."""
    with writing(engine) as session:
        account_id = funded_account(session)
        last = NOW + YEAR_S - CEILING_MARGIN_S
        reserve(session, account_id, R1, 1, None, R1, 60, last)
        with pytest.raises(Rejected, match="too soon"):
            reserve(session, account_id, R2, 1, None, R2, 60, last + 1)


def test_a_repeated_key_finds_the_first_result(engine: Engine) -> None:
    with writing(engine) as session:
        account_id = funded_account(session)
        hold(session, account_id, R1, key="k")
        assert not hold(session, account_id, R2, key="k").is_new
        assert not hold(session, account_id, R1).is_new
        capture(session, R1, draft(response_json='{"answer": 1}'), NOW)
    with writing(engine) as session:
        again = hold(session, account_id, R2, key="k")
    assert (again.request_id, again.state, again.response_json) == (R1, "captured", '{"answer": 1}')
    assert_money_adds_up(engine)


def test_a_key_with_another_body_is_refused(engine: Engine) -> None:
    with writing(engine) as session:
        account_id = funded_account(session)
        hold(session, account_id, R1, key="k")
        with pytest.raises(Rejected) as refusal:
            reserve(session, account_id, R2, 1, "k", sha256(b"other"), 60, NOW)
        assert (refusal.value.code, refusal.value.http_status) == ("idempotency_key_reused", 422)


def test_keys_are_each_accounts_own(engine: Engine) -> None:
    with writing(engine) as session:
        assert hold(session, funded_account(session), R1, key="k").is_new
        assert hold(session, funded_account(session), R2, key="k").is_new


def test_another_accounts_request_id_is_refused(engine: Engine) -> None:
    with writing(engine) as session:
        hold(session, funded_account(session), R1)
        with pytest.raises(Rejected):
            hold(session, funded_account(session), R1)


def test_a_released_request_may_be_asked_again_under_its_key(engine: Engine) -> None:
    with writing(engine) as session:
        account_id = funded_account(session)
        hold(session, account_id, R1, key="k")
        assert release(session, R1, NOW)
        assert not release(session, R1, NOW)
        assert hold(session, account_id, R2, key="k").is_new
    assert_money_adds_up(engine)


def test_a_released_reservation_can_be_neither_captured_nor_renewed(engine: Engine) -> None:
    with writing(engine) as session:
        hold(session, funded_account(session), R1)
        release(session, R1, NOW)
        for act in (lambda: capture(session, R1, draft(), NOW), lambda: renew(session, R1, 60, NOW)):
            with pytest.raises(Rejected) as refusal:
                act()
            assert (refusal.value.code, refusal.value.http_status) == ("reservation_lost", 409)
        assert session.scalars(select(ReceiptRow)).all() == []


def test_orphans_are_released_and_the_living_kept(engine: Engine) -> None:
    with writing(engine) as session:
        account_id = funded_account(session)
        hold(session, account_id, R1)
        hold(session, account_id, R2)
        renew(session, R2, 600, NOW)
    with writing(engine) as session:
        assert release_orphans(session, NOW + 60) == 0  # a lease includes its last second
        assert release_orphans(session, NOW + 61) == 1
        assert release_orphans(session, NOW + 61) == 0
        assert [charge_of(session, r).state for r in (R1, R2)] == ["released", "reserved"]
    assert_money_adds_up(engine)


def test_a_fee_beyond_the_reservation_is_a_bug(engine: Engine) -> None:
    with writing(engine) as session:
        hold(session, funded_account(session), R1, 100)
        with pytest.raises(AssertionError):
            capture(session, R1, draft(fee_gwei=101), NOW)
        assert charge_of(session, R1).state == "reserved"
    assert_money_adds_up(engine)


def test_no_transcript_is_kept_where_none_is_given(engine: Engine) -> None:
    with writing(engine) as session:
        hold(session, funded_account(session), R1)
        capture(session, R1, dataclasses.replace(draft(), transcript=None), NOW)
        assert session.scalars(select(TranscriptRow)).all() == []


def test_unknown_accounts_and_requests_are_refused(engine: Engine) -> None:
    with writing(engine) as session:
        for code, act in (
            ("account_not_found", lambda: hold(session, "nobody", R1)),
            ("charge_not_found", lambda: renew(session, R1, 60, NOW)),
            ("charge_not_found", lambda: capture(session, R1, draft(), NOW)),
        ):
            with pytest.raises(Rejected) as refusal:
                act()
            assert (refusal.value.code, refusal.value.http_status) == (code, 404)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "capture", "release", "renew", "tick", "orphans"]),
        st.integers(0, 5),  # which request
        st.integers(0, 60),  # how much, or how long
    ),
    max_size=40,
)


@given(steps=STEPS, deposit=st.integers(0, 150), ceiling=st.integers(0, 150), budget=st.integers(0, 150))
@hypothesis_settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_no_sequence_of_steps_breaks_the_money(
    engine: Engine, steps: list[tuple[str, int, int]], deposit: int, ceiling: int, budget: int
) -> None:
    """Against the plainest model there is: a dict of requests and what each holds or has paid."""
    with writing(engine) as session:
        payer = fund(session, deposit, ceiling)
        account_id = open_account(session, payer, "x", budget, NOW)
    held: dict[bytes, list[int]] = {}  # request → [max, lease end]
    paid: dict[bytes, int] = {}
    now = NOW
    for act, number, amount in steps:
        request_id = sha256(payer + bytes([number]))
        with writing(engine) as session:
            if act == "reserve":
                room = min(deposit, ceiling, budget) - sum(paid.values()) - sum(m for m, _ in held.values())
                try:
                    charge = reserve(session, account_id, request_id, amount, None, R1, 30, now)
                    if charge.is_new:
                        assert amount <= room
                        held[request_id] = [amount, now + 30]
                except Rejected:
                    assert amount > room
            elif act == "capture":
                fee = held.get(request_id, [0])[0] * amount // 60
                try:
                    receipt = capture(session, request_id, draft(fee), now)
                    if request_id in held:
                        del held[request_id]
                        paid[request_id] = fee
                    assert receipt.fee_gwei == paid[request_id]
                except Rejected:
                    assert request_id not in held
                    assert request_id not in paid
            elif act == "release":
                assert release(session, request_id, now) == (held.pop(request_id, None) is not None)
            elif act == "renew":
                try:
                    renew(session, request_id, amount, now)
                    held[request_id][1] = now + amount
                except Rejected:
                    assert request_id not in held
            elif act == "tick":
                now += amount
            else:
                ended = [request_id for request_id, (_, until) in held.items() if until < now]
                assert release_orphans(session, now) == len(ended)
                for request_id in ended:
                    del held[request_id]
    with reading(engine) as session:
        found = payer_of(session, payer)
        assert (found.spent_gwei, found.reserved_gwei) == (
            sum(paid.values()),
            sum(m for m, _ in held.values()),
        )
    with writing(engine) as session:  # leave none held, so that examples do not meet
        for request_id in held:
            release(session, request_id, now)
    assert_money_adds_up(engine)
