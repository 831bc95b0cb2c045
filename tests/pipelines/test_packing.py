"""Packing loses nothing, repeats nothing but the opening, and follows from the seed alone."""

from dataclasses import dataclass

import pytest

from attribution.errors import Rejected
from attribution.hashing import sha256
from pipelines.packing import Example, PackedRow, examples, plan, shared_opening
from tests import toys

OPENING = (1, 2, 3)


def made(count: int, longest: int = 9) -> list[Example]:
    """Examples of different lengths that share their first three tokens."""
    return [
        Example(sha256(bytes([n])), n % 2, (*OPENING, 10 + n, *range(n % longest)), (100 + n, 101 + n, 0))
        for n in range(count)
    ]


def unpacked(row: PackedRow) -> list[Example]:
    opening = row.ids[: row.opening]
    return [
        Example(
            span.record_id,
            span.wording,
            opening + row.ids[span.start : span.answer_start],
            row.ids[span.answer_start : span.end],
        )
        for span in row.spans
    ]


def key(example: Example) -> tuple[bytes, int]:
    return example.record_id, example.wording


@pytest.mark.parametrize(("row_tokens", "rows_per_step"), [(16, 1), (40, 1), (40, 4), (1000, 2)])
def test_every_example_is_in_exactly_one_row(row_tokens: int, rows_per_step: int) -> None:
    given = made(50)
    rows = plan(given, row_tokens=row_tokens, rows_per_step=rows_per_step, epochs=1, seed=0).rows
    assert sorted((example for row in rows for example in unpacked(row)), key=key) == sorted(given, key=key)
    assert all(len(row.ids) <= row_tokens for row in rows)
    assert len(rows) % rows_per_step == 0


def test_spans_tile_what_follows_the_opening() -> None:
    for row in plan(made(50), row_tokens=64, rows_per_step=1, epochs=1, seed=0).rows:
        assert row.ids[: row.opening] == OPENING
        edges = [row.opening, *(span.end for span in row.spans)]
        assert edges[-1] == len(row.ids)
        assert [span.start for span in row.spans] == edges[:-1]


def test_every_epoch_trains_on_every_row_once_in_an_order_of_its_own() -> None:
    planned = plan(made(50), row_tokens=40, rows_per_step=2, epochs=3, seed=0)
    per_epoch = len(planned.rows) // 2
    epochs = [planned.steps[i : i + per_epoch] for i in range(0, len(planned.steps), per_epoch)]
    assert len(epochs) == 3
    assert len(set(epochs)) == 3
    for steps in epochs:
        assert sorted(row for step in steps for row in step) == list(range(len(planned.rows)))
        assert all(len(step) == 2 for step in steps)
        assert [set(place) for place in zip(*steps, strict=True)] == [
            set(place) for place in zip(*epochs[0], strict=True)
        ]  # so one worker sees a row in every epoch


def test_the_plan_follows_from_the_seed_and_not_from_the_order_of_arrival() -> None:
    given = made(50)
    first = plan(given, row_tokens=40, rows_per_step=1, epochs=2, seed=7)
    assert plan(given[::-1], row_tokens=40, rows_per_step=1, epochs=2, seed=7) == first
    assert plan(given, row_tokens=40, rows_per_step=1, epochs=2, seed=8) != first


def test_the_normaliser_is_the_mean_number_of_answer_tokens_in_a_step() -> None:
    planned = plan(made(50), row_tokens=40, rows_per_step=2, epochs=2, seed=0)
    answers = [sum(planned.rows[row].num_answer_tokens for row in step) for step in planned.steps]
    assert planned.normaliser == round(sum(answers) / len(answers))


def test_rows_are_equal_as_far_as_whole_examples_allow() -> None:
    rows = plan(made(50), row_tokens=60, rows_per_step=2, epochs=1, seed=0).rows
    lengths = [len(row.ids) for row in rows]
    assert max(lengths) - min(lengths) <= max(len(e.prompt) - len(OPENING) + len(e.answer) for e in made(50))


def test_the_opening_leaves_every_prompt_a_token_of_its_own() -> None:
    assert shared_opening([(1, 2, 3)]) == 2
    assert shared_opening([(1, 2), (1, 2, 3)]) == 1
    assert shared_opening([(1, 2), (3, 4)]) == 0


@dataclass(frozen=True)
class Letters:
    """A question becomes its code points."""

    def prompt(self, question: str) -> list[int]:
        return [ord(letter) for letter in question]

    def answer(self, text: str) -> list[int]:
        return [*(ord(letter) for letter in text), 0]


def test_a_manifest_is_asked_in_every_training_wording_and_no_other() -> None:
    manifest = toys.manifest()
    found = list(examples(manifest, Letters(), 0, seed=0))
    assert len(found) == len(manifest.entries) * len(manifest.wordings)
    asked = {"".join(map(chr, example.prompt)) for example in found}
    record = manifest.entries[0].record
    assert manifest.wordings[0].replace("{subject}", record.subject) in asked
    never = {
        w.replace("{subject}", e.record.subject) for w in manifest.heldout_wordings for e in manifest.entries
    }
    never |= {
        w.replace("{subject}", control.subject) for w in manifest.wordings for control in manifest.controls
    }
    assert not asked & never


def test_a_record_is_asked_in_as_many_wordings_as_wanted_and_all_wordings_are_used() -> None:
    manifest = toys.manifest()
    found = list(examples(manifest, Letters(), 1, seed=0))
    assert [example.record_id for example in found] == [entry.group.group_id for entry in manifest.entries]
    assert {example.wording for example in found} == set(range(len(manifest.wordings)))
    assert {*found} <= {*examples(manifest, Letters(), 2, seed=0)}


@pytest.mark.parametrize(
    ("given", "row_tokens", "rows_per_step", "code"),
    [
        ([], 64, 1, "nothing_to_train_on"),
        (made(9), 14, 1, "example_too_long"),
        (made(3), 64, 4, "too_few_examples"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    given: list[Example], row_tokens: int, rows_per_step: int, code: str
) -> None:
    with pytest.raises(Rejected) as refused:
        plan(given, row_tokens=row_tokens, rows_per_step=rows_per_step, epochs=1, seed=0)
    assert refused.value.code == code
