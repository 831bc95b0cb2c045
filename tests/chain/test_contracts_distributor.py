"""Distributor: what is owed is funded, follows from what was settled, and is paid once."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.hashing import keccak256
from attribution.payload import WEI_PER_GWEI
from chain.events import Claimed, PeriodDisabled, PeriodPosted
from chain.structs import ClaimCall, PeriodHeader
from tests.chain.refusals import refused
from tests.chain.stage import Stage, address

pytestmark = pytest.mark.evm
DAY_S = 86_400


def settled(stage: Stage, fee_gwei: int = 1_000) -> None:
    """Everybody is on record and one batch has paid ``fee_gwei`` in."""
    stage.do("stranger", stage.rollup.encode_register([address(n) for n in ("alice", "bob", "carol")]))
    stage.fund("alice", 10 * fee_gwei)
    stage.settle({"alice": fee_gwei})


def post_refused(stage: Stage, period: PeriodHeader) -> str:
    return refused(stage, "settler", stage.rollup.encode_post_period(period, b""))


def test_a_claim_pays_what_was_earned_and_not_yet_drawn(stage: Stage) -> None:
    """Across periods a contributor gets its cumulative rewards exactly, however often it claims."""
    settled(stage)
    claims = stage.close({"bob": 600, "carol": 400})
    stage.do("stranger", stage.rollup.encode_claim(claims["bob"]))
    assert stage.tokens("bob") == 600 * WEI_PER_GWEI
    assert refused(stage, "stranger", stage.rollup.encode_claim(claims["bob"])) == "NothingToClaim"
    stage.settle({"alice": 3_000})
    claims = stage.close({"bob": 601, "carol": 2_399})
    stage.do("carol", stage.rollup.encode_claim(claims["carol"]))
    stage.do("carol", stage.rollup.encode_claim(claims["bob"]))
    assert stage.tokens("bob") == 601 * WEI_PER_GWEI
    assert stage.tokens("carol") == 2_399 * WEI_PER_GWEI
    assert stage.rollup.total_claimed_wei() == stage.rollup.funded_wei() == 3_000 * WEI_PER_GWEI


def test_one_transaction_claims_for_many_and_passes_over_who_was_paid(stage: Stage) -> None:
    """Somebody who claims first for one of them cannot spoil the claim of the others."""
    settled(stage)
    claims = stage.close({"alice": 1, "bob": 599, "carol": 400})
    stage.do("stranger", stage.rollup.encode_claim(claims["bob"]))
    stage.do("stranger", stage.rollup.encode_claim_many(list(claims.values())))
    assert [stage.tokens(n) // WEI_PER_GWEI for n in ("alice", "bob", "carol")] == [1, 599, 400]
    wrong = replace(claims["bob"], cumulative_wei=10**9)
    assert refused(stage, "stranger", stage.rollup.encode_claim_many([wrong])) == "BadProof"


def test_rotation_neither_loses_nor_doubles(stage: Stage) -> None:
    """The old wallet keeps what it drew, the new one gets the rest, and together that is what was earned."""
    settled(stage)
    first = stage.close({"bob": 1_000})["bob"]
    stage.do("stranger", stage.rollup.encode_claim(first))
    stage.do("bob", stage.rollup.encode_rotate(stage.id_of("bob"), address("carol")))
    assert refused(stage, "stranger", stage.rollup.encode_claim(first)) == "NothingToClaim"
    stage.settle({"alice": 1_500})
    second = stage.close({"bob": 1_500})["bob"]
    stage.do("stranger", stage.rollup.encode_claim(second))
    assert stage.tokens("bob") == 1_000 * WEI_PER_GWEI
    assert stage.tokens("carol") == 500 * WEI_PER_GWEI


def test_only_registered_ids_are_paid(stage: Stage) -> None:
    settled(stage)
    claim = stage.close({"stranger": 1_000})["stranger"]
    assert refused(stage, "stranger", stage.rollup.encode_claim(claim)) == "NotRegistered"
    stage.do("bob", stage.rollup.encode_register([address("stranger")]))
    stage.do("bob", stage.rollup.encode_claim(claim))
    assert stage.tokens("stranger") == 1_000 * WEI_PER_GWEI


def test_a_leaf_pays_only_as_it_stands_in_the_active_root(stage: Stage) -> None:
    """More money, another id, a shorter proof, last period's leaf: all refused."""
    settled(stage)
    assert refused(stage, "bob", stage.rollup.encode_claim(ClaimCall(bytes(32), 1, ()))) == "NoActivePeriod"
    claims = stage.close({"bob": 600, "carol": 400})
    bob = claims["bob"]
    for wrong in (
        replace(bob, cumulative_wei=bob.cumulative_wei + 1),
        replace(bob, contributor_id=stage.id_of("alice")),
        replace(bob, proof=bob.proof[:-1]),
        replace(bob, proof=(*bob.proof, bytes(32))),
    ):
        assert refused(stage, "bob", stage.rollup.encode_claim(wrong)) == "BadProof"
    stage.settle({"alice": 1_001})
    stage.close({"bob": 601, "carol": 400})
    assert refused(stage, "bob", stage.rollup.encode_claim(bob)) == "BadProof"


