"""Send one call and wait for it: for deployments, payers and claims, whose senders are there to try again.

The settler does not use this: it journals what it signs, bumps fees and survives its own death."""

import time

from attribution.errors import Rejected, Unavailable
from chain.rollup import Rollup
from chain.transactions import Call, MinedTransaction, Transaction, address_of, tx_hash

GAS_MARGIN_PERCENT = 20  # state may change between the estimate and the block
POLL_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


def execute(rollup: Rollup, private_key: bytes, call: Call, *, timeout_s: float = 120.0) -> MinedTransaction:
    """Estimate, sign, send, wait until mined.

    Raises:
        Rejected: ``reverted``, with the contract's error as ``field``, before anything is sent or after it
            was mined; or what ``Rollup.send_raw`` says.
        Unavailable: ``not_mined`` in time. It may be mined later; the message holds its hash.
    """
    sender = address_of(private_key)
    gas = rollup.estimate_gas(sender, call) * (100 + GAS_MARGIN_PERCENT) // 100
    nonce, fees = rollup.nonce(sender), rollup.suggest_fees()
    raw = Transaction(rollup.addresses.chain_id, nonce, gas, fees, call).sign(private_key)
    rollup.send_raw(raw)
    mined = wait_mined(rollup, tx_hash(raw), timeout_s=timeout_s)
    if not mined.succeeded:
        rollup.estimate_gas(sender, call)  # says why, if it would still fail
        raise Rejected("reverted", f"transaction {mined.tx_hash.hex()} failed in block {mined.block}")
    return mined


def wait_mined(rollup: Rollup, transaction_hash: bytes, *, timeout_s: float = 120.0) -> MinedTransaction:
    """``Unavailable("not_mined")`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    attempt = 0
    while (mined := rollup.receipt(transaction_hash)) is None:
        if time.monotonic() > deadline:
            raise Unavailable("not_mined", f"{transaction_hash.hex()} is not mined after {timeout_s:g} s")
        time.sleep(POLL_S[min(attempt, len(POLL_S) - 1)])
        attempt += 1
    return mined
