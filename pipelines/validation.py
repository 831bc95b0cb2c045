"""What a row must be before it is a record. Pure: bytes and rules in, one verdict per line out.

A shard is JSON Lines, one object of strings per line. A bad line costs that line only; whether the shard as a
whole is what its contributor signed is decided before, in ``pipelines/ingest.py``."""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import py3langid.langid
from pydantic_core import from_json

from attribution.types import Record, Rejection, Shard
from cluster.datanets import Rules
from cluster.shards import split_lines
from pipelines.pii import first_pii

REQUIRED = ("subject", "answer", "source", "source_version", "source_key", "licence")
LANGUAGE_CHARS = 400  # the detector walks bytes in Python: more costs time and tells nothing new
OPTIONAL = ("text",)  # the passage; the subject where there is none


@dataclass(frozen=True, slots=True)
class Accepted:
    row: int  # counts from 0, empty lines included
    record: Record


class _Refused(Exception):
    def __init__(self, code: str, field: str, detail: str) -> None:
        super().__init__(code)
        self.code = code
        self.field = field
        self.detail = detail[:300]  # keys and licences are the sender's words, of any length


def validate_shard(shard: Shard, data: bytes, rules: Rules) -> Iterator[Accepted | Rejection]:
    """One verdict per line, in order. A row whose record already stands in this shard is a duplicate row."""
    seen: dict[bytes, int] = {}
    for row, line in enumerate(split_lines(data)):
        verdict = validate_row(shard, row, line, rules)
        if isinstance(verdict, Accepted):
            first = seen.setdefault(verdict.record.record_id, row)
            if first != row:
                verdict = Rejection(shard.shard_id, row, "duplicate_row", "", f"same record as row {first}")
        yield verdict


def validate_row(shard: Shard, row: int, line: bytes, rules: Rules) -> Accepted | Rejection:
    try:
        fields = _parse(line, rules)
        _check_lengths(fields, rules)
        _check_licence(fields, rules)
        _check_pii(fields)
        _check_language(fields["text"], rules)
    except _Refused as refused:
        return Rejection(shard.shard_id, row, refused.code, refused.field, refused.detail)
    return Accepted(row, Record(datanet=shard.datanet, contributor_id=shard.contributor_id, **fields))


def _parse(line: bytes, rules: Rules) -> dict[str, str]:
    if len(line) > rules.max_line_bytes:
        raise _Refused("line_too_long", "", f"{len(line)} bytes, limit {rules.max_line_bytes}")
    try:
        text = line.decode("utf-8")
        from_json(
            line
        )  # limits nesting; the json module overflows the stack where a library lifted its limit
        found = json.loads(text, object_pairs_hook=_pairs)
    except UnicodeDecodeError as error:
        raise _Refused("not_utf8", "", f"byte {error.start}: {error.reason}") from error
    except ValueError as error:
        raise _Refused("not_json", "", str(error)[:200]) from error
    if not isinstance(found, dict):
        raise _Refused("not_an_object", "", f"a row is an object, found {type(found).__name__}")
    return _strings(found)


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _strings(found: Mapping[str, object]) -> dict[str, str]:
    missing = [key for key in REQUIRED if key not in found]
    if missing:
        raise _Refused("missing_field", missing[0], f"has {sorted(found)[:12]}")
    unknown = sorted(set(found) - {*REQUIRED, *OPTIONAL})
    if unknown:
        raise _Refused("unknown_field", unknown[0][:80], f"a row has {[*REQUIRED, *OPTIONAL]}")
    fields = {}
    for key, value in found.items():
        if not isinstance(value, str):
            raise _Refused("wrong_type", key, f"wants text, found {type(value).__name__}")
        if any("\ud800" <= c <= "\udfff" or (c < " " and c not in "\t\n\r") for c in value):
            raise _Refused("bad_character", key, "holds a control character or half a surrogate pair")
        fields[key] = value.strip()
    return {"text": fields["subject"], **fields} if not fields.get("text") else fields


def _check_lengths(fields: Mapping[str, str], rules: Rules) -> None:
    limits = {
        "subject": (rules.min_subject_chars, rules.max_subject_chars),
        "answer": (1, rules.max_answer_chars),
        "text": (1, rules.max_text_chars),
        "source": (1, 200),
        "source_version": (1, 80),
        "source_key": (1, 200),
    }
    for key, (least, most) in limits.items():
        size = len(fields[key])
        if size < least:
            raise _Refused("too_short", key, f"{size} characters, at least {least}")
        if size > most:
            raise _Refused("too_long", key, f"{size} characters, at most {most}")


def _check_licence(fields: Mapping[str, str], rules: Rules) -> None:
    if fields["licence"] not in rules.licences:
        raise _Refused("licence", "licence", f"{fields['licence'][:80]!r}, allowed {list(rules.licences)}")


def _check_pii(fields: Mapping[str, str]) -> None:
    for key in ("subject", "answer", "text"):
        found = first_pii(fields[key])
        if found is not None:  # the finding itself is not repeated: a rejection is public
            raise _Refused(f"pii_{found.kind}", key, f"at character {found.start}")


def _check_language(text: str, rules: Rules) -> None:
    if len(text) < rules.language_min_chars:
        return
    language, probability = _identifier().classify(text[:LANGUAGE_CHARS])
    is_allowed = language in (*rules.languages, "zxx")  # zxx: figures and code, no language at all
    if not is_allowed and probability * 1_000_000 >= rules.language_min_ppm:
        raise _Refused("language", "text", f"{language} ({probability:.2f}), allowed {list(rules.languages)}")


@functools.cache
def _identifier() -> py3langid.langid.LanguageIdentifier:
    langid = py3langid.langid
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
