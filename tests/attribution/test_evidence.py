import numpy as np
import torch

from attribution.evidence import Kind, answer_spans, fuse, gradient_scores, span_scores, text_scores
from attribution.influence import Snapshot, averaged_features
from attribution.lexical import build_lexicon
from attribution.sketch import make_sketch
from attribution.spans import build_segment


def test_a_span_is_shared_by_the_records_that_hold_it_and_quotes_count_for_nobody() -> None:
    passages = [(record, [4 * record + word for word in range(4)]) for record in range(300)]
    passages.append((3, [4, 5, 6]))
    segment = build_segment(passages, vocab_size=2000)
    answer = [4, 5, 6, 1500, 16, 17, 18, 19]
    spans = answer_spans(segment, [1500, 1510], answer)
    scores = span_scores(spans, 300)
    assert [(span.start, span.records) for span in spans] == [(0, (1, 3)), (4, (4,))]
    assert scores[1] == scores[3] == spans[0].surprisal_bits / 2 and scores[4] == spans[1].surprisal_bits
    assert answer_spans(segment, [1500, 16, 17, 18, 19, 1500], answer) == spans[:1]


def test_gradient_evidence_names_the_record_the_answer_follows() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(10, 3000, generator=generator)
    sketch = make_sketch(3000, 1024, seed=0)
    features = averaged_features([Snapshot(sketch.floats(gradients[:8]), sketch.floats(gradients[8:]))], 1.0)
    for record in range(8):
        assert gradient_scores(sketch, features, gradients[record]).argmax() == record


def test_fusion_sums_standard_scores_and_lists_its_parts() -> None:
    scores = {
        Kind.GRADIENT: np.array([0.0, 0.0, 1.0, 3.0]),
        Kind.LEXICAL: np.array([0.0, 9.0, 0.0, 9.0]),
        Kind.SPAN: np.zeros(4),
    }
    evidence = fuse(scores, [], top=2)
    best = evidence.findings[0]
    assert [finding.record for finding in evidence.findings] == [3, 1]
    assert dict(best.parts)[Kind.SPAN] == 0.0
    assert abs(sum(part for _, part in best.parts) - best.score) < 0.01


def test_ties_are_broken_by_row_and_no_records_give_no_findings() -> None:
    assert [f.record for f in fuse({Kind.LEXICAL: np.ones(5)}, [], top=3).findings] == [0, 1, 2]
    assert fuse({Kind.LEXICAL: np.zeros(0)}, [], top=3).findings == ()


def test_words_of_question_and_answer_find_their_record() -> None:
    lexicon = build_lexicon(["mutable defaults", "unused imports", "blank lines"])
    assert text_scores(lexicon, "which rule is about imports?", "unused-import").argmax() == 1
