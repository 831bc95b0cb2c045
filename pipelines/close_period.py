"""Close a period: from final batches to payouts and one cumulative reward root.

    python -m pipelines.close_period --spec FILE_OR_URI

For every adapter with outstanding fees, the unit gradient of each paid answer (batch of one, canonical
runtime) is rounded, weighted by its fee and summed in integers. A replay of the recorded training turns the
sum into credits of its groups and controls; where there is none to be had, or the fees are not worth one, the
sum's dot products with the adapter's indexed features do, and the statement says which and why.
attribution/payout.py makes money of them. Rows appear in one transaction, after the payload is archived: a
job that dies leaves nothing but chunk sums and a replay half done, which the next one takes up."""

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
from attribution.payload import PeriodPayload, add_payouts, encode_period
from attribution.payout import AdapterClose, Beneficiaries, Payouts, Split, pay
from attribution.types import ZERO_ID
from cluster.config import Settings, SplitPpm
from cluster.database import reading, writing
from cluster.indexes import stored_index
from cluster.ledger import FEES, Entry, post
from cluster.models import base_model, load_base
from cluster.storage import open_storage
from cluster.tables import PayoutRow, PeriodRow
from cluster.transcripts import delete_transcripts, key_path, load_key
from pipelines.adapter_close import ReplaySum, close_adapter, replay_adapter
from pipelines.answer_sums import Chunk, forget_sums, store_sums
from pipelines.fan_out import fan_out, num_workers
from pipelines.job import Ground, Outcome, main
from pipelines.outstanding import NextPeriod, Outstanding, next_period, unchallengeable
from pipelines.readiness import Carried, Closable, Ready, open_files, prepare
from pipelines.replay_pool import open_pool
from pipelines.replayed import Replayed
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


def close_period(
    ground: Ground, spec: CloseSpec, sum_answers: SumAnswers, replay_sum: ReplaySum, now: int
) -> ClosedPeriod:
    """``Rejected`` if there is nothing to close. Started again after a crash it gives the same period."""
    settings, storage = ground.settings, ground.storage
    key = load_key(key_path(settings.home))
    with reading(ground.engine) as session:
        due = next_period(session)
        paid_for = [one for one in due.adapters if one.adapter_id != ZERO_ID]
        found = [prepare(session, key, one, settings.period) for one in paid_for]
    opened = [
        open_files(storage, one, settings.period, now) if isinstance(one, Closable) else one for one in found
    ]
    ready = [one for one in opened if isinstance(one, Ready)]
    for one in ready:
        sum_answers(one.index, one.closable.chunks)
    closes = [close_adapter(storage, one, replay_sum) for one in ready]
    closes += [close_base(one, spec) for one in due.adapters if one.adapter_id == ZERO_ID]
    carried = tuple(one for one in opened if isinstance(one, Carried))
    closed = assemble(due, spec, settings.split_ppm, closes, carried)
    storage.put_if_absent(f"blobs/{closed.payload_hash.hex()}", encode_period(closed.payload))
    with writing(ground.engine) as session:
        _write(session, closed, now)
    for one in ready:
        forget_sums(storage, one.closable.chunks)
    return closed


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

    def replay_in_pool(ready: Ready, total: Tensor) -> Replayed:
        return replay_adapter(ground, ready, total, partial(open_pool, ground.settings))

    started = time.monotonic()
    now = int(time.time())
    num_forgotten = forget(ground, now)
    closed = close_period(ground, spec, in_parallel, replay_in_pool, now)
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
