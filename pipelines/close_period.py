"""Close a period: from final batches to payouts and one cumulative reward root.

    python -m pipelines.close_period --spec FILE_OR_URI

For every adapter with outstanding fees, the unit gradient of each paid answer (batch of one, canonical
runtime) is rounded, weighted by its fee and summed in integers; the sum's dot products with the adapter's
indexed features are the credits of its groups and controls; attribution/payout.py makes money of them. Rows
appear in one transaction, after the payload is archived: a job that dies leaves nothing but chunk sums, which
the next one takes up."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from sqlalchemy.orm import Session
from torch import Tensor

from attribution.errors import Rejected
from attribution.hashing import keccak256
from attribution.index import Index
from attribution.influence import integer_credits
from attribution.payload import PeriodPayload, add_payouts, encode_period
from attribution.payout import AdapterClose, Beneficiaries, Payouts, Split, pay
from attribution.sketch import make_sketch
from attribution.types import ZERO_ID, Credit, Manifest
from cluster.config import Settings, SplitPpm
from cluster.database import reading, writing
from cluster.indexes import indexed_records, stored_index
from cluster.ledger import FEES, Entry, post
from cluster.models import base_model, load_base
from cluster.storage import Storage, open_storage, put_content
from cluster.tables import PayoutRow, PeriodRow
from cluster.transcripts import delete_transcripts, key_path, load_key
from pipelines.answer_sums import Chunk, encode_sum, forget_sums, store_sums, total_sum
from pipelines.fan_out import fan_out, num_workers
from pipelines.job import Ground, Outcome, main
from pipelines.outstanding import NextPeriod, Outstanding, next_period, unchallengeable
from pipelines.readiness import Carried, Closable, Ready, open_files, prepare
from pipelines.spec import Spec


class CloseSpec(Spec):
    """Where rewards are claimed, and whom the fixed lines of the split pay: beneficiary ids in hex, zero for
    nobody."""

    chain_id: int
    distributor: str
    platform: str
    host: str
    pool: str
    stakers: str = ZERO_ID.hex()
    retrieval: str = ZERO_ID.hex()

    def beneficiaries(self) -> Beneficiaries:
        ids = (self.platform, self.host, self.stakers, self.retrieval, self.pool)
        return Beneficiaries(*(bytes.fromhex(one) for one in ids))


SumAnswers = Callable[[Index, Sequence[Chunk]], None]
"""Leaves every chunk's sum in storage."""


@dataclass(frozen=True, slots=True)
class ClosedPeriod:
    payload: PeriodPayload
    payouts: tuple[Payouts, ...]
    carried: tuple[Carried, ...]

    @property
    def payload_hash(self) -> bytes:
        return keccak256(encode_period(self.payload))


def close_period(ground: Ground, spec: CloseSpec, sum_answers: SumAnswers, now: int) -> ClosedPeriod:
    """``Rejected`` if there is nothing to close. Started again after a crash it gives the same period."""
    settings, storage = ground.settings, ground.storage
    key = load_key(key_path(settings.home))
    with reading(ground.engine) as session:
        due = next_period(session)
        paid_for = [one for one in due.adapters if one.adapter_id != ZERO_ID]
        found = [prepare(session, key, one, settings.period) for one in paid_for]
    ready = [open_files(storage, one) for one in found if isinstance(one, Closable)]
    for one in ready:
        sum_answers(one.index, one.closable.chunks)
    closes = [close_adapter(storage, one) for one in ready]
    closes += [close_base(one, spec) for one in due.adapters if one.adapter_id == ZERO_ID]
    carried = tuple(one for one in found if isinstance(one, Carried))
    closed = assemble(due, spec, settings.split_ppm, closes, carried)
    storage.put_if_absent(f"blobs/{closed.payload_hash.hex()}", encode_period(closed.payload))
    with writing(ground.engine) as session:
        _write(session, closed, now)
    for one in ready:
        forget_sums(storage, one.closable.chunks)
    return closed


def close_adapter(storage: Storage, ready: Ready) -> AdapterClose:
    """Publish the sum and turn it into credits."""
    closable, card = ready.closable, ready.index.card
    total = total_sum(storage, closable.chunks, ready.index.loras)
    published = put_content(storage, "gradient_sums", encode_sum(total))
    credits_, controls = credits_of(ready.index, ready.manifests, total)
    return AdapterClose(
        adapter_id=closable.outstanding.adapter_id,
        owner_id=closable.owner_id,
        fee_gwei=closable.outstanding.fee_gwei,
        method=f"{card.method} index={closable.index_id.hex()} bits={closable.bits}{closable.label}",
        gradient_sum_sha256=bytes.fromhex(published),
        credits=credits_,
        controls=controls,
    )


def credits_of(
    index: Index, manifests: Sequence[Manifest], total: Tensor
) -> tuple[tuple[Credit, ...], tuple[int, ...]]:
    """Signed credits of all trained groups, sorted by id, and of all controls, sorted: integers from a
    published sum and a published index, so anybody gets the same."""
    sketch = make_sketch(len(total), index.card.sketch_size, index.card.sketch_seed)
    values = integer_credits(sketch, total, index.features)
    records = indexed_records(index, manifests)
    credits_ = [
        Credit(record.record_id, record.contributor_id, value)
        for record, value in zip(records, values, strict=False)
    ]
    controls = values[len(records) :]
    return tuple(sorted(credits_, key=lambda credit: credit.group_id)), tuple(sorted(controls))


