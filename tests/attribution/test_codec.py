"""Canonical bytes have one reading."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.codec import Decoder, Encoder
from attribution.errors import Corrupted
from attribution.types import Manifest, Receipt, Record
from tests.attribution import values


@given(values.receipts)
def test_decode_inverts_encode_for_receipts(receipt: Receipt) -> None:
    assert Receipt.from_canonical(receipt.canonical()) == receipt


@given(values.records)
def test_record_bytes_are_stable_under_decoding(record: Record) -> None:
    """Text is normalised to NFC on encoding, so one more round changes nothing, the id included."""
    decoded = Record.from_canonical(record.canonical())
    assert decoded.canonical() == record.canonical()
    assert decoded.record_id == record.record_id


@given(values.manifests())
def test_decode_inverts_encode_for_manifests(manifest: Manifest) -> None:
    assert Manifest.from_canonical(manifest.canonical()).manifest_id == manifest.manifest_id


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1), st.binary()), max_size=4)
)
def test_every_kind_of_field_comes_back(rows: list[tuple[int, int, bytes]]) -> None:
    data = Encoder("t/1").each(rows, lambda e, row: e.u64(row[0]).i64(row[1]).blob(row[2])).finish()
    d = Decoder(data, "t/1")
    assert list(d.each(lambda dec: (dec.u64(), dec.i64(), dec.blob()))) == rows
    d.finish()


@given(values.receipts, st.data())
def test_a_cut_or_longer_receipt_is_corrupted(receipt: Receipt, data: st.DataObject) -> None:
    canonical = receipt.canonical()
    cut = data.draw(st.integers(0, len(canonical) - 1))
    with pytest.raises(Corrupted):
        Receipt.from_canonical(canonical[:cut])
    with pytest.raises(Corrupted, match="follow the last field"):
        Receipt.from_canonical(canonical + b"\0")


def test_a_value_is_not_read_as_another_type() -> None:
    with pytest.raises(Corrupted) as refusal:
        Decoder(Encoder("openledger/shard/1").finish(), "openledger/record/1")
    assert refusal.value.code == "codec_tag"


def test_adjacent_texts_cannot_trade_letters() -> None:
    """Length prefixes: ("ab", "c") and ("a", "bc") are different bytes."""
    assert Encoder("t/1").text("ab").text("c").finish() != Encoder("t/1").text("a").text("bc").finish()


def test_text_that_looks_the_same_is_the_same() -> None:
    assert Encoder("t/1").text("\u00e9").finish() == Encoder("t/1").text("e\u0301").finish()
