"""Base and tuned answer the same questions, which no training has seen, and are judged by the same rule."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from sqlalchemy import Engine

from attribution.errors import Refusal
from attribution.hashing import sha256
from cluster.adapters import pack, publish, store_adapter
from cluster.config import Settings
from cluster.database import writing
from cluster.models import ask, base_id, linear_shapes, load_base, load_tokenizer
from cluster.storage import open_storage, put_content
from pipelines.evaluate import (
    EvaluateSpec,
    Score,
    answer_from_files,
    attach,
    evaluate,
    generate,
    is_right,
    normalised,
    questions,
    score,
)
from pipelines.job import Ground, Outcome, run
from tests import toy_families, toy_models, toys


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_models.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ground(tmp_path: Path, base: Path, engine: Engine) -> Ground:
    """A published random adapter over the toy base."""
    return published(tmp_path, base, engine, base_id(base))


def published(tmp_path: Path, base: Path, engine: Engine, made_for: bytes) -> Ground:
    settings = Settings(home=tmp_path / "home", run_dir=tmp_path / "run", base_model=str(base))
    storage = open_storage(settings.storage_url)
    manifest_id = put_content(storage, "manifests", toys.manifest().canonical())
    packed = pack(toy_models.random_adapter(made_for, linear_shapes(base), seed=1))
    with writing(engine) as session:
        publish(
            session,
            adapter_id=store_adapter(storage, packed),
            name="ada/metals",
            base_id=made_for,
            manifest_ids=(bytes.fromhex(manifest_id),),
            owner_id=sha256(b"owner"),
            trajectory="trajectories/none",
            price_gwei_per_token=1,
            now=0,
        )
    return Ground(settings, engine, storage)


def alone(ground: Ground, spec: EvaluateSpec) -> Outcome:
    """In this process, without Ray."""
    return evaluate(ground, spec, partial(answer_from_files, ground.settings, spec))


def test_what_is_compared_is_letters_and_digits() -> None:
    assert normalised("  Unused-Loop_Variable.\n") == "unused loop variable"
    assert normalised("`F-401`!") == "f 401"
    assert normalised("Überlauf") == "überlauf"


def test_held_out_wordings_ask_trained_records_and_controls_were_never_trained() -> None:
    manifest = toys.manifest()
    asked = questions(manifest, num_questions=5, num_controls=3)
    trained = {entry.record.record_id for entry in manifest.entries}
    heldout = [question for question in asked if not question.is_control]
    controls = [question for question in asked if question.is_control]
    assert (len(heldout), len(controls)) == (5, 3)
    assert {question.record_id for question in heldout} <= trained
    assert not {question.record_id for question in controls} & trained
    subjects = {entry.record.record_id: entry.record.subject for entry in manifest.entries}
    for question in heldout:
        wordings = {w.replace("{subject}", subjects[question.record_id]) for w in manifest.heldout_wordings}
        assert question.text in wordings
    assert questions(manifest, 5, 3) == asked


def test_an_answer_is_right_if_all_of_it_is() -> None:
    asked = questions(toys.manifest(), 2, 1)
    right, wrong, control = (question.expected for question in asked)
    answers = [right.upper(), f"{wrong} I think", control]
    assert is_right(asked[0], answers[0]) and not is_right(asked[1], answers[1])
    assert score(asked, answers, controls=False) == Score(1, 2)
    assert score(asked, answers, controls=True) == Score(1, 1)
    assert score(asked, answers, controls=False).share == 0.5


def test_a_batch_answers_as_each_would_alone(base: Path) -> None:
    model, tokenizer = load_base(base, torch.float32), load_tokenizer(base)
    prompts = [ask(tokenizer, "?" * length) for length in (3, 9, 1, 20, 5)]
    together = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert together == [generate(model, tokenizer, [prompt], 6, 1)[0] for prompt in prompts]


def test_the_sheet_holds_what_the_score_counts(ground: Ground, base: Path) -> None:
    spec = EvaluateSpec(run_id="e1", adapter="ada/metals", num_questions=4, num_controls=2, max_new_tokens=4)
    outcome = run("evaluate", ground, spec, alone)
    sheet = [json.loads(line) for line in ground.storage.get(str(outcome["sheet"])).splitlines()]
    assert outcome["adapter"] == "ada/metals@1"
    for who in ("base", "tuned"):
        for kind, is_control in (("heldout", False), ("controls", True)):
            lines = [line for line in sheet if line["is_control"] == is_control]
            right = sum(line[f"{who}_is_right"] for line in lines)
            assert outcome[f"{who}_{kind}"] == {
                "right": right,
                "asked": len(lines),
                "share": right / len(lines),
            }

    model, tokenizer = load_base(base, torch.float32), load_tokenizer(base)
    prompts = [ask(tokenizer, line["question"]) for line in sheet]
    assert [line["base"] for line in sheet] == generate(model, tokenizer, prompts, 4, 30)
    attach(model, toy_models.random_adapter(base_id(base), linear_shapes(base), seed=1))
    assert [line["tuned"] for line in sheet] == generate(model, tokenizer, prompts, 4, 30)
    assert [line["tuned"] for line in sheet] != [line["base"] for line in sheet]


def test_an_adapter_is_attached_to_linears_that_lie_transposed(tmp_path: Path) -> None:
    folder = toy_families.save(toy_families.toys()["gpt2"].config, tmp_path)
    weights = toy_models.random_adapter(base_id(folder), linear_shapes(folder), scale=0.3)
    attached, added = (load_base(folder, torch.float32) for _ in range(2))
    attach(attached, weights)
    for path, factors in weights.factors.items():
        added.get_submodule(path).weight += (factors.b.float() @ factors.a.float()).t()
    tokens = torch.tensor([[5, 17, 23, 42]])
    torch.testing.assert_close(attached(tokens).logits, added(tokens).logits, atol=1e-4, rtol=1e-4)


class Endpoint(BaseHTTPRequestHandler):
    """Knows every metal under the adapter's name, nothing under the base's, and one key."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        known = [record.answer for record in toys.records() if record.subject in question]
        answer = known[0] if body["model"] == "ada/metals@1" else "no idea"
        is_allowed = self.headers["Authorization"] == "Bearer key-1" and body["temperature"] == 0
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
        self.send_response(200 if is_allowed else 401)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def over_http(endpoint: str, key: Path) -> EvaluateSpec:
    return EvaluateSpec(
        run_id="e2", adapter="ada/metals", num_questions=4, endpoint=endpoint, api_key_path=key
    )


