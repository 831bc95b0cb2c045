"""Payload encoding and certificates as the EigenDA stand-in makes them: right in shape, worthless as proof.

Sizes, RLP layout and the expansion of payloads are the real ones; the commitment to the blob is a hash in
the place of a KZG point and nobody signs. Layout: Layr-Labs/eigenda ``api/proxy`` and ``contracts``,
certificate V4."""

import secrets

import numpy as np
import rlp

from attribution.errors import Rejected
from attribution.hashing import keccak256

SYMBOL_BYTES = 32
FIELD_PRIME = 21888242871839275222246405745257275088548364400416034343698204186575808495617  # BN254
VERSION_BYTE = b"\x03"  # certificate version minus one


def encode_payload(payload: bytes) -> bytes:
    """Version 0: a header symbol with the length, then a zero byte before every 31 of payload, then zeros
    up to a power of two of 32-byte symbols."""
    num_symbols = 1 + -(-len(payload) // 31)
    padded = 1 << (num_symbols - 1).bit_length()
    symbols = np.zeros((padded, SYMBOL_BYTES), dtype=np.uint8)
    symbols[0, 2:6] = np.frombuffer(len(payload).to_bytes(4, "big"), dtype=np.uint8)
    body = np.frombuffer(payload.ljust((num_symbols - 1) * 31, b"\0"), dtype=np.uint8)
    symbols[1:num_symbols, 1:] = body.reshape(num_symbols - 1, 31)
    return symbols.tobytes()


def decode_payload(blob: bytes) -> bytes:
    """Inverse of ``encode_payload``; anything it did not write is ``Rejected``."""
    num_symbols = len(blob) // SYMBOL_BYTES
    if num_symbols == 0 or len(blob) % SYMBOL_BYTES or num_symbols & (num_symbols - 1):
        raise Rejected("da_blob", f"{len(blob)} bytes are no power of two of symbols", field="blob")
    symbols = np.frombuffer(blob, dtype=np.uint8).reshape(num_symbols, SYMBOL_BYTES)
    size = int.from_bytes(blob[2:6], "big")
    payload = symbols[1:, 1:].tobytes()
    if symbols[:, 0].any() or blob[1] or any(blob[6:32]) or size > len(payload) or any(payload[size:]):
        raise Rejected("da_blob", "header or padding is not what version 0 writes", field="blob")
    return payload[:size]


def certificate(blob: bytes, num_non_signers: int = 1) -> bytes:
    """A well-formed V4 certificate (RLP), random but for the blob's commitment and length: no two equal."""
    digest = keccak256(blob)
    commitment = [int.from_bytes(h, "big") % FIELD_PRIME for h in (digest, keccak256(digest))]
    blob_header = [0, b"\x00\x01", [commitment, _g2(), _g2(), len(blob) // SYMBOL_BYTES], _word()]
    inclusion = [
        [blob_header, secrets.token_bytes(65), [0, 1]],
        secrets.randbelow(1000),
        secrets.token_bytes(128),
    ]
    indices = [[0, 1], [0, 1]]
    signature = [[0] * num_non_signers, [_g1() for _ in range(num_non_signers)], [_g1(), _g1()], _g2(), _g1()]
    batch_header = [_word(), secrets.randbelow(2**32)]
    fields = [batch_header, inclusion, [*signature, [0, 1], [0, 1], indices], b"\x00\x01", 0]
    return bytes(rlp.encode(fields))


def _word() -> bytes:
    return secrets.token_bytes(32)


def _g1() -> list[int]:
    return [secrets.randbelow(FIELD_PRIME), secrets.randbelow(FIELD_PRIME)]


def _g2() -> list[list[int]]:
    return [_g1(), _g1()]
