import math

import numpy as np

from attribution.lexical import K1, B, build_lexicon, lexical_scores, words

DOCUMENTS = ["the cat sat", "the dog sat on the cat", "a Mutable-Default argument, B006", ""]


def bm25_by_definition(query: str) -> list[float]:
    """The oracle: the formula, a word and a document at a time."""
    tokens = [words(document) for document in DOCUMENTS]
    mean = sum(map(len, tokens)) / len(tokens)
    scores = []
    for document in tokens:
        score = 0.0
        for word in set(words(query)):
            having = sum(word in other for other in tokens)
            idf = math.log(1 + (len(tokens) - having + 0.5) / (having + 0.5))
            times = document.count(word)
            score += idf * times * (K1 + 1) / (times + K1 * (1 - B + B * len(document) / mean))
        scores.append(score)
    return scores


def test_postings_equal_the_formula() -> None:
    lexicon = build_lexicon(DOCUMENTS)
    for query in ("the cat", "mutable default b006", "zebra", "the the dog"):
        np.testing.assert_allclose(lexical_scores(lexicon, query), bm25_by_definition(query))


def test_rare_words_find_their_record_however_they_are_written() -> None:
    assert lexical_scores(build_lexicon(DOCUMENTS), "Is MUTABLE default b006?").argmax() == 2


def test_nothing_shared_is_zero_and_no_records_are_fine() -> None:
    assert not lexical_scores(build_lexicon(DOCUMENTS), "xyzzy").any()
    assert lexical_scores(build_lexicon([]), "cat").shape == (0,)
