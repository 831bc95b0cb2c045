"""Which word-for-word passages of an answer stand in which records: a suffix array over token ids.

A ``Segment`` is immutable and memory-mappable: 6 bytes a token for vocabularies below 65,535 tokens (2 for
the token, 4 for the suffix), 8 beyond. Token ``t`` is stored as ``t + 1``; 0 separates passages and compares
lowest, so no match ever crosses from one record into the next. Spans are evidence, never money: what is
quoted from the prompt is dropped (``drop_quoted``), and rarity is measured, not length alone.

Source: longest matches by suffix array, infini-gram arXiv:2401.17377 and OLMoTrace arXiv:2504.07096; the
search here takes all start positions in lock-step instead of one thread each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydivsufsort import divsufsort

from attribution.errors import Corrupted

Ints = NDArray[Any]  # unsigned, of the width the segment was built with
Longs = NDArray[np.int64]
WINDOW = 32  # tokens compared per probe; longer matches are refined window by window
ARRAYS = ("tokens", "suffixes", "starts", "owners")


@dataclass(frozen=True, slots=True)
class Segment:
    """Passages of records and the order of all their suffixes.

    Attributes:
        tokens: stored tokens (id + 1), each passage followed by a 0, then ``WINDOW`` zeros of padding.
        suffixes: positions of all suffixes that begin with a token, in lexicographic order.
        starts: position of the first token of each passage, ascending.
        owners: index of the record each passage belongs to.
    """

    tokens: Ints
    suffixes: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    owners: NDArray[np.uint32]

    @property
    def num_tokens(self) -> int:
        return len(self.suffixes)


@dataclass(frozen=True, slots=True)
class Span:
    """Answer tokens ``[start, end)`` stand word for word in ``records`` (indexes, ascending).

    ``count`` is how often in all, ``surprisal_bits`` how improbable these tokens are together if drawn one by
    one from the segment: rare names score high, boilerplate low."""

    start: int
    end: int
    count: int
    surprisal_bits: float
    records: tuple[int, ...]


def build_segment(passages: Sequence[tuple[int, Sequence[int]]], vocab_size: int) -> Segment:
    """Sort all suffixes of ``(record index, token ids)`` passages. Equal passages give equal bytes anywhere.

    The suffix sort is bytewise: big-endian storage makes byte order token order; suffixes that begin inside a
    token are thrown away."""
    width = np.dtype(np.uint16) if vocab_size < 2**16 - 1 else np.dtype(np.uint32)
    lengths = np.array([len(ids) for _, ids in passages], dtype=np.int64)
    ends = np.cumsum(lengths + 1)
    tokens = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=width)
    starts = ends - lengths - 1
    for (_, ids), start in zip(passages, starts.tolist(), strict=True):
        assert all(0 <= token < vocab_size for token in ids), f"a token is outside [0, {vocab_size})"
        tokens[start : start + len(ids)] = np.asarray(ids, dtype=np.int64) + 1
    assert tokens.nbytes < 2**31, "split into several segments"
    suffixes = np.zeros(0, dtype=np.uint32)
    if len(tokens):
        order = divsufsort(np.frombuffer(tokens.astype(width.newbyteorder(">")).tobytes(), np.uint8).copy())
        positions = order[order % width.itemsize == 0] // width.itemsize
        suffixes = positions[tokens[positions] != 0].astype(np.uint32)
    return Segment(
        np.concatenate([tokens, np.zeros(WINDOW, width)]),
        suffixes,
        starts.astype(np.uint32),
        np.array([owner for owner, _ in passages], dtype=np.uint32),
    )


def save_segment(segment: Segment, folder: Path) -> None:
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(segment, name), allow_pickle=False)


def open_segment(locate: Callable[[str], Path]) -> Segment:
    """Memory-map the arrays that ``locate`` finds by file name; ``Corrupted`` if they do not belong
    together."""
    tokens, suffixes, starts, owners = (
        np.load(locate(f"{name}.npy"), mmap_mode="r", allow_pickle=False) for name in ARRAYS
    )
    if len(tokens) != len(suffixes) + len(starts) + WINDOW or len(starts) != len(owners):
        raise Corrupted(
            "segment_shape",
            f"{len(tokens)} stored tokens for {len(suffixes)} suffixes, "
            f"{len(starts)} passages and {len(owners)} owners",
        )
    return Segment(tokens, suffixes, starts, owners)


def longest_matches(segment: Segment, answer: Sequence[int]) -> Longs:
    """For each start position, how many of the tokens from there on stand somewhere in the segment in a row.

    All positions search together, ``WINDOW`` tokens a comparison; a position whose whole window matched goes
    on, within the suffixes that share it, with its next window."""
    num = len(answer)
    result = np.zeros(num, dtype=np.int64)
    if num == 0 or segment.num_tokens == 0:
        return result
    stored = np.zeros(num + WINDOW, dtype=np.int64)
    stored[:num] = np.asarray(answer, dtype=np.int64) + 1
    active = np.arange(num)
    low = np.zeros(num, dtype=np.int64)
    high = np.full(num, segment.num_tokens, dtype=np.int64)
    depth = 0
    while len(active):
        query = stored[np.minimum(active[:, None] + depth + np.arange(WINDOW), num + WINDOW - 1)]
        first = _bound(segment, query, low, high, depth, after_equal=False)
        matched = np.zeros(len(active), dtype=np.int64)
        for neighbour in (first - 1, first):
            inside = (neighbour >= low) & (neighbour < high)
            matched = np.maximum(matched, np.where(inside, _common(segment, query, neighbour, depth), 0))
        result[active] = depth + matched
        whole = matched == WINDOW
        active, query, first, high = active[whole], query[whole], first[whole], high[whole]
        if len(active):
            high = _bound(segment, query, first, high, depth, after_equal=True)
        low, depth = first, depth + WINDOW
    return result


def _windows(segment: Segment, ranks: Longs, depth: int) -> Longs:
    """The stored tokens ``[depth, depth + WINDOW)`` of the suffixes of these ranks, ``[ranks, WINDOW]``."""
    positions = segment.suffixes[np.clip(ranks, 0, segment.num_tokens - 1)].astype(np.int64) + depth
    where = np.minimum(positions[:, None] + np.arange(WINDOW), len(segment.tokens) - 1)
    return segment.tokens[where].astype(np.int64)


def _bound(segment: Segment, query: Longs, low: Longs, high: Longs, depth: int, after_equal: bool) -> Longs:
    """First rank in ``[low, high)`` whose window is not below the query's (or is above it)."""
    low, high = low.copy(), high.copy()
    rows = np.arange(len(query))
    while (open_ := low < high).any():
        middle = (low + high) >> 1
        difference = _windows(segment, middle, depth) - query
        sign = difference[rows, (difference != 0).argmax(axis=1)]
        goes_right = open_ & ((sign < 0) | (after_equal & (sign == 0)))
        low = np.where(goes_right, middle + 1, low)
        high = np.where(open_ & ~goes_right, middle, high)
    return low


