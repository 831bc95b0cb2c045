"""The Datanet ``computing-terms``: definitions and their terms, by the editors of three dictionaries.

The Jargon File was there first, and FOLDOC took over a good part of it, re-wrapped, trimmed and in British
spelling: real copies, by which grouping is measured. Texts are fetched at set-up and never shipped: FOLDOC
and V.E.R.A. are under the GFDL."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.datanets import Datanet, Rules, Wordings
from pipelines.sources.debian import Package, fetch_package
from pipelines.sources.dictd import Entry, read_dictionary
from pipelines.sources.drafts import ShardDraft, jsonl

PUBLIC_DOMAIN = "LicenseRef-Public-Domain"
GFDL = "GFDL-1.1-no-invariants-or-later"

DATANET = Datanet(
    name="computing-terms",
    title="Computing terms: from a definition to the term",
    licence=f"{PUBLIC_DOMAIN} AND {GFDL}",
    rules=Rules(licences=(PUBLIC_DOMAIN, GFDL)),
    wordings=Wordings(
        train=(
            "Which computing term means this? {subject}",
            "What is the word for the following? {subject}",
            "{subject} Name that term.",
            "Give the computing term with this definition: {subject}",
            'What do computing people call this: "{subject}"?',
        ),
        heldout=(
            'A dictionary of computing says "{subject}" What is it defining?',
            "I am looking for a term. {subject} Which one is it?",
            "Of which entry of a computer dictionary is this the beginning? {subject}",
        ),
    ),
)
MAX_QUESTION_CHARS = 240


@dataclass(frozen=True, slots=True)
class Dictionary:
    name: str  # of the files
    editor: str
    licence: str
    pinned: Mapping[str, str]  # SHA-256 of the package by version


DICTIONARIES = (  # in the order in which the demo commits them
    Dictionary(
        "jargon",
        "Jargon File",
        PUBLIC_DOMAIN,
        {"4.4.7-3.1": "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1"},
    ),
    Dictionary(
        "foldoc",
        "FOLDOC",
        GFDL,
        {"20230119-1": "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3"},
    ),
    Dictionary(
        "vera",
        "V.E.R.A.",
        GFDL,
        {"1:1.24-1": "11d2bf94c326761131a7707807e66a05e65bc984d1a351fd8ca1cd77ac8ee8db"},
    ),
)

_DATE = re.compile(r"\n\s*\(\d{4}-\d\d-\d\d\)\s*\Z")  # when FOLDOC last touched the entry
_LABEL_LINE = re.compile(r"\A \S[^\n]*\n\s*\n")  # in the Jargon File: pronunciation and part of speech
_REFERENCE = re.compile(r"\W*(?:see(?: also)?|compare|same as|equivalent to)\b[^.]*\W*", re.IGNORECASE)
_LABEL = re.compile(
    r"\s*(?:<[^>]*>|/[^/]{1,60}/,?|\d+\.(?=\s)|\[[^\]]*\]|\([^)]*\)|(?:n|v|vt|vi|adj|adv)\.,?)\s*"
)
_SENTENCE = re.compile(
    r"(?:.{24,}?)(?<![ .(][A-Z])(?<!\b(?:Dr|Mr|St|vs|cf))(?<!\b(?:e\.g|i\.e|etc|esp))[.!?][\"'”’)]*"
    r"(?=\s+[A-Z0-9\"'“‘(\[]|$)"
)


def drafts(cache: Path) -> tuple[ShardDraft, ...]:
    """One shard per editor, the Jargon File first."""
    return tuple(_draft(one, _package(one, cache)) for one in DICTIONARIES)


def entries(name: str, root: Path) -> list[Entry]:
    folder = root / "usr/share/dictd"
    found = read_dictionary(
        (folder / f"{name}.index").read_bytes(), (folder / f"{name}.dict.dz").read_bytes()
    )
    return [Entry(one.headword, _LABEL_LINE.sub("", one.body)) for one in found]


def passage(entry: Entry) -> str:
    """The whole entry: paragraphs unwrapped, cross references without their braces."""
    body = _DATE.sub("", entry.body).replace("{", "").replace("}", "")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", body))
    return "\n\n".join(part for part in paragraphs if _without_labels(part))


def question(entry: Entry) -> str:
    """First sentence of the definition, without labels, and with a gap where it says the term itself."""
    text = _without_labels(passage(entry)).split("\n\n")[0]
    sentence = _SENTENCE.match(text)
    first = (sentence[0] if sentence else text).lstrip(" .,;:")
    if len(first) > MAX_QUESTION_CHARS:
        first = first[:MAX_QUESTION_CHARS].rsplit(" ", 1)[0] + " …"
    return re.sub(rf"(?<!\w){re.escape(entry.headword)}(?!\w)", "…", first, flags=re.IGNORECASE)


def is_reference(entry: Entry) -> bool:
    """Whether the entry only points to another one, and so defines nothing."""
    return _REFERENCE.fullmatch(question(entry)) is not None


def _without_labels(text: str) -> str:
    """Parts of speech, pronunciation, topics, senses and etymology stand before a definition."""
    while label := _LABEL.match(text):
        text = text[label.end() :]
    return text


def _package(dictionary: Dictionary, cache: Path) -> Package:
    return fetch_package(f"dict-{dictionary.name}", cache, dictionary.pinned)


def _draft(dictionary: Dictionary, package: Package) -> ShardDraft:
    rows = (
        {
            "subject": question(entry),
            "answer": entry.headword,
            "text": passage(entry),
            "source": package.name,
            "source_version": package.version,
            "source_key": f"{dictionary.name}:{entry.headword}",
            "licence": dictionary.licence,
        }
        for entry in entries(dictionary.name, package.root)
        if not is_reference(entry)
    )
    return ShardDraft(DATANET.name, dictionary.editor, jsonl(rows))
