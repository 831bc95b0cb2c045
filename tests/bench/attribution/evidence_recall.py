"""Does evidence name the record that was asked? Over held-out questions about trained records.

    python -m tests.bench.attribution.evidence_recall --adapter OWNER/MODEL --out OUT.json [--sheet KEY]

The adapter must be indexed, in the home that the settings name. Answers are greedy, from the files; with
``--sheet`` they are those of an evaluation (``evaluations/<run_id>.jsonl`` in storage). The questions are
drawn by hash over all trained records and held-out wordings; a wrong answer's evidence counts as it is."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attribution.evidence import Kind, standard_scores
from attribution.types import Manifest
from cluster.adapters import load_adapter, resolve
from cluster.config import load_settings
from cluster.database import connect, reading
from cluster.indexes import stored_manifest
from cluster.models import ask, base_model, linear_shapes, load_base
from cluster.storage import Storage, open_storage
from cluster.tables import AdapterRow
from cluster.transcripts import Transcript
from pipelines.evaluate import Question, attach, generate, is_right, questions
from pipelines.manifests import lot
from serve_apps.evidence import Findings, Library, Reader, explain, open_library, open_reader

TOP = 3


@dataclass(frozen=True, slots=True)
class Asked:
    record_id: bytes
    question: str
    answer: str
    is_right: bool


def drawn(manifests: Sequence[Manifest], count: int) -> list[Question]:
    """``count`` of all held-out questions about trained records, by hash."""
    every = [q for one in manifests for q in questions(one, 10**9, 0)]
    return sorted(every, key=lambda q: lot("evidence", q.record_id + q.text.encode()))[:count]


def answered_by_files(reader: Reader, storage: Storage, wanted: Sequence[Question], ref: str) -> list[Asked]:
    settings = load_settings()
    rows = connect(settings.database_url)
    with reading(rows) as session:
        adapter = resolve(session, ref)
    path = base_model(settings).path
    model = load_base(path, torch.float32)
    attach(model, load_adapter(storage, adapter, linear_shapes(path)))
    prompts = [ask(reader.tokenizer, question.text) for question in wanted]
    answers = generate(model, reader.tokenizer, prompts, 16, 25)
    return [
        Asked(question.record_id, question.text, answer, is_right(question, answer))
        for question, answer in zip(wanted, answers, strict=True)
    ]


def answered_by_sheet(storage: Storage, key: str, count: int) -> list[Asked]:
    lines = [json.loads(line) for line in storage.get(key).splitlines()]
    found = [
        Asked(bytes.fromhex(line["record_id"]), line["question"], line["tuned"], line["tuned_is_right"])
        for line in lines
        if not line["is_control"]
    ]
    return sorted(found, key=lambda one: lot("evidence", one.record_id + one.question.encode()))[:count]


def transcript_of(reader: Reader, one: Asked) -> Transcript:
    answer = reader.tokenizer.encode(one.answer, add_special_tokens=False)
    ids = (*answer, reader.tokenizer.eos_token_id)
    return Transcript(tuple(ask(reader.tokenizer, one.question)), ids, one.question, one.answer)


def rank_of(findings: Findings, kinds: Sequence[Kind], row: int) -> int:
    """How many records stand before ``row`` when only these kinds speak."""
    total = sum(standard_scores(findings.scores[kind]) for kind in kinds)
    assert not isinstance(total, int)
    return int((total > total[row]).sum())


def figures(reader: Reader, library: Library, asked: Sequence[Asked]) -> dict[str, float | int | str]:
    rows = {record.record_id: row for row, record in enumerate(library.records)}
    views = {"fused": tuple(Kind), **{str(kind): (kind,) for kind in Kind}}
    ranks: dict[str, list[int]] = {name: [] for name in views}
    started, cpu = time.monotonic(), time.process_time()
    for one in asked:
        findings = explain(reader, library, transcript_of(reader, one))
        for name, kinds in views.items():
            ranks[name].append(rank_of(findings, kinds, rows[one.record_id]))
    num = len(asked)
    return {
        "questions": num,
        "answered_right": sum(one.is_right for one in asked),
        "records": len(library.records),
        "method": library.index.card.method,
        **{f"top{TOP}_{name}": sum(rank < TOP for rank in found) for name, found in ranks.items()},
        **{f"top1_{name}": sum(rank < 1 for rank in found) for name, found in ranks.items()},
        "seconds_per_answer": round((time.monotonic() - started) / num, 3),
        "cpu_seconds_per_answer": round((time.process_time() - cpu) / num, 3),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", default="")
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = load_settings()
    storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
    rows = connect(settings.database_url)
    with reading(rows) as session:
        adapter = resolve(session, options.adapter)
        index_id = session.get_one(AdapterRow, adapter.adapter_id.hex()).index_id
    assert index_id, f"{adapter.ref} has no index: run pipelines.index first"
    reader, library = open_reader(settings), open_library(storage, bytes.fromhex(index_id))
    if options.sheet:
        asked = answered_by_sheet(storage, options.sheet, options.questions)
    else:
        manifests = [stored_manifest(storage, one) for one in adapter.manifest_ids]
        asked = answered_by_files(reader, storage, drawn(manifests, options.questions), adapter.ref)
    found = figures(reader, library, asked)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    for name, target in (("fused", 0.80), ("gradient", 0.55)):
        share = float(found[f"top{TOP}_{name}"]) / len(asked)
        print(
            f"goal evidence_top{TOP}_{name} {share:.2f} {target:.2f} {'met' if share >= target else 'short'}"
        )


if __name__ == "__main__":
    main()
