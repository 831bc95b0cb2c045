"""Index an adapter: what its records did to the model, and where their words stand.

    python -m pipelines.index --spec FILE_OR_URI

Takes the gradient of each trained record and of each control at checkpoints of the recorded training, makes
the damped-Fisher features of attribution/influence.py from them, sorts the suffixes of all record texts, and
stores the result under its hash. The adapter's row then names it: from that moment its answers have evidence
and its fees can be paid."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from sqlalchemy import update
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attribution.codec import Encoder
from attribution.errors import Rejected
from attribution.gradients import Example, Lora, num_parameters
from attribution.hashing import sha256
from attribution.index import IndexCard, write_index
from attribution.influence import Snapshot, averaged_features, sketched_gradients, unit_rows
from attribution.sketch import Sketch, make_sketch
from attribution.spans import Segment, build_segment
from attribution.types import Adapter, Manifest, Record
from cluster.adapters import resolve
from cluster.config import Settings
from cluster.database import reading, writing
from cluster.indexes import store_index, stored_manifest
from cluster.models import ask, base_model, load_base, load_tokenizer
from cluster.storage import Storage
from cluster.tables import AdapterRow
from pipelines.fan_out import fan_out, num_workers
from pipelines.job import Ground, Outcome, main
from pipelines.recorded import recorded_loras
from pipelines.spec import Spec


class IndexSpec(Spec):
    """``snapshots``: trajectory steps at which records and answers are compared; none means the last alone.
    Each costs every answer one more gradient."""

    adapter: str  # owner/model@version
    snapshots: tuple[int, ...] = ()
    damping: float = Field(0.3, gt=0)
    wordings_per_record: int = Field(1, ge=1)
    max_controls: int = Field(24, ge=1)  # of each manifest
    sketch_size: int = Field(32_768, ge=256)
    sketch_seed: int = Field(0, ge=0)


@dataclass(frozen=True, slots=True)
class Asked:
    """One record asked in one wording. ``row`` is the record's row in the index."""

    row: int
    example: Example


SketchAll = Callable[[Lora, Sketch, Sequence[Example]], Tensor]
"""Sketched gradients ``[examples, size]`` in the order given."""


def build_index(
    ground: Ground, adapter: Adapter, trajectory: str, spec: IndexSpec, sketch_all: SketchAll
) -> bytes:
    """Work out and store the adapter's index; returns its id."""
    base = base_model(ground.settings)
    if base.base_id != adapter.base_id:
        found, expected = base.base_id.hex(), adapter.base_id.hex()
        raise Rejected("wrong_base", f"{adapter.ref} is over base {expected}, configured is {found}")
    manifests = [stored_manifest(ground.storage, one) for one in adapter.manifest_ids]
    tokenizer = load_tokenizer(base.path)
    num_trained = sum(len(manifest.entries) for manifest in manifests)
    questions = _questions(manifests, spec.max_controls)
    asked = ask_records(tokenizer, questions, spec.wordings_per_record)
    snapshots, loras = recorded_loras(ground.storage, trajectory, spec.snapshots)
    features = averaged_features(_snapshots(loras, asked, num_trained, spec, sketch_all), spec.damping)
    card = IndexCard(
        adapter_id=adapter.adapter_id.hex(),
        base_id=adapter.base_id.hex(),
        manifest_ids=tuple(one.hex() for one in adapter.manifest_ids),
        num_trained=num_trained,
        num_controls=len(questions) - num_trained,
        snapshots=snapshots,
        lora_scale=next(iter(loras[0].values())).scale,
        damping=spec.damping,
        wordings_per_record=spec.wordings_per_record,
        sketch_size=spec.sketch_size,
        sketch_seed=spec.sketch_seed,
    )
    segment = record_segment(tokenizer, [question.record for question in questions[:num_trained]])
    with tempfile.TemporaryDirectory() as folder:
        index_id = write_index(Path(folder), card, features, loras, segment)
        store_index(ground.storage, Path(folder), index_id)
    return index_id


@dataclass(frozen=True, slots=True)
class Question:
    """A record and the wordings it may be asked in."""

    record: Record
    wordings: tuple[str, ...]


def _questions(manifests: Sequence[Manifest], max_controls: int) -> list[Question]:
    """All trained records, then the controls: the order of an index's rows."""
    trained = [Question(entry.record, one.wordings) for one in manifests for entry in one.entries]
    controls = [Question(record, one.wordings) for one in manifests for record in one.controls[:max_controls]]
    return trained + controls


