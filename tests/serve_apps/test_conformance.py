"""The rules of OpenAI's published API description, held by bytes on the wire.

Bodies are checked strictly against the types of the official client, which are generated from that
description; what types cannot say (framing, nulls, order, error bodies) is said here.
"""

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.serve_apps.conftest import Gateway

ASK = [{"role": "user", "content": "Which one?"}]
CHAT: dict[str, Any] = {"model": "toy/a4", "messages": ASK, "max_tokens": 12, "seed": 7}
PLAIN: dict[str, Any] = {"model": "base", "prompt": "abc", "max_tokens": 12, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}
]
CALL = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80}
JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two choices": {"n": 2},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "a call": CALL,
    "two calls with logprobs": {**CALL, "n": 2, "logprobs": True},
    "json": JSON,
    "every number": {
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"40": -100, "41": 2.5},
        "stop": ["zz"],
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
    },
    "nulls": {
        "temperature": None,
        "top_p": None,
        "n": None,
        "stop": None,
        "logprobs": None,
        "tools": None,
        "tool_choice": None,
        "response_format": None,
        "logit_bias": None,
        "seed": None,
        "stream_options": None,
        "max_completion_tokens": 5,
    },
}


def post(gateway: Gateway, path: str, body: dict[str, Any]) -> httpx.Response:
    return gateway.http().post(path, json=body)


