"""Canonical bytes: the one encoder whose output is hashed, signed or committed to.

A value is a domain tag followed by its fields in declaration order. Integers are 8 bytes big-endian (``u64``,
``i64``), byte strings and text (UTF-8, NFC) carry a ``u32`` length, sequences a ``u32`` count, sets are
sorted first. There are no floats, no maps and no optional fields, so equal values have equal bytes and every
byte has one reading."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeVar

from attribution.errors import Corrupted

T = TypeVar("T")


class Encoder:
    """Appends fields. ``tag`` names the type and its version, for example ``"openledger/record/1"``."""

    def __init__(self, tag: str) -> None:
        self._parts = [_prefixed(tag.encode("ascii"))]

    def u64(self, value: int) -> "Encoder":
        assert 0 <= value < 2**64, value
        self._parts.append(value.to_bytes(8, "big"))
        return self

    def i64(self, value: int) -> "Encoder":
        assert -(2**63) <= value < 2**63, value
        self._parts.append(value.to_bytes(8, "big", signed=True))
        return self

    def id32(self, value: bytes) -> "Encoder":
        assert len(value) == 32, len(value)
        self._parts.append(value)
        return self

    def address(self, value: bytes) -> "Encoder":
        assert len(value) == 20, len(value)
        self._parts.append(value)
        return self

    def blob(self, value: bytes) -> "Encoder":
        self._parts.append(_prefixed(value))
        return self

    def text(self, value: str) -> "Encoder":
        return self.blob(unicodedata.normalize("NFC", value).encode("utf-8"))

    def each(self, values: Sequence[T], write: Callable[["Encoder", T], object]) -> "Encoder":
        self._parts.append(len(values).to_bytes(4, "big"))
        for value in values:
            write(self, value)
        return self

    def finish(self) -> bytes:
        return b"".join(self._parts)


class Decoder:
    """Reads what ``Encoder`` wrote. Anything else, a trailing byte included, is ``Corrupted``."""

    def __init__(self, data: bytes, tag: str) -> None:
        self._data = data
        self._at = 0
        found = self.blob()
        if found != tag.encode("ascii"):
            raise Corrupted("codec_tag", f"expected {tag!r}, found {found[:40]!r}", field="tag")

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise Corrupted("codec_truncated", f"needs {end} bytes, has {len(self._data)}")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def u64(self) -> int:
        return int.from_bytes(self._take(8), "big")

    def i64(self) -> int:
        return int.from_bytes(self._take(8), "big", signed=True)

    def id32(self) -> bytes:
        return self._take(32)

    def address(self) -> bytes:
        return self._take(20)

    def blob(self) -> bytes:
        return self._take(int.from_bytes(self._take(4), "big"))

    def text(self) -> str:
        try:
            return self.blob().decode("utf-8")
        except UnicodeDecodeError as error:
            raise Corrupted("codec_text", f"not UTF-8 at byte {self._at}: {error.reason}") from error

    def each(self, read: Callable[["Decoder"], T]) -> tuple[T, ...]:
        return tuple(read(self) for _ in range(int.from_bytes(self._take(4), "big")))

    def finish(self) -> None:
        if self._at != len(self._data):
            raise Corrupted("codec_trailing", f"{len(self._data) - self._at} bytes follow the last field")


def _prefixed(value: bytes) -> bytes:
    assert len(value) < 2**32
    return len(value).to_bytes(4, "big") + value
