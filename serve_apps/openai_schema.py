"""Request bodies of the OpenAI API, as far as it is served here.

An unknown parameter is refused, and so is a known one that this server would have to ignore although it
changes the answer; what cannot change it (``user``, ``metadata``, …) is accepted. Types are strict: ``"1"``
is no number. What the values may be is said by ``SamplingParams`` and ``Order``, who check them for
everybody.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from attribution.errors import Rejected
from serve_apps.engine.grammar import json_grammar, tool_grammar
from serve_apps.engine.types import MAX_LOGPROBS, SamplingParams, TokenScore, within
from serve_apps.tool_calls import call_text

MAX_COMPLETION_LOGPROBS = 5  # as the OpenAI reference has it for /v1/completions
MAX_SCHEMA_DEPTH = 64
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
MAX_MODEL_CHARS = 1000  # a blend of eight has eight names


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    """Whoever walks a schema later may recurse."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return schema
    raise ValueError(f"nested more than {MAX_SCHEMA_DEPTH} levels deep")


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


Schema = Annotated[dict[str, Any], AfterValidator(_shallow)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str = Field(pattern=NAME)
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None  # what an answer carries, so that it can be sent back as it came
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} makes no tool_calls")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("tool_call_id goes with role tool, and only with it")
        return self

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template without tools takes it, and as ``prompt_sha256`` commits to it."""
        if self.role == "tool":
            return {"role": "user", "content": f"<tool_response>\n{self.text}\n</tool_response>"}
        calls = [call_text(call.function.name, call.function.arguments) for call in self.tool_calls or ()]
        content = "\n".join([self.text, *calls] if self.text else calls)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}

    @property
    def templated(self) -> dict[str, Any]:
        """As a chat template with tools takes it."""
        if self.role == "tool":
            return {"role": "tool", "content": self.text, "tool_call_id": self.tool_call_id}
        if not self.tool_calls:
            return dict(self.plain)
        calls = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.function.name, "arguments": _parsed(call.function.arguments)},
            }
            for call in self.tool_calls
        ]
        return {"role": "assistant", "content": self.text, "tool_calls": calls}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


class Function(Body):
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None  # calls fit their schema always


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str = Field(pattern=NAME)


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    name: str = Field(pattern=NAME)
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None  # answers fit the schema always


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema goes with type json_schema, and only with it")
        return self


class Generation(Body):
    """What chats and plain completions share."""

    model: str = Field(max_length=MAX_MODEL_CHARS)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def refuse_unsupported(self) -> None:
        """Raises: Rejected for what would change the answer and is not served, or does not go together."""
        if self.stream_options is not None and not self.stream:
            raise _mismatch("stream_options", "stream_options go with stream=true")

    @property
    def grammar(self) -> str:
        """What the answer must match; empty: anything."""
        return ""

    @property
    def num_logprobs(self) -> int | None:
        return None

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
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple(TokenScore(_token(key), bias) for key, bias in (self.logit_bias or {}).items()),
            seed=seed if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
            num_logprobs=self.num_logprobs,
            grammar=self.grammar,
        )

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None

    def refuse_unsupported(self) -> None:
        Generation.refuse_unsupported(self)
        if self.reasoning_effort:
            raise unsupported("reasoning_effort", self.reasoning_effort)
        if self.top_logprobs is not None:
            within("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
            if not self.logprobs:
                raise _mismatch("top_logprobs", "top_logprobs go with logprobs=true")
        self._refuse_tools()

    def _refuse_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        for field in ("tool_choice", "parallel_tool_calls"):
            if not names and getattr(self, field) not in (None, "none"):
                raise _mismatch(field, f"{field} goes with tools")
        if len(set(names)) < len(names):
            raise _mismatch("tools", "two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise _mismatch("tool_choice", f"no tool is named {self.tool_choice.function.name!r}")
        for tool in self.tools or ():
            if (tool.function.parameters or {}).get("type", "object") != "object":
                raise _mismatch("tools", f"the parameters of {tool.function.name} are not of type object")
        if self.calls_tools and self.response_format is not None and self.response_format.type != "text":
            raise unsupported("response_format", f"{self.response_format.type} beside tools")

    @property
    def calls_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def schemas(self) -> dict[str, dict[str, Any] | None]:
        """Every JSON schema that the answer may have to fit, by the field it stands in."""
        if self.calls_tools:
            fields = enumerate(self.tools or ())
            return {f"tools.{i}.function.parameters": tool.function.parameters for i, tool in fields}
        if self.response_format is not None and self.response_format.json_schema is not None:
            return {"response_format.json_schema.schema": self.response_format.json_schema.schema_}
        return {}

    @property
    def grammar(self) -> str:
        if self.calls_tools:
            named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
            functions = [tool.function for tool in self.tools or () if named in (None, tool.function.name)]
            return tool_grammar(
                {function.name: _of_object(function.parameters) for function in functions},
                may_talk=self.tool_choice in (None, "auto"),
                may_repeat=named is None and self.parallel_tool_calls is not False,
            )
        if self.response_format is None or self.response_format.type == "text":
            return ""
        form = self.response_format.json_schema
        return json_grammar(form.schema_ if form is not None else None)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def prompt_field(self) -> str:
        return "messages"


class CompletionRequest(Generation):
    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        Generation.refuse_unsupported(self)
        if self.best_of not in (None, self.num_choices):
            raise unsupported("best_of", self.best_of)
        if self.suffix:
            raise unsupported("suffix", self.suffix)
        within("logprobs", self.logprobs or 0, 0, MAX_COMPLETION_LOGPROBS)
        if self.echo and self.logprobs is not None:
            raise unsupported("logprobs", f"{self.logprobs} with echo")

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def asked_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # the OpenAI default of this endpoint

    @property
    def tokens_field(self) -> str:
        return "max_tokens"

    @property
    def prompt_field(self) -> str:
        return "prompt"


def _of_object(schema: dict[str, Any] | None) -> dict[str, Any]:
    return {**(schema or {}), "type": "object"}


def _token(key: str) -> int:
    if not key.isdecimal() or str(int(key[:20])) != key:
        raise Rejected("logit_bias_invalid", f"{key[:50]!r} is no token id", field="logit_bias")
    return int(key)


def unsupported(field: str, given: object) -> Rejected:
    return Rejected("unsupported_parameter", f"{field}={given!r} is not supported here", field=field)


def _mismatch(field: str, why: str) -> Rejected:
    return Rejected("invalid_value", why, field=field)
