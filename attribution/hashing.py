"""The two hashes: keccak-256 for what reaches the chain, SHA-256 for files and records."""

import hashlib

import sha3  # safe-pysha3: ten times faster than the pure-Python keccak


def keccak256(data: bytes) -> bytes:
    """32 bytes, as Solidity's ``keccak256``."""
    return bytes(sha3.keccak_256(data).digest())


def sha256(data: bytes | memoryview) -> bytes:
    """32 bytes."""
    return hashlib.sha256(data).digest()
