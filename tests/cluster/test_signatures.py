"""EIP-712: what is signed is what the contract hashes, and every other signature is refused."""

import dataclasses
import secrets

import pytest
from eth_account import Account
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import Rejected
from attribution.hashing import keccak256
from cluster.signatures import (
    Domain,
    ShardReveal,
    SpendCeiling,
    datanets_domain,
    digest,
    escrow_domain,
    recover,
    sign,
    verify,
)

KEY = b"\x11" * 32
SIGNER = bytes.fromhex(Account.from_key(KEY).address[2:])
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
CEILING = SpendCeiling(SIGNER, b"\x22" * 20, 5 * 10**18, 1_900_000_000)
REVEAL = ShardReveal("python-lint", b"\x01" * 32, b"\x02" * 32, b"\x03" * 32, 120)
ESCROW = escrow_domain(31337, b"\x44" * 20)
DATANETS = datanets_domain(31337)


def word(value: int | bytes) -> bytes:
    return value.to_bytes(32, "big") if isinstance(value, int) else value.rjust(32, b"\0")


def test_the_ceiling_is_hashed_as_the_contract_does() -> None:
    """The formula of EIP-712 by hand: type hash, domain separator, 0x1901."""
    kind = b"SpendCeiling(address payer,address operator,uint256 cumulativeMaxWei,uint64 expiry)"
    fields = (CEILING.payer, CEILING.operator, CEILING.cumulative_max_wei, CEILING.expiry)
    struct = keccak256(keccak256(kind) + b"".join(map(word, fields)))
    about = b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
    names = keccak256(about) + keccak256(b"OpenLedger Escrow") + keccak256(b"1")
    separator = keccak256(names + word(31337) + word(b"\x44" * 20))
    assert digest(CEILING, ESCROW) == keccak256(b"\x19\x01" + separator + struct)


def test_a_reveal_is_hashed_by_its_fields() -> None:
    fields = b"string datanet,bytes32 contributorId,bytes32 commitment,bytes32 contentSha256,uint64 numRows"
    kind = b"ShardReveal(" + fields + b")"
    ids = REVEAL.contributor_id + REVEAL.commitment + REVEAL.content_sha256
    struct = keccak256(keccak256(kind) + keccak256(REVEAL.datanet.encode()) + ids + word(REVEAL.num_rows))
    about = keccak256(b"EIP712Domain(string name,string version,uint256 chainId)")
    separator = keccak256(about + keccak256(b"OpenLedger Datanets") + keccak256(b"1") + word(31337))
    assert digest(REVEAL, DATANETS) == keccak256(b"\x19\x01" + separator + struct)


def test_a_wallet_signs_the_same() -> None:
    """A browser wallet signs typed data, not digests: eth_account's own path stands for it."""
    message = {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "SpendCeiling": [
                {"name": "payer", "type": "address"},
                {"name": "operator", "type": "address"},
                {"name": "cumulativeMaxWei", "type": "uint256"},
                {"name": "expiry", "type": "uint64"},
            ],
        },
        "primaryType": "SpendCeiling",
        "domain": {
            "name": "OpenLedger Escrow",
            "version": "1",
            "chainId": 31337,
            "verifyingContract": "0x" + "44" * 20,
        },
        "message": {
            "payer": "0x" + SIGNER.hex(),
            "operator": "0x" + "22" * 20,
            "cumulativeMaxWei": 5 * 10**18,
            "expiry": 1_900_000_000,
        },
    }
    signature = bytes(Account.sign_typed_data(KEY, full_message=message).signature)
    verify(CEILING, ESCROW, signature, SIGNER)


@given(key=st.binary(min_size=32, max_size=32), hashed=st.binary(min_size=32, max_size=32))
def test_recover_inverts_sign(key: bytes, hashed: bytes) -> None:
    if not 0 < int.from_bytes(key, "big") < ORDER:
        return
    signature = sign(key, hashed)
    assert recover(hashed, signature) == bytes.fromhex(Account.from_key(key).address[2:])
    assert int.from_bytes(signature[32:64], "big") <= ORDER // 2


def test_the_other_half_of_the_curve_is_refused() -> None:
    """Anyone can turn a signature into its high-s twin; only one of the two may count."""
    signature = sign(KEY, digest(CEILING, ESCROW))
    high = ORDER - int.from_bytes(signature[32:64], "big")
    twin = signature[:32] + high.to_bytes(32, "big") + bytes([27 + 28 - signature[64]])
    with pytest.raises(Rejected, match="upper half"):
        verify(CEILING, ESCROW, twin, SIGNER)


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        b"\1" * 64,
        b"\1" * 66,
        bytes(65),
        b"\1" * 64 + b"\0",
        b"\0" * 64 + b"\x1b",
        b"\xff" * 64 + b"\x1b",
    ],
)
def test_what_is_no_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(Rejected) as refusal:
        recover(b"\1" * 32, signature)
    assert (refusal.value.code, refusal.value.http_status) == ("bad_signature", 401)


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        (dataclasses.replace(CEILING, cumulative_max_wei=CEILING.cumulative_max_wei + 1), ESCROW),
        (dataclasses.replace(CEILING, expiry=CEILING.expiry + 1), ESCROW),
        (CEILING, escrow_domain(10, b"\x44" * 20)),
        (CEILING, escrow_domain(31337, b"\x45" * 20)),
        (CEILING, Domain("OpenLedger Datanets", 31337, b"\x44" * 20)),
    ],
)
def test_a_signature_counts_for_one_value_in_one_place(value: SpendCeiling, domain: Domain) -> None:
    signature = sign(KEY, digest(CEILING, ESCROW))
    with pytest.raises(Rejected, match=SIGNER.hex()):
        verify(value, domain, signature, SIGNER)


def test_somebody_elses_signature_is_refused() -> None:
    with pytest.raises(Rejected, match="expected"):
        verify(REVEAL, DATANETS, sign(secrets.token_bytes(32), digest(REVEAL, DATANETS)), SIGNER)