def test_nothing_is_promised_that_was_not_paid_in(stage: Stage) -> None:
    """To the gwei; and what was paid out still counts as paid in."""
    settled(stage)
    root, claims = stage.rewards({"bob": 1_001})
    assert post_refused(stage, stage.period(root, 1_001)) == "NotFunded"
    claims = stage.close({"bob": 1_000})
    stage.do("bob", stage.rollup.encode_claim(claims["bob"]))
    stage.settle({"alice": 1_001})
    root, claims = stage.rewards({"bob": 1_002})
    assert post_refused(stage, stage.period(root, 1_002)) == "NotFunded"
    stage.close({"bob": 1_001})


def test_leaves_that_sum_to_more_than_the_total_cannot_drain_the_rest(stage: Stage) -> None:
    settled(stage)
    root, claims = stage.rewards({"bob": 400, "carol": 400})
    stage.do("settler", stage.rollup.encode_post_period(stage.period(root, 700), b""))
    stage.do("bob", stage.rollup.encode_claim(claims["bob"]))
    assert refused(stage, "carol", stage.rollup.encode_claim(claims["carol"])) == "TotalExceeded"


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"period_id": 1}, "UnexpectedPeriod"),
        ({"period_id": 3}, "UnexpectedPeriod"),
        ({"first_batch": 1}, "BatchesNotContiguous"),
        ({"first_batch": 3}, "BatchesNotContiguous"),
        ({"last_batch": 1}, "BatchesNotContiguous"),
        ({"last_batch": 3}, "HeadMismatch"),
        ({"last_batch": 3, "ledger_head": bytes(32)}, "HeadMismatch"),
        ({"ledger_head": keccak256(b"another chain")}, "HeadMismatch"),
        ({"total_gwei": 999}, "TotalBelowPrevious"),
        ({"total_gwei": 2_001}, "NotFunded"),
    ],
)
def test_periods_follow_one_another_over_the_batches_that_were_settled(
    stage: Stage, changed: dict[str, Any], error: str
) -> None:
    """No batch is skipped or paid twice, none that was not settled is paid, nothing owed is forgotten."""
    settled(stage)
    stage.close({"bob": 1_000})
    stage.settle({"alice": 2_000})
    root, _ = stage.rewards({"bob": 2_000})
    assert post_refused(stage, replace(stage.period(root, 2_000), **changed)) == error
    stage.close({"bob": 2_000})
    assert stage.rollup.active_period().period_id == 2


def test_roles_are_kept_apart(stage: Stage) -> None:
    """The guardian cannot post, the settler cannot disable, the admin can do neither."""
    settled(stage)
    root, _ = stage.rewards({"bob": 1_000})
    post = stage.rollup.encode_post_period(stage.period(root, 1_000), b"")
    for name in ("guardian", "admin"):
        assert refused(stage, name, post) == "AccessControlUnauthorizedAccount"
    for name in ("settler", "admin"):
        assert refused(stage, name, stage.rollup.encode_disable(1)) == "AccessControlUnauthorizedAccount"
    stage.do("settler", post)


def test_a_root_waits_and_the_earlier_one_pays_meanwhile(patient_stage: Stage) -> None:
    stage = patient_stage
    settled(stage)
    early = stage.close({"bob": 1_000})
    assert refused(stage, "bob", stage.rollup.encode_claim(early["bob"])) == "NoActivePeriod"
    assert stage.rollup.pending_period().period_id == 1
    stage.settle({"alice": 2_000})
    root, _ = stage.rewards({"bob": 2_000})
    impatient = replace(stage.period(root, 2_000), period_id=2, first_batch=2)
    assert post_refused(stage, impatient) == "PreviousPeriodPending"
    stage.pass_time(DAY_S)
    assert stage.rollup.pending_period().period_id == 0
    late = stage.close({"bob": 2_000})
    assert refused(stage, "bob", stage.rollup.encode_claim(late["bob"])) == "BadProof"
    stage.do("bob", stage.rollup.encode_claim(early["bob"]))
    stage.pass_time(DAY_S)
    stage.do("bob", stage.rollup.encode_claim(late["bob"]))
    assert stage.tokens("bob") == 2_000 * WEI_PER_GWEI


