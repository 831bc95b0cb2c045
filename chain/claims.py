"""Draw what was earned: from a period's payload to the proof, and from the proof to the tokens.

Rewards are cumulative, so the active period's payload is all that is needed, whatever was claimed before.
Anyone may send a claim; the money goes to the wallet on record."""

from collections.abc import Sequence

from attribution.errors import Corrupted, Rejected
from attribution.payload import WEI_PER_GWEI, PeriodPayload
from chain.rollup import Rollup
from chain.sending import execute
from chain.structs import ClaimCall
from chain.transactions import MinedTransaction

CLAIMS_AT_ONCE = 50  # per transaction: about 4 million gas


def claims_of(period: PeriodPayload, contributor_ids: Sequence[bytes]) -> tuple[ClaimCall, ...]:
    """Leaf and proof for each. ``Rejected`` for an id that has earned nothing."""
    tree = period.tree()
    rewards = {share.contributor_id: share for share in period.rewards}
    claims = []
    for contributor in contributor_ids:
        if contributor not in rewards:
            message = f"{contributor.hex()} has earned nothing up to period {period.period_id}"
            raise Rejected("nothing_earned", message, field="contributor_id", http_status=404)
        reward = rewards[contributor]
        proof = tree.proof(period.leaf(reward))
        claims.append(ClaimCall(contributor, reward.amount_gwei * WEI_PER_GWEI, proof))
    return tuple(claims)


def claimable_wei(rollup: Rollup, claim: ClaimCall) -> int:
    """What the claim would pay now."""
    return max(0, claim.cumulative_wei - rollup.cumulative_claimed_wei(claim.contributor_id))


def check_active(rollup: Rollup, period: PeriodPayload) -> None:
    """The chain must agree with the payload before anything is proved from it.

    Raises:
        Rejected: ``period_not_active``: not posted, still waiting, disabled, or there is a later one.
        Corrupted: ``root_differs``: the root on chain is not the one that follows from the payload.
    """
    active = rollup.active_period()
    if active.period_id != period.period_id:
        message = f"active is period {active.period_id}, given {period.period_id}"
        raise Rejected("period_not_active", message, field="period_id", http_status=409)
    root = period.tree().root
    if active.root != root:
        message = (
            f"period {period.period_id}: root on chain {active.root.hex()}, from the payload {root.hex()}"
        )
        raise Corrupted("root_differs", message, field="root")


def claim(
    rollup: Rollup, private_key: bytes, period: PeriodPayload, contributor_ids: Sequence[bytes]
) -> tuple[MinedTransaction, ...]:
    """Claim for all of them in as few transactions as gas allows; ``private_key`` pays the gas.

    Those who were paid everything are passed over. Empty when nobody is owed anything."""
    check_active(rollup, period)
    due = [c for c in claims_of(period, contributor_ids) if claimable_wei(rollup, c)]
    chunks = [due[start : start + CLAIMS_AT_ONCE] for start in range(0, len(due), CLAIMS_AT_ONCE)]
    return tuple(execute(rollup, private_key, rollup.encode_claim_many(chunk)) for chunk in chunks)
