"""How well grouping finds FOLDOC's real copies of the Jargon File, and how seldom it sees one where none is.

The truth is measured here by other means than the product's: entries as printed, plain lower-case words,
five-word shingles, headword by headword. ``python -m tests.bench.data.copies OUT.json [--cache DIR]``"""

import argparse
import json
import os
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from attribution.groups import CONTAINMENT_PPM, Committed, group
from attribution.hashing import sha256
from attribution.types import Shard
from pipelines.sources import computing_terms
from pipelines.sources.debian import fetch_package
from pipelines.sources.drafts import ShardDraft
from pipelines.validation import Accepted, validate_shard

COPIED = 0.8


@dataclass(frozen=True, slots=True)
class Truth:
    """Headwords that both dictionaries print, lower case."""

    shared: frozenset[str]
    copied: frozenset[str]  # more than COPIED of FOLDOC's shingles stand in the Jargon File's entry
    unrelated: frozenset[str]  # not one shingle in common


def truth(cache: Path) -> Truth:
    foldoc, jargon = (_shingles_by_headword(name, cache) for name in ("foldoc", "jargon"))
    shared = foldoc.keys() & jargon.keys()
    common = {word: len(foldoc[word] & jargon[word]) / max(1, len(foldoc[word])) for word in shared}
    return Truth(
        frozenset(shared),
        frozenset(word for word in shared if common[word] > COPIED),
        frozenset(word for word in shared if common[word] == 0),
    )


def accepted(cache: Path) -> list[Committed]:
    """What validation lets through, the Jargon File committed first."""
    records = []
    for seq, draft in enumerate(computing_terms.drafts(cache), start=1):
        shard = Shard(draft.datanet, draft.contributor_id, bytes(32), sha256(draft.data), 0, seq)
        for verdict in validate_shard(shard, draft.data, computing_terms.DATANET.rules):
            if isinstance(verdict, Accepted):
                records.append(Committed(verdict.record, verdict.record.record_id, seq, verdict.row))
    return records


def figures(cache: Path) -> dict[str, float | int]:
    real, records = truth(cache), accepted(cache)
    started = time.monotonic()
    grouping = group(records)
    group_s = time.monotonic() - started
    by_id = {one.record_id: one for one in records}
    jargon = {one.record.answer.lower() for one in records if one.committed_seq == 1}
    foldoc = {one.record.answer.lower() for one in records if one.committed_seq == 2}
    taken = {
        by_id[member].record.answer.lower()
        for found in grouping.groups
        if by_id[found.group_id].committed_seq == 1
        for member in found.members
        if by_id[member].committed_seq == 2
    }
    disputed = {
        by_id[one.record_id].record.answer.lower()
        for one in grouping.conflicts
        if (by_id[one.record_id].committed_seq, by_id[one.earlier_id].committed_seq) == (2, 1)
    }
    copied, unrelated = real.copied & jargon & foldoc, real.unrelated & jargon & foldoc
    return {
        "shared_headwords": len(real.shared),
        "copied": len(real.copied),
        "copied_accepted_on_both_sides": len(copied),
        "copied_grouped": len(copied & taken),
        "copied_in_conflict": len(copied & disputed - taken),
        "unrelated": len(real.unrelated),
        "unrelated_accepted_on_both_sides": len(unrelated),
        "unrelated_grouped": len(unrelated & taken),
        "containment_ppm": CONTAINMENT_PPM,
        "records": len(records),
        "groups": len(grouping.groups),
        "conflicts": len(grouping.conflicts),
        "group_s": round(group_s, 2),
    }


def _shingles_by_headword(name: str, cache: Path) -> dict[str, set[tuple[str, ...]]]:
    dictionary = next(one for one in computing_terms.DICTIONARIES if one.name == name)
    root = fetch_package(f"dict-{name}", cache, dictionary.pinned).root
    found = defaultdict(set)
    for entry in computing_terms.entries(name, root):
        body = re.sub(r"\(\d{4}-\d\d-\d\d\)|\[\{Jargon File\}[^\]]*\]", "", entry.body)
        words = re.findall(r"[a-z0-9]+", body.lower())
        found[entry.headword.lower()].update(tuple(words[i : i + 5]) for i in range(len(words) - 4))
    return {word: shingles for word, shingles in found.items() if shingles}


def _version(draft: ShardDraft) -> str:
    return str(json.loads(draft.data.split(b"\n", 1)[0])["source_version"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".openledger/packages"))
    options = parser.parse_args()
    found = figures(options.cache)
    packages = [f"{draft.contributor} {_version(draft)}" for draft in computing_terms.drafts(options.cache)]
    conditions = {"packages": packages, "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    options.out.write_text(json.dumps({"conditions": conditions, **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    grouped = found["copied_grouped"] / found["copied_accepted_on_both_sides"]
    wrong = found["unrelated_grouped"] / found["unrelated_accepted_on_both_sides"]
    print(f"goal copies_grouped {grouped:.3f} 0.90 {'met' if grouped >= 0.9 else 'short'}")
    print(f"goal unrelated_grouped {wrong:.3f} 0.02 {'met' if wrong <= 0.02 else 'short'}")


if __name__ == "__main__":
    main()
