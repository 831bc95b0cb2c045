"""Why an answer is what it is: the records behind it, by three kinds of evidence kept apart.

``span``      word-for-word passages that stand in the answer, and not in the prompt
``lexical``   rare words that the record shares with question and answer
``gradient``  the record's influence on this very answer, from the model itself

Records are ranked by the sum of the three as standard scores; each finding lists its parts, so a reader sees
which kind speaks. This is evidence, never money: periods are paid by attribution/influence.py's integers
alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attribution.influence import float_scores
from attribution.lexical import Lexicon, lexical_scores
from attribution.sketch import Sketch
from attribution.spans import Segment, Span, drop_quoted, find_spans

MIN_SPAN_TOKENS = 3
MIN_SPAN_BITS = 20.0
Scores = NDArray[np.float64]


class Kind(StrEnum):
    SPAN = "span"
    LEXICAL = "lexical"
    GRADIENT = "gradient"


WEIGHTS = {Kind.SPAN: 1.0, Kind.LEXICAL: 1.0, Kind.GRADIENT: 1.0}


@dataclass(frozen=True, slots=True)
class Finding:
    """One record behind an answer. ``record`` is its row in the index; scores are standard deviations above
    the mean record."""

    record: int
    score: float
    parts: tuple[tuple[Kind, float], ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Best record first; spans by position in the answer."""

    findings: tuple[Finding, ...]
    spans: tuple[Span, ...]


def gradient_scores(sketch: Sketch, features: NDArray[np.int16], direction: Tensor) -> Scores:
    """Influence of every row on an answer with this ``attribution.influence.direction``."""
    return float_scores(sketch.floats(direction[None])[0], features)


def answer_spans(segment: Segment, prompt: Sequence[int], answer: Sequence[int]) -> list[Span]:
    """What the answer repeats of records and did not read in its own prompt."""
    spans = find_spans(segment, answer, min_tokens=MIN_SPAN_TOKENS, min_bits=MIN_SPAN_BITS)
    return drop_quoted(spans, answer, prompt)


def span_scores(spans: Sequence[Span], num_records: int) -> Scores:
    """A span's bits, divided among the records that hold it."""
    scores = np.zeros(num_records)
    for span in spans:
        scores[list(span.records)] += span.surprisal_bits / len(span.records)
    return scores


def text_scores(lexicon: Lexicon, question: str, answer: str) -> Scores:
    return lexical_scores(lexicon, f"{question}\n{answer}")


def fuse(scores: dict[Kind, Scores], spans: Sequence[Span], top: int) -> Evidence:
    """Rank records by the weighted sum of standard scores; ties by row. Kinds may be missing.

    Args:
        scores: of every trained record, by kind, all of one length."""
    if not scores or not len(next(iter(scores.values()))):
        return Evidence((), tuple(spans))
    standard = {kind: standard_scores(values) for kind, values in scores.items()}
    total = sum((WEIGHTS[kind] * values for kind, values in standard.items()), start=np.zeros(1))
    best = np.argsort(-total, kind="stable")[:top].tolist()
    return Evidence(
        tuple(
            Finding(
                row,
                round(float(total[row]), 3),
                tuple((kind, round(float(standard[kind][row]), 3)) for kind in sorted(standard)),
            )
            for row in best
        ),
        tuple(spans),
    )


def standard_scores(values: Scores) -> Scores:
    """Standard deviations above the mean; all zero where records do not differ."""
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)
