"""Prompts and answers, encrypted until their period is closed and its challenge delay is over, then deleted.

AES-256-GCM under one key file of the platform, bound to the request they belong to: a ciphertext moved to
another row does not open. No text leaves this module but to the pipelines that attribute it."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import delete
from sqlalchemy.orm import Session

from attribution.codec import Decoder, Encoder
from attribution.errors import Corrupted, Rejected
from cluster.tables import TranscriptRow

_NONCE_BYTES = 12
_DELETE_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was asked and answered, as text and as the very tokens the engine saw and gave.

    An answer of several choices is attributed by one of them, so that what attribution costs does not depend
    on their number; of the others only the text is kept, for whoever repeats the request."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    prompt_text: str
    answer_text: str
    other_texts: tuple[str, ...] = ()


def key_path(home: Path) -> Path:
    """Where the gateway that seals and the jobs that open find the one key."""
    return home / "transcripts.key"


def load_key(path: Path) -> bytes:
    """The key of this platform (32 bytes); made at the first call, readable by this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    if not path.exists():
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(handle)
        try:
            os.link(temporary, path)  # of two processes that start together one wins, and both use its key
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    if path.stat().st_mode & 0o077:
        raise Rejected("unsafe_key", f"{path}: mode {path.stat().st_mode & 0o777:o}, expected 600")
    key = path.read_bytes()
    if len(key) != 32:
        raise Corrupted("transcript_key", f"{path}: {len(key)} bytes, expected 32")
    return key


def seal(key: bytes, transcript: Transcript, request_id: bytes) -> bytes:
    """Nonce and ciphertext; opens only with the same key and request id."""
    encoder = Encoder("openledger/transcript/2")
    encoder.each(transcript.prompt_ids, Encoder.u64).each(transcript.answer_ids, Encoder.u64)
    encoder.blob(transcript.prompt_text.encode()).blob(transcript.answer_text.encode())
    encoder.each(transcript.other_texts, lambda e, text: e.blob(text.encode()))
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, encoder.finish(), request_id)


def open_sealed(key: bytes, ciphertext: bytes, request_id: bytes) -> Transcript:
    """Inverse of ``seal``.

    Raises:
        Corrupted: another key, another request, or changed bytes.
    """
    try:
        plain = AESGCM(key).decrypt(ciphertext[:_NONCE_BYTES], ciphertext[_NONCE_BYTES:], request_id)
    except (InvalidTag, ValueError) as error:
        raise Corrupted(
            "transcript", f"the transcript of request {request_id.hex()} does not open"
        ) from error
    decoder = Decoder(plain, "openledger/transcript/2")
    ids = decoder.each(Decoder.u64), decoder.each(Decoder.u64)
    texts = decoder.blob().decode(), decoder.blob().decode()
    transcript = Transcript(*ids, *texts, decoder.each(lambda d: d.blob().decode()))
    decoder.finish()
    return transcript


def delete_transcripts(session: Session, receipt_ids: Sequence[bytes]) -> None:
    """Forget the texts of settled receipts; the receipts and their commitments stay."""
    for start in range(0, len(receipt_ids), _DELETE_AT_ONCE):
        some = [receipt_id.hex() for receipt_id in receipt_ids[start : start + _DELETE_AT_ONCE]]
        session.execute(delete(TranscriptRow).where(TranscriptRow.receipt_id.in_(some)))
