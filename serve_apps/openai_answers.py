"""Response bodies of ``/v1/chat/completions`` and ``/v1/completions``, whole and in chunks.

Additions of ours are one ``openledger`` object and ``usage.cost_gwei``, which official clients carry as extra
fields. In a stream the chunks that say how choices ended come when all is paid; the last has the receipt."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_apps.answers import Choice, Piece, Settled
from serve_apps.engine.types import TokenLogprob
from serve_apps.tool_calls import Arguments, Call, CallBegun, CallReader, Content, Delta, read_calls

TokenBytes = Callable[[int], bytes]
LEAST_LOGPROB = -9999.0  # as the OpenAI reference has it for what is next to impossible


@dataclass(frozen=True, slots=True)
class Form:
    """How one answer is shown."""

    is_chat: bool
    token_bytes: TokenBytes
    calls_tools: bool = False
    has_logprobs: bool = False
    has_usage: bool = False  # in a stream
    echo: str = ""  # shown before each choice


def usage(settled: Settled) -> dict[str, int]:
    receipt = settled.receipt
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "completion_tokens": receipt.completion_tokens,
        "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
        "cost_gwei": receipt.fee_gwei,
    }


def proof(settled: Settled) -> dict[str, str | int]:
    """The ``openledger`` object: what exactly answered, and under which receipt."""
    receipt = settled.receipt
    return {
        "receipt_id": receipt.receipt_id.hex(),
        "request_id": receipt.request_id.hex(),
        "model": settled.model_ref,
        "base_id": receipt.base_id.hex(),
        "adapter_id": receipt.adapter_id.hex(),
        "prompt_sha256": settled.prompt_sha256,
        "response_sha256": settled.answer_sha256,
        "fee_gwei": receipt.fee_gwei,
    }


def call_id(request_id: bytes, choice: int, index: int) -> str:
    """The same when an answer is repeated."""
    preimage = request_id + choice.to_bytes(4, "big") + index.to_bytes(4, "big")
    return f"call_{hashlib.sha256(preimage).hexdigest()[:24]}"


def whole(form: Form, settled: Settled) -> dict[str, Any]:
    prefix, kind = ("chatcmpl", "chat.completion") if form.is_chat else ("cmpl", "text_completion")
    show = _chat_choice if form.is_chat else _completion_choice
    choices = enumerate(settled.choices)
    return {
        "id": f"{prefix}-{settled.receipt.request_id.hex()}",
        "object": kind,
        "created": settled.created_at,
        "model": settled.model_ref,
        "choices": [{"index": i, **show(form, settled.receipt.request_id, i, one)} for i, one in choices],
        "usage": usage(settled),
        "openledger": proof(settled),
    }


def _chat_choice(form: Form, request_id: bytes, index: int, choice: Choice) -> dict[str, Any]:
    content, calls = read_calls(choice.text) if form.calls_tools else (choice.text, [])
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
        "refusal": None,
    }
    if calls:
        ids = (call_id(request_id, index, i) for i in range(len(calls)))
        message["tool_calls"] = [shown_call(*pair) for pair in zip(ids, calls, strict=False)]
    is_called = bool(calls) and all(call.is_whole for call in calls)
    return {
        "message": message,
        "logprobs": _logprobs(form, choice.logprobs),
        "finish_reason": finish_reason(choice, is_called),
    }


def _completion_choice(form: Form, request_id: bytes, index: int, choice: Choice) -> dict[str, Any]:
    return {
        "text": form.echo + choice.text,
        "logprobs": _logprobs(form, choice.logprobs),
        "finish_reason": finish_reason(choice, is_called=False),
    }


def shown_call(call_id: str, call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id, "type": "function", "function": function}


def finish_reason(choice: Choice, is_called: bool) -> str:
    """In OpenAI's words, which have none for an answer whose reader left: that is cut off, as by length."""
    if choice.finish_reason == "stop" and is_called:
        return "tool_calls"
    return "length" if choice.finish_reason == "cancelled" else choice.finish_reason