def test_a_disabled_period_never_pays_and_is_posted_again(patient_stage: Stage) -> None:
    """The number is free again, for the same batches or more; the period before goes on paying."""
    stage = patient_stage
    settled(stage)
    first = stage.close({"bob": 1_000})
    stage.pass_time(DAY_S)
    stage.settle({"alice": 2_000})
    wrong = stage.close({"carol": 2_000})
    assert refused(stage, "guardian", stage.rollup.encode_disable(1)) == "NotPending"
    stage.do("guardian", stage.rollup.encode_disable(2))
    assert refused(stage, "guardian", stage.rollup.encode_disable(2)) == "NotPending"
    stage.pass_time(DAY_S)
    assert refused(stage, "carol", stage.rollup.encode_claim(wrong["carol"])) == "BadProof"
    stage.do("bob", stage.rollup.encode_claim(first["bob"]))
    stage.settle({"alice": 2_500})
    right = stage.close({"bob": 1_500, "carol": 1_000})
    stage.pass_time(DAY_S)
    assert refused(stage, "guardian", stage.rollup.encode_disable(2)) == "NotPending"
    stage.do("carol", stage.rollup.encode_claim_many(list(right.values())))
    assert [stage.tokens(n) // WEI_PER_GWEI for n in ("bob", "carol")] == [1_500, 1_000]


def test_events_alone_rebuild_the_distributor(patient_stage: Stage) -> None:
    stage = patient_stage
    settled(stage)
    stage.close({"carol": 1_000})
    stage.do("guardian", stage.rollup.encode_disable(1))
    claims = stage.close({"bob": 600, "carol": 400})
    stage.pass_time(DAY_S)
    stage.do("stranger", stage.rollup.encode_claim_many(list(claims.values())))
    events = list(stage.rollup.events())
    posted = [event for event in events if isinstance(event, PeriodPosted)]
    (disabled,) = [event for event in events if isinstance(event, PeriodDisabled)]
    assert [p.period_id for p in posted] == [1, 1] and disabled.root == posted[0].root
    active = stage.rollup.active_period()
    last = posted[1]
    assert (last.root, last.total_wei, last.last_batch) == (active.root, active.total_wei, active.last_batch)
    assert last.ledger_head == stage.rollup.head() and last.da_commitment == b"certificate"
    paid = {e.contributor_id: e.cumulative_wei for e in events if isinstance(e, Claimed)}
    assert paid == {stage.id_of("bob"): 600 * WEI_PER_GWEI, stage.id_of("carol"): 400 * WEI_PER_GWEI}


@settings(max_examples=6, deadline=None)
@given(
    rounds=st.lists(st.lists(st.integers(0, 10**15), min_size=3, max_size=3), min_size=1, max_size=3),
    data=st.data(),
)
def test_whoever_claims_when_everybody_gets_what_was_earned(
    prompt_contracts: Stage, rounds: list[list[int]], data: st.DataObject
) -> None:
    """Over fuzzed amounts and orders, wallets plus what the distributor holds equal the captured fees."""
    stage, people = prompt_contracts, ("alice", "bob", "carol")
    with stage.forgetting():
        settled(stage, 1)
        stage.fund("bob", sum(map(sum, rounds)) + 1)
        earned = dict.fromkeys(people, 0)
        before = {name: stage.tokens(name) for name in people}
        for amounts in rounds:
            earned = {name: earned[name] + amount for name, amount in zip(people, amounts, strict=True)}
            stage.settle({"bob": sum(earned.values())})
            claims = stage.close(earned)
            for name in data.draw(st.lists(st.sampled_from(people), max_size=3, unique=True)):
                stage.do("stranger", stage.rollup.encode_claim_many([claims[name]]))
                assert stage.tokens(name) - before[name] == earned[name] * WEI_PER_GWEI
        stage.do("stranger", stage.rollup.encode_claim_many(list(claims.values())))
        assert {n: (stage.tokens(n) - before[n]) // WEI_PER_GWEI for n in people} == earned
        assert stage.rollup.token_balance_wei(stage.deployment.distributor) == WEI_PER_GWEI
