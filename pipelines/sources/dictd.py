"""Dictionaries in the format of ``dictd``: an index of headword, offset and length into one gzipped text.

Format: dictd(8), "Database format"; numbers are written in base 64, big end first."""

import gzip
import zlib
from dataclasses import dataclass

from attribution.errors import Corrupted

_DIGITS = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


@dataclass(frozen=True, slots=True)
class Entry:
    headword: str  # as printed: the index folds case; aliases below it are dropped
    body: str


def read_dictionary(index: bytes, compressed: bytes) -> list[Entry]:
    """Every entry once, in the order of the text: the index names an entry once per alias."""
    try:
        text = gzip.decompress(compressed)
    except (OSError, EOFError, zlib.error) as error:
        raise Corrupted("dictionary", f"{len(compressed)} bytes are no gzip file: {error}") from error
    spans = {_span(line) for line in index.decode("utf-8").splitlines() if not line.startswith("00")}
    entries = []
    for offset, size in sorted(spans):
        if offset + size > len(text):
            raise Corrupted(
                "dictionary", f"entry at {offset} needs {size} bytes of {len(text)}", field="index"
            )
        entries.append(_entry(text[offset : offset + size].decode("utf-8", "replace")))
    return entries


def _entry(printed: str) -> Entry:
    lines = printed.splitlines()
    indented = (n for n, line in enumerate(lines) if n > 0 and (not line or line[0].isspace()))
    return Entry(lines[0].strip(), "\n".join(lines[next(indented, len(lines)) :]))


def _span(line: str) -> tuple[int, int]:
    try:
        _, offset, size = line.split("\t")[:3]
        return _number(offset), _number(size)
    except (ValueError, KeyError) as error:
        raise Corrupted("dictionary", f"index line {line[:80]!r}", field="index") from error


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value
