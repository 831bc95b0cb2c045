"""Transcripts: they open with their own key and request and in no other way, and can be forgotten."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from attribution.errors import Corrupted, Rejected
from cluster.charges import capture
from cluster.database import writing
from cluster.receipts import transcripts_of
from cluster.transcripts import Transcript, delete_transcripts, load_key, open_sealed, seal
from tests.cluster.money import NOW, draft, funded_account, hold

KEY, REQUEST = b"\1" * 32, b"\2" * 32
SOME = Transcript((1, 2, 3), (4, 5), "asked", "ansẅered ✓")
token_ids = st.lists(st.integers(0, 2**32 - 1)).map(tuple)


@given(prompt=token_ids, answer=token_ids, texts=st.tuples(st.text(), st.text()))
def test_open_inverts_seal(prompt: tuple[int, ...], answer: tuple[int, ...], texts: tuple[str, str]) -> None:
    transcript = Transcript(prompt, answer, *texts)
    sealed = seal(KEY, transcript, REQUEST)
    assert open_sealed(KEY, sealed, REQUEST) == transcript
    assert seal(KEY, transcript, REQUEST) != sealed  # a fresh nonce each time


def test_no_text_shows_in_the_ciphertext() -> None:
    assert b"asked" not in seal(KEY, SOME, REQUEST)


def test_another_key_request_or_byte_does_not_open() -> None:
    sealed = seal(KEY, SOME, REQUEST)
    flipped = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for key, data, request in (
        (b"\3" * 32, sealed, REQUEST),
        (KEY, sealed, b"\3" * 32),
        (KEY, flipped, REQUEST),
        (KEY, sealed[:20], REQUEST),
        (KEY, b"", REQUEST),
    ):
        with pytest.raises(Corrupted):
            open_sealed(key, data, request)


def test_the_key_is_made_once_and_for_us_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "transcripts"
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(load_key, [path] * 16))
    assert len(keys) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["transcripts"]


def test_a_key_others_can_read_or_a_short_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    load_key(path)
    path.chmod(0o644)
    with pytest.raises(Rejected, match="644"):
        load_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(Corrupted, match="5 bytes"):
        load_key(path)


def test_what_is_deleted_is_gone_and_the_rest_stays(engine: Engine) -> None:
    with writing(engine) as session:
        account = funded_account(session)
        for number in (1, 2):
            hold(session, account, bytes([number]) * 32)
        receipts = [capture(session, bytes([number]) * 32, draft(), NOW) for number in (1, 2)]
        ids = [receipt.receipt_id for receipt in receipts]
        assert len(transcripts_of(session, ids)) == 2
        delete_transcripts(session, ids[:1])
        assert [kept.receipt for kept in transcripts_of(session, ids)] == receipts[1:]
