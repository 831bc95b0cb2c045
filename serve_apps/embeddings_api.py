"""``/v1/embeddings``: the final hidden state at an input's last token, at unit length, of the base model or
an adapter. Every prompt token is paid, and the receipt's response hash covers the vectors in base64.
"""

import asyncio
import base64
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from attribution.commitment import Turn, prompt_sha256
from attribution.errors import Rejected
from attribution.hashing import sha256
from serve_apps.answers import MAX_INPUTS, Order
from serve_apps.engine.types import SamplingParams
from serve_apps.openai_answers import proof, usage
from serve_apps.openai_api import IdempotencyKey, headers, last_of
from serve_apps.openai_schema import MAX_MODEL_CHARS, Body, unsupported
from serve_apps.ordering import refuse_unclear, served_model
from serve_apps.services import Caller, Services, Shared

router = APIRouter()


class EmbeddingsRequest(Body):
    model: str = Field(max_length=MAX_MODEL_CHARS)
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        given = self.input
        if isinstance(given, str):
            return [given]
        numbers = [one for one in given if isinstance(one, int)]
        return [numbers] if numbers else [one for one in given if not isinstance(one, int)]


@router.post("/v1/embeddings", dependencies=[Depends(refuse_unclear)])
async def embeddings(
    request: Request,
    body: EmbeddingsRequest,
    shared: Shared,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    if body.dimensions is not None:
        raise unsupported("dimensions", body.dimensions)  # no model here was trained to be cut
    model = await served_model(shared, body.model)
    inputs = await asyncio.to_thread(_token_ids, shared, body)
    turns = [Turn("", shared.tokenizer.decode(ids)) for ids in inputs]
    order = Order(
        account=caller,
        model=model,
        prompt_ids=tuple(token for ids in inputs for token in ids),
        prompt_text="\n\n".join(turn.content for turn in turns),
        prompt_sha256=prompt_sha256(turns),
        sampling=SamplingParams(max_tokens=1),
        idempotency_key=idempotency_key,
        request_sha256=sha256(request.url.path.encode() + b"\n" + await request.body()),
        is_stored=True,
        is_streamed=False,
        num_choices=len(inputs),
        inputs=inputs,
    )
    charge = await shared.sessions.reserve(order)
    settled = await last_of(shared.sessions.answer(order, charge))
    shared.metrics.count(settled.receipt)
    show = str if body.encoding_format == "base64" else _floats
    told = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": show(choice.text)}
            for i, choice in enumerate(settled.choices)
        ],
        "model": settled.model_ref,
        "usage": {name: n for name, n in usage(settled).items() if name != "completion_tokens"},
        "openledger": proof(settled),
    }
    return JSONResponse(told, headers=headers(charge))


def _token_ids(shared: Services, body: EmbeddingsRequest) -> tuple[tuple[int, ...], ...]:
    """Every input as tokens.

    Raises: Rejected for one that is empty, too long or has ids that are no tokens."""
    given = body.inputs
    if not 1 <= len(given) <= MAX_INPUTS:
        raise Rejected(
            "input_out_of_range", f"{len(given)} inputs, allowed are 1 to {MAX_INPUTS}", field="input"
        )
    inputs = tuple(tuple(shared.tokenizer.encode(one) if isinstance(one, str) else one) for one in given)
    most = shared.limits.max_context_tokens - 1
    for i, ids in enumerate(inputs):
        if not 1 <= len(ids) <= most:
            length = f"input {i} has {len(ids)} tokens, allowed are 1 to {most}"
            raise Rejected("input_length", length, field="input")
        if not all(0 <= token < len(shared.tokenizer) for token in ids):
            raise Rejected("token_out_of_range", f"input {i} has ids that are no tokens", field="input")
    return inputs


def _floats(text: str) -> list[Any]:
    return list(np.frombuffer(base64.b64decode(text), dtype="<f4").tolist())
