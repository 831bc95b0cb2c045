"""From a request body to an ``Order``: everything that can be refused before money is touched."""

import asyncio
import json
import secrets
from collections import Counter
from dataclasses import dataclass

from fastapi import Request

from attribution.commitment import Turn, prompt_sha256
from attribution.errors import Rejected
from attribution.hashing import sha256
from attribution.types import ZERO_ID
from cluster.accounts import Account
from cluster.models import has_tools_template, render_prompt
from serve_apps import catalog
from serve_apps.answers import Order
from serve_apps.catalog import ServedModel
from serve_apps.engine.grammar import json_grammar
from serve_apps.openai_schema import ChatRequest, CompletionRequest
from serve_apps.services import Services
from serve_apps.tool_calls import instructions


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine takes it, and as its commitment does."""

    token_ids: tuple[int, ...]
    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(turn.content for turn in self.turns)


def chat_prompt(shared: Services, body: ChatRequest) -> Prompt:
    """The turns are the plain messages; tools stand before them, as one turn of compact JSON."""
    plain = [message.plain for message in body.messages]
    turns = [Turn(message["role"], message["content"]) for message in plain]
    if not body.calls_tools:
        return Prompt(tuple(render_prompt(shared.tokenizer, plain)), tuple(turns))
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
    told = Turn("tools", json.dumps(tools, ensure_ascii=False, separators=(",", ":")))
    if has_tools_template(shared.tokenizer):
        ids = render_prompt(shared.tokenizer, [message.templated for message in body.messages], tools)
    else:
        ids = render_prompt(shared.tokenizer, [{"role": "system", "content": instructions(tools)}, *plain])
    return Prompt(tuple(ids), (told, *turns))


def plain_prompt(shared: Services, body: CompletionRequest) -> Prompt:
    prompt = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise Rejected("unsupported_parameter", f"{len(prompt)} prompts in one request", field="prompt")
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Prompt(tuple(shared.tokenizer.encode(prompt)), (Turn("", prompt),))
    ids = tuple(token for token in prompt if isinstance(token, int))
    if not all(0 <= token < len(shared.tokenizer) for token in ids):
        raise Rejected("token_out_of_range", "the prompt has ids that are no tokens", field="prompt")
    return Prompt(ids, (Turn("", str(shared.tokenizer.decode(ids))),))


async def refuse_unclear(request: Request) -> None:
    """What no schema of a body sees: a key that stands twice in an object says two things, and half a
    surrogate pair is no text. A dependency of every route that answers for money."""

    def check(pairs: list[tuple[str, object]]) -> dict[str, object]:
        twins = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        if twins:
            twice = f"{twins[0][:100]!r} stands twice in an object"
            raise Rejected("duplicate_key", twice, field=twins[0][:100])
        return dict(pairs)

    try:
        body = json.loads(await request.body(), object_pairs_hook=check)
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Rejected("invalid_unicode", f"the body has half a surrogate pair: {error.reason}") from error
    except RecursionError as error:
        raise Rejected("body_too_deep", "the body is nested too deeply") from error
    except ValueError:
        return  # no JSON at all, which is said elsewhere


async def served_model(shared: Services, name: str) -> ServedModel:
    """What ``name`` means now. Its adapter is on its way to memory while the rest of the request is read.

    Raises: Rejected as ``catalog.resolve`` does."""
    base_id, price = shared.base.base_id, shared.base_gwei_per_token
    model = await shared.read(lambda session: catalog.resolve(session, name, base_id, price))
    if model.blend is None:
        shared.pool.prefetch(model.adapter_id)
    return model


async def order_of(
    request: Request,
    body: ChatRequest | CompletionRequest,
    shared: Services,
    account: Account,
    idempotency_key: str | None,
) -> Order:
    """Raises: Rejected for whatever is wrong with the request, but for credit."""
    content = await request.body()
    model = await served_model(shared, body.model)
    if isinstance(body, ChatRequest):
        prompt = await asyncio.to_thread(chat_prompt, shared, body)
        if body.calls_tools or body.response_format is not None:
            await asyncio.to_thread(check_grammar, shared, body)
    else:
        prompt = await asyncio.to_thread(plain_prompt, shared, body)
    max_tokens = _allowed_tokens(body, len(prompt.token_ids), shared)
    sampling = body.sampling(max_tokens, seed=secrets.randbits(63))
    if not all(bias.token_id < len(shared.tokenizer) for bias in sampling.logit_bias):
        raise Rejected("token_out_of_range", "logit_bias has ids that are no tokens", field="logit_bias")
    num_public = 0
    if model.prefix_id != ZERO_ID:  # or no thread is asked
        num_public = await asyncio.to_thread(
            shared.prefixes.num_public, shared.storage, model.prefix_id, prompt.token_ids
        )
    return Order(
        account=account,
        model=model,
        prompt_ids=prompt.token_ids,
        prompt_text=prompt.text,
        prompt_sha256=prompt_sha256(prompt.turns),
        sampling=sampling,
        idempotency_key=idempotency_key,
        request_sha256=sha256(request.url.path.encode() + b"\n" + content),
        is_stored=body.store is not False,
        is_streamed=bool(body.stream),
        num_choices=body.num_choices,
        num_public=num_public,
    )


def check_grammar(shared: Services, body: ChatRequest) -> None:
    """Compile what the engine will compile, schema by schema, so that a refusal names the one that is bad."""
    field = ""
    try:
        for field, schema in body.schemas.items():  # noqa: B007  (the last is the one that failed)
            shared.grammars.constraint(json_grammar(schema))
        field = "tools" if body.calls_tools else "response_format"
        if body.grammar:
            shared.grammars.constraint(body.grammar)
    except Rejected as refusal:
        raise Rejected(refusal.code, f"{field}: {refusal.message}", field=field) from refusal


def _allowed_tokens(body: ChatRequest | CompletionRequest, num_prompt: int, shared: Services) -> int:
    limits, asked, field = shared.limits, body.asked_tokens, body.tokens_field
    room = limits.max_context_tokens - num_prompt
    if num_prompt == 0:
        raise Rejected("prompt_empty", "the prompt has no tokens", field=body.prompt_field)
    if asked is not None and asked < 1:
        raise Rejected("max_tokens_out_of_range", f"{field} is {asked}, at least 1 is needed", field=field)
    if asked is not None and asked > limits.max_completion_tokens:
        most = f"{field} is {asked}, at most {limits.max_completion_tokens} are allowed"
        raise Rejected("max_tokens_too_large", most, field=field)
    if room < (asked or 1):
        raise Rejected(
            "context_length_exceeded",
            f"{num_prompt} prompt tokens and {asked or 1} to generate, the context holds"
            f" {limits.max_context_tokens}",
            field=body.prompt_field,
        )
    return min(room, limits.max_completion_tokens) if asked is None else asked
