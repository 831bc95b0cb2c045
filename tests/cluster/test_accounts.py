"""Accounts and keys: a key opens its own account and nothing else; what the chain says is counted once."""

import re

import pytest
from sqlalchemy import Engine, select

from attribution.errors import Rejected
from cluster.accounts import (
    account_of,
    accounts_of,
    authenticate,
    issue_key,
    open_account,
    payer_of,
    record_ceiling,
    record_deposit,
    record_withdrawing,
    revoke_key,
    sign_up_trial,
)
from cluster.database import reading, writing
from cluster.ledger import ESCROW, balance, payer_free
from cluster.tables import ApiKeyRow
from tests.cluster.money import NOW, assert_money_adds_up, fund, hold

PAYER = b"\x0a" * 20


def test_a_key_opens_its_own_account(engine: Engine) -> None:
    with writing(engine) as session:
        first, second = (open_account(session, PAYER, label, 5, NOW) for label in "ab")
        keys = {account: issue_key(session, account, NOW) for account in (first, second, first)}
    with reading(engine) as session:
        for account, key in keys.items():
            assert authenticate(session, key) == account_of(session, account)
        assert [account.label for account in accounts_of(session, PAYER)] in (["a", "b"], ["b", "a"])


def test_no_secret_is_stored(engine: Engine) -> None:
    with writing(engine) as session:
        key = issue_key(session, open_account(session, PAYER, "a", 5, NOW), NOW)
        assert re.fullmatch(r"ol_[0-9a-f]{16}_[\w-]{43}", key)
        row = session.scalars(select(ApiKeyRow)).one()
        assert key.split("_", 2)[2] not in repr(vars(row))


def test_every_wrong_key_gets_the_same_answer(engine: Engine) -> None:
    with writing(engine) as session:
        account = open_account(session, PAYER, "a", 5, NOW)
        good, revoked = issue_key(session, account, NOW), issue_key(session, account, NOW)
        revoke_key(session, revoked.split("_")[1], NOW)
    unknown = "ol_" + "0" * 16 + good[19:]
    altered = good[:-1] + ("A" if good[-1] != "A" else "B")
    answers = set()
    with reading(engine) as session:
        for key in ("", "sk-1", unknown, altered, revoked, good + "x", good.upper(), "ol_é_" + "x" * 43):
            with pytest.raises(Rejected) as refusal:
                authenticate(session, key)
            answers.add((refusal.value.http_status, refusal.value.code, refusal.value.message))
        assert authenticate(session, good).account_id == account
    assert answers == {(401, "invalid_api_key", "no such API key")}


def test_trials_share_the_sponsors_money_each_within_its_credit(engine: Engine) -> None:
    with writing(engine) as session:
        sponsor = fund(session, 150)
        trials = [sign_up_trial(session, sponsor, f"trial {n}", 100, NOW) for n in range(2)]
        assert authenticate(session, trials[0].key).account_id == trials[0].account_id
        hold(session, trials[0].account_id, b"\1" * 32, 100)
        with pytest.raises(Rejected, match="account"):
            hold(session, trials[0].account_id, b"\2" * 32, 1)
        with pytest.raises(Rejected, match="payer"):
            hold(session, trials[1].account_id, b"\3" * 32, 51)


def test_a_deposit_counts_once(engine: Engine) -> None:
    with writing(engine) as session:
        assert record_deposit(session, PAYER, 70, b"\1" * 32, 0, 5, NOW)
        assert record_deposit(session, PAYER, 30, b"\1" * 32, 1, 5, NOW)
        assert not record_deposit(session, PAYER, 70, b"\1" * 32, 0, 5, NOW)
        assert record_deposit(session, PAYER, -40, b"\2" * 32, 0, 6, NOW)  # drawn back on chain
        assert payer_of(session, PAYER).deposited_gwei == 60
        assert (balance(session, payer_free(PAYER)), balance(session, ESCROW)) == (60, -60)
        record_withdrawing(session, PAYER, 25)
        record_withdrawing(session, PAYER, 10)  # asked anew: the chain keeps the last
        assert payer_of(session, PAYER).withdrawing_gwei == 10
    assert_money_adds_up(engine)


def test_a_ceiling_is_raised_and_never_lowered(engine: Engine) -> None:
    with writing(engine) as session:
        record_ceiling(session, PAYER, 100, NOW, b"1")
        record_ceiling(session, PAYER, 100, NOW, b"1")
        record_ceiling(session, PAYER, 200, NOW + 1, b"2")
        for ceiling, expiry in ((199, NOW + 2), (300, NOW)):
            with pytest.raises(Rejected) as refusal:
                record_ceiling(session, PAYER, ceiling, expiry, b"3")
            assert (refusal.value.code, refusal.value.http_status) == ("ceiling_lowered", 409)
        payer = payer_of(session, PAYER)
        assert (payer.ceiling_gwei, payer.ceiling_expiry) == (200, NOW + 1)


def test_the_unknown_is_not_found(engine: Engine) -> None:
    with reading(engine) as session:
        for act in (lambda: account_of(session, "x"), lambda: payer_of(session, PAYER)):
            with pytest.raises(Rejected) as refusal:
                act()
            assert refusal.value.http_status == 404
