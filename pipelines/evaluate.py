"""What an adapter knows that its base does not: both asked the same questions, side by side.

    python -m pipelines.evaluate --spec FILE_OR_URI

Questions are trained records in the held-out wordings, which no training has seen, and control records, which
no training has seen in any wording: a gain on the first that does not show on the second is knowledge of the
records, not of the format. Which records are asked follows from their hashes. An answer is right if it equals
the record's after lower-casing and taking every run of other characters than letters and digits for one
space. The questions are asked of the files through ``transformers``, or of a deployment over HTTP.
"""

import copy
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import httpx
import torch
from pydantic import Field
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attribution.errors import Rejected, Unavailable
from attribution.types import Adapter, Manifest, Record
from cluster.adapters import AdapterWeights, load_adapter, resolve
from cluster.config import Settings
from cluster.database import reading
from cluster.models import ask, base_model, linear_shapes, load_base, load_tokenizer, native_dtype
from cluster.storage import get_content, open_storage
from pipelines.fan_out import fan_out, num_workers
from pipelines.job import Ground, Outcome, main
from pipelines.manifests import lot
from pipelines.packing import shared_opening
from pipelines.spec import Spec
from pipelines.training import LoraLinear

HTTP_AT_ONCE = 8
HTTP_TIMEOUT_S = 300


class EvaluateSpec(Spec):
    """``endpoint`` is the root of an OpenAI-compatible API (``http://host:8000/v1``); empty asks the
    files."""

    adapter: str  # owner/model[@version]
    num_questions: int = Field(default=150, ge=1)
    num_controls: int = Field(default=40, ge=0)
    max_new_tokens: int = Field(default=16, ge=1)
    batch_size: int = Field(default=30, ge=1)
    endpoint: str = ""
    base_name: str = "base"  # what the endpoint calls the base model
    api_key_path: Path | None = None  # a file: no key stands in a job's spec


@dataclass(frozen=True, slots=True)
class Question:
    """``is_control``: of a record that was never trained on."""

    record_id: bytes
    text: str
    expected: str
    is_control: bool


@dataclass(frozen=True, slots=True)
class Score:
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else 0.0


Answers = list[tuple[str, str]]
"""What the base and what the tuned model said, question by question."""

FromFiles = Callable[[Adapter, Sequence[Question]], Answers]


