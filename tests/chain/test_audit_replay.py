"""Each lie that contracts, payloads or operator could tell is found, and named with both values."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from attribution.payload import encode_period
from attribution.types import Blend, BlendPart, Share, contributor_id
from chain.replay import differences
from tests.chain.history import (
    ADAPTER,
    ALICE,
    BOB,
    CAROL,
    DAVE,
    OTHER,
    POOL,
    History,
    close,
    receipt,
)

FIRST = [receipt(ALICE, 1, 10), receipt(ALICE, 2, 20), receipt(BOB, 1, 30)]
SECOND = [receipt(ALICE, 3, 5), receipt(BOB, 2, 5, OTHER)]


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path)


def codes(history: History) -> set[str]:
    return {finding.code for finding in history.audit()}


def test_an_honest_history_has_no_finding(history: History) -> None:
    """Batches, a period that carries an adapter, one that is disabled and posted anew, a claim."""
    history.batch(FIRST)
    history.period([close(60)])
    history.disable(1)
    first = history.period([close(60)])
    history.batch(SECOND)
    history.period([close(5)], period_id=2, first_batch=2, payload={"carried": ((OTHER, 5),)})
    history.batch([receipt(BOB, 3, 7)])
    history.period([close(7), close(5, {}, OTHER)], period_id=3, first_batch=3)
    assert history.audit() == []
    assert first.total_gwei == 60 and sum(share.amount_gwei for share in history.rewards) == 77


def test_each_adapter_s_method_is_shown_on_one_line_whatever_it_says(history: History) -> None:
    history.batch(FIRST)
    history.period([replace(close(60), method="metagradient/1 seconds=7\nholds")])
    lines = history.report().to_text().splitlines()
    shown = [line for line in lines if line.endswith(r"60 gwei  by 'metagradient/1 seconds=7\nholds'")]
    assert len(shown) == 1 and lines.count("holds") == 1


def test_a_blends_fee_is_due_to_its_adapters_by_weight(history: History) -> None:
    parts = [BlendPart(ADAPTER, 900_000), BlendPart(OTHER, 100_000)]
    blend = Blend(tuple(sorted(parts, key=lambda part: part.adapter_id)))
    history.batch([receipt(ALICE, 1, 10, blend.blend_id), receipt(BOB, 1, 30)], blends=(blend,))
    history.period([close(39)], payload={"carried": ((OTHER, 1),)})
    assert history.audit() == []


def pays_one_adapter_for_a_blend(history: History) -> None:
    blend = Blend(tuple(BlendPart(one, 500_000) for one in sorted((ADAPTER, OTHER))))
    history.batch([receipt(ALICE, 1, 10, blend.blend_id)], blends=(blend,))
    history.period([close(10)])


def hides_what_a_blend_was_of(history: History) -> None:
    blend = Blend(tuple(BlendPart(one, 500_000) for one in sorted((ADAPTER, OTHER))))
    history.batch([receipt(ALICE, 1, 10, blend.blend_id)])
    history.period([close(10)])


def omits_a_receipt(history: History) -> None:
    history.batch([receipt(ALICE, 1, 10), receipt(ALICE, 3, 10)])


def settles_a_receipt_twice(history: History) -> None:
    history.batch(FIRST)
    history.batch([FIRST[0]])


def takes_more_from_one_and_less_from_another(history: History) -> None:
    history.batch(FIRST, captures={ALICE: 35, BOB: 25})


def takes_more_than_the_ceiling(history: History) -> None:
    history.batch([receipt(ALICE, 1, 950)])


def skips_a_number(history: History) -> None:
    history.batch(FIRST, batch_id=2)


def lies_about_the_root(history: History) -> None:
    history.batch(FIRST, root=b"\1" * 32)


def lies_about_the_count(history: History) -> None:
    history.batch(FIRST, num_receipts=2)


def lies_about_the_head(history: History) -> None:
    history.batch(FIRST, head=b"\1" * 32)


def lies_about_the_fee(history: History) -> None:
    history.batch(FIRST, fee_wei=61 * 10**9)


def withholds_a_payload(history: History) -> None:
    history.batch(FIRST, payload_hash=b"\1" * 32)


def pays_an_adapter_less_than_it_earned(history: History) -> None:
    history.batch(FIRST)
    history.period([close(50)])


def forgets_to_list_what_it_carries(history: History) -> None:
    history.batch([*FIRST, receipt(BOB, 2, 5, OTHER)])
    history.period([close(60)])


def lies_about_the_total(history: History) -> None:
    history.batch(FIRST)
    history.period([close(60)], total_wei=61 * 10**9)


def skips_a_period(history: History) -> None:
    history.batch(FIRST)
    history.period([close(60)], period_id=2)


def skips_a_batch(history: History) -> None:
    history.batch(FIRST)
    history.batch(SECOND)
    history.period([close(65), close(5, {}, OTHER)], first_batch=2)


def binds_another_head(history: History) -> None:
    history.batch(FIRST)
    history.period([close(60)], ledger_head=b"\1" * 32)


def computes_for_another_chain(history: History) -> None:
    history.batch(FIRST)
    history.period([close(60)], payload={"chain_id": 1})


def pays_a_claim_nobody_earned(history: History) -> None:
    history.batch(FIRST)
    history.period([close(60)])
    history.claim(ALICE, 60, 60)


def pays_a_claim_to_another_wallet(history: History) -> None:
    history.batch(FIRST)
    history.period([close(60, {contributor_id(ALICE): 1})])
    history.claim(ALICE, 42, 42, paid_to=BOB)


def pays_a_claim_twice(history: History) -> None:
    history.batch(FIRST)
    history.period([close(60, {contributor_id(ALICE): 1})])
    history.claim(ALICE, 42, 42)
    history.claim(ALICE, 42, 42)


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        (omits_a_receipt, {"payer_seq"}),
        (settles_a_receipt_twice, {"payer_seq", "receipt_twice"}),
        (takes_more_from_one_and_less_from_another, {"capture", "captured"}),
        (takes_more_than_the_ceiling, {"over_ceiling"}),
        (skips_a_number, {"batch_gap", "batch_id", "captured"}),
        (lies_about_the_root, {"batch_root"}),
        (lies_about_the_count, {"batch_receipts"}),
        (lies_about_the_head, {"head"}),
        (lies_about_the_fee, {"batch_fee"}),
        (withholds_a_payload, {"payload_missing"}),
        (pays_an_adapter_less_than_it_earned, {"period_fee"}),
        (forgets_to_list_what_it_carries, {"carried"}),
        (pays_one_adapter_for_a_blend, {"period_fee", "carried"}),
        (hides_what_a_blend_was_of, {"period_fee", "carried"}),
        (lies_about_the_total, {"period_total"}),
        (skips_a_period, {"period_gap"}),
        (skips_a_batch, {"period_batches", "period_fee"}),
        (binds_another_head, {"period_head", "period_payload"}),
        (computes_for_another_chain, {"period_payload"}),
        (pays_a_claim_nobody_earned, {"claim"}),
        (pays_a_claim_to_another_wallet, {"claim_wallet"}),
        (pays_a_claim_twice, {"claim_amount"}),
    ],
)
def test_a_lie_is_found_for_what_it_is(
    history: History, lie: Callable[[History], None], expected: set[str]
) -> None:
    lie(history)
    assert codes(history) == expected


def test_a_reward_moved_from_one_to_another_names_both_and_the_amounts(history: History) -> None:
    """The payload's credits are honest, its rewards and its root are not."""
    history.batch(FIRST)
    honest = {s.contributor_id: s.amount_gwei for s in history.period([close(60)]).rewards}
    history.disable(1)
    moved = {**honest, CAROL: honest[CAROL] + 3, DAVE: honest[DAVE] - 3}
    rewards = tuple(Share(who, gwei) for who, gwei in sorted(moved.items()))
    history.period([close(60)], payload={"rewards": rewards})
    found = {f.subject: (f.expected, f.found) for f in history.audit() if f.code == "reward"}
    assert found == {
        f"period 1, contributor {who.hex()}": (f"{honest[who]} gwei", f"{moved[who]} gwei")
        for who in (CAROL, DAVE)
    }
    assert codes(history) == {"reward", "period_root"}


