"""Our contracts on one rollup, typed: what to call, what they hold, what they said. The only module that
knows web3, and no value of web3 leaves it.

Nothing is signed here. A contract's refusal is ``Rejected("reverted")`` with the contract's own error as
``field`` and its values in the message; a node that does not answer, or a payer without gas money, is
``Unavailable``. Nodes word the same refusal differently, so their texts are matched case-insensitively by
substring."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any, Literal, TypeVar

from eth_typing import ChecksumAddress
from web3 import HTTPProvider, Web3
from web3.contract import Contract
from web3.exceptions import (
    BadFunctionCallOutput,
    BlockNotFound,
    ContractLogicError,
    RequestTimedOut,
    TooManyRequests,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.middleware import AttributeDictMiddleware

from attribution.errors import Corrupted, Rejected, Unavailable
from attribution.hashing import keccak256
from attribution.payload import WEI_PER_GWEI
from attribution.types import Capture
from chain.abi import ARTIFACTS, contract_error, event_kinds, field_name
from chain.artifact import load_artifact
from chain.deployment import Deployment
from chain.events import Event, Position
from chain.fees import L1_BLOCK, FeeParameters
from chain.structs import BatchHeader, ClaimCall, PayerState, PeriodHeader, PeriodState
from chain.transactions import Call, Fees, MinedTransaction, tx_hash
from cluster.signatures import SpendCeiling

T = TypeVar("T")
Tag = Literal["latest", "safe", "finalized"] | int

SPEAKERS = ("registry", "escrow", "ledger", "distributor")
ROLE_GRANTED = keccak256(b"RoleGranted(bytes32,address,address)")
ROLE_REVOKED = keccak256(b"RoleRevoked(bytes32,address,address)")
MIN_TIP_WEI = 10**6  # op-node's and op-batcher's default
LOG_RANGE_BLOCKS = 5_000  # nodes refuse wider ranges
TIMEOUT_S = 30
ALREADY_KNOWN = ("already known", "already imported", "known transaction")
NOT_NOW = ("rate limit", "too many requests", "timed out", "header not found", "blockoutofrange")
REFUSALS = {
    "nonce too low": "nonce_too_low",
    "replacement transaction underpriced": "replacement_underpriced",
    "less than block base fee": "fee_too_low",
    "transaction underpriced": "fee_too_low",
}


class Rollup:
    """A node and our contracts on it. Constructing it asks the node nothing. Not shared between threads."""

    def __init__(self, rpc_url: str, addresses: Deployment) -> None:
        self.addresses = addresses
        provider = HTTPProvider(
            rpc_url, request_kwargs={"timeout": TIMEOUT_S}, exception_retry_configuration=None
        )
        # Without web3's middleware for chain ids and names, which would double the questions to the node.
        self._w3 = Web3(provider, middleware=[(AttributeDictMiddleware, "attrdict")])
        self._contracts: dict[str, Contract] = {
            name: self._w3.eth.contract(
                Web3.to_checksum_address(getattr(addresses, name)), abi=load_artifact(artifact).abi
            )
            for name, artifact in ARTIFACTS.items()
        }

    # the node

    def chain_id(self) -> int:
        return _ask(lambda: self._w3.eth.chain_id)

    def block_number(self, tag: Tag = "latest") -> int:
        return _ask(lambda: int(self._w3.eth.get_block(tag)["number"]))

    def block_hash(self, tag: Tag = "latest") -> bytes:
        """Changes under the same number when the chain reorganises."""
        return _ask(lambda: bytes(self._w3.eth.get_block(tag)["hash"]))

    def timestamp(self, tag: Tag = "latest") -> int:
        return _ask(lambda: int(self._w3.eth.get_block(tag)["timestamp"]))

    def nonce(self, sender: bytes, tag: Tag = "latest") -> int:
        return _ask(lambda: int(self._w3.eth.get_transaction_count(_text(sender), tag)))

    def balance_wei(self, holder: bytes, tag: Tag = "latest") -> int:
        """Gas money, not tokens."""
        return _ask(lambda: int(self._w3.eth.get_balance(_text(holder), tag)))

    def code(self, address: bytes, tag: Tag = "latest") -> bytes:
        return _ask(lambda: bytes(self._w3.eth.get_code(_text(address), tag)))

    def storage(self, address: bytes, slot: int, tag: Tag = "latest") -> int:
        return _ask(lambda: int.from_bytes(self._w3.eth.get_storage_at(_text(address), slot, tag), "big"))

    def suggest_fees(self) -> Fees:
        """A cap of twice the base fee: six full blocks in a row do not price the transaction out."""
        base = _ask(lambda: int(self._w3.eth.get_block("latest")["baseFeePerGas"]))
        tip = max(MIN_TIP_WEI, _ask(lambda: int(self._w3.eth.max_priority_fee)))
        return Fees(tip, 2 * base + tip)

    def fee_parameters(self, tag: Tag = "latest") -> FeeParameters:
        """For ``chain.fees``, from the L1Block predeploy's storage (Isthmus layout)."""
        scalars, operator = (self.storage(L1_BLOCK, slot, tag) for slot in (3, 8))
        return FeeParameters(
            base_fee_wei=self.storage(L1_BLOCK, 1, tag),
            blob_base_fee_wei=self.storage(L1_BLOCK, 7, tag),
            base_fee_scalar=scalars >> 96 & 0xFFFFFFFF,
            blob_base_fee_scalar=scalars >> 64 & 0xFFFFFFFF,
            operator_fee_scalar=operator >> 64 & 0xFFFFFFFF,
            operator_fee_constant_wei=operator & 0xFFFFFFFFFFFFFFFF,
        )

    def estimate_gas(self, sender: bytes, call: Call) -> int:
        """``Rejected("reverted")`` if the call would fail now."""
        fields: Any = {"from": _text(sender), "data": "0x" + call.data.hex()}
        if call.to:
            fields["to"] = _text(call.to)
        return _ask(lambda: int(self._w3.eth.estimate_gas(fields)))

    def send_raw(self, raw: bytes) -> bytes:
        """Hand signed bytes to the node; bytes it has already are fine. Returns the transaction's hash.

        Raises:
            Rejected: ``nonce_too_low`` (look for a receipt: one version was mined),
                ``replacement_underpriced``, ``fee_too_low``, else ``transaction_refused``.
            Unavailable: ``insufficient_funds`` (somebody must send gas money), or no answer.
        """
        try:
            with _translated():
                return bytes(self._w3.eth.send_raw_transaction(raw))
        except Rejected as error:
            said = error.message.lower()
            if any(words in said for words in ALREADY_KNOWN):
                return tx_hash(raw)
            if "insufficient funds" in said:
                raise Unavailable("insufficient_funds", error.message, retry_after_s=60.0) from error
            code = next((code for words, code in REFUSALS.items() if words in said), "transaction_refused")
            raise Rejected(code, error.message, field="raw") from error

    def receipt(self, transaction_hash: bytes) -> MinedTransaction | None:
        """None while it is not mined."""
        try:
            with _translated(TransactionNotFound):
                found: Any = self._w3.eth.get_transaction_receipt(transaction_hash)  # type: ignore[arg-type]
        except TransactionNotFound:
            return None
        return MinedTransaction(
            transaction_hash,
            int(found["blockNumber"]),
            bytes(found["blockHash"]),
            found["status"] == 1,
            int(found["gasUsed"]),
            int(found["effectiveGasPrice"]),
            _integer(found.get("l1Fee", 0)),
        )

    # calls for a settler, a payer, a contributor

    def encode_commit_batch(
        self, header: BatchHeader, da_commitment: bytes, captures: Sequence[Capture]
    ) -> Call:
        """``captures`` sorted by payer; what they newly take must sum to the header's fee."""
        fields = (
            header.batch_id,
            header.root,
            header.payload_hash,
            header.num_receipts,
            header.fee_gwei * WEI_PER_GWEI,
        )
        taken = [(_text(c.payer), c.cumulative_gwei * WEI_PER_GWEI) for c in captures]
        return self._call("ledger", "commitBatch", fields, da_commitment, taken)

    def encode_post_period(self, period: PeriodHeader, da_commitment: bytes) -> Call:
        fields = (
            period.period_id,
            period.root,
            period.total_gwei * WEI_PER_GWEI,
            period.first_batch,
            period.last_batch,
            period.ledger_head,
            period.payload_hash,
        )
        return self._call("distributor", "postPeriod", fields, da_commitment)

    def encode_disable(self, period_id: int) -> Call:
        return self._call("distributor", "disable", period_id)

    def encode_register(self, wallets: Sequence[bytes]) -> Call:
        """Wallets on record already are passed over."""
        return self._call("registry", "register", [_text(wallet) for wallet in wallets])

    def encode_rotate(self, contributor_id: bytes, new_wallet: bytes) -> Call:
        return self._call("registry", "rotate", contributor_id, _text(new_wallet))

    def encode_approve(self, spender: bytes, amount_wei: int) -> Call:
        return self._call("token", "approve", _text(spender), amount_wei)

    def encode_transfer(self, to: bytes, amount_wei: int) -> Call:
        return self._call("token", "transfer", _text(to), amount_wei)

    def encode_deposit(self, payer: bytes, amount_wei: int) -> Call:
        """From the sender's allowance to the escrow."""
        return self._call("escrow", "deposit", _text(payer), amount_wei)

    def encode_deposit_with_permit(
        self, payer: bytes, amount_wei: int, deadline: int, signature: bytes
    ) -> Call:
        """``signature`` (65 bytes, r s v) is the payer's EIP-2612 permit; anyone may send it."""
        r, s, v = signature[:32], signature[32:64], signature[64]
        return self._call("escrow", "depositWithPermit", _text(payer), amount_wei, deadline, v, r, s)

    def encode_authorize(self, ceiling: SpendCeiling, signature: bytes) -> Call:
        """Anyone may send it. The ceiling on record already does nothing."""
        fields = (_text(ceiling.payer), _text(ceiling.operator), ceiling.cumulative_max_wei, ceiling.expiry)
        return self._call("escrow", "authorize", fields, signature)

    def encode_request_withdrawal(self, amount_wei: int) -> Call:
        return self._call("escrow", "requestWithdrawal", amount_wei)

    def encode_withdraw(self) -> Call:
        return self._call("escrow", "withdraw")

    def encode_claim(self, claim: ClaimCall) -> Call:
        return self._call(
            "distributor", "claim", claim.contributor_id, claim.cumulative_wei, list(claim.proof)
        )

    def encode_claim_many(self, claims: Sequence[ClaimCall]) -> Call:
        """Leaves that were paid before are passed over."""
        fields = [(c.contributor_id, c.cumulative_wei, list(c.proof)) for c in claims]
        return self._call("distributor", "claimMany", fields)

    # what the contracts hold

    def next_batch_id(self, tag: Tag = "latest") -> int:
        return int(self._read("ledger", "nextBatchId", tag=tag))

    def head(self, tag: Tag = "latest") -> bytes:
        """Of the header chain; zero before the first batch."""
        return bytes(self._read("ledger", "head", tag=tag))

    def head_of(self, batch_id: int, tag: Tag = "latest") -> bytes:
        """Zero if that batch is not settled."""
        return bytes(self._read("ledger", "headOf", batch_id, tag=tag))

    def payer_state(self, payer: bytes, tag: Tag = "latest") -> PayerState:
        deposited, captured, ceiling, expiry, withdrawable_at, withdrawing = self._read(
            "escrow", "payerState", _text(payer), tag=tag
        )
        return PayerState(deposited, captured, ceiling, expiry, withdrawable_at, withdrawing)

    def ceiling_digest(self, ceiling: SpendCeiling) -> bytes:
        """What the payer signs, in the contract's own words."""
        fields = (_text(ceiling.payer), _text(ceiling.operator), ceiling.cumulative_max_wei, ceiling.expiry)
        return bytes(self._read("escrow", "ceilingDigest", fields))

    def wallet_of(self, contributor_id: bytes, tag: Tag = "latest") -> bytes:
        """Zero if nobody registered."""
        return _address(self._read("registry", "walletOf", contributor_id, tag=tag))

    def cumulative_claimed_wei(self, contributor_id: bytes, tag: Tag = "latest") -> int:
        return int(self._read("distributor", "claimedWei", contributor_id, tag=tag))

    def total_claimed_wei(self, tag: Tag = "latest") -> int:
        return int(self._read("distributor", "totalClaimedWei", tag=tag))

    def funded_wei(self, tag: Tag = "latest") -> int:
        """Everything ever paid into the distributor; a period's total may not exceed it."""
        return int(self._read("distributor", "fundedWei", tag=tag))

    def active_period(self, tag: Tag = "latest") -> PeriodState:
        return PeriodState(*self._read("distributor", "activePeriod", tag=tag))

    def pending_period(self, tag: Tag = "latest") -> PeriodState:
        return PeriodState(*self._read("distributor", "pendingPeriod", tag=tag))

    def token_balance_wei(self, holder: bytes, tag: Tag = "latest") -> int:
        return int(self._read("token", "balanceOf", _text(holder), tag=tag))

    def permit_nonce(self, holder: bytes, tag: Tag = "latest") -> int:
        return int(self._read("token", "nonces", _text(holder), tag=tag))

    def constant(self, contract: str, getter: str) -> bytes | int:
        """What a getter without arguments says, an address as 20 bytes: for checking a deployment."""
        value = _plain(self._read(contract, getter))
        assert isinstance(value, bytes | int)
        return value

    def role_holders(self, contract: str) -> dict[bytes, frozenset[bytes]]:
        """Role → who holds it now, from all grants and revocations since the deployment."""
        held: dict[bytes, set[bytes]] = {}
        for log in self._logs([contract], self.addresses.block, self.block_number()):
            if bytes(log["topics"][0]) in (ROLE_GRANTED, ROLE_REVOKED):
                holders = held.setdefault(bytes(log["topics"][1]), set())
                holder = bytes(log["topics"][2])[12:]
                (holders.add if bytes(log["topics"][0]) == ROLE_GRANTED else holders.discard)(holder)
        return {role: frozenset(holders) for role, holders in held.items() if holders}

    # what the contracts said

    def events(self, first_block: int | None = None, tag: Tag = "latest") -> Iterator[Event]:
        """Everything our contracts said from ``first_block`` (default: the first) to ``tag``, in order."""
        last = tag if isinstance(tag, int) else self.block_number(tag)
        start = self.addresses.block if first_block is None else first_block
        by_address = {self._contracts[name].address: self._contracts[name] for name in SPEAKERS}
        for log in self._logs(SPEAKERS, start, last):
            event = _event(by_address[log["address"]], log)
            if event is not None:
                yield event

    def _logs(self, names: Sequence[str], first: int, last: int) -> Iterator[Any]:
        """In chain order, a range of blocks at a time."""
        wanted = [self._contracts[name].address for name in names]
        for low in range(first, last + 1, LOG_RANGE_BLOCKS):
            logs = self._log_range(wanted, low, min(low + LOG_RANGE_BLOCKS - 1, last))
            yield from sorted(logs, key=lambda log: (int(log["blockNumber"]), int(log["logIndex"])))

    def _log_range(self, addresses: Sequence[ChecksumAddress], low: int, high: int) -> list[Any]:
        query: Any = {"fromBlock": low, "toBlock": high, "address": list(addresses)}
        return _ask(lambda: list(self._w3.eth.get_logs(query)))

    def _call(self, name: str, function: str, *args: object) -> Call:
        data = self._contracts[name].encode_abi(function, args=args)
        return Call(getattr(self.addresses, name), bytes.fromhex(data[2:]))

    def _read(self, name: str, function: str, *args: object, tag: Tag = "latest") -> Any:
        bound = getattr(self._contracts[name].functions, function)(*args)
        return _ask(lambda: bound.call(block_identifier=tag))


