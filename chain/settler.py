"""The settler: receipts in, settled batches and posted periods out, each exactly once.

A plain state machine over rows. Each ``tick`` takes leadership, looks at the chain, and moves every row that
can move by one step; a process that dies between any two statements is replaced by one that reads the rows.
The rules that make this safe: what reaches the network was written down before (payloads, certificates,
signed bytes); a batch's id, receipts and payload never change once sealed; one transaction waits to be mined
at a time; the chain itself refuses a batch or period that it has; every write checks the *term* of the
lease."""

import time
from collections.abc import Callable

from sqlalchemy import select, update

from attribution.errors import Corrupted, Rejected, Unavailable
from attribution.hashing import keccak256
from attribution.payload import WEI_PER_GWEI, decode_batch, decode_period, encode_batch, next_head
from attribution.types import Batch
from chain import outbox
from chain.courier import Courier
from chain.deposits import DepositWatch
from chain.events import BatchCommitted, PeriodPosted
from chain.structs import BatchHeader, PeriodHeader
from chain.term import Term
from chain.world import SettlerRules, World
from cluster import receipts
from cluster.database import reading
from cluster.signatures import SpendCeiling
from cluster.tables import BatchRow, PayerRow, PeriodRow

CEILING_MARGIN_S = 600  # of chain time: so long may a batch wait for its block


