"""Everything our contracts ever said, replayed with integers: what must be true follows, and what is not is
found.

No row, file or statement of the operator is believed. Batches are read from the payloads that their headers
hash; captures must equal the receipts' fees; a period's rewards are paid out again from its credits."""

from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace

from attribution.errors import Corrupted
from attribution.payload import (
    WEI_PER_GWEI,
    PeriodPayload,
    add_payouts,
    batch_tree,
    decode_batch,
    decode_period,
    next_head,
)
from attribution.payout import AdapterClose, Payouts, fee_shares
from attribution.types import ZERO_ID, Batch, Share
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
    Registered,
    Rotated,
    Withdrawn,
)
from chain.findings import BatchLine, Finding, PeriodLine, Report
from chain.payload_source import PayloadSource


@dataclass(slots=True)
class PayerBook:
    """One payer, as its events and receipts say."""

    deposited_wei: int = 0
    ceiling_wei: int = 0
    captured_wei: int = 0
    last_seq: int = 0
    spent_gwei: int = 0


@dataclass(slots=True)
class Earned:
    """What beneficiaries have earned and what adapters have outstanding, behind some period."""

    last_batch: int = 0
    period_id: int = 0
    rewards: tuple[Share, ...] = ()
    total_wei: int = 0
    outstanding_gwei: dict[bytes, int] = field(default_factory=lambda: defaultdict(int))


