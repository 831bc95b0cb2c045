"""The one commitment of a receipt: binds prompt, answer and evidence index, and shows none."""

from collections.abc import Sequence
from dataclasses import dataclass

from attribution.codec import Encoder
from attribution.hashing import keccak256, sha256


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a prompt; a plain completion is one turn without a role."""

    role: str
    content: str


def prompt_sha256(turns: Sequence[Turn]) -> bytes:
    """What ``answer_commitment`` binds of a prompt: whoever asked can compute it without a tokenizer."""
    encoder = Encoder("openledger/prompt/1")
    return sha256(encoder.each(turns, lambda e, turn: e.text(turn.role).text(turn.content)).finish())


def answer_sha256(texts: Sequence[str]) -> bytes:
    """What ``answer_commitment`` binds of an answer: SHA-256 of its UTF-8 text, or of all its choices."""
    if len(texts) == 1:
        return sha256(texts[0].encode())
    encoder = Encoder("openledger/choices/1")
    return sha256(encoder.each(texts, lambda e, text: e.blob(text.encode())).finish())


def answer_commitment(salt: bytes, prompt_sha256: bytes, answer_sha256: bytes, index_id: bytes) -> bytes:
    """Opened by whoever holds the 32-byte salt, which keeps a guessed prompt from being confirmed.

    Args:
        prompt_sha256: as the function of that name gives it.
        answer_sha256: as the function of that name gives it.
        index_id: of the adapter's evidence index at the time of the answer; zero without one.
    """
    encoder = Encoder("openledger/answer/1").id32(salt).id32(prompt_sha256).id32(answer_sha256)
    return keccak256(encoder.id32(index_id).finish())