def _common(segment: Segment, query: Longs, ranks: Longs, depth: int) -> Longs:
    """Leading tokens that query and suffix share; a separator or the end of the answer (both 0) ends it."""
    equal = (_windows(segment, ranks, depth) == query) & (query != 0)
    return np.where(equal.all(axis=1), WINDOW, (~equal).argmax(axis=1))


def find_spans(segment: Segment, answer: Sequence[int], *, min_tokens: int, min_bits: float) -> list[Span]:
    """Maximal spans of the answer that stand in the segment: none lies within another.

    ``min_tokens`` and ``min_bits`` keep boilerplate out; the order is by position."""
    lengths = longest_matches(segment, answer)
    bits = _surprisal_bits(segment, answer)
    spans = []
    last_end = 0
    for start, length in enumerate(lengths.tolist()):
        end = start + length
        if end <= last_end:
            continue
        last_end = end
        span_bits = float(bits[start:end].sum())
        if length >= min_tokens and span_bits >= min_bits:
            ranks = _occurrences(segment, answer[start:end])
            spans.append(Span(start, end, len(ranks), span_bits, _records(segment, ranks)))
    return spans


def drop_quoted(spans: Sequence[Span], answer: Sequence[int], prompt: Sequence[int]) -> list[Span]:
    """Without the spans that also stand in the prompt: who is merely quoted back has contributed nothing."""
    padded = f" {' '.join(map(str, prompt))} "
    return [span for span in spans if f" {' '.join(map(str, answer[span.start : span.end]))} " not in padded]


def _occurrences(segment: Segment, phrase: Sequence[int]) -> Longs:
    """Positions of every occurrence, by narrowing the rank interval a window at a time."""
    low, high = np.zeros(1, dtype=np.int64), np.full(1, segment.num_tokens, dtype=np.int64)
    for depth in range(0, len(phrase), WINDOW):
        part = np.asarray(phrase[depth : depth + WINDOW], dtype=np.int64)[None] + 1
        below = np.zeros((1, WINDOW), dtype=np.int64)
        below[:, : part.shape[1]] = part
        above = np.full((1, WINDOW), np.iinfo(np.int64).max // 2)
        above[:, : part.shape[1]] = part
        low, high = (
            _bound(segment, below, low, high, depth, after_equal=False),
            _bound(segment, above, low, high, depth, after_equal=True),
        )
    return segment.suffixes[int(low[0]) : int(high[0])].astype(np.int64)


def _records(segment: Segment, positions: Longs) -> tuple[int, ...]:
    passages = np.searchsorted(segment.starts, positions, side="right") - 1
    return tuple(int(owner) for owner in np.unique(segment.owners[passages]))


def _surprisal_bits(segment: Segment, answer: Sequence[int]) -> NDArray[np.float64]:
    """``-log2 p(token)`` with add-one counts, read off the suffix array: a token's suffixes are adjacent."""
    tokens = np.asarray(answer, dtype=np.int64)[:, None] + 1
    query = np.zeros((len(tokens), WINDOW), dtype=np.int64)
    query[:, :1] = tokens
    above = np.full((len(tokens), WINDOW), np.iinfo(np.int64).max // 2)
    above[:, :1] = tokens
    low = np.zeros(len(tokens), dtype=np.int64)
    high = np.full(len(tokens), segment.num_tokens, dtype=np.int64)
    first = _bound(segment, query, low, high, 0, after_equal=False)
    count = _bound(segment, above, first, high, 0, after_equal=True) - first
    return math.log2(segment.num_tokens + 1) - np.log2(count + 1.0)
