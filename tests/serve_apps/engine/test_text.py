"""The text of an answer is its decoded tokens up to the first stop string, however tokens cut it."""

import random

import pytest

from serve_apps.engine.text import TextStream


def decode_bytes(ids: object) -> str:
    return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]


def stream(text: str, stop: tuple[str, ...]) -> tuple[str, list[str], bool]:
    """Push byte by byte; gives all text, the pieces, and whether it stopped."""
    source, pieces = TextStream(decode_bytes, stop), []
    for byte in text.encode():
        piece = source.push(byte)
        pieces.append(piece.text)
        if piece.is_stopped:
            return "".join(pieces), pieces, True
    last = source.finish()
    return "".join([*pieces, last.text]), pieces, last.is_stopped


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語と🙂", "", "🙂🙂"])
def test_pieces_make_up_the_text_and_hold_whole_characters(text: str) -> None:
    shown, pieces, stopped = stream(text, ())
    assert shown == text and not stopped
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(20))
def test_text_ends_before_the_first_stop_string(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab\n") for _ in range(60))
    stop = tuple("".join(rng.choice("ab\n") for _ in range(rng.randint(1, 5))) for _ in range(2))
    places = [text.find(s) for s in stop if s in text]
    first_end = min((text.find(s) + len(s) for s in stop if s in text), default=len(text))
    cut = [text[:first_end].find(s) for s in stop if s in text[:first_end]]
    shown, _, stopped = stream(text, stop)
    assert stopped == bool(places)
    assert shown == (text[: min(cut)] if cut else text)


def test_what_could_become_a_stop_string_is_held_back() -> None:
    source = TextStream(decode_bytes, ("END",))
    assert [source.push(byte).text for byte in b"aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert source.finish().text == "EN"


def test_half_a_character_at_the_end_is_shown_as_the_decoder_shows_it() -> None:
    source = TextStream(decode_bytes, ())
    assert source.push("é".encode()[0]).text == ""
    assert source.finish().text == "\ufffd"


def begun(text: str, stop: tuple[str, ...] = ()) -> tuple[str, list[int]]:
    """What is shown, and where its tokens begin, byte by byte."""
    source, places, offsets, shown = TextStream(decode_bytes, stop), [], [], ""
    for byte in text.encode():
        places.append(source.offset)
        piece = source.push(byte)
        offsets += [places[len(offsets) + i] for i in range(piece.num_begun)]
        shown += piece.text
        if piece.is_stopped:
            return shown, offsets
    last = source.finish()
    return shown + last.text, offsets + [places[len(offsets) + i] for i in range(last.num_begun)]


def test_every_token_begins_once_where_its_character_does() -> None:
    assert begun("aé🙂b") == ("aé🙂b", [0, 1, 1, 2, 2, 2, 2, 3])
    assert begun("") == ("", [])


def test_tokens_of_a_stop_string_never_begin_and_those_held_back_do_later() -> None:
    assert begun("abENDc", ("END",)) == ("ab", [0, 1])
    assert begun("aENxEN", ("END",)) == ("aENxEN", [0, 1, 2, 3, 4, 5])
