"""JSON by schema and tool calls, as the official client asks for them: what comes always fits."""

import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from serve_apps.tool_calls import call_text
from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.conftest import Gateway

ASK = [{"role": "user", "content": "Where to?"}]


class Move(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    direction: Literal["north", "south"]
    num_steps: Literal[1, 2, 3]
    is_fast: bool


MOVE = Move.model_json_schema()


def tool(name: str = "move", schema: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": MOVE if schema is None else schema, **more},
    }


@pytest.mark.parametrize("model", ["base", "toy/a4"])
def test_the_clients_own_parser_gets_what_it_asked_for(gateway: Gateway, model: str) -> None:
    for seed in range(4):
        answer = gateway.client().chat.completions.parse(
            model=model,
            messages=ASK,
            response_format=Move,
            seed=seed,
            max_tokens=90,  # type: ignore[arg-type]
        )
        assert isinstance(answer.choices[0].message.parsed, Move)
        assert answer.choices[0].finish_reason == "stop"


def test_a_json_object_is_one_or_is_cut_off(gateway: Gateway) -> None:
    ways: dict[str, Any] = {"model": "base", "messages": ASK, "response_format": {"type": "json_object"}}
    for seed in range(5):
        choice = gateway.client().chat.completions.create(**ways, seed=seed, max_tokens=60).choices[0]
        assert (choice.message.content or "").startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)


def test_json_streams_and_has_choices(gateway: Gateway) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "move", "schema": MOVE, "strict": True}}
    ways: dict[str, Any] = {"model": "toy/a2", "messages": ASK, "response_format": form, "n": 3, "seed": 1}
    whole = gateway.client().chat.completions.create(**ways)
    said = ["", "", ""]
    for chunk in gateway.client().chat.completions.create(**ways, stream=True):
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said == [choice.message.content for choice in whole.choices]
    for text in said:
        Move.model_validate_json(text)
    assert_money_adds_up(gateway.database)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "move"}}])
def test_a_call_that_must_be_made_is_made(gateway: Gateway, choice: Any) -> None:
    ways: dict[str, Any] = {"model": "toy/a4", "messages": ASK, "tools": [tool()], "tool_choice": choice}
    answer = gateway.client().chat.completions.create(**ways, parallel_tool_calls=False, seed=2).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls or []
    assert call.type == "function" and call.function.name == "move" and call.id.startswith("call_")
    Move.model_validate_json(call.function.arguments)


