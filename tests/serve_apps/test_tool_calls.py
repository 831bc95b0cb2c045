"""Calls are read out of text however it is cut into pieces, and nothing that was said is lost."""

import random

import pytest

from serve_apps.tool_calls import (
    Arguments,
    CallBegun,
    CallReader,
    Content,
    call_text,
    instructions,
    read_calls,
)

TRICKY = '{"a": "}\\\\\\"{", "b": [{"c": "</tool_call>"}, []], "d": {}}'
ONE, TWO = call_text("move", TRICKY), call_text("wait", "{}")
ANSWERS = {
    "": ("", []),
    "just text": ("just text", []),
    "a < b <tool and <tool_call": ("a < b <tool and <tool_call", []),
    ONE: ("", [("move", TRICKY, True)]),
    f"so: {ONE}": ("so: ", [("move", TRICKY, True)]),
    f"{ONE}\n{TWO}\n{ONE}": ("", [("move", TRICKY, True), ("wait", "{}", True), ("move", TRICKY, True)]),
    ONE[:60]: ("", [("move", ONE[:60].partition('"arguments": ')[2], False)]),
    ONE[:-3]: ("", [("move", TRICKY, False)]),
    f"{ONE}\n{TWO[:20]}": (TWO[:20], [("move", TRICKY, True)]),
    TWO[:20]: (TWO[:20], []),
    TWO[:30]: (TWO[:30], []),
}


@pytest.mark.parametrize("text", ANSWERS)
def test_calls_are_read(text: str) -> None:
    content, calls = read_calls(text)
    expected_content, expected = ANSWERS[text]
    assert content == expected_content
    assert [(call.name, call.arguments, call.is_whole) for call in calls] == expected


@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_do_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    for text in ANSWERS:
        reader, deltas, at = CallReader(), [], 0
        while at < len(text):
            size = rng.randint(1, 9)
            deltas += reader.push(text[at : at + size])
            at += size
        deltas += reader.finish()
        content = "".join(delta.text for delta in deltas if isinstance(delta, Content))
        begun = [delta.name for delta in deltas if isinstance(delta, CallBegun)]
        said = [
            "".join(d.text for d in deltas if isinstance(d, Arguments) and d.index == i)
            for i in range(len(begun))
        ]
        whole_content, calls = read_calls(text)
        assert content == whole_content
        assert list(zip(begun, said, strict=True)) == [(call.name, call.arguments) for call in calls]


def test_instructions_show_every_tool_and_the_form() -> None:
    told = instructions([{"type": "function", "function": {"name": "move"}}])
    assert '{"name": "move"}' in told and call_text("NAME", "{}") in told
