"""Who said it first: duplicates, near duplicates and conflicts among the records of one Datanet.

Grouping is a function of the accepted records and of the order in which they were committed, of nothing else:
not of the order of arrival, not of the number of workers. Texts are compared as sets of five-word shingles by
*containment*, the share of the smaller set found in the larger, so neither trimming a text nor padding it
hides the copy. Candidate pairs come from an inverted index with a prefix filter (a set contained to a share
``t`` must share one of its rarest ``n - ⌈t n⌉ + 1`` shingles), which is exact: no pair is missed.
Source of the filter: Chaudhuri et al., "A primitive operator for similarity joins", ICDE 2006."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from attribution.types import Group, Record

SHINGLE_WORDS = 5
MIN_SHINGLES = 8  # twelve words: in shorter texts a common phrase is most of the text
CONTAINMENT_PPM = 600_000  # tests/bench/data/copies.py shows what other values would find

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[^\W_]+")
_TOKEN = re.compile(_WORD.pattern + r"|(?<![^\W_])-|[^\w\s-]")  # a hyphen inside a word only separates
_PROSE = re.compile(r"(?<!\S)[.,;:!?…'\"‘’“”()`]+|[.,;:!?…'\"‘’“”()`]+(?!\S)")  # at the edges of words


@dataclass(frozen=True, slots=True)
class Committed:
    """A record and its place in the order of commitments: ``(committed_seq, row)`` is unique."""

    record: Record
    record_id: bytes
    committed_seq: int
    row: int

    @property
    def place(self) -> tuple[int, int]:
        return self.committed_seq, self.row


@dataclass(frozen=True, slots=True)
class Conflict:
    """The same question, or the same passage, with another answer than ``earlier_id`` gave: for review."""

    record_id: bytes
    earlier_id: bytes


@dataclass(frozen=True, slots=True)
class Grouping:
    """Every record is in exactly one group; ``conflicts`` (by record id) are firsts of groups that nobody may
    train on before a person has looked. Groups are sorted by id."""

    groups: tuple[Group, ...]
    conflicts: tuple[Conflict, ...]


def words(text: str) -> list[str]:
    """Case, compatibility forms, punctuation and invisible characters tell no two passages apart."""
    return _WORD.findall(_folded(text))


def normalise(text: str) -> str:
    """For equality of questions and answers: as ``words``, but ``C++`` is not ``C``, nor ``==`` ``!=``."""
    return " ".join(_TOKEN.findall(_PROSE.sub(" ", _folded(text))))


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isascii() or unicodedata.category(c) != "Cf")


def shingles(text: str) -> frozenset[bytes]:
    """8-byte hashes of every run of five words; the whole text where it is shorter."""
    found = words(text)
    runs = range(max(1, len(found) - SHINGLE_WORDS + 1))
    return frozenset(
        hashlib.blake2b(" ".join(found[i : i + SHINGLE_WORDS]).encode(), digest_size=8).digest() for i in runs
    )


def containment_ppm(a: frozenset[bytes], b: frozenset[bytes]) -> int:
    """Share of the smaller set that the larger one holds. Texts too short to judge share nothing."""
    smaller = min(len(a), len(b))
    return len(a & b) * 1_000_000 // smaller if smaller >= MIN_SHINGLES else 0


def group(records: Iterable[Committed]) -> Grouping:
    """Let each record join the group of the earliest record that it duplicates.

    Two records are alike if they ask the same question or hold (nearly) the same passage; alike with the
    same answer is a duplicate, alike with another answer a conflict. A star, not a transitive union: what
    resembles the texts of two owners joins the earlier and moves neither. A copy of a copy still belongs to
    the first author."""
    ordered = sorted(records, key=attrgetter("place"))
    answers = [normalise(c.record.answer) for c in ordered]
    heads: list[int] = []
    conflicts = []
    for later, alike in enumerate(_earliest_alike(ordered, answers)):
        same = [earlier for earlier in alike if answers[earlier] == answers[later]]
        heads.append(heads[min(same)] if same else later)
        if alike and not same:
            conflicts.append(Conflict(ordered[later].record_id, ordered[min(alike)].record_id))
    return Grouping(_groups(ordered, heads), tuple(sorted(conflicts, key=attrgetter("record_id"))))


def _groups(ordered: Sequence[Committed], heads: Sequence[int]) -> tuple[Group, ...]:
    members = defaultdict(list)
    for one, first in zip(ordered, heads, strict=True):
        members[first].append(one.record_id)
    groups = (
        Group(ordered[first].record_id, ordered[first].record.contributor_id, tuple(sorted(ids)))
        for first, ids in members.items()
    )
    return tuple(sorted(groups, key=attrgetter("group_id")))


def _earliest_alike(ordered: Sequence[Committed], answers: Sequence[str]) -> Iterator[list[int]]:
    """For each record the earlier ones that are like it: of each question or passage only the earliest, and
    the earliest with the same answer, so that a million equal rows cost a million steps."""
    questions = [normalise(c.record.subject) for c in ordered]
    passages = [normalise(c.record.text) for c in ordered]
    distinct = list(dict.fromkeys(passages))
    pairs = similar_sets([shingles(passage) for passage in distinct])
    near = {distinct[n]: [distinct[other] for other in others] for n, others in pairs.items()}
    first: dict[tuple[str, str], int] = {}
    first_with: dict[tuple[str, str, str], int] = {}
    for index, (question, passage, answer) in enumerate(zip(questions, passages, answers, strict=True)):
        own = [("question", question), ("passage", passage)]
        seen = [*own, *(("passage", other) for other in near.get(passage, ()))]
        found = [first.get(key) for key in seen] + [first_with.get((*key, answer)) for key in seen]
        yield [earlier for earlier in found if earlier is not None]
        for key in own:
            first.setdefault(key, index)
            first_with.setdefault((*key, answer), index)


def similar_sets(sets: Sequence[frozenset[bytes]]) -> dict[int, list[int]]:
    """Positions of the sets whose ``containment_ppm`` reaches ``CONTAINMENT_PPM``, both ways round."""
    rarity = Counter(shingle for one in sets for shingle in one)
    holders = defaultdict(list)
    for number, one in enumerate(sets):
        if len(one) >= MIN_SHINGLES:
            for shingle in one:
                if rarity[shingle] > 1:
                    holders[shingle].append(number)
    near = defaultdict(set)
    for number, one in enumerate(sets):
        if len(one) >= MIN_SHINGLES:
            for other in _candidates(one, rarity, holders):
                if other != number and containment_ppm(one, sets[other]) >= CONTAINMENT_PPM:
                    near[number].add(other)
                    near[other].add(number)
    return {number: sorted(others) for number, others in near.items()}


def _candidates(one: frozenset[bytes], rarity: Counter[bytes], holders: dict[bytes, list[int]]) -> set[int]:
    """Whatever holds enough of ``one`` holds one of these: the prefix filter."""
    rarest = sorted(one, key=lambda shingle: (rarity[shingle], shingle))
    shared = -(-CONTAINMENT_PPM * len(one) // 1_000_000)
    prefix = len(one) - shared + 1
    return {other for shingle in rarest[:prefix] for other in holders.get(shingle, ())}
