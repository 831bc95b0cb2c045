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
from dataclasses import dataclass, field
from heapq import merge
from itertools import groupby
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
    heads: list[int] = []
    conflicts = []
    for later, (same, other) in enumerate(_earliest_alike(ordered)):
        heads.append(later if same is None else heads[same])
        if same is None and other is not None:
            conflicts.append(Conflict(ordered[later].record_id, ordered[other].record_id))
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


def _earliest_alike(ordered: Sequence[Committed]) -> Iterator[tuple[int | None, int | None]]:
    """For each record the earliest one before it that is alike: with the same answer, and with any.

    Only the earliest counts, so a million copies or a million fillings of one template cost a million short
    searches, not their square."""
    answers = [normalise(one.record.answer) for one in ordered]
    passages = [normalise(one.record.text) for one in ordered]
    sets = {passage: shingles(passage) for passage in passages}
    rarity = Counter(shingle for one in sets.values() for shingle in one)
    num_voices = Counter(answer for _, answer in set(zip(passages, answers, strict=True)))
    everyone = _Earlier({})
    by_answer = {answer: _Earlier({}) for answer, count in num_voices.items() if count > 1}
    first: dict[tuple[str, ...], int] = {}
    for index, (one, passage, answer) in enumerate(zip(ordered, passages, answers, strict=True)):
        keys = [("question", normalise(one.record.subject)), ("passage", passage)]
        same = [first.get((*key, answer)) for key in keys]
        other = [first.get(key) for key in keys]
        if same[1] is None:  # nobody has said this before
            prefix = _prefix(sets[passage], rarity)
            shared = [shingle for shingle in sets[passage] if rarity[shingle] > 1]
            for found, earlier in ((other, everyone), (same, by_answer.get(answer))):
                if earlier is not None:
                    found.append(earlier.find(sets[passage], shared, prefix))
                    earlier.add(index, sets[passage], shared, prefix)
        yield _least(same), _least(other)
        for key in keys:
            first.setdefault(key, index)
            first.setdefault((*key, answer), index)


def _least(found: Iterable[int | None]) -> int | None:
    return min((one for one in found if one is not None), default=None)


@dataclass(frozen=True, slots=True)
class _Earlier:
    """The sets seen so far, by any of their shared shingles, and by the few that a larger set must hold."""

    sets: dict[int, frozenset[bytes]]
    by_any: defaultdict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))
    by_prefix: defaultdict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(
        self, number: int, one: frozenset[bytes], shared: Sequence[bytes], prefix: Sequence[bytes]
    ) -> None:
        if len(one) >= MIN_SHINGLES:
            self.sets[number] = one
            for shingle in shared:
                self.by_any[shingle].append(number)
            for shingle in prefix:
                self.by_prefix[shingle].append(number)

    def find(self, one: frozenset[bytes], shared: Sequence[bytes], prefix: Sequence[bytes]) -> int | None:
        """The earliest set alike, either one held in the other."""
        if len(one) < MIN_SHINGLES:
            return None
        larger = [self.by_any[shingle] for shingle in prefix if shingle in self.by_any]
        smaller = [self.by_prefix[shingle] for shingle in shared if shingle in self.by_prefix]
        for number, _ in groupby(merge(*larger, *smaller)):
            if containment_ppm(one, self.sets[number]) >= CONTAINMENT_PPM:
                return number
        return None


def _prefix(one: frozenset[bytes], rarity: Counter[bytes]) -> list[bytes]:
    """So many of the rarest shingles that whatever holds enough of the set holds one of these; less those
    that nobody else has."""
    rarest = sorted(one, key=lambda shingle: (rarity[shingle], shingle))
    needed = -(-CONTAINMENT_PPM * len(one) // 1_000_000)
    return [shingle for shingle in rarest[: len(one) - needed + 1] if rarity[shingle] > 1]
