"""EIP-712: what contributors and payers sign, and whose signature it is.

The struct hashes equal the contracts' (``Escrow.ceilingDigest``). Signatures are 65 bytes ``r ‖ s ‖ v`` with
``v`` 27 or 28 and low ``s``: the one form that OpenZeppelin's ECDSA takes, so there is no second spelling."""

from dataclasses import dataclass

from eth_account.messages import encode_typed_data
from eth_keys.datatypes import PrivateKey, Signature
from eth_keys.exceptions import BadSignature
from eth_utils.exceptions import ValidationError

from attribution.errors import Rejected
from attribution.hashing import keccak256

_CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
Field = tuple[str, str, object]  # Solidity type, name, value


@dataclass(frozen=True, slots=True)
class ShardReveal:
    """What a contributor signs when the bytes of a committed shard are shown."""

    datanet: str
    contributor_id: bytes
    commitment: bytes
    content_sha256: bytes
    num_rows: int

    def fields(self) -> tuple[Field, ...]:
        return (
            ("string", "datanet", self.datanet),
            ("bytes32", "contributorId", self.contributor_id),
            ("bytes32", "commitment", self.commitment),
            ("bytes32", "contentSha256", self.content_sha256),
            ("uint64", "numRows", self.num_rows),
        )


@dataclass(frozen=True, slots=True)
class SpendCeiling:
    """What a payer signs: ``operator`` (the ledger contract) may capture so much of its deposit in all, until
    ``expiry`` (UTC seconds, inclusive)."""

    payer: bytes
    operator: bytes
    cumulative_max_wei: int
    expiry: int

    def fields(self) -> tuple[Field, ...]:
        return (
            ("address", "payer", self.payer),
            ("address", "operator", self.operator),
            ("uint256", "cumulativeMaxWei", self.cumulative_max_wei),
            ("uint64", "expiry", self.expiry),
        )


@dataclass(frozen=True, slots=True)
class Domain:
    """Where a signature counts: it is worth nothing on another chain or for another contract."""

    name: str
    chain_id: int
    verifying_contract: bytes | None  # None where no contract checks it


def datanets_domain(chain_id: int) -> Domain:
    return Domain("OpenLedger Datanets", chain_id, None)


def escrow_domain(chain_id: int, escrow: bytes) -> Domain:
    return Domain("OpenLedger Escrow", chain_id, escrow)


def digest(value: ShardReveal | SpendCeiling, domain: Domain) -> bytes:
    """The 32 bytes that are signed: keccak of ``0x1901``, the domain's hash and the struct's."""
    fields = value.fields()
    about = {"name": domain.name, "version": "1", "chainId": domain.chain_id}
    if domain.verifying_contract is not None:
        about["verifyingContract"] = domain.verifying_contract
    types = {type(value).__name__: [{"type": kind, "name": name} for kind, name, _ in fields]}
    message = encode_typed_data(about, types, {name: content for _, name, content in fields})
    return keccak256(b"\x19" + message.version + message.header + message.body)


def sign(private_key: bytes, digest: bytes) -> bytes:
    """For tests, demonstrations and command lines; the settler's key signs in ``chain/signer.py`` alone."""
    signature = PrivateKey(private_key).sign_msg_hash(digest).to_bytes()
    return signature[:64] + bytes([signature[64] + 27])


def recover(digest: bytes, signature: bytes) -> bytes:
    """The address (20 bytes) that signed.

    Raises:
        Rejected: ``bad_signature``: not 65 bytes, not in the one accepted form, or of no key at all.
    """
    if len(signature) != 65:
        raise _bad(f"expected 65 bytes, given {len(signature)}")
    v, s = signature[64], int.from_bytes(signature[32:64], "big")
    if v not in (27, 28):
        raise _bad(f"v must be 27 or 28, given {v}")
    if s > _CURVE_ORDER // 2:
        raise _bad("s is in the upper half of the curve's order")
    try:
        public_key = Signature(signature[:64] + bytes([v - 27])).recover_public_key_from_msg_hash(digest)
    except (BadSignature, ValidationError, ValueError) as error:
        raise _bad(str(error)) from error
    return bytes(public_key.to_canonical_address())


def verify(value: ShardReveal | SpendCeiling, domain: Domain, signature: bytes, signer: bytes) -> None:
    """Raises ``Rejected("bad_signature")`` unless ``signer`` signed exactly this value for this domain."""
    found = recover(digest(value, domain), signature)
    if found != signer:
        raise _bad(f"signed by 0x{found.hex()}, expected 0x{signer.hex()}")


def _bad(why: str) -> Rejected:
    return Rejected("bad_signature", why, field="signature", http_status=401)