class Replay:
    """Feed it every event in order, then read ``findings``."""

    def __init__(self, deployment: Deployment, source: PayloadSource) -> None:
        self._deployment = deployment
        self._source = source
        self._payers: dict[bytes, PayerBook] = defaultdict(PayerBook)
        self._wallets: dict[bytes, bytes] = {}
        self._heads = [ZERO_ID]
        self._fees: list[dict[bytes, int]] = [{}]  # by batch, by adapter
        self._due: dict[tuple[int, bytes], int] = {}  # captures announced by a payload, gwei cumulative
        self._seen: set[bytes] = set()  # request ids
        self._is_blind = (
            False  # a batch's receipts are not to be had: what is summed over them is not checked
        )
        self._earned = Earned()
        self._before = Earned()  # the newest period, if it is disabled
        self._leaves: dict[bytes, set[int]] = defaultdict(set)  # cumulative wei a posted root has promised
        self._claimed: dict[bytes, int] = defaultdict(int)
        self.adapter_ids: set[bytes] = set()  # that receipts name, alone or in a blend
        self.closes: list[tuple[int, AdapterClose]] = []  # by which period
        self.findings: list[Finding] = []
        self.batches: list[BatchLine] = []
        self.periods: list[PeriodLine] = []
        self.checked: dict[str, int] = dict.fromkeys(
            ("events", "batches", "receipts", "captures", "periods", "payouts", "claims"), 0
        )

    def apply(self, event: Event) -> None:
        self.checked["events"] += 1
        match event:
            case Deposited():
                self._payers[event.payer].deposited_wei += event.amount_wei
            case Withdrawn():
                self._payers[event.payer].deposited_wei -= event.amount_wei
            case CeilingAuthorized():
                self._payers[event.payer].ceiling_wei = event.cumulative_max_wei
            case Captured():
                self._capture(event)
            case BatchCommitted():
                self._batch(event)
            case PeriodPosted():
                self._period(event)
            case PeriodDisabled():
                self._disable(event)
            case Claimed():
                self._claim(event)
            case Registered():
                self._wallets[event.contributor_id] = event.wallet
            case Rotated():
                self._wallets[event.contributor_id] = event.new_wallet

    def finish(self, escrow_wei: int, distributor_wei: int) -> None:
        """After the last event: nothing announced is missing, and the contracts hold what they owe."""
        self._missing_captures()
        held = sum(book.deposited_wei - book.captured_wei for book in self._payers.values())
        if escrow_wei < held:
            self._find("escrow_balance", "escrow", f"at least {held} wei", f"{escrow_wei} wei")
        owed = self._earned.total_wei - sum(self._claimed.values())
        if distributor_wei < owed:
            self._find("distributor_balance", "distributor", f"at least {owed} wei", f"{distributor_wei} wei")

    def report(self) -> Report:
        """The arithmetic audit's."""
        lines = tuple(self.batches), tuple(self.periods), tuple(self.findings)
        return Report("arithmetic", self.checked, *lines)

    def _find(self, code: str, subject: str, expected: object, found: object) -> None:
        self.findings.append(Finding(code, subject, str(expected), str(found)))

    def _same(self, code: str, subject: str, expected: object, found: object) -> bool:
        if expected != found:
            shown = [value.hex() if isinstance(value, bytes) else value for value in (expected, found)]
            self._find(code, subject, *shown)
        return expected == found

    # batches

    def _batch(self, event: BatchCommitted) -> None:
        self._missing_captures()
        subject = f"batch {event.batch_id}"
        self.checked["batches"] += 1
        self._same("batch_gap", subject, len(self._heads), event.batch_id)
        fee_gwei, dust = divmod(event.fee_wei, WEI_PER_GWEI)
        self._same("batch_fee", f"{subject}, below a gwei", 0, dust)
        head = next_head(
            self._heads[-1],
            event.batch_id,
            event.root,
            event.payload_hash,
            event.num_receipts,
            fee_gwei,
            event.da_commitment,
        )
        self._same("head", subject, head, event.head)
        self._heads.append(event.head)
        copies = self._source.fetch(subject, event.da_commitment, event.payload_hash)
        self.findings += copies.findings
        self.batches.append(
            BatchLine(
                event.batch_id,
                event.num_receipts,
                fee_gwei,
                event.payload_hash,
                event.at.tx_hash,
                copies.sources,
            )
        )
        self._fees.append({})
        if copies.payload is None:
            self._is_blind = True
        else:
            self._receipts(event, copies.payload)

    def _receipts(self, event: BatchCommitted, payload: bytes) -> None:
        subject = f"batch {event.batch_id}"
        try:
            batch = decode_batch(payload)
        except Corrupted as error:
            return self._find("batch_payload", subject, "a batch payload", error.message)
        self._same("batch_id", subject, event.batch_id, batch.batch_id)
        self._same("batch_root", subject, batch_tree(batch).root, event.root)
        self._same("batch_receipts", subject, len(batch.receipts), event.num_receipts)
        self._same("batch_fee", subject, batch.fee_gwei * WEI_PER_GWEI, event.fee_wei)
        blends = {blend.blend_id: blend for blend in batch.blends}
        for receipt in sorted(batch.receipts, key=lambda receipt: (receipt.payer, receipt.payer_seq)):
            self.checked["receipts"] += 1
            book = self._payers[receipt.payer]
            of_payer = f"{subject}, payer {receipt.payer.hex()}"
            if not self._is_blind:
                self._same("payer_seq", of_payer, book.last_seq + 1, receipt.payer_seq)
            book.last_seq = receipt.payer_seq
            book.spent_gwei += receipt.fee_gwei
            if receipt.request_id in self._seen:
                self._find("receipt_twice", f"{subject}, request {receipt.request_id.hex()}", "once", "again")
            self._seen.add(receipt.request_id)
            fees = self._fees[-1]
            for adapter_id, fee_gwei in fee_shares(receipt, blends):
                self.adapter_ids.add(adapter_id)
                fees[adapter_id] = fees.get(adapter_id, 0) + fee_gwei
        self._announce(event.batch_id, batch)

    def _announce(self, batch_id: int, batch: Batch) -> None:
        """The payload's captures follow from its receipts; the escrow must say the same in this
        transaction."""
        if self._is_blind:
            return
        for capture in batch.captures:
            subject = f"batch {batch_id}, payer {capture.payer.hex()}"
            spent_gwei = self._payers[capture.payer].spent_gwei
            self._same("capture", subject, f"{spent_gwei} gwei", f"{capture.cumulative_gwei} gwei")
            self._due[batch_id, capture.payer] = spent_gwei

    def _capture(self, event: Captured) -> None:
        self.checked["captures"] += 1
        subject = f"batch {event.batch_id}, payer {event.payer.hex()}"
        book = self._payers[event.payer]
        self._same("capture_amount", subject, event.cumulative_wei - book.captured_wei, event.amount_wei)
        due_gwei = self._due.pop((event.batch_id, event.payer), None)
        if due_gwei is not None:
            self._same("captured", subject, due_gwei * WEI_PER_GWEI, event.cumulative_wei)
        elif not self._is_blind:
            self._find("captured", subject, "no capture", f"{event.cumulative_wei} wei")
        limit_wei = min(book.deposited_wei, book.ceiling_wei)
        if event.cumulative_wei > limit_wei:
            self._find("over_ceiling", subject, f"at most {limit_wei} wei", f"{event.cumulative_wei} wei")
        book.captured_wei = event.cumulative_wei

    def _missing_captures(self) -> None:
        for (batch_id, payer), gwei in self._due.items():
            self._find("captured", f"batch {batch_id}, payer {payer.hex()}", f"{gwei} gwei", "no capture")
        self._due.clear()

    # periods

    def _period(self, event: PeriodPosted) -> None:
        self.checked["periods"] += 1
        subject = f"period {event.period_id}"
        self._same("period_gap", subject, self._earned.period_id + 1, event.period_id)
        self._same("period_batches", subject, self._earned.last_batch + 1, event.first_batch)
        if event.last_batch < len(self._heads):
            self._same("period_head", subject, self._heads[event.last_batch], event.ledger_head)
        else:
            self._find("period_head", subject, f"batch {event.last_batch} settled", "it is not")
        self._before = deepcopy(self._earned)
        self._earned.period_id, self._earned.last_batch = event.period_id, event.last_batch
        self._earned.total_wei = event.total_wei
        for batch_id in range(event.first_batch, min(event.last_batch + 1, len(self._fees))):
            for adapter_id, fee_gwei in self._fees[batch_id].items():
                self._earned.outstanding_gwei[adapter_id] += fee_gwei
        copies = self._source.fetch(subject, event.da_commitment, event.payload_hash)
        self.findings += copies.findings
        payouts: tuple[Payouts, ...] = ()
        methods: tuple[str, ...] = ()
        try:
            if copies.payload is not None:
                payload = decode_period(copies.payload)
                payouts = self._pay(event, payload)
                methods = tuple(close.method for close in payload.adapters)
                for place, altered in copies.altered:
                    self.findings += differences(place, payload, altered)
        except Corrupted as error:
            self._find("period_payload", subject, "a period payload", error.message)
        self.periods.append(
            PeriodLine(
                event.period_id,
                event.first_batch,
                event.last_batch,
                event.root,
                event.total_wei // WEI_PER_GWEI,
                False,
                payouts,
                methods,
            )
        )

    def _pay(self, event: PeriodPosted, period: PeriodPayload) -> tuple[Payouts, ...]:
        """Credits to payouts to rewards to root: the same integers, or who was to get what instead."""
        subject = f"period {event.period_id}"
        bound = (period.period_id, period.first_batch, period.last_batch)
        self._same("period_payload", subject, (event.period_id, event.first_batch, event.last_batch), bound)
        self._same("period_payload", subject, event.ledger_head, period.ledger_head)
        self._same("period_payload", subject, self._deployment.chain_id, period.chain_id)
        self._same("period_payload", subject, self._deployment.distributor, period.distributor)
        self._adapters(subject, period)
        payouts = period.payouts()
        self.closes += [(event.period_id, close) for close in period.adapters]
        self.checked["payouts"] += sum(len(payout.lines) for payout in payouts)
        rewards = add_payouts(self._earned.rewards, payouts)
        self._compare_rewards(subject, rewards, period.rewards)
        self._earned.rewards = rewards
        for reward in rewards:
            self._leaves[reward.contributor_id].add(reward.amount_gwei * WEI_PER_GWEI)
        total_wei = sum(reward.amount_gwei for reward in rewards) * WEI_PER_GWEI
        self._same("period_total", subject, total_wei, event.total_wei)
        self._same("period_root", subject, replace(period, rewards=rewards).tree().root, event.root)
        return payouts

    def _adapters(self, subject: str, period: PeriodPayload) -> None:
        """A closed adapter is paid all that its receipts have outstanding; the others are carried, listed."""
        outstanding = self._earned.outstanding_gwei
        for close in period.adapters:
            due_gwei = outstanding.pop(close.adapter_id, 0)
            adapter = f"{subject}, adapter {close.adapter_id.hex()}"
            if not self._is_blind:
                self._same("period_fee", adapter, f"{due_gwei} gwei", f"{close.fee_gwei} gwei")
        if self._is_blind:
            return
        carried = dict(period.carried)
        for adapter_id in sorted(set(carried) | {a for a, gwei in outstanding.items() if gwei}):
            adapter = f"{subject}, adapter {adapter_id.hex()}"
            due_gwei, listed_gwei = outstanding.get(adapter_id, 0), carried.get(adapter_id, 0)
            self._same("carried", adapter, f"{due_gwei} gwei", f"{listed_gwei} gwei")

    def _compare_rewards(self, subject: str, expected: Iterable[Share], found: Iterable[Share]) -> None:
        due = {share.contributor_id: share.amount_gwei for share in expected}
        posted = {share.contributor_id: share.amount_gwei for share in found}
        for contributor in sorted(due.keys() | posted.keys()):
            amounts = f"{due.get(contributor, 0)} gwei", f"{posted.get(contributor, 0)} gwei"
            self._same("reward", f"{subject}, contributor {contributor.hex()}", *amounts)

    def _disable(self, event: PeriodDisabled) -> None:
        """It never counted: the next period takes its number and its batches."""
        self._earned = self._before
        self.periods.append(replace(self.periods.pop(), is_disabled=True))

    # claims

    def _claim(self, event: Claimed) -> None:
        self.checked["claims"] += 1
        subject = f"contributor {event.contributor_id.hex()}"
        wallet = self._wallets.get(event.contributor_id, bytes(20))
        self._same("claim_wallet", subject, wallet, event.wallet)
        due_wei = event.cumulative_wei - self._claimed[event.contributor_id]
        self._same("claim_amount", subject, due_wei, event.paid_wei)
        promised = self._leaves.get(event.contributor_id, set())
        if event.cumulative_wei not in promised:
            most_wei = max(promised, default=0)
            self._find("claim", subject, f"at most {most_wei} wei", f"{event.cumulative_wei} wei")
        self._claimed[event.contributor_id] = event.cumulative_wei


