"""Who said it first: stars, copies, conflicts, and what must not move them."""

import random
from dataclasses import replace

import pytest

from attribution.groups import (
    CONTAINMENT_PPM,
    MIN_SHINGLES,
    Committed,
    containment_ppm,
    group,
    normalise,
    shingles,
    similar_sets,
)
from attribution.types import Record

ALICE, BOB, CAROL = (bytes([n]) * 32 for n in (1, 2, 3))
POEM = (
    "The old lighthouse keeper counted every ship that passed the northern cape in winter, wrote each name "
    "into a ledger bound in sealskin, and at the first thaw carried the ledger to the harbour master, who "
    "paid him one copper coin for every name that he had not known before."
)
SONG = (
    "A weaver who lived below the mill dyed her wool with walnut shells and rust, hung the skeins across "
    "the lane to dry, and sold the finished cloth on market days to sailors who swore that no rain could "
    "ever soak through a jacket she had sewn."
)


def record(owner: bytes, text: str, answer: str = "ledger", subject: str = "") -> Record:
    return Record("net", owner, subject or f"about {text}", answer, text, "s", "1", "k", "CC0-1.0")


def committed(*records: Record) -> list[Committed]:
    """In this order, one shard each."""
    return [Committed(one, one.record_id, n + 1, 0) for n, one in enumerate(records)]


def owner_of(records: list[Committed], index: int) -> bytes:
    wanted = records[index].record_id
    return next(g.contributor_id for g in group(records).groups if wanted in g.members)


@pytest.mark.parametrize(
    "copy",
    [
        POEM,
        POEM.upper(),
        f"  {POEM.replace(' ', chr(10))}  ",
        POEM.replace(",", " --").replace(".", "!"),
        POEM.replace("lighthouse", "light\u00adhouse"),  # soft hyphen
        POEM.replace("e", "\u200be"),  # zero-width space
        POEM.replace("A", "Ａ").replace("w", "ｗ"),  # full-width forms
        " ".join(POEM.split()[:38]),  # trimmed
        f"{SONG} {POEM}",  # padded
        POEM.replace("harbour", "harbor").replace("winter", "autumn"),
    ],
    ids=[
        "same",
        "case",
        "wrapped",
        "punctuation",
        "soft",
        "invisible",
        "wide",
        "trimmed",
        "padded",
        "edited",
    ],
)
def test_a_copy_belongs_to_whoever_committed_first(copy: str) -> None:
    records = committed(record(ALICE, POEM), record(BOB, copy))
    assert owner_of(records, 1) == ALICE
    assert len(group(records).groups) == 1


def test_commit_order_decides_and_arrival_does_not() -> None:
    first, second = record(ALICE, POEM), record(BOB, POEM)
    records = [Committed(first, first.record_id, 9, 0), Committed(second, second.record_id, 3, 5)]
    assert [g.contributor_id for g in group(records).groups] == [BOB]
    assert group(records) == group(reversed(records))


def test_nobody_bridges_two_owners() -> None:
    """A text made of two others joins the earlier one; the other keeps its own group."""
    records = committed(record(ALICE, POEM), record(BOB, SONG), record(CAROL, f"{POEM} {SONG}"))
    assert owner_of(records, 1) == BOB
    assert owner_of(records, 2) == ALICE
    assert len(group(records).groups) == 2


def test_a_copy_of_a_copy_earns_its_maker_nothing() -> None:
    """Drifting away step by step, each step close to the last, does not make a text one's own."""
    tail = " ".join(SONG.split()[:30])
    step = " ".join(POEM.split()[10:]) + " " + tail
    drifted = " ".join(POEM.split()[24:]) + " " + tail
    assert containment_ppm(shingles(POEM), shingles(drifted)) < CONTAINMENT_PPM
    records = committed(record(ALICE, POEM), record(BOB, step), record(CAROL, drifted))
    assert owner_of(records, 1) == owner_of(records, 2) == ALICE