def test_a_root_that_does_not_follow_from_the_payload_is_named(history: History) -> None:
    history.batch(FIRST)
    period = history.period([close(60)], root=b"\1" * 32)
    (finding,) = history.audit()
    assert (finding.code, finding.expected, finding.found) == (
        "period_root",
        period.tree().root.hex(),
        "01" * 32,
    )


def test_contracts_must_hold_what_they_owe(history: History) -> None:
    """2,000 deposited less 60 captured; 60 owed."""
    history.batch(FIRST)
    history.period([close(60)])
    assert history.audit(1940, 60) == []
    assert [f.code for f in history.audit(1939, 59)] == ["escrow_balance", "distributor_balance"]


def test_a_missing_capture_is_found(history: History) -> None:
    history.batch(FIRST)
    history.events.pop()
    assert codes(history) == {"captured"}


def test_the_pool_gets_what_nobody_earned(history: History) -> None:
    """An adapter without credits, and one whose only contributor did harm."""
    history.batch([receipt(ALICE, 1, 100), receipt(BOB, 1, 100, OTHER)])
    closes = sorted([close(100, {}), close(100, {CAROL: -4}, OTHER)], key=lambda c: c.adapter_id)
    history.period(closes)
    assert history.audit() == []
    pool = next(share for share in history.rewards if share.contributor_id == POOL)
    assert pool.amount_gwei == 2 * (100 - 5 - 15 - 10)


def test_what_an_altered_copy_says_otherwise_is_named(history: History) -> None:
    """A credit and a reward, each with both values; a copy that is no payload adds nothing."""
    history.batch(FIRST)
    period = history.period([close(60)])
    raised = replace(period, adapters=(close(60, {CAROL: 6, DAVE: 7}),))
    (found,) = differences("da", period, encode_period(raised))
    assert found.code == "credit" and (found.expected, found.found) == ("5", "6")
    assert ADAPTER.hex() in found.subject and "group" in found.subject and "in da" in found.subject
    assert differences("da", period, b"junk") == []
