"""``/v1/responses``: the same answers as chats, paid the same way, in the Responses shape.

A stream's items close, and its last event comes, when the receipt is durable."""

import re
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from attribution.errors import Refusal, Rejected
from cluster.charges import Charge
from serve_apps.answers import Order, Piece, Settled
from serve_apps.http_errors import openai_error
from serve_apps.openai_answers import call_id, proof
from serve_apps.openai_api import IdempotencyKey, event, headers, last_of
from serve_apps.ordering import order_of, refuse_unclear
from serve_apps.responses_schema import ResponsesRequest
from serve_apps.services import Caller, Services, Shared
from serve_apps.tool_calls import Arguments, CallBegun, CallReader, Content, read_calls

router = APIRouter()
Event = dict[str, Any]
SPELLINGS = {
    r"^messages\b": "input",
    r"^max_(completion_)?tokens$": "max_output_tokens",
    r"^response_format\b(\.json_schema)?": "text.format",
    r"\.function\.parameters$": ".parameters",
}


@router.post("/v1/responses", dependencies=[Depends(refuse_unclear)])
async def responses(
    request: Request,
    body: ResponsesRequest,
    shared: Shared,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    chat = body.chat
    try:
        chat.refuse_unsupported()
        order = await order_of(request, chat, shared, caller, idempotency_key)
    except Rejected as refusal:
        raise _respelt(refusal) from refusal
    charge = await shared.sessions.reserve(order)
    shape = Shape(body, order, charge, chat.calls_tools)
    if order.is_streamed:
        return await _streamed(shared, shape)
    settled = await last_of(shared.sessions.answer(order, charge))
    shared.metrics.count(settled.receipt)
    return JSONResponse(shape.whole(settled), headers=headers(charge))


def _respelt(refusal: Rejected) -> Rejected:
    """Under the name that the field has here."""
    field = refusal.field
    for chat, here in SPELLINGS.items():
        field = re.sub(chat, here, field)
    return Rejected(refusal.code, refusal.message, field=field, http_status=refusal.http_status)


async def _streamed(shared: Services, shape: "Shape") -> Response:
    started = time.monotonic()
    answer = shared.sessions.answer(shape.order, shape.charge)
    first = await anext(answer)
    shared.metrics.first_token.observe(time.monotonic() - started)

    async def events() -> AsyncIterator[str]:
        async with aclosing(answer):
            make = Events(shape)
            try:
                for each in make.opening():
                    yield _named(each)
                item: Piece | Settled = first
                while not isinstance(item, Settled):
                    for each in make.piece(item):
                        yield _named(each)
                    item = await anext(answer)
                shared.metrics.count(item.receipt)
                for each in make.closing(item):
                    yield _named(each)
            except Refusal as refusal:
                yield _named(make.failed(refusal))

    return StreamingResponse(events(), media_type="text/event-stream", headers=headers(shape.charge))


def _named(data: Event) -> str:
    return f"event: {data['type']}\n{event(data)}"


class Shape:
    """How one response is shown: what was asked for, beside what came."""

    def __init__(self, body: ResponsesRequest, order: Order, charge: Charge, calls_tools: bool) -> None:
        self.order = order
        self.charge = charge
        self.calls_tools = calls_tools
        self._head: Event = {
            "id": f"resp_{charge.request_id.hex()}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": order.model.ref,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": order.is_stored,
            "temperature": order.sampling.temperature,
            "text": {"format": _format(body)},
            "tool_choice": _tool_choice(body),
            "tools": [
                {
                    "description": None,
                    "parameters": None,
                    "strict": True,
                    **tool.model_dump(exclude_unset=True),
                }
                for tool in body.tools or ()
            ],
            "top_p": order.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def begun(self) -> Event:
        return self._head

    def whole(self, settled: Settled) -> Event:
        is_whole = settled.choices[0].finish_reason == "stop"
        return {
            **self._head,
            "created_at": settled.created_at,
            "model": settled.model_ref,
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": self._output(settled, is_whole),
            "usage": _usage(settled),
            "openledger": proof(settled),
        }

    def _output(self, settled: Settled, is_whole: bool) -> list[Event]:
        text = settled.choices[0].text
        content, calls = read_calls(text) if self.calls_tools else (text, [])
        status = "completed" if is_whole else "incomplete"
        items = [self.message(content, status)] if content or not calls else []
        for i, call in enumerate(calls):
            items.append(self.call(i, call.name, call.arguments, "completed" if call.is_whole else status))
        return items

    def message(self, text: str, status: str) -> Event:
        return {
            "id": f"msg_{self.charge.request_id.hex()}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [part(text)] if status != "in_progress" else [],
        }

    def call(self, index: int, name: str, arguments: str, status: str) -> Event:
        return {
            "id": f"fc_{self.charge.request_id.hex()}_{index}",
            "type": "function_call",
            "call_id": call_id(self.charge.request_id, 0, index),
            "name": name,
            "arguments": arguments,
            "status": status,
        }


def part(text: str) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class Events:
    """The events of one streamed response: one item is open at a time, and closes before the next opens."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._reader = CallReader()
        self._number = 0
        self._items: list[Event] = []  # the last one is open
        self._text = ""  # of the open one

    def opening(self) -> list[Event]:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._shape.begun()) for kind in kinds]

    def piece(self, piece: Piece) -> list[Event]:
        if not self._shape.calls_tools:
            return self._content(piece.text) if piece.text else []
        return [event for delta in self._reader.push(piece.text) for event in self._read(delta)]

    def closing(self, settled: Settled) -> list[Event]:
        response = self._shape.whole(settled)
        events = [event for delta in self._reader.finish() for event in self._read(delta)]
        if not self._items:
            events += self._open(self._shape.message("", "in_progress"))
        events += self._close(response["status"])
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def failed(self, refusal: Refusal) -> Event:
        error = openai_error(refusal)["error"]
        return self._event("error", **{name: error[name] for name in ("code", "message", "param")})

    def _read(self, delta: Content | CallBegun | Arguments) -> list[Event]:
        match delta:
            case Content(text):
                return self._content(text)
            case CallBegun(index, name):
                return [
                    *self._close("completed"),
                    *self._open(self._shape.call(index, name, "", "in_progress")),
                ]
            case Arguments(_, text):
                self._text += text
                return [self._in_item("response.function_call_arguments.delta", delta=text)]

    def _content(self, text: str) -> list[Event]:
        opened = []
        if not self._items or self._items[-1]["type"] != "message":
            opened = [*self._close("completed"), *self._open(self._shape.message("", "in_progress"))]
        self._text += text
        return [*opened, self._in_part("response.output_text.delta", delta=text, logprobs=[])]

    def _open(self, item: Event) -> list[Event]:
        self._items.append(item)
        self._text = ""
        events = [self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)]
        if item["type"] == "message":
            events.append(self._in_part("response.content_part.added", part=part("")))
        return events

    def _close(self, status: str) -> list[Event]:
        if not self._items:
            return []
        item, text = self._items[-1], self._text
        if item["type"] == "message":
            done = {**item, "status": status, "content": [part(text)]}
            events = [
                self._in_part("response.output_text.done", text=text, logprobs=[]),
                self._in_part("response.content_part.done", part=part(text)),
            ]
        else:
            done = {**item, "status": status, "arguments": text}
            kind = "response.function_call_arguments.done"
            events = [self._in_item(kind, name=item["name"], arguments=text)]
        index = len(self._items) - 1
        return [*events, self._event("response.output_item.done", output_index=index, item=done)]

    def _in_part(self, kind: str, **fields: Any) -> Event:
        return self._in_item(kind, content_index=0, **fields)

    def _in_item(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _format(body: ResponsesRequest) -> Event:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(exclude_unset=True, by_alias=True)


def _tool_choice(body: ResponsesRequest) -> object:
    if body.tool_choice is None or isinstance(body.tool_choice, str):
        return body.tool_choice or "auto"
    return body.tool_choice.model_dump()


def _usage(settled: Settled) -> Event:
    receipt = settled.receipt
    return {
        "input_tokens": receipt.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": receipt.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
        "cost_gwei": receipt.fee_gwei,
    }
