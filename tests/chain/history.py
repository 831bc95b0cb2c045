"""What honest contracts would have said, made by hand: an auditor's input without a chain, ready to be
tampered with.

Every maker takes ``changed`` fields, which lie; everything else follows from the receipts and credits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attribution.hashing import keccak256, sha256
from attribution.payload import (
    WEI_PER_GWEI,
    PeriodPayload,
    add_payouts,
    batch_tree,
    encode_batch,
    encode_period,
    next_head,
)
from attribution.payout import AdapterClose, Beneficiaries, Split
from attribution.types import ZERO_ID, Batch, Blend, Capture, Credit, Receipt, Share, contributor_id
from chain.deployment import Deployment
from chain.events import (
    BatchCommitted,
    Captured,
    CeilingAuthorized,
    Claimed,
    Deposited,
    Event,
    PeriodDisabled,
    PeriodPosted,
    Position,
    Registered,
)
from chain.findings import Finding, Report
from chain.payload_source import PayloadSource
from chain.replay import Replay
from cluster.storage import open_storage

PLACES = tuple(bytes([i]) * 20 for i in range(1, 10))
DEPLOYMENT = Deployment(31337, 1, *PLACES, withdrawal_delay_s=1, activation_delay_s=0, pool_delay_s=1)
ALICE, BOB = b"\xa1" * 20, b"\xb0" * 20
BASE, ADAPTER, OTHER = sha256(b"base"), sha256(b"adapter"), sha256(b"other adapter")
SPLIT = Split(50_000, 150_000, 100_000, 50_000, 600_000, 50_000)
OWNER, PLATFORM, HOST, POOL, CAROL, DAVE = (sha256(bytes([i])) for i in range(6))
WHO = Beneficiaries(PLATFORM, HOST, ZERO_ID, ZERO_ID, POOL)
CREDITS = {CAROL: 5, DAVE: 7}


def receipt(payer: bytes, seq: int, fee_gwei: int, adapter_id: bytes = ADAPTER, label: str = "") -> Receipt:
    request_id = keccak256(payer + bytes([seq]) + label.encode())
    return Receipt(request_id, payer, seq, BASE, adapter_id, 3, 4, fee_gwei, keccak256(request_id), 1)


def close(fee_gwei: int, credits: Mapping[bytes, int] = CREDITS, adapter_id: bytes = ADAPTER) -> AdapterClose:
    """Each contributor has one group, named after it."""
    values = [Credit(sha256(who), who, value) for who, value in credits.items()]
    ordered = tuple(sorted(values, key=lambda credit: credit.group_id))
    return AdapterClose(adapter_id, OWNER, fee_gwei, "made up", ZERO_ID, ordered, ())


@dataclass
class History:
    folder: Path
    events: list[Event] = field(default_factory=list)
    head: bytes = ZERO_ID
    batches: list[Batch] = field(default_factory=list)
    rewards: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        for payer in (ALICE, BOB):
            self.events.append(Deposited(self._at(), payer, payer, 1000 * WEI_PER_GWEI, 1000 * WEI_PER_GWEI))
            ceiling_wei = 900 * WEI_PER_GWEI
            self.events.append(CeilingAuthorized(self._at(), payer, PLACES[3], ceiling_wei, 2**40))

    def _at(self) -> Position:
        number = len(self.events)
        return Position(number, 0, keccak256(bytes([number])))

    def _archive(self, payload: bytes) -> bytes:
        open_storage(f"file:{self.folder}").put(f"blobs/{keccak256(payload).hex()}", payload)
        return keccak256(payload)

    def spent_gwei(self, payer: bytes, batches: Sequence[Batch]) -> int:
        return sum(r.fee_gwei for batch in batches for r in batch.receipts if r.payer == payer)

    def batch(
        self,
        receipts: Sequence[Receipt],
        captures: Mapping[bytes, int] | None = None,
        blends: tuple[Blend, ...] = (),
        **changed: Any,
    ) -> None:
        """A settled batch; ``captures`` (cumulative gwei) lie in payload and events alike."""
        ordered = tuple(sorted(receipts, key=lambda r: r.receipt_id))
        batch_id = len(self.batches) + 1
        batch = Batch(batch_id, ordered, (), blends)
        spent = {p: self.spent_gwei(p, [*self.batches, batch]) for p in {r.payer for r in ordered}}
        taken = {**spent, **(captures or {})}
        batch = replace(batch, captures=tuple(Capture(payer, taken[payer]) for payer in sorted(taken)))
        payload_hash = self._archive(encode_batch(batch))
        root = batch_tree(batch).root
        fee_wei = batch.fee_gwei * WEI_PER_GWEI
        at, certificate = self._at(), b"certificate %d" % batch_id
        event = BatchCommitted(at, batch_id, root, payload_hash, len(ordered), fee_wei, b"", certificate)
        event = replace(event, **{k: v for k, v in changed.items() if k != "head"})
        fee_gwei = event.fee_wei // WEI_PER_GWEI
        bound = (event.root, event.payload_hash, event.num_receipts, fee_gwei, event.da_commitment)
        self.head = next_head(self.head, event.batch_id, *bound)
        self.events.append(replace(event, head=changed.get("head", self.head)))
        for capture in batch.captures:
            taken_before = [c for b in self.batches for c in b.captures if c.payer == capture.payer]
            before_gwei = max((c.cumulative_gwei for c in taken_before), default=0)
            gwei = (capture.cumulative_gwei - before_gwei, capture.cumulative_gwei)
            amounts = gwei[0] * WEI_PER_GWEI, gwei[1] * WEI_PER_GWEI
            self.events.append(Captured(self._at(), capture.payer, batch_id, *amounts))
        self.batches.append(batch)

    def period(
        self,
        closes: Sequence[AdapterClose],
        period_id: int = 1,
        first_batch: int = 1,
        payload: Mapping[str, Any] | None = None,
        **changed: Any,
    ) -> PeriodPayload:
        """A posted period; ``payload`` lies in what is dispersed, ``changed`` in what is posted."""
        honest = PeriodPayload(
            period_id,
            first_batch,
            len(self.batches),
            self.head,
            DEPLOYMENT.chain_id,
            DEPLOYMENT.distributor,
            SPLIT,
            WHO,
            tuple(closes),
            (),
            (),
        )
        honest = replace(honest, rewards=add_payouts(self.rewards, honest.payouts()))
        period = replace(honest, **(payload or {}))
        event = PeriodPosted(
            self._at(),
            period_id,
            period.tree().root,
            self._archive(encode_period(period)),
            period.total_gwei * WEI_PER_GWEI,
            first_batch,
            len(self.batches),
            self.head,
            0,
            b"certificate of period",
        )
        self.events.append(replace(event, **changed))
        self.rewards = period.rewards
        return period

    def disable(self, period_id: int) -> None:
        self.events.append(PeriodDisabled(self._at(), period_id, ZERO_ID, PLACES[8]))
        self.rewards = ()

    def claim(
        self, wallet: bytes, cumulative_gwei: int, paid_gwei: int, paid_to: bytes | None = None
    ) -> None:
        who = contributor_id(wallet)
        self.events.append(Registered(self._at(), who, wallet))
        amounts = paid_gwei * WEI_PER_GWEI, cumulative_gwei * WEI_PER_GWEI
        self.events.append(Claimed(self._at(), who, paid_to or wallet, *amounts))

    def audit(self, escrow_gwei: int = 10**6, distributor_gwei: int = 10**6) -> list[Finding]:
        return list(self.report(escrow_gwei, distributor_gwei).findings)

    def report(self, escrow_gwei: int = 10**6, distributor_gwei: int = 10**6) -> Report:
        replay = Replay(DEPLOYMENT, PayloadSource(None, open_storage(f"file:{self.folder}")))
        for event in self.events:
            replay.apply(event)
        replay.finish(escrow_gwei * WEI_PER_GWEI, distributor_gwei * WEI_PER_GWEI)
        return replay.report()
