"""Request bodies of ``/v1/responses``: another spelling of a chat, and turned into one.

No response is kept to go on from (``previous_response_id``, ``conversation``): a caller sends the whole of
it. Whatever else this server would have to ignore is no field here and so is refused as unknown.
"""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from attribution.errors import Rejected
from serve_apps.openai_schema import MAX_MODEL_CHARS, NAME, Body, ChatRequest, Schema, unsupported


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None  # what an answer carries, so that it can be sent back as it came
    logprobs: list[Any] | None = None


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str = Field(pattern=NAME)
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class FunctionTool(Body):
    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class NamedFunction(Body):
    type: Literal["function"]
    name: str = Field(pattern=NAME)


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, pattern=NAME)
    schema_: Schema | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("json_schema wants a name and a schema")
        return self


class TextConfig(Body):
    format: TextFormat | None = None


class ResponsesRequest(Body):
    model: str = Field(max_length=MAX_MODEL_CHARS)
    input: str | list[InputMessage | FunctionCallItem | FunctionOutput]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def chat(self) -> ChatRequest:
        """The same as a chat.

        Raises: Rejected for what would change the answer and is not served."""
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                raise unsupported(name, getattr(self, name))
        if self.truncation == "auto":
            raise unsupported("truncation", self.truncation)
        format_ = self.text.format if self.text is not None else None
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stream": self.stream,
            "store": self.store,
            "response_format": _response_format(format_) if format_ is not None else None,
            "parallel_tool_calls": self.parallel_tool_calls if self.tools else None,
        }
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude_unset=True, exclude={"type"})}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, NamedFunction):
            body["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tools or self.tool_choice == "required":
            body["tool_choice"] = self.tool_choice
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            field = "input" if first["loc"][:1] == ("messages",) else str(first["loc"][0])
            raise Rejected("invalid_value", f"{field}: {first['msg']}", field=field) from error

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            match item:
                case InputMessage():
                    messages.append({"role": item.role, "content": item.text})
                case FunctionOutput():
                    messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
                case FunctionCallItem():
                    if not messages or messages[-1]["role"] != "assistant":
                        messages.append({"role": "assistant", "content": ""})
                    call = {"name": item.name, "arguments": item.arguments}
                    made = messages[-1].setdefault("tool_calls", [])
                    made.append({"id": item.call_id, "type": "function", "function": call})
        return messages


def _response_format(given: TextFormat) -> dict[str, Any]:
    if given.type != "json_schema":
        return {"type": given.type}
    schema = {"name": given.name, "schema": given.schema_, "strict": given.strict}
    return {"type": given.type, "json_schema": schema}