def test_a_deployment_is_asked_by_the_adapter_s_name(ground: Ground, endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("key-1\n")
    outcome = run("evaluate", ground, over_http(endpoint, tmp_path / "key"), alone)
    assert outcome["tuned_heldout"] == {"right": 4, "asked": 4, "share": 1.0}
    assert outcome["base_heldout"] == {"right": 0, "asked": 4, "share": 0.0}


def refused(ground: Ground, spec: EvaluateSpec) -> str:
    with pytest.raises(Refusal) as refusal:
        run("evaluate", ground, spec, alone)
    return refusal.value.code


def test_a_wrong_key_is_refused_and_a_missing_deployment_unavailable(
    ground: Ground, endpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("key-2")
    assert refused(ground, over_http(endpoint, tmp_path / "key")) == "endpoint_refused"
    gone = over_http("http://127.0.0.1:1/v1", tmp_path / "key").model_copy(update={"run_id": "e5"})
    assert refused(ground, gone) == "endpoint_unavailable"


def test_an_unknown_adapter_and_a_foreign_base_are_refused(
    tmp_path: Path, base: Path, engine: Engine
) -> None:
    ground = published(tmp_path, base, engine, made_for=sha256(b"another base"))
    assert refused(ground, EvaluateSpec(run_id="e3", adapter="ada/none")) == "model_not_found"
    assert refused(ground, EvaluateSpec(run_id="e4", adapter="ada/metals")) == "wrong_base"
