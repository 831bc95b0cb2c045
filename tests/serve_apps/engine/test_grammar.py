"""An answer under a grammar matches it, ends where it does, and a bad grammar is refused before it costs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from attribution.errors import Rejected
from cluster.models import load_tokenizer
from serve_apps.engine.engine import Engine
from serve_apps.engine.grammar import Grammars, json_grammar, tool_grammar
from tests import toy_models
from tests.serve_apps.conftest import Toys, request, run

NUM_TOKENS, END = 300, 2  # 259 in the tokenizer; the rest is padding
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "is_on": {"type": "boolean"}},
    "required": ["x", "is_on"],
    "additionalProperties": False,
}
CALL = '<tool_call>\n{"name": "move", "arguments": {"x": 3, "is_on": true}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(toy_models.tiny_base(tmp_path_factory.mktemp("grammar") / "base"))


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerBase) -> Grammars:
    return Grammars(tokenizer, NUM_TOKENS, [END])


def fits(grammars: Grammars, tokenizer: PreTrainedTokenizerBase, grammar: str, text: str) -> bool:
    """Whether ``text`` may be said, token by token, and may end there."""
    constraint, is_over = grammars.constraint(grammar), False
    for token in tokenizer.encode(text):
        if is_over or not constraint.allowed()[token]:
            return False
        is_over = constraint.advance(token)
    return is_over or bool(constraint.allowed()[END])


@pytest.mark.parametrize(
    ("schema", "text", "is_fit"),
    [
        (POINT, '{"x": 3, "is_on": true}', True),
        (POINT, '{"x": 30, "is_on": true}', False),
        (POINT, '{"x": 3}', False),
        (POINT, '{"x": 3, "is_on": true, "y": 1}', False),
        (None, '{"any": [1, null, {"deep": "yes"}]}', True),
        (None, "[1]", False),
        (None, "{", False),
        ({"$defs": {"n": {"enum": ["a", "b"]}}, "$ref": "#/$defs/n"}, '"b"', True),
        ({"$defs": {"n": {"enum": ["a", "b"]}}, "$ref": "#/$defs/n"}, '"c"', False),
    ],
)
def test_only_json_of_the_schema_fits(
    grammars: Grammars, tokenizer: PreTrainedTokenizerBase, schema: dict[str, object], text: str, is_fit: bool
) -> None:
    assert fits(grammars, tokenizer, json_grammar(schema), text) == is_fit


@pytest.mark.parametrize(
    ("text", "talking", "repeating", "both", "neither"),
    [
        ("no call", True, False, True, False),
        (CALL, True, True, True, True),
        (f"{CALL}\n{CALL}", False, True, True, False),
        (f"first {CALL}", True, False, True, False),
        ("<tool_call> of a kind", False, False, False, False),
        (CALL.replace("move", "delete"), False, False, False, False),
        (CALL.replace("3", "true"), False, False, False, False),
        (CALL[:-1], False, False, False, False),
    ],
)
def test_only_calls_of_given_functions_fit(
    grammars: Grammars,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    talking: bool,
    repeating: bool,
    both: bool,
    neither: bool,
) -> None:
    def is_fit(may_talk: bool, may_repeat: bool) -> bool:
        grammar = tool_grammar({"move": POINT, "wait": None}, may_talk=may_talk, may_repeat=may_repeat)
        return fits(grammars, tokenizer, grammar, text)

    assert (is_fit(True, False), is_fit(False, True), is_fit(True, True), is_fit(False, False)) == (
        talking,
        repeating,
        both,
        neither,
    )


def _deep(levels: int) -> dict[str, object]:
    return {"type": "string"} if not levels else {"allOf": [_deep(levels - 1)]}


BAD = {
    "no type": {"type": "nonsense"},
    "no match": {"type": "string", "minLength": 5, "maxLength": 2},
    "no such definition": {"$ref": "#/$defs/none"},
    "another host": {"$ref": "https://example.com/schema.json"},
    "not supported": {"not": {"type": "string"}},
    "bad pattern": {"type": "string", "pattern": "("},
    "too deep": _deep(400),
    "too long": {"enum": ["x" * 100] * 400},
    "explodes": {
        "allOf": [
            {"anyOf": [{"properties": {f"k{i}{j}": {"type": "string", "minLength": j}}} for j in range(10)]}
            for i in range(8)
        ]
    },
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_schema_is_refused(grammars: Grammars, what: str) -> None:
    with pytest.raises(Rejected) as refused:
        grammars.constraint(json_grammar(BAD[what]))  # type: ignore[arg-type]
    assert refused.value.code in ("schema_not_supported", "schema_too_large") and refused.value.message
    with pytest.raises(Rejected):
        grammars.constraint(tool_grammar({"f": BAD[what]}, may_talk=True, may_repeat=True))  # type: ignore[dict-item]


@pytest.mark.parametrize("seed", range(6))
def test_a_random_model_under_a_grammar_says_what_fits_and_stops(toys: Toys, seed: int) -> None:
    """Whoever shares its batch; and the last token of the grammar is the last of the answer."""
    engine = toys.engine()
    values = {"ignore_eos": False, "temperature": 1.0, "seed": seed, "max_tokens": 80}
    under = [
        request((5, 6, 7 + i), adapter, grammar=json_grammar(POINT), **values)
        for i, adapter in enumerate([b"\0" * 32, toys.adapter_ids[4]])
    ]
    free = request((5, 6, 7), temperature=1.0, seed=seed, max_tokens=40)
    answers = run(engine, [*under, free])
    for each in under:
        answer = answers[each.request_id]
        said = json.loads(answer.text)
        assert set(said) == {"x", "is_on"} and 0 <= said["x"] <= 9 and isinstance(said["is_on"], bool)
        assert answer.finish is not None and answer.finish.reason == "stop"
        assert len(answer.token_ids) == len(answer.text)
    alone = request((5, 6, 7), temperature=1.0, seed=seed, max_tokens=40)
    assert run(engine, [alone])[alone.request_id].token_ids == answers[free.request_id].token_ids
    engine.close()


def test_a_grammar_that_is_none_is_refused_at_submit(toy_engine: Engine) -> None:
    with pytest.raises(Rejected):
        toy_engine.submit(request((5, 6), grammar="nonsense", ignore_eos=False))
    with pytest.raises(Rejected) as endless:
        request((5, 6), grammar=json_grammar(POINT), ignore_eos=True)
    assert endless.value.field == "ignore_eos"


def test_a_grammar_that_turns_out_too_complex_fails_its_own_answer_only(toy_engine: Engine) -> None:
    """It compiles; the first step is too much."""
    grammar = json_grammar({"type": "string", "pattern": "^(a?){500}(a{500}){500}$"})
    bad, good = request((5, 6), grammar=grammar, ignore_eos=False), request((5, 6))
    answers = run(toy_engine, [bad, good])
    failed, done = answers[bad.request_id].finish, answers[good.request_id].finish
    assert failed is not None and failed.refusal is not None and failed.refusal.code == "schema_not_supported"
    assert done is not None and done.reason == "length"
    load = toy_engine.load()
    assert load.num_free_blocks == load.num_blocks - 1


def test_preempted_answers_keep_their_place_in_the_grammar(toys: Toys) -> None:
    """A cache too small for all: answers are computed anew, their grammars go on."""
    schema = {"type": "array", "items": {"enum": ["ab", "cd"]}, "minItems": 30, "maxItems": 30}
    engine = toys.engine(kv_bytes=320_000)
    requests = [
        request((5, 6, 7), grammar=json_grammar(schema), ignore_eos=False, max_tokens=200, temperature=1.0)
        for _ in range(6)
    ]
    for answer in run(engine, requests).values():
        assert len(json.loads(answer.text)) == 30
    engine.close()


def test_a_mask_covers_the_padded_vocabulary(grammars: Grammars, tmp_path: Path) -> None:
    allowed = grammars.constraint(json_grammar(None)).allowed()
    assert allowed.shape == (NUM_TOKENS,) and allowed.dtype == torch.bool
    assert not allowed[259:].any()
