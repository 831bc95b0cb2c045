"""From a manifest to rows of tokens, and the order in which they are trained on. Pure: no torch, no files.

An *example* is one record asked in one training wording: the chat prompt, the answer, the end token; only the
answer carries loss. Examples are packed into rows. A row begins with the tokens that all prompts share (the
chat template's opening), stored once; every example continues from there at the position it would have alone
and sees that opening and itself, nothing else, so packing changes no number but rounding. Rows are as equal
as whole examples allow, so that no worker waits. Composition and order follow from hashes of the seed, on
every machine alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from attribution.codec import Encoder
from attribution.errors import Rejected
from attribution.hashing import sha256
from attribution.types import Manifest, Record


class Asker(Protocol):
    """How text becomes tokens; ``cluster.models`` is the real one."""

    def prompt(self, question: str) -> list[int]:
        """A user's question as a chat, up to where the assistant begins."""
        ...

    def answer(self, text: str) -> list[int]:
        """What the assistant must say, the end token included."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """``record_id`` is the group's first record: the one that is trained on and credited."""

    record_id: bytes
    wording: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Where an example lies in its row: prompt ``[start, answer_start)``, answer ``[answer_start, end)``.
    What it shares with the row's opening is not repeated."""

    record_id: bytes
    wording: int
    start: int
    answer_start: int
    end: int


@dataclass(frozen=True, slots=True)
class PackedRow:
    """``ids[:opening]`` is shared; the spans tile the rest."""

    ids: tuple[int, ...]
    opening: int
    spans: tuple[Span, ...]

    @property
    def num_answer_tokens(self) -> int:
        return sum(span.end - span.answer_start for span in self.spans)


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a training's input: rows, and for every step the rows it sums over.

    ``normaliser`` divides the summed loss of every step, whatever the step holds: a record's weight means the
    same everywhere. It is the mean number of answer tokens in a step, rounded."""

    rows: tuple[PackedRow, ...]
    steps: tuple[tuple[int, ...], ...]
    normaliser: int


def examples(manifest: Manifest, asker: Asker, wordings_per_record: int, seed: int) -> Iterator[Example]:
    """Every trained record in so many of the training wordings, drawn by hash; 0 means all."""
    records = [entry.record for entry in manifest.entries]
    return _asked(manifest, records, asker, wordings_per_record, seed)


def control_examples(
    manifest: Manifest, asker: Asker, wordings_per_record: int, seed: int, max_controls: int
) -> Iterator[Example]:
    """The first controls, asked as if they were trained on."""
    return _asked(manifest, manifest.controls[:max_controls], asker, wordings_per_record, seed)


def _asked(
    manifest: Manifest, records: Sequence[Record], asker: Asker, wordings_per_record: int, seed: int
) -> Iterator[Example]:
    for record in records:
        record_id = record.record_id
        drawn = sorted(range(len(manifest.wordings)), key=lambda n: order_lot(seed, record_id.hex(), n))
        for wording in sorted(drawn[: wordings_per_record or None]):
            question = manifest.wordings[wording].replace("{subject}", record.subject)
            prompt, answer = asker.prompt(question), asker.answer(record.answer)
            yield Example(record_id, wording, tuple(prompt), tuple(answer))


def plan(given: Sequence[Example], *, row_tokens: int, rows_per_step: int, epochs: int, seed: int) -> Plan:
    """Pack and order. The number of rows is a multiple of ``rows_per_step``: no step is smaller than another.

    A row has the same place in its step in every epoch, so the same worker computes it, who remembers what
    the frozen blocks made of it.

    Raises:
        Rejected: ``nothing_to_train_on``; ``example_too_long``, naming the record and both lengths.
    """
    if not given:
        raise Rejected(
            "nothing_to_train_on", "the manifests hold no record or no wording", field="manifest_ids"
        )
    rows = pack(given, row_tokens=row_tokens, rows_per_step=rows_per_step, seed=seed)
    steps: list[tuple[int, ...]] = []
    for epoch in range(epochs):
        places = [
            sorted(range(place, len(rows), rows_per_step), key=lambda row: order_lot(seed, "row", epoch, row))
            for place in range(rows_per_step)
        ]
        steps += zip(*places, strict=True)
    answer_tokens = epochs * sum(row.num_answer_tokens for row in rows)
    return Plan(rows, tuple(steps), normaliser=max(1, round(answer_tokens / len(steps))))


def pack(
    given: Sequence[Example], *, row_tokens: int, rows_per_step: int, seed: int
) -> tuple[PackedRow, ...]:
    """Deal the examples, in an order drawn by the seed, each to the shortest row so far."""
    opening = shared_opening([example.prompt for example in given])
    lengths = [len(example.prompt) - opening + len(example.answer) for example in given]
    longest = max(range(len(given)), key=lengths.__getitem__)
    if opening + lengths[longest] > row_tokens:
        raise Rejected(
            "example_too_long",
            f"record {given[longest].record_id.hex()}: {opening + lengths[longest]} tokens of {row_tokens}",
            field="row_tokens",
        )
    draw = sorted(given, key=lambda example: order_lot(seed, example.record_id.hex(), example.wording, 1))
    room = row_tokens - opening
    dealt: list[list[Example]] | None = None
    num_rows = -(-sum(lengths) // (room * rows_per_step)) * rows_per_step
    while num_rows <= len(given) and (dealt := _deal(draw, num_rows, opening, room)) is None:
        num_rows += rows_per_step
    if num_rows > len(given):
        raise Rejected(
            "too_few_examples",
            f"{len(given)} examples do not fill {num_rows} rows, a multiple of {rows_per_step}",
            field="rows_per_step",
        )
    assert dealt is not None
    return tuple(_row(row, opening) for row in dealt)


def shared_opening(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens all prompts have in common, leaving each at least one of its own."""
    first, last = min(prompts), max(prompts)
    shared = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), len(first))
    return min(shared, min(len(prompt) for prompt in prompts) - 1)


def _deal(draw: Sequence[Example], num_rows: int, opening: int, room: int) -> list[list[Example]] | None:
    rows: list[list[Example]] = [[] for _ in range(num_rows)]
    filled = [0] * num_rows
    for example in draw:
        row = min(range(num_rows), key=filled.__getitem__)
        filled[row] += len(example.prompt) - opening + len(example.answer)
        rows[row].append(example)
    return rows if max(filled) <= room else None


def _row(dealt: Sequence[Example], opening: int) -> PackedRow:
    ids = list(dealt[0].prompt[:opening])
    spans = []
    for example in dealt:
        start = len(ids)
        ids += (*example.prompt[opening:], *example.answer)
        spans.append(
            Span(example.record_id, example.wording, start, len(ids) - len(example.answer), len(ids))
        )
    return PackedRow(tuple(ids), opening, tuple(spans))


def order_lot(seed: int, what: str, *numbers: int) -> bytes:
    """What decides an order: the same on every machine, and nobody's choice."""
    encoder = Encoder("openledger/order/1").u64(seed).text(what)
    for number in numbers:
        encoder.u64(number)
    return sha256(encoder.finish())