def differences(place: str, period: PeriodPayload, altered: bytes) -> list[Finding]:
    """What a copy with another hash says otherwise: of credits the adapter and group. A copy that does not
    decode was reported by its hash and has nothing to add."""
    try:
        other = decode_period(altered)
    except Corrupted:
        return []
    found = []
    closes = {close.adapter_id: close for close in other.adapters}
    for close in period.adapters:
        adapter = f"period {period.period_id}, adapter {close.adapter_id.hex()}"
        there = closes.get(close.adapter_id)
        theirs = {credit.group_id: credit.value for credit in there.credits} if there else {}
        ours = {credit.group_id: credit.value for credit in close.credits}
        for group in sorted(ours.keys() | theirs.keys()):
            if ours.get(group) != theirs.get(group):
                subject = f"{adapter}, group {group.hex()} in {place}"
                found.append(Finding("credit", subject, str(ours.get(group)), str(theirs.get(group))))
    rewards = {share.contributor_id: share.amount_gwei for share in other.rewards}
    for share in period.rewards:
        if rewards.get(share.contributor_id) != share.amount_gwei:
            subject = f"period {period.period_id}, contributor {share.contributor_id.hex()} in {place}"
            amounts = str(share.amount_gwei), str(rewards.get(share.contributor_id))
            found.append(Finding("reward", subject, *amounts))
    return found
