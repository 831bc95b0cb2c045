"""Transactions as values: what to call, under which nonce and fees, the signed bytes, and the way back.

Type 2 without an access list is all that this system sends. Encoding:
https://eips.ethereum.org/EIPS/eip-1559."""

from dataclasses import dataclass

import coincurve
import rlp

from attribution.errors import Corrupted, Rejected
from attribution.hashing import keccak256

TYPE_BYTE = b"\x02"


@dataclass(frozen=True, slots=True)
class Call:
    """``to`` is 20 bytes, or empty to create a contract."""

    to: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class Fees:
    """EIP-1559: at most ``cap_wei`` per gas in all, of which at most ``tip_wei`` for the sequencer."""

    tip_wei: int
    cap_wei: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """What is signed; ``value_wei`` is there so that a signer can refuse it."""

    chain_id: int
    nonce: int
    gas: int
    fees: Fees
    call: Call
    value_wei: int = 0

    def __post_init__(self) -> None:
        numbers = (self.chain_id, self.nonce, self.gas, self.fees.tip_wei, self.fees.cap_wei, self.value_wei)
        if min(numbers) < 0 or max(numbers) >= 2**256 or len(self.call.to) not in (0, 20):
            raise Rejected("bad_transaction", f"numbers {numbers}, address of {len(self.call.to)} bytes")

    @property
    def worst_fee_wei(self) -> int:
        return self.gas * self.fees.cap_wei

    def sign(self, private_key: bytes) -> bytes:
        """The bytes for ``eth_sendRawTransaction``; equal transactions sign to equal bytes (RFC 6979)."""
        numbers = [self.chain_id, self.nonce, self.fees.tip_wei, self.fees.cap_wei, self.gas]
        fields: list[object] = [*numbers, self.call.to, self.value_wei, self.call.data, []]
        digest = keccak256(TYPE_BYTE + bytes(rlp.encode(fields)))
        signature = coincurve.PrivateKey(private_key).sign_recoverable(digest, hasher=None)
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
        return TYPE_BYTE + bytes(rlp.encode([*fields, signature[64], r, s]))


@dataclass(frozen=True, slots=True)
class MinedTransaction:
    """``l1_fee_wei`` is what the receipt says, 0 where the node says nothing (anvil)."""

    tx_hash: bytes
    block: int
    block_hash: bytes
    succeeded: bool
    gas_used: int
    gas_price_wei: int
    l1_fee_wei: int


def tx_hash(raw: bytes) -> bytes:
    return keccak256(raw)


def parse(raw: bytes) -> Transaction:
    """What the signed bytes say, whoever signed them. ``Corrupted`` if no ``sign`` made them."""
    try:
        fields = rlp.decode(raw[1:])
        chain_id, nonce, tip, cap, gas, value = (int.from_bytes(fields[i], "big") for i in (0, 1, 2, 3, 4, 6))
        parsed = Transaction(chain_id, nonce, gas, Fees(tip, cap), Call(fields[5], fields[7]), value)
        is_ours = raw[:1] == TYPE_BYTE and len(fields) == 12 and list(fields[8]) == []
    except (rlp.exceptions.RLPException, IndexError, TypeError, Rejected) as error:
        raise Corrupted("raw_transaction", f"{len(raw)} bytes are no signed transaction: {error}") from error
    if not is_ours:
        raise Corrupted("raw_transaction", f"{len(raw)} bytes are of another type", field="raw")
    return parsed


def address_of(private_key: bytes) -> bytes:
    """20 bytes: the end of keccak of the public key."""
    return keccak256(coincurve.PrivateKey(private_key).public_key.format(compressed=False)[1:])[12:]
