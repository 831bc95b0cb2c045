"""The pool: what nobody earned is drawn like any reward, and leaves the timelock only after its delay."""

import pytest
from eth_abi.abi import encode

from attribution.errors import Rejected
from attribution.hashing import keccak256
from attribution.merkle import merkle_tree, reward_leaf
from attribution.payload import WEI_PER_GWEI
from attribution.types import contributor_id
from chain.structs import ClaimCall
from chain.transactions import Call
from tests.chain.refusals import refused
from tests.chain.stage import Stage, address

pytestmark = pytest.mark.evm
CALL = "address,uint256,bytes,bytes32,bytes32"


def timelock(stage: Stage, function: str, transfer: Call, *delay_s: int) -> Call:
    """``schedule`` or ``execute`` this transfer of tokens by the pool."""
    kinds = CALL + ",uint256" * len(delay_s)
    values = (transfer.to, 0, transfer.data, bytes(32), bytes(32), *delay_s)
    selector = keccak256(f"{function}({kinds})".encode())[:4]
    return Call(stage.deployment.pool, selector + encode(kinds.split(","), values))


def test_the_pool_is_paid_by_claim_and_pays_after_its_delay_only(stage: Stage) -> None:
    d, pool_id = stage.deployment, contributor_id(stage.deployment.pool)
    stage.fund("alice", 50)
    stage.settle({"alice": 50})
    leaf = reward_leaf(d.chain_id, d.distributor, pool_id, 50 * WEI_PER_GWEI)
    period = stage.period(merkle_tree([leaf]).root, 50)
    stage.do("settler", stage.rollup.encode_post_period(period, b""))
    stage.do("stranger", stage.rollup.encode_claim(ClaimCall(pool_id, 50 * WEI_PER_GWEI, ())))
    assert stage.rollup.token_balance_wei(d.pool) == 50 * WEI_PER_GWEI

    transfer = stage.rollup.encode_transfer(address("bob"), 20 * WEI_PER_GWEI)
    schedule = timelock(stage, "schedule", transfer, d.pool_delay_s)
    execute = timelock(stage, "execute", transfer)
    for name in ("settler", "guardian", "treasury"):
        assert refused(stage, name, schedule) == "AccessControlUnauthorizedAccount"
    hasty = timelock(stage, "schedule", transfer, d.pool_delay_s - 1)
    assert refused(stage, "admin", hasty) == "TimelockInsufficientDelay"
    stage.do("admin", schedule)
    assert refused(stage, "admin", execute) == "TimelockUnexpectedOperationState"
    stage.pass_time(d.pool_delay_s)
    with pytest.raises(Rejected):
        stage.do("stranger", execute)
    stage.do("admin", execute)
    assert stage.tokens("bob") == 20 * WEI_PER_GWEI