class Chunks:
    """The chunks of one streamed answer; they share id, time and model."""

    def __init__(self, form: Form, request_id: bytes, model_ref: str, created: int, num_choices: int) -> None:
        prefix, kind = ("chatcmpl", "chat.completion.chunk") if form.is_chat else ("cmpl", "text_completion")
        self._form = form
        self._request_id = request_id
        self._readers = [CallReader() for _ in range(num_choices)]
        self._head = {
            "id": f"{prefix}-{request_id.hex()}",
            "object": kind,
            "created": created,
            "model": model_ref,
        }

    def opening(self) -> list[dict[str, Any]]:
        """A chat stream begins by naming the role, one that echoes with the prompt."""
        choices = range(len(self._readers))
        if self._form.is_chat:
            delta = {"role": "assistant", "content": None if self._form.calls_tools else "", "refusal": None}
            return [self._chunk(choice, delta, "") for choice in choices]
        return [self._chunk(choice, {}, self._form.echo) for choice in choices if self._form.echo]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        if not self._form.calls_tools:
            deltas = [{"content": piece.text}] if piece.text else []
        else:
            read = self._readers[piece.choice].push(piece.text)
            deltas = [self._delta(piece.choice, delta) for delta in read]
        if not deltas and piece.logprobs:
            deltas = [{}]
        logprobs = [piece.logprobs if i == 0 else () for i in range(len(deltas))]
        return [
            self._chunk(piece.choice, delta, piece.text, told)
            for delta, told in zip(deltas, logprobs, strict=True)
        ]

    def last(self, settled: Settled) -> list[dict[str, Any]]:
        chunks = []
        for number, choice in enumerate(settled.choices):
            reader = self._readers[number]
            rest = [self._delta(number, delta) for delta in reader.finish()]
            chunks += [self._chunk(number, delta, "") for delta in rest]
            reason = finish_reason(choice, is_called=reader.num_calls > 0 and reader.is_between)
            chunks.append(self._chunk(number, {}, "", (), reason))
        chunks[-1]["openledger"] = proof(settled)
        return chunks

    def usage(self, settled: Settled) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage(settled)}

    def _delta(self, choice: int, delta: Delta) -> dict[str, Any]:
        match delta:
            case Content(text):
                return {"content": text}
            case CallBegun(index, name):
                begun = shown_call(call_id(self._request_id, choice, index), Call(name, ""))
                return {"tool_calls": [{"index": index, **begun}]}
            case Arguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        text: str,
        told: Sequence[TokenLogprob] = (),
        reason: str | None = None,
    ) -> dict[str, Any]:
        shown = {
            "index": choice,
            **({"delta": delta} if self._form.is_chat else {"text": text}),
            "logprobs": _logprobs(self._form, told) if told else None,
            "finish_reason": reason,
        }
        return {**self._head, "choices": [shown], **({"usage": None} if self._form.has_usage else {})}


def _logprobs(form: Form, told: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if told is None or not form.has_logprobs:
        return None
    if form.is_chat:
        return {"content": [_chat_logprob(form.token_bytes, one) for one in told], "refusal": None}
    return {
        "tokens": [_legacy_token(form.token_bytes(one.chosen.token_id)) for one in told],
        "token_logprobs": [_finite(one.chosen.score) for one in told],
        "top_logprobs": [_legacy_top(form.token_bytes, one) for one in told],
        "text_offset": [len(form.echo) + one.text_offset for one in told],
    }


def _chat_logprob(token_bytes: TokenBytes, told: TokenLogprob) -> dict[str, Any]:
    def shown(token_id: int, score: float) -> dict[str, Any]:
        data = token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(score), "bytes": list(data)}

    top = [shown(one.token_id, one.score) for one in told.top]
    return {**shown(told.chosen.token_id, told.chosen.score), "top_logprobs": top}


def _legacy_top(token_bytes: TokenBytes, told: TokenLogprob) -> dict[str, float]:
    """The likeliest by their text, and the chosen one whether it is among them or not."""
    return {_legacy_token(token_bytes(one.token_id)): _finite(one.score) for one in (*told.top, told.chosen)}


def _legacy_token(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(score: float) -> float:
    return max(score, LEAST_LOGPROB)
