"""The header of a packed adapter in the plain form that we write, read without a copy of what follows it.

A safetensors file is eight bytes of length, a JSON object that says where each tensor lies, and the tensors.
Whatever is valid but unusual (another type, an escape, a gap, a key twice) is not judged here: the library
reads it, slowly. Source: github.com/huggingface/safetensors, README, "Format"."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4 * 2**20  # of 256 bytes for a tensor: 16,000 tensors
ITEM_BYTES = 2  # bf16

Place = tuple[tuple[int, int], int, int]  # shape, and from which number to which it lies behind the header


@dataclass(frozen=True, slots=True)
class PackedHeader:
    base_id: str
    size_bytes: int  # what lies before the first number
    num_values: int
    places: Mapping[str, Place]


def read_header(data: memoryview) -> PackedHeader | None:
    """``None`` where the file is not of the plain form, valid or not."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    size = LENGTH_BYTES + length
    if not 0 < length <= MAX_HEADER_BYTES or size >= len(data):
        return None
    header = _parsed(bytes(data[LENGTH_BYTES:size]))
    return header if header is not None and size + ITEM_BYTES * header.num_values == len(data) else None


@lru_cache(maxsize=16)  # adapters of one training configuration share their header to the byte
def _parsed(text: bytes) -> PackedHeader | None:
    if not text.startswith(b"{") or not text.isascii() or b"\\" in text:
        return None
    try:
        entries = json.loads(text, object_pairs_hook=_once)
        metadata = entries.pop("__metadata__", {})
        places = {name: _place(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    end = 0
    for _, start, stop in sorted(places.values(), key=lambda place: place[1]):
        if start != end:
            return None
        end = stop
    base_id = metadata.get("base_id") if isinstance(metadata, dict) and len(metadata) == 1 else None
    return PackedHeader(base_id, LENGTH_BYTES + len(text), end, places) if isinstance(base_id, str) else None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _place(entry: Mapping[str, Any]) -> Place:
    """Raises: ValueError, TypeError or KeyError for anything but matrices of bf16 with their offsets."""
    rows, columns = entry["shape"]
    start, end = entry["data_offsets"]
    if len(entry) != 3 or entry["dtype"] != "BF16" or {*map(type, (rows, columns, start, end))} != {int}:
        raise ValueError("not plain")
    if (
        min(rows, columns) < 1
        or start < 0
        or start % ITEM_BYTES
        or end - start != ITEM_BYTES * rows * columns
    ):
        raise ValueError("not plain")
    return (rows, columns), start // ITEM_BYTES, end // ITEM_BYTES
