"""Who said it first: stars, copies, conflicts, and what must not move them."""

import random
import time
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


def copies_with_holes(seed: int) -> list[Committed]:
    """A hundred records over a small vocabulary, half of them cut from or added to earlier ones."""
    rng = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(30)]
    records: list[Committed] = []
    for seq in range(100):
        words = rng.choices(vocabulary, k=rng.randrange(4, 40))
        if records and rng.random() < 0.6:
            words = rng.choice(records).record.text.split()[rng.randrange(9) :] + words[: rng.randrange(12)]
        subject = rng.choice(["", "a common question"]) if rng.random() < 0.1 else ""
        one = record(bytes([seq % 7]) * 32, " ".join(words) or "w", rng.choice(["yes", "no"]), subject)
        one = replace(one, source_key=str(seq))
        records.append(Committed(one, one.record_id, seq // 3, seq % 3))
    return records


def slow_group(records: list[Committed]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """Head by record id, and earliest disputed record by conflict, by comparing every pair."""
    ordered = sorted(records, key=lambda one: one.place)
    heads: dict[bytes, bytes] = {}
    conflicts: dict[bytes, bytes] = {}

    def alike(a: Record, b: Record) -> bool:
        return (
            normalise(a.subject) == normalise(b.subject)
            or normalise(a.text) == normalise(b.text)
            or containment_ppm(shingles(a.text), shingles(b.text)) >= CONTAINMENT_PPM
        )

    for n, later in enumerate(ordered):
        found = [one for one in ordered[:n] if alike(one.record, later.record)]
        same = [one for one in found if normalise(one.record.answer) == normalise(later.record.answer)]
        heads[later.record_id] = heads[same[0].record_id] if same else later.record_id
        if found and not same:
            conflicts[later.record_id] = found[0].record_id
    return heads, conflicts


@pytest.mark.parametrize("seed", range(6))
def test_the_index_finds_what_comparing_every_pair_finds(seed: int) -> None:
    records = copies_with_holes(seed)
    heads, conflicts = slow_group(records)
    grouping = group(records)
    assert {member: g.group_id for g in grouping.groups for member in g.members} == heads
    assert {c.record_id: c.earlier_id for c in grouping.conflicts} == conflicts
    assert len(grouping.groups) < len(records) and conflicts  # else the comparison says nothing


def test_order_of_arrival_moves_nothing() -> None:
    records = copies_with_holes(99)
    expected = group(records)
    rng = random.Random(1)
    for _ in range(3):
        rng.shuffle(records)
        assert group(records) == expected


@pytest.mark.parametrize("answer", ["the same", "its own {}"])
def test_a_template_filled_in_many_times_is_no_quadratic_work(answer: str) -> None:
    """Comparing all pairs of these would take an hour."""
    words = POEM.split()
    texts = [" ".join([*words[:20], f"filling{n}", *words[20:]]) for n in range(3_000)]
    records = committed(*(record(BOB, text, answer.format(n)) for n, text in enumerate(texts)))
    started = time.monotonic()
    grouping = group(records)
    assert time.monotonic() - started < 60
    assert len(grouping.groups) == (1 if answer == "the same" else 3_000)
    assert len(grouping.conflicts) == (0 if answer == "the same" else 2_999)


def test_a_great_many_equal_rows_cost_no_more_than_as_many_different_ones() -> None:
    """Quadratic work would take minutes here."""
    records = [
        Committed(replace(record(BOB, POEM), source_key=str(n)), n.to_bytes(32, "big"), 1, n)
        for n in range(6_000)
    ]
    assert len(group(records).groups) == 1


def test_no_records_make_no_groups() -> None:
    assert group([]).groups == ()