def events(reply: httpx.Response) -> list[str]:
    """The data of every event: each a line of its own, an empty one after it."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = reply.text.split("\n\n")
    assert blocks[-1] == "" and all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [block[6:] for block in blocks[:-1]]


@pytest.mark.parametrize("way", WAYS)
def test_chat_bodies_are_of_the_published_shape(gateway: Gateway, way: str) -> None:
    answer = ChatCompletion.model_validate_json(
        post(gateway, "/v1/chat/completions", {**CHAT, **WAYS[way]}).content
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    for number, choice in enumerate(answer.choices):
        assert choice.index == number and choice.message.role == "assistant"
        assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)


@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_chat_streams_are_of_the_published_shape(gateway: Gateway, way: str, has_usage: bool) -> None:
    body = {**CHAT, **WAYS[way], "stream": True, "stream_options": {"include_usage": has_usage}}
    data = events(post(gateway, "/v1/chat/completions", body))
    assert data[-1] == "[DONE]"
    raw = [json.loads(each) for each in data[:-1]]
    chunks = [ChatCompletionChunk.model_validate_json(each) for each in data[:-1]]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    if has_usage:
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert all(each["usage"] is None for each in raw[:-1])
        chunks = chunks[:-1]
    else:
        assert not any("usage" in each for each in raw)
    seen: dict[int, list[Any]] = {}
    for chunk in chunks:
        (choice,) = chunk.choices
        seen.setdefault(choice.index, []).append(choice)
    assert sorted(seen) == list(range(body.get("n") or 1))
    for told in seen.values():
        assert told[0].delta.role == "assistant" and all(choice.delta.role is None for choice in told[1:])
        assert told[-1].finish_reason and all(choice.finish_reason is None for choice in told[:-1])
        begun = [delta for choice in told for delta in choice.delta.tool_calls or () if delta.id]
        assert [delta.index for delta in begun] == list(range(len(begun)))
        assert all(delta.function.name and delta.function.arguments == "" for delta in begun)


@pytest.mark.parametrize("change", [{}, {"n": 2}, {"logprobs": 2}, {"echo": True}, {"prompt": [[5, 6, 7]]}])
def test_completions_are_of_the_published_shape(gateway: Gateway, change: dict[str, Any]) -> None:
    Completion.model_validate_json(post(gateway, "/v1/completions", {**PLAIN, **change}).content)
    data = events(post(gateway, "/v1/completions", {**PLAIN, **change, "stream": True}))
    assert data[-1] == "[DONE]"
    chunks = [json.loads(each) for each in data[:-1]]
    for chunk in chunks:
        assert chunk["object"] == "text_completion" and len(chunk["choices"]) == 1
        assert {"index", "text", "logprobs", "finish_reason"} == set(chunk["choices"][0])
    assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in chunks) == change.get("n", 1)


def test_models_are_of_the_published_shape(gateway: Gateway) -> None:
    told = gateway.http().get("/v1/models").json()
    assert told["object"] == "list" and all(Model.model_validate(model) for model in told["data"])
    retrieve = gateway.client().models.retrieve
    assert retrieve("toy/a1").id == retrieve("toy/a1@1").id == "toy/a1@1"
    assert retrieve("base").id.startswith("base@") and retrieve("base").owned_by == "openledger"
    with pytest.raises(openai.NotFoundError):
        retrieve("toy/none")


class Problem(pydantic.BaseModel):
    """``Error`` of the description: all four are required, two may be null."""

    model_config = pydantic.ConfigDict(extra="forbid")
    message: str
    type: str
    param: str | None
    code: str | None


BROKEN: dict[str, tuple[bytes, int]] = {
    "no JSON": (b"{nonsense", 400),
    "nothing": (b"", 400),
    "a list": (b"[]", 400),
    "a number": (b"5", 400),
    "null": (b"null", 400),
    "deep": (b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "just too deep": (b'{"model": "base", "messages": ' + b"[" * 950 + b"]" * 950 + b"}", 400),
    "a deep schema": (
        b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "response_format": {"type":'
        b' "json_schema", "json_schema": {"name": "x", "schema": ' + b'{"not": ' * 300 + b"{}" + b"}" * 303,
        400,
    ),
    "a huge number": (b'{"model": "base", "messages": [], "n": ' + b"9" * 5000 + b"}", 400),
    "twins": (b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "n": 1, "n": 2}', 400),
    "deep twins": (b'{"model": "base", "messages": [{"role": "user", "role": "user", "content": "x"}]}', 400),
    "no UTF-8": (b'{"model": "\xff"}', 400),
    "half a character": (b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "no number": (b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "top_p": NaN}', 400),
    "an unknown model": (b'{"model": "gpt-0", "messages": [{"role": "user", "content": "x"}]}', 404),
}


@pytest.mark.parametrize("what", BROKEN)
def test_errors_are_of_the_published_shape(gateway: Gateway, what: str) -> None:
    content, status = BROKEN[what]
    reply = gateway.http().post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == status and set(reply.json()) == {"error"}
    error = Problem.model_validate(reply.json()["error"])
    assert error.message and error.type in ("invalid_request_error", "not_found_error")
    assert gateway.charge_states() == []


WRONG_TYPES: dict[str, Any] = {
    "model": 5,
    "messages": "hello",
    "temperature": "hot",
    "top_p": [],
    "n": 1.5,
    "max_tokens": "ten",
    "stop": {"a": 1},
    "seed": "lucky",
    "logit_bias": [1, 2],
    "logprobs": "yes",
    "top_logprobs": "3",
    "tools": {},
    "tool_choice": 7,
    "response_format": "json",
    "stream": "true",
    "stream_options": True,
    "user": 5,
    "metadata": {"a": 1},
    "presence_penalty": "much",
    "parallel_tool_calls": "no",
}


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_a_wrong_type_is_refused_by_the_name_of_its_parameter(gateway: Gateway, field: str) -> None:
    reply = post(gateway, "/v1/chat/completions", {**CHAT, field: WRONG_TYPES[field]})
    assert reply.status_code == 400
    param = reply.json()["error"]["param"]
    assert param.split(".")[0] == field


def test_the_client_raises_its_own_errors(gateway: Gateway) -> None:
    with pytest.raises(openai.AuthenticationError):
        gateway.client("ol_none").chat.completions.create(**CHAT)
    with pytest.raises(openai.NotFoundError):
        gateway.client().chat.completions.create(**{**CHAT, "model": "none"})
    with pytest.raises(openai.BadRequestError):
        gateway.client().chat.completions.create(**{**CHAT, "n": 0})
    with pytest.raises(openai.UnprocessableEntityError):
        for n in (1, 2):
            gateway.client().chat.completions.create(**CHAT, n=n, extra_headers={"Idempotency-Key": "k"})


def test_seeds_reproduce_over_every_way_of_asking(gateway: Gateway) -> None:
    create = gateway.client().chat.completions.create
    first, again, other = (create(**{**CHAT, "seed": seed, "n": 2}) for seed in (1, 1, 2))
    said = [[choice.message.content for choice in answer.choices] for answer in (first, again, other)]
    assert said[0] == said[1] != said[2]