def test_calls_stream_as_deltas_that_add_up(gateway: Gateway) -> None:
    """Through the client's own accumulator, and by hand."""
    ways: dict[str, Any] = {"model": "toy/a1", "messages": ASK, "tools": [tool()], "tool_choice": "required"}
    ways |= {"seed": 4, "max_tokens": 250}
    whole = gateway.client().chat.completions.create(**ways).choices[0]
    calls: list[dict[str, str]] = []
    reasons = []
    for chunk in gateway.client().chat.completions.create(**ways, stream=True):
        choice = chunk.choices[0]
        reasons.append(choice.finish_reason)
        for delta in choice.delta.tool_calls or []:
            assert delta.function is not None
            if delta.id is not None:
                assert delta.type == "function" and delta.index == len(calls)
                calls.append({"id": delta.id, "name": delta.function.name or "", "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments or ""
    assert [call["arguments"] for call in calls] == [
        c.function.arguments for c in whole.message.tool_calls or []
    ]
    assert {call["name"] for call in calls} == {"move"}
    assert reasons[-1] == whole.finish_reason
    one_call = {**ways, "parallel_tool_calls": False}
    with gateway.client().chat.completions.stream(**one_call) as stream:
        final = stream.get_final_completion().choices[0]
    (call,) = final.message.tool_calls or []
    assert final.finish_reason == "tool_calls" and call.function.arguments == calls[0]["arguments"]


def test_repeated_calls_have_the_same_ids(gateway: Gateway) -> None:
    body = {
        "model": "toy/a1",
        "messages": ASK,
        "tools": [tool()],
        "tool_choice": "required",
        "max_tokens": 200,
    }
    replies = [
        gateway.http().post("/v1/chat/completions", json=body, headers={"Idempotency-Key": "k"}).json()
        for _ in range(2)
    ]
    assert replies[0] == replies[1]


def test_text_is_free_where_no_call_must_be_made(gateway: Gateway) -> None:
    """``none`` asks as without tools; ``auto`` may talk and may be cut off."""
    ways: dict[str, Any] = {"model": "base", "messages": ASK, "max_tokens": 20, "temperature": 0}
    create = gateway.client().chat.completions.create
    bare = create(**ways)
    none = create(**ways, tools=[tool()], tool_choice="none")
    assert none.choices[0].message == bare.choices[0].message
    auto = create(**ways, tools=[tool()])
    assert auto.choices[0].message.content and not auto.choices[0].message.tool_calls
    assert auto.usage and bare.usage and auto.usage.prompt_tokens > bare.usage.prompt_tokens + 100


def test_a_conversation_with_calls_goes_on(gateway: Gateway) -> None:
    """What an answer carried is sent back as it came; it is asked as the plain form says."""
    ways: dict[str, Any] = {"model": "base", "tools": [tool()], "seed": 1, "max_tokens": 200}
    create = gateway.client().chat.completions.create
    message = (
        create(**ways, messages=ASK, tool_choice="required", parallel_tool_calls=False).choices[0].message
    )
    (call,) = message.tool_calls or []
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    ended = {**ways, "max_tokens": 5, "tool_choice": "none", "extra_body": {"ignore_eos": True}}
    after = create(**ended, messages=[*ASK, message, result])
    said = call_text(call.function.name, call.function.arguments)
    plain = [
        {"role": "assistant", "content": said},
        {"role": "user", "content": "<tool_response>\ndone\n</tool_response>"},
    ]
    assert create(**ended, messages=[*ASK, *plain]).choices[0].message == after.choices[0].message


KNOWING = (
    "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.num_steps }})"
    "{% endfor %};{% endfor %}"
)


def test_a_template_that_knows_tools_is_given_them_and_what_became_of_them(gateway: Gateway) -> None:
    gateway.services.tokenizer.chat_template = KNOWING
    arguments = '{"direction": "north", "num_steps": 2, "is_fast": true}'
    call = {"id": "call_1", "type": "function", "function": {"name": "move", "arguments": arguments}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    answer = gateway.client().chat.completions.create(
        model="base",
        messages=messages,  # type: ignore[arg-type]
        tools=[tool()],  # type: ignore[list-item]
        max_tokens=3,
    )
    told = "[move]user:Where to?;assistant:(move 2);tool:done;"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(gateway.services.tokenizer.encode(told))


def test_a_call_cut_off_by_length_says_so(gateway: Gateway) -> None:
    ways: dict[str, Any] = {"model": "base", "messages": ASK, "tools": [tool()], "tool_choice": "required"}
    answer = gateway.client().chat.completions.create(**ways, max_tokens=50).choices[0]
    assert answer.finish_reason == "length"
    (call,) = answer.message.tool_calls or []
    assert call.function.arguments and not call.function.arguments.endswith("}")


LARGE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
SIZEABLE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(600)}}
TOOLS = {"tools": [tool()]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a format of none": ({"response_format": {"type": "yaml"}}, "response_format.type"),
    "a schema missing": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "a schema too many": (
        {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
        "response_format",
    ),
    "a nameless schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    "a schema that is a list": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
        "response_format.json_schema.schema",
    ),
    "a bad schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
        "response_format.json_schema.schema",
    ),
    "a large schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": LARGE}}},
        "response_format.json_schema.schema",
    ),
    "an endless answer": (
        {"response_format": {"type": "json_object"}, "ignore_eos": True},
        "ignore_eos",
    ),
    "both": ({**TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    "a bad second tool": ({"tools": [tool(), tool("b", {"not": {}})]}, "tools.1.function.parameters"),
    "a large tool": ({"tools": [tool("b", LARGE)]}, "tools.0.function.parameters"),
    "many large tools": ({"tools": [tool(f"t{i}", SIZEABLE) for i in range(9)]}, "tools"),
    "a tool of no object": ({"tools": [tool("b", {"type": "string"})]}, "tools"),
    "a tool without name": ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    "a tool with a bad name": ({"tools": [tool('b"}')]}, "tools.0.function.name"),
    "twins": ({"tools": [tool(), tool()]}, "tools"),
    "a choice of none": ({**TOOLS, "tool_choice": "any"}, "tool_choice"),
    "a choice of another": (
        {**TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice",
    ),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "parallel without tools": ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    "129 tools": ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools"),
    "a stray result": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
    "calls of a user": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": "x",
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
                    ],
                }
            ]
        },
        "messages.0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name_and_costs_nothing(gateway: Gateway, what: str) -> None:
    change, param = REFUSED[what]
    body: dict[str, Any] = {"model": "base", "messages": ASK, **change}
    extra = {"ignore_eos": body.pop("ignore_eos")} if "ignore_eos" in body else None
    with pytest.raises(openai.BadRequestError) as refused:
        gateway.client().chat.completions.create(**body, extra_body=extra)
    assert (refused.value.param or "").startswith(param) and refused.value.type == "invalid_request_error"
    assert gateway.charge_states() == []


def test_a_schema_that_turns_out_too_complex_is_refused_and_paid_back(gateway: Gateway) -> None:
    """It compiles; only the engine's second step shows what it is."""
    schema = {"type": "string", "pattern": "^(a?){500}(a{500}){500}$"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="too many expressions"):
        gateway.client().chat.completions.create(model="base", messages=ASK, response_format=form)  # type: ignore[call-overload]
    assert gateway.charge_states() == ["released"]
    assert_money_adds_up(gateway.database)
