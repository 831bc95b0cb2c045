"""What the signer will sign: calls of named functions of our contracts, on one chain, under caps.

Pure decisions; ``chain/signer.py`` holds the key and the socket. Refusals are ``Rejected`` with a stable code
and both values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attribution.errors import Rejected
from attribution.hashing import keccak256
from chain.transactions import Transaction

DAY_S = 86400


class SignerPolicy(BaseModel):
    """The policy file (JSON). ``contracts`` maps an address (hex) to the signatures that may be called there,
    written as in Solidity: ``"register(address[])"``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chain_id: int
    contracts: dict[str, tuple[str, ...]]
    max_gas: int = Field(default=10_000_000, gt=0)
    max_fee_wei: int = Field(default=100 * 10**9, gt=0)  # per gas
    max_daily_fee_wei: int = Field(default=10**18, gt=0)  # worst case of all that is signed in one UTC day

    @staticmethod
    def read(path: Path) -> "SignerPolicy":
        try:
            return SignerPolicy.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise Rejected("signer_policy", f"policy {path}: {error}", field="policy") from error

    def check(self, transaction: Transaction) -> None:
        """All but the daily cap, which needs to know what was signed before."""
        if transaction.chain_id != self.chain_id:
            raise _refusal("signer_chain_id", "chain_id", transaction.chain_id, self.chain_id)
        if transaction.value_wei:
            raise _refusal("signer_value", "value_wei", transaction.value_wei, 0)
        if transaction.gas > self.max_gas:
            raise _refusal("signer_gas", "gas", transaction.gas, self.max_gas)
        if max(transaction.fees.cap_wei, transaction.fees.tip_wei) > self.max_fee_wei:
            raise _refusal("signer_fee", "max_fee_wei", transaction.fees.cap_wei, self.max_fee_wei)
        selectors = self._selectors().get(transaction.call.to)
        if selectors is None:
            raise _refusal("signer_contract", "to", transaction.call.to.hex(), "our contracts")
        if transaction.call.data[:4] not in selectors:
            raise _refusal(
                "signer_selector", "data", transaction.call.data[:4].hex(), "the allowed functions"
            )

    def _selectors(self) -> Mapping[bytes, frozenset[bytes]]:
        return {
            bytes.fromhex(address.removeprefix("0x")): frozenset(
                keccak256(s.encode())[:4] for s in signatures
            )
            for address, signatures in self.contracts.items()
        }


@dataclass(slots=True)
class DailyFees:
    """Worst-case fees signed today, by nonce: versions of one transaction exclude each other, so only the
    dearest counts, and signing the same bytes again is free."""

    day: int = 0
    worst_by_nonce: dict[int, int] = field(default_factory=dict)

    def add(self, transaction: Transaction, cap_wei: int, now_s: float) -> None:
        """Count it, or ``Rejected`` and nothing is counted."""
        today = int(now_s) // DAY_S
        known = self.worst_by_nonce if today == self.day else {}
        worst = max(known.get(transaction.nonce, 0), transaction.worst_fee_wei)
        after = known | {transaction.nonce: worst}
        if sum(after.values()) > cap_wei:
            raise _refusal("signer_daily_fee", "gas", sum(after.values()), cap_wei)
        self.day, self.worst_by_nonce = today, after


def _refusal(code: str, name: str, asked: object, allowed: object) -> Rejected:
    return Rejected(code, f"{name} is {asked}, the policy allows {allowed}", field=name, http_status=403)
