"""Tool calls as text: how they stand in an answer, and how they are read out of it while it grows.

Whatever the model, a call is written ``<tool_call>\\n{"name": N, "arguments": A}\\n</tool_call>``, several to
a line each, after the text if there is any; the grammar of ``engine/grammar.py`` holds an answer to that. A
chat template that knows tools is given them; for others a system message lists them and says the form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_apps.engine.grammar import CALL_BEGIN, CALL_END

_HEAD = f'{CALL_BEGIN}\n{{"name": "'
_NECK = '", "arguments": '
_TAIL = f"}}\n{CALL_END}"


@dataclass(frozen=True, slots=True)
class Call:
    """One call. ``is_whole`` is False for one that was cut off; its arguments are no JSON then."""

    name: str
    arguments: str
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Some more of the arguments of call ``index``."""

    index: int
    text: str


Delta = Content | CallBegun | Arguments


def call_text(name: str, arguments: str) -> str:
    return f"{_HEAD}{name}{_NECK}{arguments}{_TAIL}"


def instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told of ``tools`` whose chat template has no place for them."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You may call these functions:\n{listed}\n\nTo call one, answer with its name and its arguments as"
        f" JSON:\n{call_text('NAME', '{}')}"
    )


class CallReader:
    """Reads calls out of text that arrives in pieces.

    What was cut off before a call's arguments began is content: nothing that was said is lost."""

    def __init__(self) -> None:
        self._rest = ""
        self._state = self._content
        self._index = -1
        self._depth = 0
        self._is_in_string = self._is_escaped = False

    @property
    def num_calls(self) -> int:
        return self._index + 1

    @property
    def is_between(self) -> bool:
        """Whether no call is open."""
        return self._state in (self._content, self._between)

    def push(self, text: str) -> list[Delta]:
        self._rest += text
        deltas: list[Delta] = []
        while (found := self._state()) is not None:
            deltas += found
        if self._state == self._content and (shown := len(self._rest) - _open_suffix(self._rest, _HEAD)):
            deltas.append(Content(self._rest[:shown]))
            self._rest = self._rest[shown:]
        return deltas

    def finish(self) -> list[Delta]:
        held = {
            self._content: self._rest,
            self._between: self._rest.removeprefix("\n"),
            self._name: _HEAD + self._rest,
        }.get(self._state, "")
        self._rest = ""
        return [Content(held)] if held else []

    # Each state takes what it can off ``_rest``; None when it needs more text.

    def _content(self) -> list[Delta] | None:
        before, head, after = self._rest.partition(_HEAD)
        if not head:
            return None
        self._rest, self._state = after, self._name
        return [Content(before)] if before else []

    def _name(self) -> list[Delta] | None:
        name, neck, after = self._rest.partition(_NECK)
        if not neck:
            return None
        self._rest, self._state = after, self._arguments
        self._index += 1
        return [CallBegun(self._index, name)]

    def _arguments(self) -> list[Delta] | None:
        if not self._rest:
            return None
        end = next((i + 1 for i, c in enumerate(self._rest) if self._closes(c)), 0)
        taken = self._rest[: end or len(self._rest)]
        self._rest = self._rest[len(taken) :]
        if end:
            self._state = self._tail
        return [Arguments(self._index, taken)]

    def _closes(self, character: str) -> bool:
        """Whether the object of the arguments ends with ``character``."""
        if self._is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_in_string = False
            return False
        self._is_in_string = character == '"'
        self._depth += (character in "{[") - (character in "}]")
        return self._depth == 0

    def _tail(self) -> list[Delta] | None:
        _, tail, after = self._rest.partition(_TAIL)
        if not tail:
            return None
        self._rest, self._state = after, self._between
        return []

    def _between(self) -> list[Delta] | None:
        _, head, after = self._rest.partition(_HEAD)
        if not head:
            return None
        self._rest, self._state = after, self._name
        return []


def read_calls(text: str) -> tuple[str, list[Call]]:
    """The content of a whole answer, and its calls."""
    reader = CallReader()
    deltas = [*reader.push(text), *reader.finish()]
    content = "".join(delta.text for delta in deltas if isinstance(delta, Content))
    names = [delta.name for delta in deltas if isinstance(delta, CallBegun)]
    arguments = [
        "".join(delta.text for delta in deltas if isinstance(delta, Arguments) and delta.index == i)
        for i in range(len(names))
    ]
    last = len(names) - 1
    return content, [
        Call(name, said, i < last or reader.is_between)
        for i, (name, said) in enumerate(zip(names, arguments, strict=True))
    ]


def _open_suffix(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` with which ``mark`` begins."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