def _ask(question: Callable[[], T]) -> T:
    with _translated():
        return question()


@contextmanager
def _translated(*kept: type[Exception]) -> Iterator[None]:
    """Turn what web3 and the HTTP client raise into our refusals; ``kept`` pass unchanged."""
    try:
        yield
    except kept:
        raise
    except ContractLogicError as error:
        name, words = contract_error(error.data)
        raise Rejected("reverted", words or str(error), field=name) from error
    except (BadFunctionCallOutput, BlockNotFound) as error:
        raise Unavailable("not_on_chain_yet", f"at this block: {error}") from error
    except (RequestTimedOut, TooManyRequests) as error:
        raise Unavailable("chain_unavailable", f"the node is busy: {error}") from error
    except Web3RPCError as error:
        said = str(error.message or error).lower()
        if any(words in said for words in NOT_NOW):
            raise Unavailable("chain_unavailable", f"the node is busy: {error}") from error
        raise Rejected("refused_by_node", str(error.message or error)) from error
    except Web3Exception as error:
        raise Corrupted("chain_answer", f"{type(error).__name__}: {error}") from error
    except JSONDecodeError as error:
        raise Unavailable("chain_unavailable", f"what answers is no node: {error}") from error
    except OSError as error:  # every failure of the HTTP client is one
        raise Unavailable("chain_unavailable", f"no answer from the node: {error}") from error


def _event(contract: Contract, log: Any) -> Event | None:
    found = event_kinds().get(bytes(log["topics"][0]))
    if found is None:
        return None
    name, kind = found
    args = contract.events[name]().process_log(log)["args"]
    at = Position(int(log["blockNumber"]), int(log["logIndex"]), bytes(log["transactionHash"]))
    return kind(at, **{field_name(field): _plain(value) for field, value in args.items()})


def _plain(value: object) -> Any:
    if isinstance(value, str):
        return _address(value)
    return bytes(value) if isinstance(value, bytes) else value


def _text(address: bytes) -> ChecksumAddress:
    return Web3.to_checksum_address(address)


def _address(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def _integer(value: object) -> int:
    """op-geth's own receipt fields reach us as hex text."""
    return int(value, 16) if isinstance(value, str) else int(str(value))
