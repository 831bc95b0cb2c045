"""EIP-1559 transactions as values: encode, sign, and read back from the bytes that were journalled.

Only what this system sends: type 2, a call (never a creation), no access list. Encoding:
https://eips.ethereum.org/EIPS/eip-1559."""

from dataclasses import dataclass

import coincurve
import rlp

from attribution.errors import Corrupted, Rejected
from attribution.hashing import keccak256

TYPE_BYTE = b"\x02"


@dataclass(frozen=True, slots=True)
class Transaction:
    """What is signed. Fees are wei per gas; ``value_wei`` is there so that a signer can refuse it."""

    chain_id: int
    nonce: int
    max_priority_fee_wei: int
    max_fee_wei: int
    gas: int
    to: bytes
    data: bytes
    value_wei: int = 0

    def __post_init__(self) -> None:
        numbers = (
            self.chain_id,
            self.nonce,
            self.max_priority_fee_wei,
            self.max_fee_wei,
            self.gas,
            self.value_wei,
        )
        if min(numbers) < 0 or max(numbers) >= 2**256 or len(self.to) != 20:
            raise Rejected("bad_transaction", f"numbers {numbers}, {len(self.to)} bytes of address")

    @property
    def worst_fee_wei(self) -> int:
        return self.gas * self.max_fee_wei

    @property
    def digest(self) -> bytes:
        return keccak256(TYPE_BYTE + rlp.encode(self._fields()))

    def _fields(self) -> list[object]:
        head = [self.chain_id, self.nonce, self.max_priority_fee_wei, self.max_fee_wei, self.gas]
        return [*head, self.to, self.value_wei, self.data, []]


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """``raw`` is what a node takes; its keccak is the hash everybody names it by."""

    transaction: Transaction
    raw: bytes

    @property
    def tx_hash(self) -> bytes:
        return keccak256(self.raw)


def sign(transaction: Transaction, private_key: bytes) -> SignedTransaction:
    """Deterministic (RFC 6979): the same transaction gives the same bytes."""
    signature = coincurve.PrivateKey(private_key).sign_recoverable(transaction.digest, hasher=None)
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
    fields = [*transaction._fields(), signature[64], r, s]
    return SignedTransaction(transaction, TYPE_BYTE + bytes(rlp.encode(fields)))


def parse(raw: bytes) -> SignedTransaction:
    """Inverse of ``sign``, without looking at who signed. ``Corrupted`` if these are not such bytes."""
    try:
        fields = rlp.decode(raw[1:])
        numbers = [int.from_bytes(fields[i], "big") for i in (0, 1, 2, 3, 4, 6)]
        chain_id, nonce, tip, cap, gas, value = numbers
        parsed = Transaction(chain_id, nonce, tip, cap, gas, fields[5], fields[7], value)
        is_ours = raw[:1] == TYPE_BYTE and len(fields) == 12 and list(fields[8]) == []
    except (rlp.exceptions.RLPException, IndexError, TypeError, Rejected) as error:
        raise Corrupted("raw_transaction", f"{len(raw)} bytes are no signed transaction: {error}") from error
    if not is_ours:
        raise Corrupted("raw_transaction", f"{len(raw)} bytes are no type-2 call", field="raw")
    return SignedTransaction(parsed, raw)


def address_of(private_key: bytes) -> bytes:
    """20 bytes: the end of keccak of the public key."""
    return keccak256(coincurve.PrivateKey(private_key).public_key.format(compressed=False)[1:])[12:]