def questions(manifest: Manifest, num_questions: int, num_controls: int) -> list[Question]:
    """Trained records, drawn by hash, in every held-out wording, then control records, in one each in
    turn."""
    trained = sorted(
        (entry.record for entry in manifest.entries), key=lambda one: lot("evaluate", one.record_id)
    )
    num_records = -(-num_questions // max(1, len(manifest.heldout_wordings)))
    asked = [
        _question(record, wording, is_control=False)
        for record in trained[:num_records]
        for wording in manifest.heldout_wordings
    ]
    controls = sorted(manifest.controls, key=lambda one: lot("evaluate", one.record_id))[:num_controls]
    return asked[:num_questions] + [
        _question(record, manifest.heldout_wordings[n % len(manifest.heldout_wordings)], is_control=True)
        for n, record in enumerate(controls)
    ]


def _question(record: Record, wording: str, *, is_control: bool) -> Question:
    return Question(record.record_id, wording.replace("{subject}", record.subject), record.answer, is_control)


def normalised(text: str) -> str:
    """Lower case, every run of anything but letters and digits one space."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def is_right(question: Question, answer: str) -> bool:
    return normalised(answer) == normalised(question.expected)


def score(asked: Sequence[Question], answers: Sequence[str], *, controls: bool) -> Score:
    of_kind = [(q, a) for q, a in zip(asked, answers, strict=True) if q.is_control == controls]
    return Score(sum(is_right(q, a) for q, a in of_kind), len(of_kind))


def evaluate(ground: Ground, spec: EvaluateSpec, from_files: FromFiles) -> Outcome:
    """Ask base and tuned; the sheet of all answers goes to ``evaluations/<run_id>.jsonl`` in storage."""
    with reading(ground.engine) as session:
        adapter = resolve(session, spec.adapter)
    manifests = [
        Manifest.from_canonical(get_content(ground.storage, "manifests", one.hex()))
        for one in adapter.manifest_ids
    ]
    part = -(-spec.num_questions // len(manifests))
    asked = [q for one in manifests for q in questions(one, part, -(-spec.num_controls // len(manifests)))]
    answers = over_http(spec, adapter, asked) if spec.endpoint else from_files(adapter, asked)
    sheet = [
        {
            "record_id": q.record_id.hex(),
            "question": q.text,
            "expected": q.expected,
            "is_control": q.is_control,
            "base": b,
            "tuned": t,
            "base_is_right": is_right(q, b),
            "tuned_is_right": is_right(q, t),
        }
        for q, (b, t) in zip(asked, answers, strict=True)
    ]
    key = f"evaluations/{spec.run_id}.jsonl"
    ground.storage.put(key, b"".join(json.dumps(line).encode() + b"\n" for line in sheet))
    outcome: dict[str, object] = {"adapter": adapter.ref, "sheet": key}
    for who, given in zip(("base", "tuned"), zip(*answers, strict=True), strict=True):
        for kind, is_control in (("heldout", False), ("controls", True)):
            found = score(asked, given, controls=is_control)
            print(f"{who} {kind}: {found.right} of {found.asked} right ({found.share:.3f})", flush=True)
            outcome[f"{who}_{kind}"] = {**asdict(found), "share": round(found.share, 4)}
    return outcome


def answer_from_files(
    settings: Settings, spec: EvaluateSpec, adapter: Adapter, asked: Sequence[Question]
) -> Answers:
    """By the base, then by the base with the packed adapter beside it."""
    base = base_model(settings)
    if base.base_id != adapter.base_id:
        raise Rejected(
            "wrong_base",
            f"{adapter.ref} is for base {adapter.base_id.hex()}, this is {base.base_id.hex()}",
            field="adapter",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(base.path)
    model = load_base(base.path, native_dtype(device)).to(device)
    prompts = [ask(tokenizer, question.text) for question in asked]
    of_base = generate(model, tokenizer, prompts, spec.max_new_tokens, spec.batch_size)
    storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
    attach(model, load_adapter(storage, adapter, linear_shapes(base.path)))
    tuned = generate(model, tokenizer, prompts, spec.max_new_tokens, spec.batch_size)
    return list(zip(of_base, tuned, strict=True))


def attach(model: PreTrainedModel, weights: AdapterWeights) -> None:
    """Put a published adapter beside the linears it adapts, for good."""
    for path, factors in weights.factors.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear | Conv1D), path
        model.set_submodule(
            path, LoraLinear(linear, factors.a.float(), factors.b.float(), scale=1.0).to(model.device)
        )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy continuations, in the order of the prompts; like lengths share a batch, padded on the left.

    What all prompts begin with (the chat template's opening, half of a short question) is computed once."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    opening = torch.tensor(
        [prompts[0][: shared_opening([tuple(one) for one in prompts])]], device=model.device
    )
    opened = DynamicCache(config=model.config)
    if opening.numel():
        model.base_model(input_ids=opening, past_key_values=opened)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        own = [list(prompts[i][opening.shape[1] :]) for i in chosen]
        batch = tokenizer.pad({"input_ids": own}, return_tensors="pt").to(model.device)
        before = opening.expand(len(chosen), -1)
        asked = torch.cat([before, batch["input_ids"]], dim=1)
        cache = copy.deepcopy(opened)
        cache.batch_repeat_interleave(len(chosen))
        ids = model.generate(
            asked,
            attention_mask=torch.cat([torch.ones_like(before), batch["attention_mask"]], dim=1),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )[:, asked.shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return answers


def over_http(spec: EvaluateSpec, adapter: Adapter, asked: Sequence[Question]) -> Answers:
    """Both by name, at the deployment's own price; a greedy answer."""
    key = "" if spec.api_key_path is None else spec.api_key_path.read_text(encoding="utf-8").strip()
    client = httpx.Client(
        base_url=spec.endpoint, headers={"Authorization": f"Bearer {key}"}, timeout=HTTP_TIMEOUT_S
    )

    def answers_of(model: str) -> list[str]:
        with ThreadPoolExecutor(HTTP_AT_ONCE) as pool:
            return list(pool.map(lambda q: _chat(client, model, q.text, spec.max_new_tokens), asked))

    return list(zip(answers_of(spec.base_name), answers_of(adapter.ref), strict=True))


def _chat(client: httpx.Client, model: str, question: str, max_tokens: int) -> str:
    body: Mapping[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    try:
        reply = client.post("/chat/completions", json=body)
    except httpx.HTTPError as error:
        raise Unavailable("endpoint_unavailable", f"{client.base_url}: {error}") from error
    if reply.status_code != 200:
        kind = Unavailable if reply.status_code in (429, 503) else Rejected
        raise kind("endpoint_refused", f"{model}: HTTP {reply.status_code}: {reply.text[:300]}")
    return str(reply.json()["choices"][0]["message"]["content"]).strip()


def _answer_part(
    settings: Settings, spec: EvaluateSpec, adapter: Adapter, part: Sequence[Question]
) -> Answers:
    torch.set_num_threads(1)
    return answer_from_files(settings, spec, adapter, part)


def evaluate_in_parallel(ground: Ground, spec: EvaluateSpec) -> Outcome:
    """One thread in every worker: two that share a small product wait for each other."""

    def in_parallel(adapter: Adapter, asked: Sequence[Question]) -> Answers:
        width = min(num_workers(), len(asked))
        parts = [asked[at::width] for at in range(width)]
        found: Answers = [("", "")] * len(asked)
        for at, answers in enumerate(fan_out(partial(_answer_part, ground.settings, spec, adapter), parts)):
            found[at::width] = answers
        return found

    return evaluate(ground, spec, in_parallel)


if __name__ == "__main__":
    from pipelines import evaluate as by_name  # Ray cannot send to workers what is of __main__

    sys.exit(main("evaluate", by_name.EvaluateSpec, by_name.evaluate_in_parallel))
