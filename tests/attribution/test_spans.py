from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.errors import Corrupted
from attribution.spans import (
    WINDOW,
    Segment,
    build_segment,
    drop_quoted,
    find_spans,
    longest_matches,
    open_segment,
    save_segment,
)

Passages = list[tuple[int, list[int]]]


def longest_by_scanning(passages: Passages, answer: list[int]) -> list[int]:
    """The oracle: every length at every position, compared with every slice of every passage."""
    longest = []
    for start in range(len(answer)):
        length = 0
        while start + length < len(answer) and count_by_scanning(
            passages, answer[start : start + length + 1]
        ):
            length += 1
        longest.append(length)
    return longest


def count_by_scanning(passages: Passages, phrase: list[int]) -> int:
    return sum(
        ids[at : at + len(phrase)] == phrase
        for _, ids in passages
        for at in range(len(ids) - len(phrase) + 1)
    )


def spans_by_scanning(passages: Passages, answer: list[int], min_tokens: int) -> list[tuple[int, int]]:
    reach = [(start, start + length) for start, length in enumerate(longest_by_scanning(passages, answer))]
    return [
        (a, b)
        for a, b in reach
        if b - a >= min_tokens and not any(c <= a and b <= d and (c, d) != (a, b) for c, d in reach)
    ]


small_vocabulary = st.lists(st.integers(0, 3), max_size=60)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), small_vocabulary), max_size=8), small_vocabulary)
def test_search_in_lock_step_equals_scanning(passages: Passages, answer: list[int]) -> None:
    """Lengths, maximal spans, counts and records agree with a brute-force scan."""
    segment = build_segment(passages, vocab_size=4)
    assert longest_matches(segment, answer).tolist() == longest_by_scanning(passages, answer)
    spans = find_spans(segment, answer, min_tokens=2, min_bits=0.0)
    assert [(span.start, span.end) for span in spans] == spans_by_scanning(passages, answer, 2)
    for span in spans:
        phrase = answer[span.start : span.end]
        assert span.count == count_by_scanning(passages, phrase)
        owners = {owner for owner, ids in passages if count_by_scanning([(owner, ids)], phrase)}
        assert span.records == tuple(sorted(owners))


@pytest.mark.parametrize("vocab_size", [1000, 100_000], ids=["16 bit", "32 bit"])
def test_matches_longer_than_a_window_are_exact(vocab_size: int) -> None:
    """Two passages share three windows and part on a later token; the longer one is found whole."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, vocab_size, 3 * WINDOW).tolist()
    passages = [(0, [*shared, 1, 2, 3]), (1, [*shared, 1, 2, 9, 9]), (2, rng.integers(0, 9, 500).tolist())]
    segment = build_segment(passages, vocab_size)
    assert segment.tokens.itemsize + segment.suffixes.itemsize == (6 if vocab_size == 1000 else 8)
    (span,) = find_spans(segment, [*shared, 1, 2, 3], min_tokens=WINDOW, min_bits=0.0)
    assert (span.start, span.end, span.count, span.records) == (0, 3 * WINDOW + 3, 1, (0,))


def test_no_match_crosses_a_record() -> None:
    segment = build_segment([(0, [5, 6]), (1, [7, 8])], vocab_size=10)
    assert longest_matches(segment, [5, 6, 7, 8]).tolist() == [2, 1, 2, 1]


def test_rare_names_outweigh_boilerplate() -> None:
    passages = [(record, [1, 2, 3, 10 + record, 40 + record]) for record in range(20)]
    segment = build_segment(passages, vocab_size=100)
    boilerplate, name = find_spans(segment, [1, 2, 3, 99, 12, 42], min_tokens=2, min_bits=0.0)
    assert name.surprisal_bits > boilerplate.surprisal_bits
    assert name.records == (2,) and boilerplate.count == 20
    assert find_spans(segment, [1, 2, 3], min_tokens=2, min_bits=boilerplate.surprisal_bits + 0.1) == []


def test_what_the_prompt_says_is_no_evidence() -> None:
    segment = build_segment([(0, [1, 2, 3, 4]), (1, [7, 8, 9])], vocab_size=20)
    answer = [1, 2, 3, 4, 15, 7, 8, 9]
    spans = find_spans(segment, answer, min_tokens=3, min_bits=0.0)
    assert len(spans) == 2
    assert drop_quoted(spans, answer, prompt=[11, 1, 2, 3, 4, 12]) == spans[1:]
    assert drop_quoted(spans, answer, prompt=[11, 1, 2, 3, 5]) == spans


def test_saved_segment_is_mapped_back(tmp_path: Path) -> None:
    segment = build_segment([(0, [1, 2, 3]), (3, [4, 5])], vocab_size=10)
    save_segment(segment, tmp_path)
    mapped = open_segment(tmp_path.joinpath)
    assert isinstance(mapped.tokens, np.memmap)
    assert find_spans(mapped, [4, 5], min_tokens=2, min_bits=0.0)[0].records == (3,)


def test_arrays_of_two_segments_are_refused(tmp_path: Path) -> None:
    save_segment(build_segment([(0, [1, 2, 3])], vocab_size=10), tmp_path)
    longer = build_segment([(0, [1, 2, 3, 4])], vocab_size=10)
    np.save(tmp_path / "suffixes.npy", longer.suffixes)
    with pytest.raises(Corrupted, match="4 suffixes"):
        open_segment(tmp_path.joinpath)


def test_an_empty_segment_matches_nothing() -> None:
    empty: Segment = build_segment([], vocab_size=10)
    assert find_spans(empty, [1, 2], min_tokens=1, min_bits=0.0) == []