class Settler:
    """``holder`` names this process; two with one name fence each other like any two."""

    def __init__(
        self, world: World, rules: SettlerRules, holder: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._world = world
        self._rules = rules
        self._term = Term(world.rows, holder, rules.lease_s, clock)
        self._deposits = DepositWatch(world.rollup, rules.final_tag)
        self._courier = Courier(
            world.rows, world.rollup, world.signer, self._term, rules.final_tag, rules.resubmit_s
        )

    def tick(self) -> list[str]:
        """Do what can be done now. Returns a line for everything that happened and for every step that has to
        wait; empty if nothing did.

        Raises:
            Corrupted: rows, archive, DA layer and chain disagree: a person must look before the next tick.
        """
        said = self._term.hold()
        if not self._term.is_held:
            return said
        steps = (
            self._count_deposits,
            self._courier.follow,
            self._seal,
            self._disperse_batch,
            self._disperse_period,
            self._submit_batch,
            self._submit_period,
        )
        for step in steps:
            try:
                said += step()
            except (Unavailable, Rejected) as refusal:
                if refusal.code == "fenced":
                    self._term.drop()
                    return [*said, f"another settler leads: {refusal.message}"]
                said.append(f"{step.__name__.strip('_')} waits: {refusal.code}: {refusal.message}")
        return said

    # deposits

    def _count_deposits(self) -> list[str]:
        seen = self._deposits.look()
        if seen is None:
            return []
        with self._term.writing() as session:
            said = seen.record(session, self._term.now)
        self._deposits.done(seen)
        return said

    # batches

    def _seal(self) -> list[str]:
        with reading(self._world.rows) as session:
            if outbox.num_waiting(session) == 0:
                return []
            if not outbox.is_due(receipts.outbox(session), self._rules.batch, self._term.now):
                return []
            batch = outbox.next_batch(session, self._rules.batch)
        payload = encode_batch(batch)
        payload_hash = keccak256(payload)
        self._world.storage.put(_archive_key(payload_hash.hex()), payload)
        with self._term.writing() as session:
            outbox.record(session, batch, payload_hash, self._term.number, self._term.now)
        return [f"batch:{batch.batch_id} sealed: {len(batch.receipts)} receipts, {batch.fee_gwei} gwei"]

    def _disperse_batch(self) -> list[str]:
        with reading(self._world.rows) as session:
            found = session.execute(
                select(BatchRow.batch_id, BatchRow.payload_hash)
                .where(BatchRow.state == "sealed")
                .order_by(BatchRow.batch_id)
            ).first()
        if found is None:
            return []
        commitment = self._world.da.put(self._archived(found.payload_hash))
        with self._term.writing() as session:
            session.execute(
                update(BatchRow)
                .where(BatchRow.batch_id == found.batch_id, BatchRow.state == "sealed")
                .values(state="dispersed", da_commitment=commitment)
            )
        return [f"batch:{found.batch_id} dispersed: certificate of {len(commitment)} bytes"]

    def _submit_batch(self) -> list[str]:
        """The lowest batch that is not on its way, after the ceilings its captures need."""
        with reading(self._world.rows) as session:
            if self._courier.is_busy(session):
                return []
            row = session.scalars(
                select(BatchRow)
                .where(BatchRow.state.in_(("sealed", "dispersed", "sent")))
                .order_by(BatchRow.batch_id)
            ).first()
        if row is None or row.state == "sealed":
            return []
        if self._world.rollup.next_batch_id() > row.batch_id:
            return self._adopt_batch(row)
        payload_hash = bytes.fromhex(row.payload_hash)
        if not self._reads_back(row.da_commitment, payload_hash):
            return self._discard(BatchRow, row.batch_id, "sealed")
        batch = decode_batch(self._archived(row.payload_hash))
        ceiling = self._missing_ceiling(batch)
        if ceiling is not None:
            return ceiling()
        header = BatchHeader(
            row.batch_id, bytes.fromhex(row.root), payload_hash, row.num_receipts, row.fee_gwei
        )
        call = self._world.rollup.encode_commit_batch(header, row.da_commitment, batch.captures)
        return self._courier.submit(f"batch:{row.batch_id}", call)

    def _adopt_batch(self, row: BatchRow) -> list[str]:
        """The chain has this batch already. If it is ours to the byte, take the transaction over."""
        rollup = self._world.rollup
        head = next_head(
            rollup.head_of(row.batch_id - 1),
            row.batch_id,
            bytes.fromhex(row.root),
            bytes.fromhex(row.payload_hash),
            row.num_receipts,
            row.fee_gwei,
            row.da_commitment,
        )
        on_chain = rollup.head_of(row.batch_id)
        if head != on_chain:
            raise Corrupted(
                "foreign_batch", f"batch {row.batch_id}: head {on_chain.hex()} on chain, {head.hex()} in rows"
            )
        for event in rollup.events():
            if isinstance(event, BatchCommitted) and event.batch_id == row.batch_id:
                return self._courier.adopt(f"batch:{row.batch_id}", event.at.tx_hash)
        return []

    def _missing_ceiling(self, batch: Batch) -> Callable[[], list[str]] | None:
        """How to authorise the first payer whose ceiling on chain does not cover what this batch takes, or
        may end before the batch is in a block."""
        must_last = self._world.rollup.timestamp() + CEILING_MARGIN_S
        for capture in batch.captures:
            state = self._world.rollup.payer_state(capture.payer)
            with reading(self._world.rows) as session:
                payer = session.get_one(PayerRow, capture.payer.hex())
            signed_wei = payer.ceiling_gwei * WEI_PER_GWEI
            is_short = capture.cumulative_gwei * WEI_PER_GWEI > state.ceiling_wei or state.expiry < must_last
            if is_short and (signed_wei > state.ceiling_wei or payer.ceiling_expiry > state.expiry):
                ledger = self._world.rollup.addresses.ledger
                ceiling = SpendCeiling(capture.payer, ledger, signed_wei, payer.ceiling_expiry)
                call = self._world.rollup.encode_authorize(ceiling, payer.ceiling_signature)
                purpose = f"ceiling:{payer.payer}:{payer.ceiling_gwei}"
                return lambda: self._courier.submit(purpose, call)
        return None

    # periods

    def _disperse_period(self) -> list[str]:
        with reading(self._world.rows) as session:
            found = session.execute(
                select(PeriodRow.period_id, PeriodRow.payload_hash)
                .where(PeriodRow.state == "closed")
                .order_by(PeriodRow.period_id)
            ).first()
        if found is None:
            return []
        commitment = self._world.da.put(self._archived(found.payload_hash))
        with self._term.writing() as session:
            session.execute(
                update(PeriodRow)
                .where(PeriodRow.period_id == found.period_id, PeriodRow.state == "closed")
                .values(state="dispersed", da_commitment=commitment)
            )
        return [f"period:{found.period_id} dispersed: certificate of {len(commitment)} bytes"]

    def _submit_period(self) -> list[str]:
        with reading(self._world.rows) as session:
            if self._courier.is_busy(session):
                return []
            row = session.scalars(
                select(PeriodRow)
                .where(PeriodRow.state.in_(("closed", "dispersed", "sent")))
                .order_by(PeriodRow.period_id)
            ).first()
        if row is None or row.state == "closed":
            return []
        adopted = self._adopt_period(row)
        if adopted:
            return adopted
        payload_hash = bytes.fromhex(row.payload_hash)
        if not self._reads_back(row.da_commitment, payload_hash):
            return self._discard(PeriodRow, row.period_id, "closed")
        head = decode_period(self._archived(row.payload_hash)).ledger_head
        header = PeriodHeader(
            row.period_id,
            bytes.fromhex(row.root),
            row.total_gwei,
            row.first_batch,
            row.last_batch,
            head,
            payload_hash,
        )
        call = self._world.rollup.encode_post_period(header, row.da_commitment)
        return self._courier.submit(f"period:{row.period_id}", call)

    def _adopt_period(self, row: PeriodRow) -> list[str]:
        """Only a period that was on its way before can be on chain; a disabled one is not looked at again."""
        newest = max(
            self._world.rollup.active_period().period_id, self._world.rollup.pending_period().period_id
        )
        if newest < row.period_id:
            return []
        posted = [event for event in self._world.rollup.events() if isinstance(event, PeriodPosted)]
        found = [event for event in posted if event.period_id == row.period_id][-1]
        if (found.root.hex(), found.payload_hash.hex()) != (row.root, row.payload_hash):
            raise Corrupted(
                "foreign_period",
                f"period {row.period_id}: root {found.root.hex()} on chain, {row.root} in rows",
            )
        return self._courier.adopt(f"period:{row.period_id}", found.at.tx_hash)

    # what batches and periods share

    def _archived(self, payload_hash: str) -> bytes:
        payload = self._world.storage.get(_archive_key(payload_hash))
        found = keccak256(payload).hex()
        if found != payload_hash:
            raise Corrupted("archive_hash", f"blobs/{payload_hash} holds bytes with hash {found}")
        return payload

    def _reads_back(self, commitment: bytes, payload_hash: bytes) -> bool:
        """Does the certificate lead to the payload? Asked before the chain is told so for ever."""
        try:
            return keccak256(self._world.da.get(commitment)) == payload_hash
        except Corrupted:
            return False

    def _discard(self, table: type[BatchRow] | type[PeriodRow], number: int, state: str) -> list[str]:
        key = BatchRow.batch_id if table is BatchRow else PeriodRow.period_id
        with self._term.writing() as session:
            session.execute(update(table).where(key == number).values(state=state, da_commitment=b""))
        return [f"{table.__tablename__} {number}: certificate does not lead to the payload, dispersing again"]


def _archive_key(payload_hash: str) -> str:
    return f"blobs/{payload_hash}"
