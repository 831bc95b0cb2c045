"""Logprobs in OpenAI's two shapes: those of the model, one for each token of the text, streamed or not."""

import math

import openai
import pytest
import torch

from cluster.models import load_base
from tests.serve_apps.conftest import Gateway

ASK = [{"role": "user", "content": "Which one?"}]
GREEDY = {"temperature": 0, "max_tokens": 10, "extra_body": {"ignore_eos": True}}
CHAT = {"model": "base", "messages": ASK, "logprobs": True, **GREEDY}


def test_they_are_the_models_own(gateway: Gateway) -> None:
    """Against transformers, teacher-forced; whatever temperature, bias and penalties made of them."""
    ids = gateway.services.tokenizer.encode("abc")
    ways = {"temperature": 0.7, "seed": 3, "logit_bias": {"40": 5}, "presence_penalty": 1.0}
    answer = gateway.client().completions.create(
        model="base", prompt=ids, logprobs=5, max_tokens=10, extra_body={"ignore_eos": True}, **ways
    )  # type: ignore[call-overload]
    told = answer.choices[0].logprobs
    model = load_base(gateway.toys.base.path, torch.float32)
    known = {gateway.services.grammars.token_bytes(i): i for i in range(3, 259)}
    assert told.tokens and len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        with torch.inference_mode():
            scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
        chosen = known[_bytes_of(token)]
        assert logprob == pytest.approx(float(scores[chosen]), abs=1e-3)
        assert top[token] == logprob and 5 <= len(top) <= 6
        assert max(top.values()) == pytest.approx(float(scores.max()), abs=1e-3)
        ids.append(chosen)


def _bytes_of(token: str) -> bytes:
    return bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()


def test_chat_logprobs_spell_the_text(gateway: Gateway) -> None:
    answer = gateway.client().chat.completions.create(**CHAT, top_logprobs=3)  # type: ignore[call-overload]
    told = answer.choices[0].logprobs.content
    data = b"".join(bytes(one.bytes) for one in told)
    assert data.decode(errors="replace") == answer.choices[0].message.content
    for one in told:
        assert len(one.top_logprobs) == 3 and one.token == bytes(one.bytes).decode(errors="replace")
        assert one.logprob == one.top_logprobs[0].logprob  # greedy
        likelihoods = [top.logprob for top in one.top_logprobs]
        assert likelihoods == sorted(likelihoods, reverse=True) and math.exp(sum(likelihoods)) <= 1
    bare = gateway.client().chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert [one.top_logprobs for one in bare.choices[0].logprobs.content] == [[]] * len(told)


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_logprobs_are_the_same(gateway: Gateway, n: int) -> None:
    ways = {**CHAT, "top_logprobs": 2, "n": n, "temperature": 1, "seed": 9}
    whole = gateway.client().chat.completions.create(**ways)  # type: ignore[call-overload]
    told = [[] for _ in range(n)]  # type: list[list[object]]
    for chunk in gateway.client().chat.completions.create(**ways, stream=True):  # type: ignore[call-overload]
        choice = chunk.choices[0]
        told[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert told == [choice.logprobs.content for choice in whole.choices]


def test_streamed_completions_have_them_too(gateway: Gateway) -> None:
    ways = {"model": "base", "prompt": "abc", "logprobs": 2, **GREEDY}
    whole = gateway.client().completions.create(**ways).choices[0]  # type: ignore[call-overload]
    tokens, offsets = [], []
    for chunk in gateway.client().completions.create(**ways, stream=True):  # type: ignore[call-overload]
        if (told := chunk.choices[0].logprobs) is not None:
            tokens += told.tokens
            offsets += told.text_offset
    assert (tokens, offsets) == (whole.logprobs.tokens, whole.logprobs.text_offset)
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] < len(whole.text)


def test_tokens_of_a_stop_string_are_not_told(gateway: Gateway) -> None:
    create = gateway.client().chat.completions.create
    text = create(**CHAT).choices[0].message.content  # type: ignore[call-overload]
    stopped = create(**CHAT, stop=text[3:5]).choices[0]  # type: ignore[call-overload]
    assert stopped.finish_reason == "stop"
    shown = b"".join(bytes(one.bytes) for one in stopped.logprobs.content)
    assert shown.decode(errors="replace") == stopped.message.content == text[: text.find(text[3:5])]


def test_none_are_told_unasked_and_a_repeat_has_none(gateway: Gateway) -> None:
    create = gateway.client().chat.completions.create
    assert create(model="base", messages=ASK, **GREEDY).choices[0].logprobs is None  # type: ignore[call-overload]
    key = {"Idempotency-Key": "told"}
    first, again = (create(**CHAT, extra_headers=key).choices[0] for _ in range(2))  # type: ignore[call-overload]
    assert first.logprobs is not None and again.logprobs is None
    assert first.message == again.message


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("logprobs", {"logprobs": 6}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": True}),
        ("logprobs", {"logprobs": 1, "echo": True}),
        ("best_of", {"best_of": 3}),
        ("suffix", {"suffix": "x"}),
        ("max_tokens", {"max_tokens": 0}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["a", "b"]}),
        ("prompt", {"prompt": [10**6]}),
        ("prompt", {"prompt": "x" * 2000}),
    ],
)
def test_completions_refuse_what_they_cannot(gateway: Gateway, field: str, change: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        gateway.client().completions.create(**{"model": "base", "prompt": "abc", **change})  # type: ignore[call-overload]
    assert refused.value.param == field


def test_echo_shows_the_prompt_before_the_answer(gateway: Gateway) -> None:
    create = gateway.client().completions.create
    plain, echoed = (create(model="base", prompt="abc", echo=e, **GREEDY) for e in (False, True))  # type: ignore[call-overload]
    assert echoed.choices[0].text == "abc" + plain.choices[0].text
    assert echoed.usage == plain.usage
    ids = gateway.services.tokenizer.encode("abc")
    chunks = create(model="base", prompt=ids, echo=True, stream=True, **GREEDY)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text
