"""``/v1/responses`` through the official client: the same answers as a chat, in another shape."""

from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.conftest import Gateway

GREEDY: dict[str, Any] = {"model": "toy/a4", "temperature": 0, "max_output_tokens": 20}
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


class Move(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    direction: Literal["north", "south"]
    num_steps: Literal[1, 2, 3]


TOOL = {"type": "function", "name": "move", "parameters": Move.model_json_schema(), "strict": True}
MUST_CALL: dict[str, Any] = {
    "model": "toy/a4",
    "tools": [TOOL],
    "tool_choice": "required",
    "extra_body": {"seed": 3},
}


def test_text_and_messages_ask_what_a_chat_asks(gateway: Gateway) -> None:
    client = gateway.client()
    chat = client.chat.completions.create(
        model="toy/a4",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which one?"}],
        temperature=0,
        max_tokens=20,
    )
    as_text = client.responses.create(**GREEDY, input="Which one?", instructions="Be brief.")
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Which one?"}]}]
    as_list = client.responses.create(**GREEDY, input=parts, instructions="Be brief.")
    assert as_text.output_text == as_list.output_text == chat.choices[0].message.content
    assert as_text.usage is not None and chat.usage is not None
    assert as_text.usage.total_tokens == chat.usage.total_tokens
    assert (as_text.usage.model_extra or {})["cost_gwei"] == 20 * chat.usage.total_tokens
    proofs = [(answer.model_extra or {})["openledger"] for answer in (as_text, chat)]
    assert proofs[0]["response_sha256"] == proofs[1]["response_sha256"]
    assert proofs[0]["prompt_sha256"] == proofs[1]["prompt_sha256"]
    assert_money_adds_up(gateway.database)


def test_the_body_is_of_openais_shape(gateway: Gateway) -> None:
    body = {**GREEDY, "input": "Which one?", "metadata": {"a": "b"}, "user": "me"}
    told = gateway.http().post("/v1/responses", json=body).json()
    response = Response.model_validate(told, strict=True)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.metadata, response.user, response.max_output_tokens) == ({"a": "b"}, "me", 20)


@pytest.mark.parametrize("ways", [{**GREEDY}, MUST_CALL], ids=["text", "calls"])
def test_the_events_add_up_to_the_response(gateway: Gateway, ways: dict[str, Any]) -> None:
    whole = gateway.client().responses.create(**ways, input="Which one?")
    events = list(gateway.client().responses.create(**ways, input="Which one?", stream=True))
    for event in events:
        EVENT.validate_python(event.model_dump(by_alias=True, exclude_unset=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert events[-1].type == f"response.{whole.status}"
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.model_dump() for item in done] == [item.model_dump() for item in final.output]
    assert [_said(item) for item in final.output] == [_said(item) for item in whole.output]
    kinds = ("response.output_text.delta", "response.function_call_arguments.delta")
    deltas = "".join(event.delta for event in events if event.type in kinds)
    assert deltas == "".join(_said(item) for item in whole.output)
    with gateway.client().responses.stream(**ways, input="Which one?") as stream:
        for _ in stream:
            pass
        if whole.status == "completed":
            assert [_said(item) for item in stream.get_final_response().output] == [
                _said(i) for i in whole.output
            ]
    assert_money_adds_up(gateway.database)


def _said(item: Any) -> str:
    return str(item.arguments if item.type == "function_call" else item.content[0].text)


def test_json_by_schema(gateway: Gateway) -> None:
    answer = gateway.client().responses.parse(model="base", input="Where to?", text_format=Move)
    assert isinstance(answer.output_parsed, Move) and answer.status == "completed"


def test_a_call_and_its_result_go_back_as_they_came(gateway: Gateway) -> None:
    first = gateway.client().responses.create(**MUST_CALL, input="Where to?", parallel_tool_calls=False)
    (call,) = first.output
    assert call.type == "function_call"
    Move.model_validate_json(call.arguments)
    turns: list[Any] = [
        {"role": "user", "content": "Where to?"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    after = gateway.client().responses.create(**GREEDY, tools=[TOOL], tool_choice="none", input=turns)
    assert after.output_text


def test_a_repeated_key_repeats_the_response(gateway: Gateway) -> None:
    body = {**GREEDY, "input": "Which one?", "temperature": 1}
    replies = [
        gateway.http().post("/v1/responses", json=body, headers={"Idempotency-Key": "r"}) for _ in range(2)
    ]
    assert replies[0].json() == replies[1].json()
    assert replies[1].headers["Idempotent-Replayed"] == "true"
    assert gateway.charge_states() == ["captured"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "going on": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "later": ({"background": True}, "background"),
    "cutting": ({"truncation": "auto"}, "truncation"),
    "reasoning": ({"reasoning": {"effort": "low"}}, "reasoning"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input",
    ),
    "no input": ({"input": []}, "input"),
    "a number": ({"input": 5}, "input"),
    "a search": ({"tools": [{"type": "web_search"}]}, "tools"),
    "a stray choice": ({"tool_choice": "required"}, "tool_choice"),
    "a nameless schema": ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format"),
    "a bad schema": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}},
        "text.format.schema",
    ),
    "a bad tool": ({"tools": [{**TOOL, "parameters": {"not": {}}}]}, "tools.0.parameters"),
    "too long": ({"max_output_tokens": 10**9}, "max_output_tokens"),
    "too hot": ({"temperature": 2.5}, "temperature"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_served_is_refused_by_name(gateway: Gateway, what: str) -> None:
    change, param = REFUSED[what]
    with pytest.raises(openai.BadRequestError) as refused:
        gateway.client().responses.create(**{"model": "base", "input": "x", **change})
    assert (refused.value.param or "").startswith(param)
    assert gateway.charge_states() == []
