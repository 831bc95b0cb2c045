"""The evidence plane: worker processes that find out, off the response path, why answers are what they are.

A worker takes receipts whose evidence is pending, opens their transcripts, and stores what it found in their
rows. It keeps no state of its own: killed anywhere, it or another one starts over with what is still pending,
and evidence follows from receipt and index, so it does not matter who was first. Workers divide receipts by
id and run at low priority, so that they yield to answers."""

import json
import os
import threading
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from attribution.errors import Corrupted, Rejected, Unavailable
from attribution.evidence import (
    Evidence,
    Kind,
    Scores,
    answer_spans,
    fuse,
    gradient_scores,
    span_scores,
    text_scores,
)
from attribution.gradients import Example
from attribution.index import Index
from attribution.influence import direction, num_entries
from attribution.lexical import Lexicon, build_lexicon
from attribution.sketch import Sketch, make_sketch
from attribution.spans import Span
from attribution.types import Receipt, Record
from cluster.config import Settings
from cluster.database import connect, reading, writing
from cluster.indexes import indexed_records, stored_index, stored_manifest
from cluster.models import base_model, load_base, load_tokenizer
from cluster.receipts import StoredTranscript, set_evidence, transcripts_of
from cluster.storage import Storage, open_storage
from cluster.tables import AdapterRow, ReceiptRow
from cluster.transcripts import Transcript, key_path, load_key, open_sealed

TOP = 5
AT_ONCE = 16  # receipts taken per look at the database
LOOK_AHEAD = 256
IDLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Library:
    """One adapter's index, opened, and what follows from its records' texts."""

    index: Index
    records: tuple[Record, ...]
    lexicon: Lexicon
    sketch: Sketch


@dataclass(frozen=True, slots=True)
class Reader:
    """The model that answers are read with: frozen, float32."""

    base_id: bytes
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def open_reader(settings: Settings) -> Reader:
    base = base_model(settings)
    return Reader(base.base_id, load_base(base.path, torch.float32), load_tokenizer(base.path))


def open_library(storage: Storage, index_id: bytes) -> Library:
    index = stored_index(storage, index_id)
    manifests = [stored_manifest(storage, bytes.fromhex(one)) for one in index.card.manifest_ids]
    records = indexed_records(index, manifests)
    texts = [f"{record.subject}\n{record.answer}\n{record.text}" for record in records]
    sketch = make_sketch(num_entries(index.loras), index.card.sketch_size, index.card.sketch_seed)
    return Library(index, records, build_lexicon(texts), sketch)


@dataclass(frozen=True, slots=True)
class Findings:
    """What each kind of evidence says of every trained record about one answer, before it is ranked."""

    scores: dict[Kind, Scores]
    spans: tuple[Span, ...]

    @property
    def ranked(self) -> Evidence:
        return fuse(self.scores, self.spans, TOP)


def explain(reader: Reader, library: Library, transcript: Transcript) -> Findings:
    """All three kinds of evidence for one answer."""
    index = library.index
    if index.card.base_id != reader.base_id.hex():
        raise Rejected(
            "wrong_base", f"the index is over base {index.card.base_id}, loaded is {reader.base_id.hex()}"
        )
    example = Example(transcript.prompt_ids, transcript.answer_ids)
    toward = direction(reader.model, index.loras, example)
    spans = answer_spans(index.segment, transcript.prompt_ids, transcript.answer_ids)
    trained = index.features[: len(library.records)]
    scores = {
        Kind.GRADIENT: gradient_scores(library.sketch, trained, toward),
        Kind.LEXICAL: text_scores(library.lexicon, transcript.prompt_text, transcript.answer_text),
        Kind.SPAN: span_scores(spans, len(library.records)),
    }
    return Findings(scores, tuple(spans))


def evidence_json(evidence: Evidence, reader: Reader, library: Library, transcript: Transcript) -> str:
    """What the receipt shows. Every piece is *evidence only*: no money follows from it."""
    answer = transcript.answer_ids
    value = {
        "status": "evidence only",
        "index_id": library.index.index_id.hex(),
        "records": [
            _named(library.records[finding.record])
            | {"score": finding.score, "parts": {str(kind): part for kind, part in finding.parts}}
            for finding in evidence.findings
        ],
        "spans": [
            {
                "start_token": span.start,
                "end_token": span.end,
                "text": reader.tokenizer.decode(list(answer[span.start : span.end])),
                "bits": round(span.surprisal_bits, 1),
                "record_ids": [library.records[row].record_id.hex() for row in span.records[:TOP]],
                "num_records": len(span.records),
            }
            for span in evidence.spans
        ],
    }
    return json.dumps(value, sort_keys=True)


def nothing_json(reason: str) -> str:
    return json.dumps({"status": "evidence only", "reason": reason, "records": [], "spans": []})


