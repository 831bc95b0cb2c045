"""The bytes of a shard: its lines, and what commits to them."""

from collections.abc import Sequence

from attribution.hashing import keccak256, sha256
from attribution.merkle import merkle_tree

SHARDS = "shards"  # storage prefix


def split_lines(data: bytes) -> list[bytes]:
    """The rows of a shard. A final newline ends the last line, it does not begin another."""
    lines = data.split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def shard_root(lines: Sequence[bytes]) -> bytes:
    """Merkle root over the double-hashed SHA-256 of every line: any line can be proven on its own."""
    return merkle_tree([keccak256(keccak256(sha256(line))) for line in lines]).root


def commitment_to(data: bytes, contributor: bytes, salt: bytes) -> bytes:
    """``keccak(salt ‖ contributor id ‖ shard root)``: 96 bytes hashed."""
    assert len(salt) == 32 and len(contributor) == 32
    return keccak256(salt + contributor + shard_root(split_lines(data)))
