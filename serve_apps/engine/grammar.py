"""What an answer may look like, and which tokens keep it so. The one module that knows llguidance.

The engine sees a ``Constraint``: which tokens may come next, and which one came. A grammar is a text that
crosses processes: the gateway writes and checks it, the engine's process compiles it again. The limits keep
one compilation and one step in the tens of milliseconds, whatever was sent."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attribution.errors import Rejected

MAX_SCHEMA_BYTES = 32 * 1024
MAX_TOOLS_BYTES = 128 * 1024  # of all tools together

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"

# No free whitespace: a small model may go on with it for ever.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint(Protocol):
    """One answer's way through a grammar. Both raise Rejected when that turns out too complex."""

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool ``[vocabulary]``; an end token is among them where the answer may
        end."""
        ...

    def advance(self, token_id: int) -> bool:
        """Take the token that came, one of those allowed; says whether nothing may follow it."""
        ...


Constrain = Callable[[str], Constraint]


class Grammars:
    """Compiles grammars for one tokenizer and a vocabulary that may be padded beyond it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, end_ids: Sequence[int] | None = None
    ) -> None:
        self._tokenizer: LLTokenizer = from_tokenizer(
            tokenizer, n_vocab=num_tokens, eos_token=list(end_ids) if end_ids else None
        )

    def constraint(self, grammar: str) -> "Constraint":
        """Raises: Rejected for what is no grammar, too large, or asks for something not supported."""
        limits = LLParserLimits(
            initial_lexer_fuel=1_000_000, max_grammar_size=100_000, max_lexer_states=20_000
        )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return _Matcher(matcher)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; for half a character that is no text."""
        return bytes(self._tokenizer.decode_bytes([token_id]))


class _Matcher:
    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> Tensor:
        scores = self._matcher.compute_logit_bias()  # a byte per token, not zero where it is allowed
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        allowed = torch.frombuffer(bytearray(scores), dtype=torch.uint8).bool()
        if not allowed.any():
            raise _refused("no token of this model goes on with it")
        return allowed

    def advance(self, token_id: int) -> bool:
        if not self._matcher.consume_token(token_id):
            raise _refused(self._matcher.get_error())
        return bool(self._matcher.is_stopped())


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """JSON that fits ``schema``; without one, any JSON object."""
    try:
        return LLMatcher.grammar_from_json_schema(_compact(schema))
    except ValueError as error:
        raise _refused(str(error)) from error


def tool_grammar(schemas: Mapping[str, Mapping[str, Any] | None], *, may_talk: bool, may_repeat: bool) -> str:
    """Calls in the form ``<tool_call>\\n{"name": N, "arguments": A}\\n</tool_call>``, one to a line.

    Args:
        schemas: of the arguments of each function that may be called.
        may_talk: whether text may come before the first call, or instead of one.
        may_repeat: whether more than one call may be made.
    """
    more = '("\\n" call)*' if may_repeat else ""
    lines = ["%llguidance {}", f"start: text | opened {more}" if may_talk else f"start: call {more}"]
    if may_talk:
        lines += ["text: TEXT", "opened: opening rest", f"opening[lazy]: TEXT {json.dumps(CALL_BEGIN)}"]
        lines += ["TEXT: /(.|\\n)*/"]
    lines += [f"call: {json.dumps(CALL_BEGIN)} rest"]
    lines += ["rest: " + " | ".join(f"f{i}" for i in range(len(schemas)))]
    for i, (name, schema) in enumerate(schemas.items()):
        before = json.dumps(f'\n{{"name": "{name}", "arguments": ')
        after = json.dumps(f"}}\n{CALL_END}")
        lines += [f"f{i}: {before} a{i} {after}", f"a{i}: %json {_compact(schema)}"]
    return LLMatcher.grammar_from_lark(_bounded("\n".join(lines), MAX_TOOLS_BYTES))


def _compact(schema: Mapping[str, Any] | None) -> str:
    whole = {**({"type": "object"} if schema is None else schema), "x-guidance": _COMPACT}
    return _bounded(json.dumps(whole), MAX_SCHEMA_BYTES)


def _bounded(text: str, most: int) -> str:
    if len(text) > most:
        large = f"the schema has {len(text)} bytes, at most {most} are allowed"
        raise Rejected("schema_too_large", large, field="schema")
    return text


def _refused(why: str) -> Rejected:
    return Rejected("schema_not_supported", why.strip().split("\n")[0][:500], field="schema")
