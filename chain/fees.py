"""What a transaction costs on an OP Stack rollup: execution, L1 data (Fjord) and operator (Isthmus) fees, to
the wei.

Sources: https://specs.optimism.io/protocol/fjord/exec-engine.html (L1 fee) and
https://specs.optimism.io/protocol/isthmus/exec-engine.html (operator fee); the length is that of FastLZ
level 1, https://github.com/ariya/FastLZ. Jovian multiplies the operator scalar by 100 instead of dividing it
by a million; nothing local implements that, so it is not here."""

from dataclasses import dataclass

L1_BLOCK = bytes.fromhex(
    "4200000000000000000000000000000000000015"
)  # the predeploy that holds the parameters
L1_FEE_INTERCEPT = -42_585_600
L1_FEE_PER_BYTE = 836_500  # both in 10^-6 byte of estimated compressed size
MIN_TRANSACTION_SIZE = 100 * 10**6
_WINDOW = 8_192
_HASHES = 8_192
_MAX_MATCH = 262


@dataclass(frozen=True, slots=True)
class FeeParameters:
    """What L1Block says at one block. All zero on a chain that is no OP Stack rollup."""

    base_fee_wei: int  # of L1
    blob_base_fee_wei: int
    base_fee_scalar: int
    blob_base_fee_scalar: int
    operator_fee_scalar: int
    operator_fee_constant_wei: int


def l1_fee_wei(raw: bytes, at: FeeParameters) -> int:
    """For the signed bytes. Deposits (type 0x7e) pay none."""
    size = max(MIN_TRANSACTION_SIZE, L1_FEE_INTERCEPT + L1_FEE_PER_BYTE * compressed_length(raw))
    price = 16 * at.base_fee_scalar * at.base_fee_wei + at.blob_base_fee_scalar * at.blob_base_fee_wei
    return size * price // 10**12


def operator_fee_wei(gas: int, at: FeeParameters) -> int:
    """For the gas used; before execution a node wants to see it for the gas limit."""
    return gas * at.operator_fee_scalar // 10**6 + at.operator_fee_constant_wei


def upfront_wei(raw: bytes, gas_limit: int, cap_wei: int, at: FeeParameters) -> int:
    """The balance below which a node refuses the transaction."""
    return gas_limit * cap_wei + l1_fee_wei(raw, at) + operator_fee_wei(gas_limit, at)


def compressed_length(data: bytes) -> int:
    """Length of FastLZ level-1 output, as op-geth counts it: a byte for 32 literals, 2 or 3 for a match."""
    last_seen = [0] * _HASHES
    total = anchor = 0
    at = 2
    limit = len(data) - 13
    while at < limit:
        found = _next_match(data, at, limit, last_seen)
        if found is None:
            break
        at, earlier = found
        total += _literals(at - anchor)
        length = _match_length(data, earlier + 3, at + 3)
        total += _match_cost(length)
        at += length
        for _ in range(2):
            last_seen[_hash(_three(data, at))] = at
            at += 1
        anchor = at
    return total + _literals(len(data) - anchor)


def _next_match(data: bytes, at: int, limit: int, last_seen: list[int]) -> tuple[int, int] | None:
    """The next place whose three bytes were seen within the window, and where; None before ``limit``."""
    while at < limit:
        word = _three(data, at)
        slot = _hash(word)
        earlier, last_seen[slot] = last_seen[slot], at
        at += 1
        if at - 1 - earlier < _WINDOW and word == _three(data, earlier):
            return (at - 1, earlier) if at < limit else None
    return None


def _match_length(data: bytes, earlier: int, at: int) -> int:
    """Bytes that agree, the first that does not included, short of the last four."""
    end = len(data) - 4 - at
    length = 0
    while length < end:
        length += 1
        if data[earlier + length - 1] != data[at + length - 1]:
            break
    return length


def _match_cost(length: int) -> int:
    length -= 1
    return 3 * (length // _MAX_MATCH) + (3 if length % _MAX_MATCH >= 6 else 2)


def _literals(count: int) -> int:
    return 33 * (count // 32) + (count % 32 + 1 if count % 32 else 0)


def _three(data: bytes, at: int) -> int:
    return data[at] | data[at + 1] << 8 | data[at + 2] << 16


def _hash(word: int) -> int:
    return (2_654_435_769 * word >> 19) & (_HASHES - 1)
