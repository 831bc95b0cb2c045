"""Transactions on their way to a block: signed, written down, sent, sent again, outbid, mined, final.

One transaction at a time waits to be mined, so nonces leave no gap. Signed bytes are in the journal before
the node sees them; after a restart the same bytes are sent again. Of the versions of one transaction any may
be the one that is mined. Rules: op-service/txmgr of the OP Stack."""

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from attribution.errors import Corrupted, Rejected
from chain import journal
from chain.rollup import Rollup, Tag
from chain.signer import SignerClient
from chain.term import Term
from chain.transactions import Call, Fees, Transaction, parse, tx_hash
from cluster.database import reading

BUMP_PERCENT = 10  # what nodes ask of a replacement, on tip and cap
FEE_LIMIT = 5  # times the suggestion; beyond it the same bytes are offered again
GAS_MARGIN_PERCENT = 20
MAX_REVERTS = 3  # each costs gas
OVERTAKEN = ("nonce_too_low", "replacement_underpriced", "fee_too_low")  # the next look at the chain tells


class Courier:
    """``final_tag`` names the block up to which the chain is taken not to change."""

    def __init__(
        self, rows: Engine, rollup: Rollup, signer: SignerClient, term: Term, final_tag: Tag, resubmit_s: int
    ) -> None:
        self._rows = rows
        self._rollup = rollup
        self._signer = signer
        self._term = term
        self._final_tag: Tag = final_tag
        self._resubmit_s = resubmit_s
        self._offered: set[bytes] = set()  # what this process has handed to the node at least once
        self._newest = (0, b"")  # block number and hash at the last look

    def follow(self) -> list[str]:
        """Look at everything that is not final. What is in a block is looked at again when that block is
        final or the chain is no longer the one we saw."""
        said = self._reopen_lost()
        with reading(self._rows) as session:
            pending = journal.live(session)
        if not pending:
            return said
        final_block = self._rollup.block_number(self._final_tag)
        is_same = self._is_same_chain()
        for versions in pending:
            blocks = [version.block for version in versions if version.state == "mined"]
            if not (is_same and blocks and blocks[0] > final_block):
                said += self._follow_one(versions, final_block)
        return said

    def _reopen_lost(self) -> list[str]:
        """A local chain that was killed forgets its last blocks, also final ones: their bytes are sent
        again."""
        nonce = self._rollup.nonce(self._rollup.addresses.settler)
        with reading(self._rows) as session:
            lost = journal.final_from(session, nonce)
        if lost:
            with self._term.writing() as session:
                for version in lost:
                    journal.mark_unmined(session, version)
            self._offered -= {version.tx_hash for version in lost}
        return [f"{version.purpose} was final and is gone from the chain" for version in lost]

    def _is_same_chain(self) -> bool:
        """Does the newest block of the last look still stand? Then so do all below it."""
        newest = self._rollup.block_number()
        number, block_hash = self._newest
        is_same = number <= newest and self._rollup.block_hash(number) == block_hash
        self._newest = newest, self._rollup.block_hash(newest)
        return is_same

    def _follow_one(self, versions: tuple[journal.Version, ...], final_block: int) -> list[str]:
        """Look up every version: any of them may be the one in a block, also after a reorganisation."""
        purpose = versions[0].purpose
        for version in versions:
            found = self._rollup.receipt(version.tx_hash)
            if found is None:
                continue
            if not found.succeeded:
                with self._term.writing() as session:
                    journal.mark_dead(session, versions, version)
                return [f"{purpose} reverted in block {found.block}"]
            said = []
            if version.state != "mined" or version.block != found.block:
                with self._term.writing() as session:
                    journal.mark_mined(session, version, found.block, found.gas_used)
                said.append(f"{purpose} mined in block {found.block}, {found.gas_used} gas")
            if found.block <= final_block:
                with self._term.writing() as session:
                    journal.mark_final(session, version, versions, self._term.now)
                said.append(f"{purpose} final")
            return said
        return self._push(versions)

    def _push(self, versions: tuple[journal.Version, ...]) -> list[str]:
        """No version is in a block: notice if one was, offer the bytes again, or offer more."""
        said = []
        purpose = versions[0].purpose
        for version in versions:
            if version.state == "mined":
                with self._term.writing() as session:
                    journal.mark_unmined(session, version)
                self._offered.discard(version.tx_hash)
                said.append(f"{purpose} fell out of block {version.block}")
        offers = [version for version in versions if version.raw]
        if not offers:
            return said
        settler = self._rollup.addresses.settler
        if self._rollup.nonce(settler, self._final_tag) > versions[0].nonce:
            return [*said, *self._give_up(versions)]
        best = max(offers, key=lambda version: parse(version.raw).fees.cap_wei)
        if best.tx_hash in self._offered and self._term.now - best.created_at >= self._resubmit_s:
            return [*said, *self._outbid(best)]
        if best.tx_hash not in self._offered or best.state == "signed":
            return [*said, *self._offer(best)]
        return said

    def _give_up(self, versions: tuple[journal.Version, ...]) -> list[str]:
        """The nonce is used up for good. Unless a version was mined since we looked, it was not by us."""
        if any(self._rollup.receipt(version.tx_hash) for version in versions):
            return []
        with self._term.writing() as session:
            journal.mark_dead(session, versions, None)
        return [f"{versions[0].purpose}: nonce {versions[0].nonce} went to another transaction"]

    def _offer(self, version: journal.Version) -> list[str]:
        try:
            self._rollup.send_raw(version.raw)
        except Rejected as refusal:
            if refusal.code not in OVERTAKEN:
                raise
        self._offered.add(version.tx_hash)
        with self._term.writing() as session:
            journal.mark_sent(session, version.tx_hash)
        return [f"{version.purpose} sent as {version.tx_hash.hex()}"]

    def _outbid(self, best: journal.Version) -> list[str]:
        """Sign the same call with at least a tenth more, or repeat the bytes at the limit."""
        old = parse(best.raw)
        suggested = self._rollup.suggest_fees()
        fees = Fees(
            max(suggested.tip_wei, _bumped(old.fees.tip_wei)),
            max(suggested.cap_wei, _bumped(old.fees.cap_wei)),
        )
        if fees.cap_wei > FEE_LIMIT * suggested.cap_wei:
            self._rollup.send_raw(best.raw)
            return [f"{best.purpose} waits at {old.fees.cap_wei} wei per gas, the limit"]
        version = Transaction(old.chain_id, old.nonce, old.gas, fees, old.call)
        return self._sign_and_send(best.purpose, version)

    def _sign_and_send(self, purpose: str, transaction: Transaction) -> list[str]:
        """Signed bytes are in the journal before anybody else sees them."""
        raw = self._signer.sign(transaction)
        now = self._term.now
        with self._term.writing() as session:
            journal.add(session, tx_hash(raw), purpose, transaction.nonce, raw, self._term.number, now)
        version = journal.Version(tx_hash(raw), purpose, transaction.nonce, raw, "signed", 0, now)
        return self._offer(version)

    def is_busy(self, session: Session) -> bool:
        """One transaction at a time waits to be mined: nonces never leave a gap."""
        return any(all(v.state in journal.IN_FLIGHT for v in versions) for versions in journal.live(session))

    def submit(self, purpose: str, call: Call) -> list[str]:
        """Make a transaction of a call and send it.

        Raises:
            Rejected: ``reverted``: the contract would refuse it now; nothing was signed.
            Corrupted: it was mined and failed too often although it was to succeed.
        """
        with reading(self._rows) as session:
            num_reverted = journal.num_reverted(session, purpose)
        if num_reverted >= MAX_REVERTS:
            raise Corrupted("keeps_reverting", f"{purpose} failed on chain {num_reverted} times")
        rollup = self._rollup
        sender = self._signer.address()
        gas = rollup.estimate_gas(sender, call) * (100 + GAS_MARGIN_PERCENT) // 100
        chain_id = rollup.addresses.chain_id
        transaction = Transaction(chain_id, rollup.nonce(sender), gas, rollup.suggest_fees(), call)
        return self._sign_and_send(purpose, transaction)

    def adopt(self, purpose: str, hash_on_chain: bytes) -> list[str]:
        found = self._rollup.receipt(hash_on_chain)
        if found is None:  # reorganised away since we looked
            return []
        with self._term.writing() as session:
            term = self._term.number
            journal.add(session, hash_on_chain, purpose, journal.ADOPTED_NONCE, b"", term, self._term.now)
            version = journal.Version(hash_on_chain, purpose, journal.ADOPTED_NONCE, b"", "signed", 0, 0)
            journal.mark_mined(session, version, found.block, found.gas_used)
        return [f"{purpose} was on chain already, in block {found.block}"]


def _bumped(fee_wei: int) -> int:
    return -(-fee_wei * (100 + BUMP_PERCENT) // 100)
