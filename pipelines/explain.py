"""Explain one answer: its own part of every record's credit, by one replay of its own gradient.

    python -m pipelines.explain --spec FILE_OR_URI

The gradient is rounded and weighted as the period rounded and weighted it, so the parts of all answers of a
period add up to the period's credits, before anything is netted, within ``ROUNDING_PPM`` of the largest: the
replay is linear but for fp32, and every part is rounded once. Needs the answer's transcript, so it is for the
operator and for as long as transcripts are kept."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pydantic import Field

from attribution.errors import Rejected
from attribution.fixed_point import fraction_bits
from attribution.gradients import Example
from attribution.index import Index
from attribution.payload import decode_period
from attribution.payout import fee_shares
from attribution.types import ZERO_ID, Credit
from cluster.blends import blends_among
from cluster.database import reading
from cluster.indexes import stored_index, stored_manifest
from cluster.models import base_model, load_tokenizer
from cluster.receipts import receipt_of, transcripts_of
from cluster.tables import AdapterRow
from cluster.transcripts import key_path, load_key, open_sealed
from pipelines.adapter_close import replayed_credits
from pipelines.answer_sums import Answer, Chunk, chunks_of, forget_sums, total_sum
from pipelines.close_period import SumAnswers, sum_chunks
from pipelines.course import ChatAsker
from pipelines.fan_out import fan_out
from pipelines.job import Ground, Outcome, main
from pipelines.outstanding import paying_period
from pipelines.replay_pool import open_pool
from pipelines.replayed import OpenWorkers, Replayable, replayed
from pipelines.spec import Spec

_BITS = re.compile(r" bits=(\d+);")


class ExplainSpec(Spec):
    receipt_id: str = Field(pattern="^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class Part:
    """What one answer put into one adapter's credits, in units of ``2**-bits`` gwei; ``period_id`` is the
    period that paid it, 0 if none has."""

    adapter_id: bytes
    fee_gwei: int
    bits: int
    period_id: int
    credits: tuple[Credit, ...]


@dataclass(frozen=True, slots=True)
class _Owed:
    """One adapter's share of the answer's fee, as the rows have it."""

    answer: Answer
    row: AdapterRow
    period: tuple[int, str] | None  # that paid it, and the hash of its payload


def explain(
    ground: Ground, receipt_id: bytes, sum_answers: SumAnswers, open_workers: OpenWorkers
) -> tuple[Part, ...]:
    """A part for every adapter that answered.

    Raises:
        Rejected: ``receipt_not_found``; ``no_transcript``, it is deleted or was never kept;
            ``no_index``; the adapter's training cannot be replayed.
    """
    return tuple(_part(ground, owed, sum_answers, open_workers) for owed in _owed(ground, receipt_id))


def _owed(ground: Ground, receipt_id: bytes) -> list[_Owed]:
    key = load_key(key_path(ground.settings.home))
    with reading(ground.engine) as session:
        stored = receipt_of(session, receipt_id)
        kept = transcripts_of(session, [receipt_id])
        if not kept:
            raise Rejected(
                "no_transcript", f"receipt {receipt_id.hex()}: its transcript is gone", http_status=404
            )
        text = open_sealed(key, kept[0].ciphertext, kept[0].receipt.request_id)
        if not text.answer_ids:
            raise Rejected("empty_answer", f"{receipt_id.hex()} answered nothing", http_status=404)
        example = Example(text.prompt_ids, text.answer_ids)
        blends = blends_among(session, [stored.receipt.adapter_id])
        blend = blends.get(stored.receipt.adapter_id)
        return [
            _Owed(
                Answer(receipt_id, example, fee_gwei, blend),
                _indexed(session.get(AdapterRow, adapter_id.hex()), adapter_id),
                paying_period(session, adapter_id, stored.batch_id) if stored.batch_id else None,
            )
            for adapter_id, fee_gwei in fee_shares(stored.receipt, blends)
            if adapter_id != ZERO_ID
        ]


def _indexed(row: AdapterRow | None, adapter_id: bytes) -> AdapterRow:
    if row is None or row.index_id is None:
        raise Rejected("no_index", f"adapter {adapter_id.hex()} has no index", http_status=404)
    return row


def _part(ground: Ground, owed: _Owed, sum_answers: SumAnswers, open_workers: OpenWorkers) -> Part:
    storage, row = ground.storage, owed.row
    adapter_id = bytes.fromhex(row.adapter_id)
    index = stored_index(storage, bytes.fromhex(str(row.index_id)))
    period_id, bits = _rounded_as(ground, owed, adapter_id)
    chunks = chunks_of(index.index_id, bits, [owed.answer])
    sum_answers(index, chunks)
    total = total_sum(storage, chunks, index.loras)
    forget_sums(storage, chunks)
    manifests = tuple(stored_manifest(storage, bytes.fromhex(one)) for one in index.card.manifest_ids)
    what = Replayable(row.trajectory, index.card.snapshots, manifests)
    asker = ChatAsker(load_tokenizer(base_model(ground.settings).path))
    found = replayed(storage, storage, what, asker, total, open_workers)
    return Part(adapter_id, owed.answer.fee_gwei, bits, period_id, replayed_credits(manifests, found)[0])


def _rounded_as(ground: Ground, owed: _Owed, adapter_id: bytes) -> tuple[int, int]:
    """The paying period and its fixed point; of an answer not paid yet, the finest."""
    if owed.period is not None:
        period_id, payload_hash = owed.period
        period = decode_period(ground.storage.get(f"blobs/{payload_hash}"))
        for close in period.adapters:
            bits = _BITS.search(close.method)
            if close.adapter_id == adapter_id and bits:
                return period_id, int(bits[1])
    return 0, fraction_bits(owed.answer.fee_gwei)


def _work(ground: Ground, spec: ExplainSpec) -> Outcome:
    def summed(index: Index, chunks: Sequence[Chunk]) -> None:
        fan_out(partial(sum_chunks, ground.settings, index.index_id), [chunks])

    parts = explain(ground, bytes.fromhex(spec.receipt_id), summed, partial(open_pool, ground.settings))
    return {
        part.adapter_id.hex(): {
            "fee_gwei": part.fee_gwei,
            "bits": part.bits,
            "period_id": part.period_id,
            "credits": {credit.group_id.hex(): credit.value for credit in part.credits},
        }
        for part in parts
    }


if __name__ == "__main__":
    from pipelines import explain as by_name  # Ray cannot send to workers what is of __main__

    sys.exit(main("explain", by_name.ExplainSpec, by_name._work))