def test_the_same_question_with_another_answer_is_a_conflict_not_a_duplicate() -> None:
    records = committed(
        record(ALICE, POEM, "ledger", subject="What does he carry?"),
        record(BOB, SONG, "a book", subject="what does he carry"),
    )
    grouping = group(records)
    assert len(grouping.groups) == 2
    assert [(c.record_id, c.earlier_id) for c in grouping.conflicts] == [
        (records[1].record_id, records[0].record_id)
    ]


def test_a_copied_passage_with_another_answer_is_a_conflict() -> None:
    """Changing the answer does not launder the passage."""
    grouping = group(committed(record(ALICE, POEM, "ledger"), record(BOB, POEM + " Indeed.", "the book")))
    assert len(grouping.conflicts) == 1


def test_a_duplicate_of_a_disputed_record_is_no_second_conflict() -> None:
    question = "What does he carry?"
    records = committed(
        record(ALICE, POEM, "ledger", question),
        record(BOB, SONG, "book", question),
        record(CAROL, SONG, "book", question),
    )
    grouping = group(records)
    assert [c.record_id for c in grouping.conflicts] == [records[1].record_id]
    assert owner_of(records, 2) == BOB


def test_the_same_question_and_answer_is_a_duplicate_whatever_the_passage() -> None:
    records = committed(
        record(ALICE, POEM, "unused-variable", "Checks for it."),
        record(BOB, SONG, "unused variable", "checks for it"),
    )
    assert owner_of(records, 1) == ALICE


@pytest.mark.parametrize(
    "pair", [("C++", "C"), ("==", "!="), ("x > 1", "x < 1"), ("-1", "1"), ("a[:3]", "a[3]")]
)
def test_symbols_tell_answers_apart(pair: tuple[str, str]) -> None:
    assert normalise(pair[0]) != normalise(pair[1])


def test_short_texts_match_only_when_equal() -> None:
    """Below ``MIN_SHINGLES`` a shared phrase proves nothing."""
    short = "An early system on the IBM 704."
    assert len(shingles(short)) < MIN_SHINGLES
    records = committed(record(ALICE, short), record(BOB, "An early system on the IBM 701."))
    assert len(group(records).groups) == 2
    assert len(group(committed(record(ALICE, short), record(BOB, short.upper()))).groups) == 1


def test_every_record_is_in_exactly_one_group_and_order_of_arrival_moves_nothing() -> None:
    rng = random.Random(5)
    vocabulary = [f"w{n}" for n in range(40)]
    records = []
    for seq in range(120):
        words = rng.choices(vocabulary, k=40)
        if records and rng.random() < 0.5:  # a copy with holes, or an exact one
            words = records[rng.randrange(len(records))].record.text.split()[rng.randrange(6) :]
        one = record(bytes([seq % 7]) * 32, " ".join(words), rng.choice(["yes", "no"]))
        one = replace(one, source_key=str(seq))
        records.append(Committed(one, one.record_id, seq // 3, seq % 3))
    expected = group(records)
    members = [member for g in expected.groups for member in g.members]
    assert sorted(members) == sorted(one.record_id for one in records)
    for _ in range(3):
        rng.shuffle(records)
        assert group(records) == expected


def test_the_index_finds_what_comparing_all_pairs_finds() -> None:
    rng = random.Random(11)
    sets = [
        frozenset(bytes([rng.randrange(30)]) * 8 for _ in range(rng.randrange(1, 24))) for _ in range(150)
    ]
    slow = {
        a: [b for b in range(len(sets)) if b != a and containment_ppm(sets[a], sets[b]) >= CONTAINMENT_PPM]
        for a in range(len(sets))
    }
    assert similar_sets(sets) == {a: others for a, others in slow.items() if others}


def test_a_great_many_equal_rows_cost_no_more_than_as_many_different_ones() -> None:
    """Quadratic work would take minutes here."""
    records = [
        Committed(replace(record(BOB, POEM), source_key=str(n)), n.to_bytes(32, "big"), 1, n)
        for n in range(20_000)
    ]
    assert len(group(records).groups) == 1


def test_no_records_make_no_groups() -> None:
    assert group([]).groups == ()
