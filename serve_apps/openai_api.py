"""``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``: an OpenAI server whose answers are paid.

A route checks, reserves, streams and ends; the first token is awaited before the response begins, so that
whatever goes wrong until then has its proper status."""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy.orm import Session

from attribution.errors import Refusal
from cluster.charges import Charge
from serve_apps import catalog
from serve_apps.answers import Order, Piece, Settled
from serve_apps.http_errors import openai_error
from serve_apps.openai_answers import Chunks, Form, whole
from serve_apps.openai_schema import ChatRequest, CompletionRequest
from serve_apps.ordering import order_of, refuse_unclear
from serve_apps.services import Caller, Services, Shared

router = APIRouter()
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # dumps would make one per call
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=255)]


@router.get("/v1/models")
async def models(shared: Shared, caller: Caller) -> Response:
    """All of them: this list of the API has no pages. Thousands are written on the thread that reads them."""

    def listed(session: Session) -> bytes:
        base = {"id": catalog.BASE, "object": "model", "created": 0, "owned_by": "openledger"}
        adapters = catalog.served(session, shared.base.base_id)
        data = [base, *(_model(each.ref, each.base_id, each.adapter_id) for each in adapters)]
        return json.dumps({"object": "list", "data": data}).encode()

    return Response(await shared.read(listed), media_type="application/json")


@router.get("/v1/models/{name:path}")
async def model(name: str, shared: Shared, caller: Caller) -> dict[str, Any]:
    """What ``name`` stands for now: a bare name is the promoted version."""
    base_id, price = shared.base.base_id, shared.base_gwei_per_token
    found = await shared.read(lambda session: catalog.resolve(session, name, base_id, price))
    return _model(found.ref, found.base_id, found.adapter_id)


def _model(ref: str, base_id: bytes, adapter_id: bytes) -> dict[str, Any]:
    return {
        "id": ref,
        "object": "model",
        "created": 0,
        "owned_by": ref.split("/")[0] if "/" in ref else "openledger",
        "root": catalog.base_ref(base_id),
        "openledger": {"adapter_id": adapter_id.hex(), "base_id": base_id.hex()},
    }


@router.post("/v1/chat/completions", dependencies=[Depends(refuse_unclear)])
async def chat_completions(
    request: Request,
    body: ChatRequest,
    shared: Shared,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    body.refuse_unsupported()
    order = await order_of(request, body, shared, caller, idempotency_key)
    form = Form(
        is_chat=True,
        token_bytes=shared.grammars.token_bytes,
        calls_tools=body.calls_tools,
        has_logprobs=body.num_logprobs is not None,
        has_usage=body.wants_usage,
    )
    return await _respond(shared, form, order)


@router.post("/v1/completions", dependencies=[Depends(refuse_unclear)])
async def completions(
    request: Request,
    body: CompletionRequest,
    shared: Shared,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    body.refuse_unsupported()
    order = await order_of(request, body, shared, caller, idempotency_key)
    form = Form(
        is_chat=False,
        token_bytes=shared.grammars.token_bytes,
        has_logprobs=body.num_logprobs is not None,
        has_usage=body.wants_usage,
        echo=order.prompt_text if body.echo else "",
    )
    return await _respond(shared, form, order)


async def _respond(shared: Services, form: Form, order: Order) -> Response:
    started = time.monotonic()
    charge = await shared.sessions.reserve(order)
    answer = shared.sessions.answer(order, charge)
    if not order.is_streamed:
        settled = await last_of(answer)
        shared.metrics.count(settled.receipt)
        return JSONResponse(whole(form, settled), headers=headers(charge))
    first = await anext(answer)
    shared.metrics.first_token.observe(time.monotonic() - started)

    async def chunks() -> AsyncIterator[str]:
        async with aclosing(answer):
            make = Chunks(form, charge.request_id, order.model.ref, int(time.time()), order.num_choices)
            try:
                for chunk in make.opening():
                    yield event(chunk)
                item: Piece | Settled = first
                while not isinstance(item, Settled):
                    for chunk in make.piece(item):
                        yield event(chunk)
                    item = await anext(answer)
                shared.metrics.count(item.receipt)
                for chunk in make.last(item):
                    yield event(chunk)
                if form.has_usage:
                    yield event(make.usage(item))
                yield "data: [DONE]\n\n"
            except Refusal as refusal:
                yield event(openai_error(refusal))

    return StreamingResponse(chunks(), media_type="text/event-stream", headers=headers(charge))


async def last_of(answer: AsyncGenerator[Piece | Settled, None]) -> Settled:
    """The end of an answer that nobody watches as it comes."""
    async with aclosing(answer):
        *_, settled = [item async for item in answer]
    assert isinstance(settled, Settled)
    return settled


def headers(charge: Charge) -> dict[str, str]:
    repeated = {} if charge.is_new else {"Idempotent-Replayed": "true"}
    return {"X-Request-Id": charge.request_id.hex(), "Cache-Control": "no-store", **repeated}


def event(data: dict[str, Any]) -> str:
    return f"data: {_encode(data)}\n\n"