def _named(record: Record) -> dict[str, object]:
    return {
        "record_id": record.record_id.hex(),
        "contributor_id": record.contributor_id.hex(),
        "datanet": record.datanet,
        "source_key": record.source_key,
    }


def pending(
    session: Session, worker: int, num_workers: int, without: Container[bytes] = ()
) -> list[tuple[Receipt, bytes]]:
    """This worker's next receipts and the index that explains each. Adapters without an index wait for
    one."""
    query = (
        select(ReceiptRow.canonical, AdapterRow.index_id)
        .join(AdapterRow, AdapterRow.adapter_id == ReceiptRow.adapter_id)
        .where(ReceiptRow.evidence_state == "pending", AdapterRow.index_id.is_not(None))
        .order_by(ReceiptRow.created_at, ReceiptRow.receipt_id)
        .limit(LOOK_AHEAD)
    )
    found = [
        (Receipt.from_canonical(canonical), bytes.fromhex(index_id or ""))
        for canonical, index_id in session.execute(query)
    ]
    mine = [
        one
        for one in found
        if int.from_bytes(one[0].receipt_id[:4], "big") % num_workers == worker
        and one[0].receipt_id not in without
    ]
    return mine[:AT_ONCE]


class EvidenceWorker:
    """Opens each index once; ``work_once`` does all the rest. A receipt that cannot be explained stays
    pending, is listed in ``refused`` and holds up no other."""

    def __init__(self, settings: Settings, worker: int = 0, num_workers: int = 1) -> None:
        self.refused: dict[bytes, str] = {}
        self._rows: Engine = connect(settings.database_url)
        self._storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
        self._key = load_key(key_path(settings.home))
        self._settings = settings
        self._place = (worker, num_workers)
        self._reader: Reader | None = None
        self._libraries: dict[bytes, Library] = {}

    def work_once(self) -> int:
        """Explain this worker's next few receipts; returns how many. 0: nothing waits."""
        with reading(self._rows) as session:
            waiting = pending(session, *self._place, without=self.refused)
            kept = {one.receipt: one for one in transcripts_of(session, [r.receipt_id for r, _ in waiting])}
        for receipt, index_id in waiting:
            try:
                text = self._explain(receipt, index_id, kept.get(receipt))
            except (Rejected, Corrupted) as refusal:
                self.refused[receipt.receipt_id] = f"{refusal.code}: {refusal.message}"
                continue
            with writing(self._rows) as session:
                set_evidence(session, receipt.receipt_id, text)
        return len(waiting)

    def _explain(self, receipt: Receipt, index_id: bytes, stored: StoredTranscript | None) -> str:
        if stored is None:
            return nothing_json("the transcript was not kept")
        transcript = open_sealed(self._key, stored.ciphertext, receipt.request_id)
        if not transcript.answer_ids:
            return nothing_json("the answer is empty")
        reader = self.warm_up()
        if index_id not in self._libraries:
            self._libraries[index_id] = open_library(self._storage, index_id)
        library = self._libraries[index_id]
        evidence = explain(reader, library, transcript).ranked
        return evidence_json(evidence, reader, library, transcript)

    def warm_up(self) -> Reader:
        """Load the model before the first receipt comes, which then need not wait for it."""
        if self._reader is None:
            self._reader = open_reader(self._settings)
        return self._reader


class _Loop:
    """The actor's shell: works in a thread of its own for as long as the process lives."""

    def __init__(self, settings: Settings, worker: int, num_workers: int) -> None:
        os.nice(10)
        torch.set_num_threads(1)
        self._done = 0
        self._unavailable = ""
        self._worker = EvidenceWorker(settings, worker, num_workers)
        threading.Thread(target=self._run, name="evidence", daemon=True).start()

    def status(self) -> Mapping[str, object]:
        refused = {receipt_id.hex(): why for receipt_id, why in self._worker.refused.items()}
        return {
            "pid": os.getpid(),
            "looked_at": self._done,
            "refused": refused,
            "unavailable": self._unavailable,
        }

    def _run(self) -> None:
        while True:
            try:
                self._worker.warm_up()
                done = self._worker.work_once()
                self._done += done
                self._unavailable = ""
            except Unavailable as refusal:
                self._unavailable, done = f"{refusal.code}: {refusal.message}", 0
            if not done:
                time.sleep(IDLE_S)


def start_pool(settings: Settings, num_workers: int = 1) -> list[Any]:
    """Named, detached actors ``evidence-<n>``; those that run already are left as they are."""
    actor = ray.remote(_Loop)
    return [
        actor.options(
            name=f"evidence-{worker}",
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
        ).remote(settings, worker, num_workers)
        for worker in range(num_workers)
    ]
