"""AttributionLedger and Escrow: what is settled is captured, in order, once, within what payers signed."""

from dataclasses import replace

import pytest
from eth_abi.abi import encode
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.hashing import keccak256
from attribution.payload import WEI_PER_GWEI
from attribution.types import Capture
from chain import anvil
from chain.events import BatchCommitted, Captured, CeilingAuthorized, Deposited
from chain.transactions import Call
from cluster.signatures import SpendCeiling, digest
from tests.chain.refusals import refused
from tests.chain.stage import FAR, Stage, address, expected_head

pytestmark = pytest.mark.evm
REFUSING_CODE = "0x60206000f3"  # returns 32 zero bytes
CONFIRMING_CODE = "0x631626ba7e60e01b60005260206000f3"  # returns ERC-1271's magic value


def test_a_batch_captures_its_fees_and_extends_the_head_chain(stage: Stage) -> None:
    """The chain's head, the captured sums and the distributor's money are what Python computes."""
    stage.fund("alice", 1_000)
    stage.fund("bob", 500)
    head = bytes(32)
    for da, spent in (
        (b"", {"alice": 7}),
        (b"\x01" * 900, {"alice": 30, "bob": 500}),
        (b"x", {"alice": 1_000}),
    ):
        header = stage.settle(spent, da)
        head = expected_head(head, header, da)
        assert stage.rollup.head() == stage.rollup.head_of(header.batch_id) == head
    assert stage.rollup.next_batch_id() == 4
    assert stage.rollup.funded_wei() == 1_500 * WEI_PER_GWEI
    assert stage.rollup.token_balance_wei(stage.deployment.escrow) == 0
    assert stage.rollup.head_of(4) == bytes(32)


def test_a_settled_batch_is_not_settled_again_nor_one_skipped(stage: Stage) -> None:
    """The same bytes a second time change nothing: whoever restarts may send them."""
    stage.fund("alice", 1_000)
    call = stage.rollup.encode_commit_batch(stage.batch(7), b"", stage.captures({"alice": 7}))
    stage.do("settler", call)
    assert refused(stage, "settler", call) == "UnexpectedBatch"
    skipping = replace(stage.batch(1), batch_id=3)
    again = stage.rollup.encode_commit_batch(skipping, b"", stage.captures({"alice": 8}))
    assert refused(stage, "settler", again) == "UnexpectedBatch"
    assert stage.rollup.payer_state(address("alice")).captured_wei == 7 * WEI_PER_GWEI


@pytest.mark.parametrize("fee_gwei", [6, 8])
def test_captures_equal_fees_or_nothing_happens(stage: Stage, fee_gwei: int) -> None:
    stage.fund("alice", 1_000)
    call = stage.rollup.encode_commit_batch(stage.batch(fee_gwei), b"", stage.captures({"alice": 7}))
    assert refused(stage, "settler", call) == "FeesNotCaptured"
    assert stage.rollup.payer_state(address("alice")).captured_wei == 0
    stage.settle({"alice": 7})


def test_an_empty_batch_is_refused_and_a_free_one_is_not(stage: Stage) -> None:
    empty = replace(stage.batch(0), num_receipts=0)
    assert refused(stage, "settler", stage.rollup.encode_commit_batch(empty, b"", [])) == "EmptyBatch"
    stage.settle({})
    assert stage.rollup.next_batch_id() == 2


def test_only_the_settler_settles_and_only_the_ledger_captures(stage: Stage) -> None:
    stage.fund("alice", 1_000)
    call = stage.rollup.encode_commit_batch(stage.batch(7), b"", stage.captures({"alice": 7}))
    assert refused(stage, "admin", call) == "AccessControlUnauthorizedAccount"
    selector = keccak256(b"capture(uint64,(address,uint256)[])")[:4]
    arguments = encode(["uint64", "(address,uint256)[]"], [1, [(address("alice"), 7 * WEI_PER_GWEI)]])
    capture = Call(stage.deployment.escrow, selector + arguments)
    assert refused(stage, "settler", capture) == "NotTheLedger"
    stage.do("settler", call)


