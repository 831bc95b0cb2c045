"""What anvil in Optimism mode takes from a sender is what the formulas say, to the wei."""

import random

import pytest

from chain import anvil
from chain.fees import (
    FeeParameters,
    compressed_length,
    l1_fee_wei,
    operator_fee_wei,
    upfront_wei,
)
from chain.sending import wait_mined
from chain.transactions import Call, Transaction, tx_hash
from tests.chain.stage import Stage, address, key

PARAMETERS = FeeParameters(
    base_fee_wei=500_000_000,
    blob_base_fee_wei=10_000_000,
    base_fee_scalar=5_227,
    blob_base_fee_scalar=1_014_213,
    operator_fee_scalar=1_000,
    operator_fee_constant_wei=10**9,
)
DATA = {
    "empty": b"",
    "zeros": bytes(500),
    "repeating": b"certificate " * 200,
    "random": random.Random(1).randbytes(500),
    "long random": random.Random(2).randbytes(5_000),
}


@pytest.mark.evm
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_a_transaction_costs_what_the_formulas_say(stage: Stage, data: bytes) -> None:
    """Execution, L1 data and operator fee together are the sender's loss; with a wei less it is refused."""
    anvil.prepare(stage.rpc_url, PARAMETERS)
    try:
        rollup = stage.rollup
        assert rollup.fee_parameters() == PARAMETERS
        nonce, fees = rollup.nonce(address("alice")), rollup.suggest_fees()
        call = Call(address("bob"), data)
        raw = Transaction(stage.deployment.chain_id, nonce, 400_000, fees, call).sign(key("alice"))
        before = rollup.balance_wei(address("alice"))
        mined = wait_mined(rollup, rollup.send_raw(raw))
        assert mined.tx_hash == tx_hash(raw)
        execution = mined.gas_used * mined.gas_price_wei
        expected = execution + l1_fee_wei(raw, PARAMETERS) + operator_fee_wei(mined.gas_used, PARAMETERS)
        assert before - rollup.balance_wei(address("alice")) == expected
        assert upfront_wei(raw, 400_000, fees.cap_wei, PARAMETERS) >= expected
    finally:
        anvil.prepare(stage.rpc_url)


@pytest.mark.evm
def test_a_laptops_chain_charges_for_l1(stage: Stage) -> None:
    at = stage.rollup.fee_parameters()
    assert at == anvil.LAPTOP_FEES
    assert l1_fee_wei(bytes(200), at) > 0


def test_compressed_length_is_that_of_fastlz() -> None:
    """Shorter than 13 bytes nothing is compressed; runs are; noise grows by a byte in 32."""
    rng = random.Random(3)
    cases = {bytes(100): 12, bytes(12): 13, b"": 0, bytes(range(64)): 66, b"ab" * 50: 12}
    assert {data: compressed_length(data) for data in cases} == cases
    noise = rng.randbytes(1_000)
    assert len(noise) < compressed_length(noise) <= len(noise) + len(noise) // 32 + 2