def ask_records(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], wordings_per_record: int
) -> list[Asked]:
    """Each record in so many of its training wordings, records taking them in turn."""
    asked = []
    for row, question in enumerate(questions):
        record, wordings = question.record, question.wordings
        answer = (*tokenizer.encode(record.answer, add_special_tokens=False), tokenizer.eos_token_id)
        for turn in range(min(wordings_per_record, len(wordings))):
            wording = wordings[(row + turn) % len(wordings)]
            prompt = ask(tokenizer, wording.replace("{subject}", record.subject))
            asked.append(Asked(row, Example(tuple(prompt), answer)))
    return asked


def record_segment(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> Segment:
    """Answer and whole text of every record; the answer also as it reads inside a sentence, after a space."""
    passages = [
        (row, tokenizer.encode(text, add_special_tokens=False))
        for row, record in enumerate(records)
        for text in (record.answer, f" {record.answer}", record.text)
    ]
    return build_segment(passages, len(tokenizer))


def _snapshots(
    loras: Sequence[Lora], asked: Sequence[Asked], num_trained: int, spec: IndexSpec, sketch_all: SketchAll
) -> list[Snapshot]:
    """Mean unit gradient of every record at every snapshot, each sketched by its own part of the whole."""
    size = num_parameters(loras[0])
    sketch = make_sketch(size * len(loras), spec.sketch_size, spec.sketch_seed)
    examples = [one.example for one in asked]
    snapshots = []
    for turn, lora in enumerate(loras):
        part = sketch.part(turn * size, (turn + 1) * size)
        rows = mean_rows(sketch_all(lora, part, examples), [one.row for one in asked])
        snapshots.append(Snapshot(rows[:num_trained], rows[num_trained:]))
    return snapshots


def mean_rows(sketches: Tensor, rows: Sequence[int]) -> Tensor:
    """Mean of the unit sketches that belong to each row: ``[max(rows) + 1, size]``."""
    index = torch.tensor(rows)
    total = torch.zeros(max(rows) + 1, sketches.shape[1]).index_add_(0, index, unit_rows(sketches))
    return total / torch.bincount(index)[:, None]


def made_key(adapter: Adapter, spec: IndexSpec) -> str:
    """Where the id of this adapter's index of this kind is noted, once it is made."""
    e = Encoder("openledger/index-spec/1").id32(adapter.adapter_id)
    choices = sorted(spec.model_dump(exclude={"run_id", "adapter"}).items())
    e.each(choices, lambda enc, choice: enc.text(choice[0]).text(repr(choice[1])))
    return f"indexes/made/{sha256(e.finish()).hex()}"


def is_made(storage: Storage, adapter: Adapter, spec: IndexSpec) -> bool:
    return made_key(adapter, spec) in storage.list("indexes/made/")


@dataclass(frozen=True, slots=True)
class _Part:
    lora: Lora
    sketch: Sketch
    examples: Sequence[Example]


def _sketch_part(settings: Settings, part: _Part) -> Tensor:
    torch.set_num_threads(1)
    model = load_base(base_model(settings).path, torch.float32)
    return sketched_gradients(model, part.lora, part.examples, part.sketch)


def _work(ground: Ground, spec: IndexSpec) -> Outcome:
    def in_parallel(lora: Lora, sketch: Sketch, examples: Sequence[Example]) -> Tensor:
        width = min(num_workers(), len(examples))
        parts = [_Part(lora, sketch, examples[at::width]) for at in range(width)]
        found = torch.empty(len(examples), sketch.size)
        for at, rows in enumerate(fan_out(partial(_sketch_part, ground.settings), parts)):
            found[at::width] = rows
        return found

    started = time.monotonic()
    with reading(ground.engine) as session:
        adapter = resolve(session, spec.adapter)
        trajectory = session.get_one(AdapterRow, adapter.adapter_id.hex()).trajectory
    made = ground.storage.get(made_key(adapter, spec)) if is_made(ground.storage, adapter, spec) else b""
    index_id = made or build_index(ground, adapter, trajectory, spec, in_parallel)
    ground.storage.put(made_key(adapter, spec), index_id)
    with writing(ground.engine) as session:
        this = AdapterRow.adapter_id == adapter.adapter_id.hex()
        session.execute(update(AdapterRow).where(this).values(index_id=index_id.hex()))
    return {
        "adapter_id": adapter.adapter_id.hex(),
        "index_id": index_id.hex(),
        "reused": bool(made),
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    from pipelines import index as by_name  # Ray cannot send to workers what is of __main__

    sys.exit(main("index", by_name.IndexSpec, by_name._work))
