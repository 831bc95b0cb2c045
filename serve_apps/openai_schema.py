"""Request and response bodies of the OpenAI API, as far as it is served here.

An unknown parameter is refused, and so is a known one that this server would have to ignore although it
changes the answer; what cannot change it (``user``, ``metadata``, …) is accepted. Additions of ours are one
``openledger`` object and ``usage.cost_gwei``, which official clients carry as extra fields."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from attribution.errors import Rejected
from serve_apps.engine.types import SamplingParams
from serve_apps.sessions import Settled


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Generation(Body):
    model: str = Field(max_length=200)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: bool | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def refuse_unsupported(self) -> None:
        """Raises: Rejected for a parameter that would change the answer and is not served."""
        if self.n not in (None, 1):
            raise _unsupported("n", self.n)
        if self.logit_bias:
            raise _unsupported("logit_bias", self.logit_bias)

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        """``None`` means the OpenAI default; ``seed`` is drawn for a request that names none."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=seed if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
        )

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    def refuse_unsupported(self) -> None:
        _Generation.refuse_unsupported(self)
        for name in ("logprobs", "top_logprobs", "tools", "reasoning_effort"):
            if getattr(self, name):
                raise _unsupported(name, getattr(self, name))
        if self.response_format not in (None, {"type": "text"}):
            raise _unsupported("response_format", self.response_format)

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Generation):
    prompt: str | list[int] | list[str]
    echo: bool = False
    best_of: int | None = None
    logprobs: int | None = None
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        _Generation.refuse_unsupported(self)
        if self.best_of not in (None, 1):
            raise _unsupported("best_of", self.best_of)
        for name in ("echo", "logprobs", "suffix"):
            if getattr(self, name):
                raise _unsupported(name, getattr(self, name))

    @property
    def asked_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # the OpenAI default of this endpoint


def _unsupported(field: str, given: object) -> Rejected:
    return Rejected("unsupported_parameter", f"{field}={given!r} is not supported here", field=field)


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


def chat_completion(settled: Settled) -> dict[str, Any]:
    message = {"role": "assistant", "content": settled.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": settled.finish_reason}
    return _whole("chatcmpl", "chat.completion", settled, choice)


def completion(settled: Settled) -> dict[str, Any]:
    choice = {
        "index": 0,
        "text": settled.text,
        "logprobs": None,
        "finish_reason": settled.finish_reason,
    }
    return _whole("cmpl", "text_completion", settled, choice)


def _whole(prefix: str, kind: str, settled: Settled, choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{settled.receipt.request_id.hex()}",
        "object": kind,
        "created": settled.created_at,
        "model": settled.model_ref,
        "choices": [choice],
        "usage": usage(settled),
        "openledger": proof(settled),
    }


class Chunks:
    """The chunks of one streamed answer; they share id, time and model."""

    def __init__(self, request_id: bytes, model_ref: str, created: int, is_chat: bool) -> None:
        prefix, kind = ("chatcmpl", "chat.completion.chunk") if is_chat else ("cmpl", "text_completion")
        self._is_chat = is_chat
        self._head = {
            "id": f"{prefix}-{request_id.hex()}",
            "object": kind,
            "created": created,
            "model": model_ref,
        }

    def opening(self) -> dict[str, Any] | None:
        """A chat stream begins by naming the role."""
        return self._chunk({"role": "assistant", "content": ""}, "") if self._is_chat else None

    def text(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}, text)

    def last(self, settled: Settled) -> dict[str, Any]:
        return self._chunk({}, "", settled.finish_reason) | {"openledger": proof(settled)}

    def usage(self, settled: Settled) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage(settled)}

    def _chunk(self, delta: dict[str, str], text: str, finish_reason: str | None = None) -> dict[str, Any]:
        content = {"delta": delta} if self._is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}
