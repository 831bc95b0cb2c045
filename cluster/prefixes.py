"""How the prompts for an adapter begin, where its owner says so in public: the one thing whose keys and
values an engine shares across tenants.

A published prefix is token ids, stored as little-endian uint32 under their SHA-256. Of a system prompt they
are what the base's chat template puts before a user's first word; a template that writes the date in front
shares less, and never anything that was not published."""

import sys
from array import array
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from attribution.errors import Corrupted, Rejected
from attribution.hashing import sha256
from cluster.models import render_prompt
from cluster.storage import Storage

MAX_PREFIX_TOKENS = 8_192  # 32 KiB, which a gateway keeps in memory


def system_prefix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What chats with this system prompt have in common, whatever the user says."""
    system = {"role": "system", "content": text}
    one, other = (
        render_prompt(tokenizer, [system, {"role": "user", "content": said}]) for said in ("A", "7")
    )
    return one[: num_common(one, other)]


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def store_prefix(storage: Storage, token_ids: Sequence[int]) -> bytes:
    """Returns its id. Storing it again changes nothing.

    Raises:
        Rejected: ``prefix_length``.
    """
    if not 1 <= len(token_ids) <= MAX_PREFIX_TOKENS:
        long = f"a prefix has 1 to {MAX_PREFIX_TOKENS} tokens, this one {len(token_ids)}"
        raise Rejected("prefix_length", long, field="prefix")
    packed = _swapped(array("I", token_ids)).tobytes()
    prefix_id = sha256(packed)
    storage.put_if_absent(_key(prefix_id), packed)
    return prefix_id


def load_prefix(storage: Storage, prefix_id: bytes) -> tuple[int, ...]:
    """Raises: Corrupted, ``prefix_hash``."""
    packed = storage.get(_key(prefix_id))
    if sha256(packed) != prefix_id:
        raise Corrupted("prefix_hash", f"{prefix_id.hex()} hashes to {sha256(packed).hex()}")
    return tuple(_swapped(array("I", packed)))


def _swapped(numbers: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _key(prefix_id: bytes) -> str:
    return f"prefixes/{prefix_id.hex()}.u32"