def test_a_payer_never_pays_more_than_deposited_or_signed_for(stage: Stage) -> None:
    """Captures stop at min(deposit, ceiling), to the gwei."""
    stage.fund("alice", 100, ceiling_gwei=1_000)
    stage.fund("bob", 1_000, ceiling_gwei=100)
    for payer, error in (("alice", "DepositExceeded"), ("bob", "CeilingExceeded")):
        call = stage.rollup.encode_commit_batch(stage.batch(101), b"", stage.captures({payer: 101}))
        assert refused(stage, "settler", call) == error
    stage.settle({"alice": 100, "bob": 100})


def test_what_was_captured_is_not_given_back(stage: Stage) -> None:
    stage.fund("alice", 100)
    stage.settle({"alice": 50})
    call = stage.rollup.encode_commit_batch(stage.batch(0), b"", stage.captures({"alice": 49}))
    assert refused(stage, "settler", call) == "CaptureBelowPrevious"
    stage.settle({"alice": 50})


def test_captures_are_sorted_and_each_payer_comes_once(stage: Stage) -> None:
    stage.fund("alice", 100)
    stage.fund("bob", 100)
    captures = stage.captures({"alice": 5, "bob": 6})
    for wrong in (captures[::-1], [captures[0], captures[0]]):
        call = stage.rollup.encode_commit_batch(stage.batch(11), b"", wrong)
        assert refused(stage, "settler", call) == "CapturesNotSorted"
    stage.do("settler", stage.rollup.encode_commit_batch(stage.batch(11), b"", captures))


def test_an_expired_ceiling_captures_nothing(stage: Stage) -> None:
    stage.pass_time(1)
    now = stage.rollup.timestamp()
    stage.fund("alice", 100, expiry=now + 1_000)
    stage.settle({"alice": 1})
    stage.pass_time(2_000)
    call = stage.rollup.encode_commit_batch(stage.batch(1), b"", stage.captures({"alice": 2}))
    assert refused(stage, "settler", call) == "CeilingExpired"
    stage.authorize("alice", ceiling_gwei=2**62, expiry=now + 10_000)
    stage.settle({"alice": 2})


def test_a_ceiling_counts_only_as_its_payer_signed_it(stage: Stage) -> None:
    """Another signer, another operator, another maximum, another contract's domain: nothing of it counts."""
    good = SpendCeiling(address("alice"), stage.deployment.ledger, 10**12, FAR)
    signature = stage.sign("alice", good)
    raised = SpendCeiling(good.payer, good.operator, good.cumulative_max_wei + 1, good.expiry)
    elsewhere = SpendCeiling(good.payer, address("stranger"), good.cumulative_max_wei, good.expiry)
    cases = (
        (good, stage.sign("bob", good), "BadSignature"),
        (raised, signature, "BadSignature"),
        (good, signature[:-1], "BadSignature"),
        (elsewhere, stage.sign("alice", elsewhere), "NotTheLedger"),
    )
    for ceiling, signed, error in cases:
        assert refused(stage, "stranger", stage.rollup.encode_authorize(ceiling, signed)) == error
    stage.do("stranger", stage.rollup.encode_authorize(good, signature))
    assert stage.rollup.payer_state(address("alice")).ceiling_wei == 10**12


