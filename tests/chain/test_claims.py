"""Claims: from a period's payload to tokens in the wallet on record, whoever sends them."""

from dataclasses import replace

import pytest

from attribution.errors import Corrupted, Rejected
from attribution.payload import WEI_PER_GWEI, PeriodPayload
from attribution.payout import Beneficiaries, Split
from attribution.types import Share
from chain.claims import claim, claimable_wei, claims_of
from tests.chain.stage import Stage, address, key

pytestmark = pytest.mark.evm
PEOPLE = ("alice", "bob", "carol")


def closed(stage: Stage, earned_gwei: dict[str, int]) -> PeriodPayload:
    """Settle what is missing, post the period whose rewards these are, and return its payload."""
    total = sum(earned_gwei.values())
    stage.settle({"alice": total})
    d, before = stage.deployment, stage.rollup.active_period()
    rewards = sorted(
        (Share(stage.id_of(n), v) for n, v in earned_gwei.items()), key=lambda s: s.contributor_id
    )
    payload = PeriodPayload(
        period_id=before.period_id + 1,
        first_batch=before.last_batch + 1,
        last_batch=stage.rollup.next_batch_id() - 1,
        ledger_head=stage.rollup.head(),
        chain_id=d.chain_id,
        distributor=d.distributor,
        split=Split(50_000, 150_000, 100_000, 50_000, 600_000, 50_000),
        beneficiaries=Beneficiaries(*[stage.id_of("carol")] * 5),
        adapters=(),
        carried=(),
        rewards=tuple(rewards),
    )
    call = stage.rollup.encode_post_period(stage.period(payload.tree().root, total), b"")
    stage.do("settler", call)
    return payload


@pytest.fixture
def ready(stage: Stage) -> Stage:
    stage.fund("alice", 10**6)
    stage.do("stranger", stage.rollup.encode_register([address(name) for name in PEOPLE]))
    return stage


def test_anyone_claims_for_everybody_once(ready: Stage) -> None:
    """A second claim sends nothing; the next period pays the difference."""
    payload = closed(ready, {"alice": 1, "bob": 20, "carol": 300})
    ids = [ready.id_of(name) for name in PEOPLE]
    assert len(claim(ready.rollup, key("stranger"), payload, ids)) == 1
    assert [ready.tokens(name) // WEI_PER_GWEI for name in PEOPLE] == [1, 20, 300]
    assert claim(ready.rollup, key("stranger"), payload, ids) == ()
    payload = closed(ready, {"alice": 1, "bob": 21, "carol": 4_000})
    (bob,) = claims_of(payload, [ready.id_of("bob")])
    assert claimable_wei(ready.rollup, bob) == WEI_PER_GWEI
    claim(ready.rollup, key("bob"), payload, ids)
    assert [ready.tokens(name) // WEI_PER_GWEI for name in PEOPLE] == [1, 21, 4_000]


def test_who_earned_nothing_has_no_claim(ready: Stage) -> None:
    payload = closed(ready, {"bob": 20})
    with pytest.raises(Rejected) as error:
        claim(ready.rollup, key("carol"), payload, [ready.id_of("carol")])
    assert error.value.code == "nothing_earned"


def test_only_the_active_period_is_claimed_from(ready: Stage) -> None:
    payload = closed(ready, {"bob": 20})
    closed(ready, {"bob": 21})
    with pytest.raises(Rejected) as error:
        claim(ready.rollup, key("bob"), payload, [ready.id_of("bob")])
    assert error.value.code == "period_not_active"


def test_a_payload_that_gives_another_root_stops_everything(ready: Stage) -> None:
    payload = closed(ready, {"bob": 20})
    forged = replace(payload, rewards=(replace(payload.rewards[0], amount_gwei=21),))
    with pytest.raises(Corrupted) as error:
        claim(ready.rollup, key("bob"), forged, [ready.id_of("bob")])
    assert error.value.code == "root_differs"