def close_base(due: Outstanding, spec: CloseSpec) -> AdapterClose:
    """Nobody contributed to the base model and nobody here owns it: both lines go to the pool."""
    pool = bytes.fromhex(spec.pool)
    return AdapterClose(ZERO_ID, pool, due.fee_gwei, "base model: no contributors", ZERO_ID, (), ())


def assemble(
    due: NextPeriod,
    spec: CloseSpec,
    split_ppm: SplitPpm,
    closes: Sequence[AdapterClose],
    carried: tuple[Carried, ...],
) -> ClosedPeriod:
    split = Split(**{f"{role}_ppm": part for role, part in split_ppm.model_dump().items()})
    who = spec.beneficiaries()
    adapters = tuple(sorted(closes, key=lambda close: close.adapter_id))
    payouts = tuple(pay(close, split, who) for close in adapters)
    payload = PeriodPayload(
        period_id=due.period_id,
        first_batch=due.first_batch,
        last_batch=due.last_batch,
        ledger_head=due.ledger_head,
        chain_id=spec.chain_id,
        distributor=bytes.fromhex(spec.distributor),
        split=split,
        beneficiaries=who,
        adapters=adapters,
        carried=tuple((one.adapter_id, one.fee_gwei) for one in carried),
        rewards=add_payouts(due.earlier, payouts),
    )
    return ClosedPeriod(payload, payouts, carried)


def _write(session: Session, closed: ClosedPeriod, now: int) -> None:
    """All rows of the period, or none: ``Rejected`` if another job was faster."""
    payload = closed.payload
    if session.get(PeriodRow, payload.period_id) is not None:
        raise Rejected("period_taken", f"period {payload.period_id} was closed meanwhile", http_status=409)
    session.add(
        PeriodRow(
            period_id=payload.period_id,
            state="closed",
            first_batch=payload.first_batch,
            last_batch=payload.last_batch,
            root=payload.tree().root.hex(),
            total_gwei=payload.total_gwei,
            payload_hash=closed.payload_hash.hex(),
            closed_at=now,
        )
    )
    session.flush()
    session.add_all(
        PayoutRow(
            period_id=payload.period_id,
            adapter_id=payouts.adapter_id.hex(),
            contributor_id=line.contributor_id.hex(),
            role=str(line.role),
            amount_gwei=line.amount_gwei,
        )
        for payouts in closed.payouts
        for line in payouts.lines
    )
    earned = add_payouts((), closed.payouts)
    entries = [Entry(f"earned:{share.contributor_id.hex()}", share.amount_gwei) for share in earned]
    paid = Entry(FEES, -sum(share.amount_gwei for share in earned))
    post(session, f"period:{payload.period_id}", [paid, *entries], f"period:{payload.period_id}", now)


def forget(ground: Ground, now: int) -> int:
    """Delete the transcripts of receipts whose payout nobody can challenge any more; returns how many."""
    with writing(ground.engine) as session:
        settled = unchallengeable(session, ground.settings.chain.activation_delay_s, now)
        delete_transcripts(session, settled)
    return len(settled)


def sum_chunks(settings: Settings, index_id: bytes, chunks: Sequence[Chunk]) -> int:
    """One worker's part, in the canonical runtime: base and factors in float32, one thread, one answer at a
    time. Returns how many sums were new."""
    torch.set_num_threads(1)
    storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
    index = stored_index(storage, index_id)
    base = base_model(settings)
    if base.base_id.hex() != index.card.base_id:
        raise Rejected(
            "wrong_base", f"the index is over base {index.card.base_id}, configured is {base.base_id.hex()}"
        )
    return store_sums(load_base(base.path, torch.float32), index, storage, chunks)


def _work(ground: Ground, spec: CloseSpec) -> Outcome:
    def in_parallel(index: Index, chunks: Sequence[Chunk]) -> None:
        width = min(num_workers(), len(chunks))
        parts = [chunks[at::width] for at in range(width)]
        fan_out(partial(sum_chunks, ground.settings, index.index_id), parts)

    started = time.monotonic()
    now = int(time.time())
    num_forgotten = forget(ground, now)
    closed = close_period(ground, spec, in_parallel, now)
    return {
        "period_id": closed.payload.period_id,
        "batches": [closed.payload.first_batch, closed.payload.last_batch],
        "payload_hash": closed.payload_hash.hex(),
        "root": closed.payload.tree().root.hex(),
        "total_gwei": closed.payload.total_gwei,
        "paid_gwei": {one.adapter_id.hex(): one.fee_gwei for one in closed.payouts},
        "methods": {one.adapter_id.hex(): one.method for one in closed.payload.adapters},
        "carried": {one.adapter_id.hex(): f"{one.code}: {one.reason}" for one in closed.carried},
        "transcripts_forgotten": num_forgotten,
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    from pipelines import close_period as by_name  # Ray cannot send to workers what is of __main__

    sys.exit(main("close_period", by_name.CloseSpec, by_name._work))