def test_a_ceiling_is_never_lowered_or_shortened(stage: Stage) -> None:
    """What was served under one ceiling stays capturable; an old one sent again does nothing."""
    stage.authorize("alice", ceiling_gwei=100, expiry=FAR)
    for gwei, expiry in ((99, FAR + 1), (101, FAR - 1)):
        lower = SpendCeiling(address("alice"), stage.deployment.ledger, gwei * WEI_PER_GWEI, expiry)
        call = stage.rollup.encode_authorize(lower, stage.sign("alice", lower))
        assert refused(stage, "stranger", call) == "CeilingLowered"
    stage.authorize("alice", ceiling_gwei=100, expiry=FAR)
    stage.authorize("alice", ceiling_gwei=101, expiry=FAR + 1)
    authorized = [event for event in stage.rollup.events() if isinstance(event, CeilingAuthorized)]
    assert [event.cumulative_max_wei // WEI_PER_GWEI for event in authorized] == [100, 101]


def test_a_key_cannot_unsign_by_taking_on_code(stage: Stage) -> None:
    """An account that delegates to code (EIP-7702) stays bound by what its key signed."""
    anvil.ask(stage.rpc_url, "anvil_setCode", "0x" + address("alice").hex(), REFUSING_CODE)
    stage.authorize("alice", ceiling_gwei=100, expiry=FAR)
    assert stage.rollup.payer_state(address("alice")).ceiling_wei == 100 * WEI_PER_GWEI


def test_a_contract_may_sign_by_erc_1271(stage: Stage) -> None:
    """It is asked; what it does not confirm does not count."""
    wallet = b"\xcc" * 20
    ceiling = SpendCeiling(wallet, stage.deployment.ledger, 10**12, FAR)
    call = stage.rollup.encode_authorize(ceiling, b"whatever the wallet takes")
    for code in ("0x", REFUSING_CODE):
        anvil.ask(stage.rpc_url, "anvil_setCode", "0x" + wallet.hex(), code)
        assert refused(stage, "stranger", call) == "BadSignature"
    anvil.ask(stage.rpc_url, "anvil_setCode", "0x" + wallet.hex(), CONFIRMING_CODE)
    stage.do("stranger", call)
    assert stage.rollup.payer_state(wallet).ceiling_wei == 10**12


def test_an_expired_ceiling_is_not_recorded(stage: Stage) -> None:
    past = SpendCeiling(address("alice"), stage.deployment.ledger, 10**12, stage.rollup.timestamp() - 1)
    call = stage.rollup.encode_authorize(past, stage.sign("alice", past))
    assert refused(stage, "stranger", call) == "CeilingExpired"


def test_amounts_are_whole_gwei(stage: Stage) -> None:
    stage.do("treasury", stage.rollup.encode_approve(stage.deployment.escrow, 10**18))
    odd = stage.rollup.encode_deposit(address("alice"), 10**9 + 1)
    assert refused(stage, "treasury", odd) == "NotWholeGwei"
    stage.do("treasury", stage.rollup.encode_deposit(address("alice"), 10**9))


def test_python_and_contract_hash_the_same_ceiling(stage: Stage) -> None:
    ceiling = SpendCeiling(address("alice"), stage.deployment.ledger, 123 * 10**9, 1_900_000_000)
    assert digest(ceiling, stage.domain) == stage.rollup.ceiling_digest(ceiling)


def test_a_deposit_needs_an_allowance_or_the_payers_permit(stage: Stage) -> None:
    """With a permit the payer needs no gas; a permit of somebody else moves nothing."""
    bare = stage.rollup.encode_deposit(address("bob"), 10**9)
    assert refused(stage, "stranger", bare) == "ERC20InsufficientAllowance"
    stage.do("treasury", stage.rollup.encode_transfer(address("alice"), 5 * 10**9))
    forged = stage.permit("bob", "alice", 5 * 10**9)
    assert refused(stage, "settler", forged) == "ERC2612InvalidSigner"
    stage.do("settler", stage.permit("alice", "alice", 5 * 10**9))
    assert stage.rollup.payer_state(address("alice")).deposited_wei == 5 * 10**9
    assert stage.tokens("alice") == 0


def test_a_withdrawal_waits_and_takes_only_what_is_left(stage: Stage) -> None:
    """Fees served before the wish are captured first; the rest comes back."""
    stage.fund("alice", 100)
    stage.settle({"alice": 30})
    too_much = stage.rollup.encode_request_withdrawal(71 * WEI_PER_GWEI)
    assert refused(stage, "alice", too_much) == "WithdrawalExceedsBalance"
    assert refused(stage, "alice", stage.rollup.encode_withdraw()) == "WithdrawalNotReady"
    stage.do("alice", stage.rollup.encode_request_withdrawal(70 * WEI_PER_GWEI))
    assert stage.rollup.payer_state(address("alice")).limit_wei == 30 * WEI_PER_GWEI
    assert refused(stage, "alice", stage.rollup.encode_withdraw()) == "WithdrawalNotReady"
    stage.settle({"alice": 45})
    stage.pass_time(stage.deployment.withdrawal_delay_s)
    stage.do("alice", stage.rollup.encode_withdraw())
    assert stage.tokens("alice") == 55 * WEI_PER_GWEI
    assert refused(stage, "alice", stage.rollup.encode_withdraw()) == "WithdrawalNotReady"
    state = stage.rollup.payer_state(address("alice"))
    assert state.deposited_wei == state.captured_wei == 45 * WEI_PER_GWEI


def test_a_withdrawal_can_be_taken_back(stage: Stage) -> None:
    stage.fund("alice", 100)
    stage.do("alice", stage.rollup.encode_request_withdrawal(100 * WEI_PER_GWEI))
    stage.do("alice", stage.rollup.encode_request_withdrawal(0))
    stage.pass_time(stage.deployment.withdrawal_delay_s + 1)
    assert refused(stage, "alice", stage.rollup.encode_withdraw()) == "WithdrawalNotReady"
    assert stage.rollup.payer_state(address("alice")).limit_wei == 100 * WEI_PER_GWEI


def test_events_alone_rebuild_ledger_and_escrow(stage: Stage) -> None:
    stage.fund("alice", 100)
    stage.fund("bob", 70)
    headers = [stage.settle(spent, b"da") for spent in ({"alice": 5}, {"alice": 9, "bob": 70})]
    events = list(stage.rollup.events())
    assert [e.at for e in events] == sorted(e.at for e in events)
    batches = [e for e in events if isinstance(e, BatchCommitted)]
    assert [(b.batch_id, b.root, b.payload_hash, b.fee_wei) for b in batches] == [
        (h.batch_id, h.root, h.payload_hash, h.fee_gwei * WEI_PER_GWEI) for h in headers
    ]
    assert batches[-1].head == stage.rollup.head() and batches[0].da_commitment == b"da"
    for name in ("alice", "bob"):
        state = stage.rollup.payer_state(address(name))
        own = [e for e in events if isinstance(e, Deposited | Captured) and e.payer == address(name)]
        assert sum(e.amount_wei for e in own if isinstance(e, Deposited)) == state.deposited_wei
        assert sum(e.amount_wei for e in own if isinstance(e, Captured)) == state.captured_wei


@settings(max_examples=10, deadline=None)
@given(
    deposit=st.integers(1, 10**17),
    ceiling=st.integers(0, 2**62),
    steps=st.lists(st.integers(0, 2**62), min_size=1, max_size=3),
)
def test_no_sequence_of_captures_leaves_the_bounds(
    prompt_contracts: Stage, deposit: int, ceiling: int, steps: list[int]
) -> None:
    """Whatever a settler tries: captured is monotone and at most min(deposit, ceiling)."""
    stage = prompt_contracts
    with stage.forgetting():
        stage.fund("alice", deposit, ceiling_gwei=ceiling)
        limit = min(deposit, ceiling)
        captured = 0
        for step in steps:
            wanted = step % (2 * limit + 2)
            header = stage.batch(max(wanted - captured, 0))
            call = stage.rollup.encode_commit_batch(header, b"", [Capture(address("alice"), wanted)])
            if captured <= wanted <= limit:
                stage.do("settler", call)
                captured = wanted
            else:
                refused(stage, "settler", call)
            assert stage.rollup.payer_state(address("alice")).captured_wei == captured * WEI_PER_GWEI
