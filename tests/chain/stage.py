"""A local rollup with our contracts on it, and the people who act on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from eth_account import Account
from eth_account.messages import encode_typed_data

from attribution.hashing import keccak256
from attribution.merkle import merkle_tree, reward_leaf
from attribution.payload import WEI_PER_GWEI, next_head
from attribution.types import Capture, contributor_id
from chain import anvil
from chain.deploy import Terms, deploy
from chain.deployment import Deployment
from chain.rollup import Rollup
from chain.sending import execute
from chain.structs import BatchHeader, ClaimCall, PeriodHeader
from chain.transactions import Call, MinedTransaction, address_of
from cluster.signatures import Domain, SpendCeiling, digest, escrow_domain, sign

TOKEN = 10**18
FAR = 2**40  # seconds: no test gets there
WITHDRAWAL_DELAY_S = 3_600
NAMES = ("treasury", "admin", "settler", "guardian", "alice", "bob", "carol", "stranger")


def key(name: str) -> bytes:
    """Of a person on this stage; the same in every run."""
    return keccak256(b"stage " + name.encode())


def address(name: str) -> bytes:
    return address_of(key(name))


@dataclass(frozen=True, slots=True)
class Stage:
    rpc_url: str
    rollup: Rollup

    @property
    def deployment(self) -> Deployment:
        return self.rollup.addresses

    def do(self, name: str, call: Call) -> MinedTransaction:
        return execute(self.rollup, key(name), call)

    def fund(self, name: str, amount_gwei: int, *, ceiling_gwei: int = 2**62, expiry: int = FAR) -> None:
        """Deposit for ``name`` and let the ledger capture it."""
        amount_wei = amount_gwei * WEI_PER_GWEI
        self.do("treasury", self.rollup.encode_approve(self.deployment.escrow, amount_wei))
        self.do("treasury", self.rollup.encode_deposit(address(name), amount_wei))
        self.authorize(name, ceiling_gwei=ceiling_gwei, expiry=expiry)

    def authorize(self, name: str, *, ceiling_gwei: int, expiry: int, by: str = "settler") -> None:
        ceiling = SpendCeiling(address(name), self.deployment.ledger, ceiling_gwei * WEI_PER_GWEI, expiry)
        self.do(by, self.rollup.encode_authorize(ceiling, self.sign(name, ceiling)))

    def sign(self, name: str, ceiling: SpendCeiling) -> bytes:
        return sign(key(name), digest(ceiling, self.domain))

    @property
    def domain(self) -> Domain:
        return escrow_domain(self.deployment.chain_id, self.deployment.escrow)

    def permit(self, signer: str, payer: str, amount_wei: int) -> Call:
        """A deposit for ``payer`` with ``signer``'s EIP-2612 permit, as a wallet signs it."""
        d = self.deployment
        domain = {"name": "Open", "version": "1", "chainId": d.chain_id, "verifyingContract": d.token}
        fields = ("owner", "address"), ("spender", "address"), ("value", "uint256"), ("nonce", "uint256")
        types = {"Permit": [{"name": n, "type": t} for n, t in (*fields, ("deadline", "uint256"))]}
        nonce = self.rollup.permit_nonce(address(payer))
        message = {"owner": address(payer), "spender": d.escrow, "value": amount_wei, "nonce": nonce}
        typed = encode_typed_data(domain, types, {**message, "deadline": FAR})
        signature = bytes(Account.sign_message(typed, key(signer)).signature)
        return self.rollup.encode_deposit_with_permit(address(payer), amount_wei, FAR, signature)

    def grant_settler(self, name: str) -> Call:
        """What the ledger's admin might send one day; nothing of ours does."""
        role = keccak256(b"SETTLER")
        data = keccak256(b"grantRole(bytes32,address)")[:4] + role + address(name).rjust(32, b"\0")
        return Call(self.deployment.ledger, data)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Afterwards the chain is as it was before."""
        snapshot = anvil.ask(self.rpc_url, "evm_snapshot")
        try:
            yield
        finally:
            anvil.ask(self.rpc_url, "evm_revert", snapshot)

    def pass_time(self, seconds: int) -> None:
        anvil.mine(self.rpc_url, seconds)

    def batch(self, fee_gwei: int) -> BatchHeader:
        """The next header, with made-up receipts."""
        batch_id = self.rollup.next_batch_id()
        root, payload_hash = (keccak256(b"%s %d" % (what, batch_id)) for what in (b"root", b"payload"))
        return BatchHeader(batch_id, root, payload_hash, 3, fee_gwei)

    def settle(self, spent_gwei: dict[str, int], da: bytes = b"certificate") -> BatchHeader:
        """Commit a batch in which each payer's cumulative spend becomes ``spent_gwei``."""
        captures = self.captures(spent_gwei)
        before = sum(self.rollup.payer_state(c.payer).captured_wei for c in captures) // WEI_PER_GWEI
        header = self.batch(sum(c.cumulative_gwei for c in captures) - before)
        self.do("settler", self.rollup.encode_commit_batch(header, da, captures))
        return header

    def captures(self, spent_gwei: dict[str, int]) -> list[Capture]:
        return sorted((Capture(address(n), v) for n, v in spent_gwei.items()), key=lambda c: c.payer)

    def rewards(self, earned_gwei: dict[str, int]) -> tuple[bytes, dict[str, ClaimCall]]:
        """Root over what each has earned since genesis, and everybody's claim."""
        d = self.deployment
        earned_wei = {name: gwei * WEI_PER_GWEI for name, gwei in earned_gwei.items()}
        leaves = {
            n: reward_leaf(d.chain_id, d.distributor, self.id_of(n), wei) for n, wei in earned_wei.items()
        }
        tree = merkle_tree(list(leaves.values()))
        claims = {n: ClaimCall(self.id_of(n), wei, tree.proof(leaves[n])) for n, wei in earned_wei.items()}
        return tree.root, claims

    def id_of(self, name: str) -> bytes:
        return contributor_id(address(name))

    def period(self, root: bytes, total_gwei: int) -> PeriodHeader:
        """The next period, over all batches that no active period has."""
        active, last = self.rollup.active_period(), self.rollup.next_batch_id() - 1
        head, payload_hash = self.rollup.head_of(last), keccak256(b"period payload")
        first = active.last_batch + 1
        return PeriodHeader(active.period_id + 1, root, total_gwei, first, last, head, payload_hash)

    def close(self, earned_gwei: dict[str, int]) -> dict[str, ClaimCall]:
        """Post the next period; what everybody has earned since genesis is ``earned_gwei``."""
        root, claims = self.rewards(earned_gwei)
        period = self.period(root, sum(earned_gwei.values()))
        self.do("settler", self.rollup.encode_post_period(period, b"certificate"))
        return claims

    def tokens(self, name: str) -> int:
        return self.rollup.token_balance_wei(address(name))


def expected_head(head: bytes, header: BatchHeader, da: bytes) -> bytes:
    return next_head(
        head, header.batch_id, header.root, header.payload_hash, header.num_receipts, header.fee_gwei, da
    )


def set_stage(rpc_url: str, *, activation_delay_s: int = 0, deployer: str = "treasury") -> Stage:
    """Fresh contracts on a chain that runs; everybody has gas money."""
    for name in {*NAMES, deployer}:
        anvil.bridge(rpc_url, address(name), 100 * TOKEN)
    terms = Terms(
        *(address(name) for name in NAMES[:4]),
        withdrawal_delay_s=WITHDRAWAL_DELAY_S,
        activation_delay_s=activation_delay_s,
    )
    return Stage(rpc_url, Rollup(rpc_url, deploy(rpc_url, key(deployer), terms, say=lambda line: None)))
