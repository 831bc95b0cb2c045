"""Every way a row can be wrong costs that row, by name, and no other."""

import json
import time
from dataclasses import asdict, replace

import pytest

from attribution.hashing import sha256
from attribution.types import Rejection, Shard
from cluster.datanets import Rules
from pipelines.pii import first_pii
from pipelines.validation import Accepted, validate_row, validate_shard
from tests import toys

RULES = toys.datanet().rules
GOOD = toys.row(toys.records()[0])
SHARD = Shard("toy-metals", toys.records()[0].contributor_id, bytes(32), bytes(32), 1, 1)
GERMAN = (
    "Die Eisenbahn fuhr langsam durch das verschneite Tal, während die Reisenden schweigend aus den "
    "beschlagenen Fenstern blickten und an zu Hause dachten."
)


def line(**changes: object) -> bytes:
    row = {**GOOD, **changes}
    return json.dumps({key: value for key, value in row.items() if value is not ...}).encode()


def test_a_good_row_becomes_the_record_it_says() -> None:
    verdict = validate_row(SHARD, 4, line(), RULES)
    assert verdict == Accepted(4, toys.records()[0])


def test_a_row_without_a_passage_is_its_own_passage() -> None:
    verdict = validate_row(SHARD, 0, line(text=...), RULES)
    assert isinstance(verdict, Accepted)
    assert verdict.record.text == verdict.record.subject


@pytest.mark.parametrize(
    ("bad", "code", "field"),
    [
        (b"", "not_json", ""),
        (line()[:-20], "not_json", ""),
        (b"not json at all", "not_json", ""),
        (b"[" * 200_000, "not_json", ""),
        (b'{"subject":' * 20_000, "not_json", ""),
        (b'{"subject": "a", "subject": "b"}', "not_json", ""),
        (b"\xff\xfe" + line(), "not_utf8", ""),
        (b'["subject", "answer"]', "not_an_object", ""),
        (b"null", "not_an_object", ""),
        (line(answer=...), "missing_field", "answer"),
        (line(licence=...), "missing_field", "licence"),
        (line(wallet="0x00"), "unknown_field", "wallet"),
        (line(answer=7), "wrong_type", "answer"),
        (line(text=["a"]), "wrong_type", "text"),
        (line(answer=None), "wrong_type", "answer"),
        (line(answer="a\x00b"), "bad_character", "answer"),
        (line(subject="a metal \ud800 of wire"), "not_json", ""),
        (line(answer="   "), "too_short", "answer"),
        (line(subject="short"), "too_short", "subject"),
        (line(source=""), "too_short", "source"),
        (line(subject="long " * 200), "too_long", "subject"),
        (line(answer="x" * 161), "too_long", "answer"),
        (line(source_key="k" * 201), "too_long", "source_key"),
        (line(text="x" * 300_000), "line_too_long", ""),
        (line(licence="GPL-3.0-only"), "licence", "licence"),
        (line(licence="cc0-1.0"), "licence", "licence"),
        (line(text=GERMAN), "language", "text"),
        (line(text=f"{GOOD['text']} Ask jo@metals.io."), "pii_email", "text"),
        (line(answer="+49 30 901820 44"), "pii_phone", "answer"),
    ],
)
def test_each_bad_row_is_refused_by_name(bad: bytes, code: str, field: str) -> None:
    verdict = validate_row(SHARD, 3, bad, RULES)
    assert isinstance(verdict, Rejection)
    assert (verdict.row, verdict.code, verdict.field) == (3, code, field)
    assert verdict.shard_id == SHARD.shard_id
    assert verdict.detail


def test_a_rejection_does_not_repeat_what_was_private() -> None:
    """Rejections are shown to everybody."""
    verdict = validate_row(SHARD, 0, line(text=f"{GOOD['text']} jo@metals.io"), RULES)
    assert "metals" not in str(asdict(verdict))


def test_a_bad_line_costs_only_itself() -> None:
    lines = toys.shard_data().splitlines()
    lines[2:2] = [b"{", b""]
    verdicts = list(validate_shard(SHARD, b"\n".join(lines), RULES))
    assert [one.row for one in verdicts] == list(range(len(lines)))
    assert [one.row for one in verdicts if isinstance(one, Rejection)] == [2, 3]


def test_a_repeated_row_is_refused_and_points_to_the_first() -> None:
    verdicts = list(validate_shard(SHARD, line() + b"\n" + line(answer=f" {GOOD['answer']} ") + b"\n", RULES))
    assert isinstance(verdicts[0], Accepted)
    assert isinstance(verdicts[1], Rejection)
    assert verdicts[1].code == "duplicate_row"


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n\n"])
def test_an_empty_shard_has_no_records(data: bytes) -> None:
    verdicts = list(validate_shard(SHARD, data, RULES))
    assert all(isinstance(one, Rejection) for one in verdicts)


def test_verdicts_do_not_depend_on_the_shard_s_content_hash() -> None:
    """What is decided is decided by the bytes in hand."""
    moved = replace(SHARD, committed_seq=9)
    rows = toys.shard_data()
    assert list(validate_shard(SHARD, rows, RULES)) == list(validate_shard(moved, rows, RULES))
    assert sha256(rows) != SHARD.content_sha256


@pytest.mark.parametrize("language", ["de", "en"])
def test_a_datanet_chooses_its_languages(language: str) -> None:
    rules = Rules(licences=RULES.licences, languages=(language,))
    assert isinstance(validate_row(SHARD, 0, line(text=GERMAN), rules), Accepted) == (language == "de")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jo.smith+spam@mail.metals.io now", "email"),
        ("card 4111 1111 1111 1111 expires", "card"),
        ("card 378282246310005", "card"),
        ("pay to DE89 3704 0044 0532 0130 00 please", "iban"),
        ("the host 8.8.8.8 answers", "ip"),
        ("2001:4860:4860:0:0:0:0:8888", "ip"),
        ("call +44 20 7946 0958", "phone"),
        ("call (415) 855-9271", "phone"),
        ("her number is 219-09-9999", "ssn"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret"),
        ("key AKIAIOSFODNN7EXAMPLE", "secret"),
    ],
)
def test_personal_data_is_found(text: str, kind: str) -> None:
    found = first_pii(text)
    assert found is not None and found.kind == kind


@pytest.mark.parametrize(
    "text",
    [
        "write to someone@example.com or root@localhost",
        "card 4111 1111 1111 1112 fails Luhn",
        "codes 0000 0001 0010 0011 are binary",
        "IBAN DE00 3704 0044 0532 0130 00 has a wrong remainder",
        "127.0.0.1 and 192.168.1.1 and 999.1.1.1",
        "on 1995-11-24 at 12:30:45 in version 1.2.3",
        "ISBN 978-3-16-148410-0 costs 1,234,567",
        "pi is 3.14159265358979",
        "a hash 4111111111111111abcdef",
        "matrix @ vector, a@b",
    ],
)
def test_what_only_looks_like_personal_data_is_let_through(text: str) -> None:
    assert first_pii(text) is None


def test_patterns_take_linear_time() -> None:
    """Nobody stalls a job with one crafted row of the longest kind."""
    started = time.monotonic()
    for unit in ("1 ", "a@", "a.", "1-", "1.", "A1 ", "(1", "+1 (", "DE11 AAAA ", "@a.a"):
        first_pii(unit * (RULES.max_text_chars // len(unit)))
    assert time.monotonic() - started < 10
