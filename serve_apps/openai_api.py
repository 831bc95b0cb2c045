"""``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``: an OpenAI server whose answers are paid.

A route checks, reserves, streams and ends; the first token is awaited before the response begins, so that
whatever goes wrong until then has its proper status."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from attribution.commitment import Turn, prompt_sha256
from attribution.errors import Refusal, Rejected
from attribution.hashing import sha256
from cluster.accounts import Account
from cluster.charges import Charge
from cluster.models import render_prompt
from serve_apps import catalog, openai_schema
from serve_apps.http_errors import openai_error
from serve_apps.openai_schema import ChatRequest, Chunks, CompletionRequest
from serve_apps.services import Caller, Services, Shared
from serve_apps.sessions import Order, Piece, Settled

router = APIRouter()
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=255)]
Generation = ChatRequest | CompletionRequest


@router.get("/v1/models")
async def models(shared: Shared, caller: Caller) -> dict[str, Any]:
    adapters = await shared.read(lambda session: catalog.served(session, shared.base.base_id))
    base = {"id": catalog.BASE, "object": "model", "created": 0, "owned_by": "openledger"}
    listed = [
        {
            "id": adapter.ref,
            "object": "model",
            "created": 0,
            "owned_by": adapter.name.split("/")[0],
            "root": catalog.base_ref(adapter.base_id),
            "openledger": {"adapter_id": adapter.adapter_id.hex(), "base_id": adapter.base_id.hex()},
        }
        for adapter in adapters
    ]
    return {"object": "list", "data": [base, *listed]}


@router.post("/v1/chat/completions")
async def chat_completions(
    request: Request,
    body: ChatRequest,
    shared: Shared,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    messages = [message.plain for message in body.messages]
    ids = await asyncio.to_thread(render_prompt, shared.tokenizer, messages)
    turns = [Turn(message["role"], message["content"]) for message in messages]
    order = await _order(request, body, shared, caller, idempotency_key, ids, turns)
    return await _respond(shared, body, order, is_chat=True)


@router.post("/v1/completions")
async def completions(
    request: Request,
    body: CompletionRequest,
    shared: Shared,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    ids, text = await asyncio.to_thread(_plain_prompt, shared, body)
    order = await _order(request, body, shared, caller, idempotency_key, ids, [Turn("", text)])
    return await _respond(shared, body, order, is_chat=False)


def _plain_prompt(shared: Services, body: CompletionRequest) -> tuple[list[int], str]:
    prompt = body.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return list(shared.tokenizer.encode(prompt)), prompt
    if not all(isinstance(token, int) for token in prompt):
        raise Rejected("unsupported_parameter", f"{len(prompt)} prompts in one request", field="prompt")
    ids = [int(token) for token in prompt]
    if not all(0 <= token < len(shared.tokenizer) for token in ids):
        raise Rejected("token_out_of_range", "the prompt has ids that are no tokens", field="prompt")
    return ids, str(shared.tokenizer.decode(ids))


async def _order(
    request: Request,
    body: Generation,
    shared: Services,
    account: Account,
    idempotency_key: str | None,
    prompt_ids: list[int],
    turns: list[Turn],
) -> Order:
    """Everything that can be refused before money is touched."""
    body.refuse_unsupported()
    max_tokens = _allowed_tokens(body.asked_tokens, len(prompt_ids), shared)
    base_id, price = shared.base.base_id, shared.base_gwei_per_token
    model = await shared.read(lambda session: catalog.resolve(session, body.model, base_id, price))
    return Order(
        account=account,
        model=model,
        prompt_ids=tuple(prompt_ids),
        prompt_text="\n\n".join(turn.content for turn in turns),
        prompt_sha256=prompt_sha256(turns),
        sampling=body.sampling(max_tokens, seed=secrets.randbits(63)),
        idempotency_key=idempotency_key,
        request_sha256=sha256(request.url.path.encode() + b"\n" + await request.body()),
        is_stored=body.store is not False,
        is_streamed=body.stream,
    )


def _allowed_tokens(asked: int | None, num_prompt: int, shared: Services) -> int:
    limits = shared.limits
    room = limits.max_context_tokens - num_prompt
    if num_prompt == 0:
        raise Rejected("prompt_empty", "the prompt has no tokens", field="prompt")
    if asked is not None and asked > limits.max_completion_tokens:
        most = f"max_tokens is {asked}, at most {limits.max_completion_tokens} are allowed"
        raise Rejected("max_tokens_too_large", most, field="max_tokens")
    if room < (asked or 1):
        raise Rejected(
            "context_length_exceeded",
            f"{num_prompt} prompt tokens and {asked or 1} to generate, the context holds"
            f" {limits.max_context_tokens}",
            field="messages",
        )
    return min(room, limits.max_completion_tokens) if asked is None else asked


async def _respond(shared: Services, body: Generation, order: Order, is_chat: bool) -> Response:
    started = time.monotonic()
    charge = await shared.sessions.reserve(order)
    answer = shared.sessions.answer(order, charge)
    if not body.stream:
        async with aclosing(answer):
            *_, settled = [item async for item in answer]
        assert isinstance(settled, Settled)
        _count(shared, settled)
        whole = openai_schema.chat_completion if is_chat else openai_schema.completion
        return JSONResponse(whole(settled), headers=_headers(charge))
    first = await anext(answer)
    shared.metrics.first_token.observe(time.monotonic() - started)

    async def chunks() -> AsyncIterator[str]:
        async with aclosing(answer):
            make = Chunks(charge.request_id, order.model.ref, int(time.time()), is_chat)
            try:
                if (opening := make.opening()) is not None:
                    yield _event(opening)
                item: Piece | Settled = first
                while not isinstance(item, Settled):
                    if item.text:
                        yield _event(make.text(item.text))
                    item = await anext(answer)
                _count(shared, item)
                yield _event(make.last(item))
                if body.wants_usage:
                    yield _event(make.usage(item))
                yield "data: [DONE]\n\n"
            except Refusal as refusal:
                yield _event(openai_error(refusal))

    return StreamingResponse(chunks(), media_type="text/event-stream", headers=_headers(charge))


def _headers(charge: Charge) -> dict[str, str]:
    repeated = {} if charge.is_new else {"Idempotent-Replayed": "true"}
    return {"X-Request-Id": charge.request_id.hex(), "Cache-Control": "no-store", **repeated}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _count(shared: Services, settled: Settled) -> None:
    shared.metrics.tokens.labels("prompt").inc(settled.receipt.prompt_tokens)
    shared.metrics.tokens.labels("completion").inc(settled.receipt.completion_tokens)
    shared.metrics.fees.inc(settled.receipt.fee_gwei)
