"""Which records share rare words with an answer and its question: BM25 over postings.

Evidence only: it knows nothing of the model, has no sign, and words are easy to stuff, so it never decides
money. Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009, with the usual k1 = 1.2
and b = 0.75."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

K1 = 1.2
B = 0.75
_WORD = re.compile(r"[a-z]+|[0-9]+")


@dataclass(frozen=True, slots=True)
class Lexicon:
    """``postings`` holds, for each word, the documents it stands in and its weight in each."""

    num_documents: int
    postings: Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]]


def words(text: str) -> list[str]:
    """Lower-case runs of letters and of digits: ``B006`` is ``b`` and ``006``."""
    return _WORD.findall(text.casefold())


def build_lexicon(documents: Sequence[str]) -> Lexicon:
    counts = [Counter(words(document)) for document in documents]
    mean_length = max(1.0, sum(count.total() for count in counts) / max(1, len(counts)))
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for index, count in enumerate(counts):
        norm = K1 * (1 - B + B * count.total() / mean_length)
        for word, times in count.items():
            found[word].append((index, times * (K1 + 1) / (times + norm)))
    postings = {}
    for word, entries in found.items():
        rarity = math.log(1 + (len(documents) - len(entries) + 0.5) / (len(entries) + 0.5))
        indexes, weights = zip(*entries, strict=True)
        postings[word] = np.array(indexes, dtype=np.int64), rarity * np.array(weights)
    return Lexicon(len(documents), postings)


def lexical_scores(lexicon: Lexicon, text: str) -> NDArray[np.float64]:
    """BM25 of every document for a query's distinct words, ``[documents]``; 0 where nothing is shared."""
    scores = np.zeros(lexicon.num_documents)
    for word in set(words(text)):
        if word in lexicon.postings:
            indexes, weights = lexicon.postings[word]
            scores[indexes] += weights
    return scores
