"""Payload bytes: decode inverts encode, damage is found, and roots do not depend on who arrived first."""

import random
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.errors import Corrupted, Rejected
from attribution.hashing import keccak256
from attribution.merkle import merkle_tree, receipt_leaf, verify
from attribution.payload import (
    PeriodPayload,
    batch_tree,
    decode_batch,
    decode_period,
    encode_batch,
    encode_period,
    next_head,
)
from attribution.payout import fee_shares
from attribution.types import PPM, Batch, Blend, BlendPart
from tests.attribution import values


@given(values.batches())
def test_decode_inverts_encode_for_batches(batch: Batch) -> None:
    assert decode_batch(encode_batch(batch)) == batch


@given(values.periods())
@settings(max_examples=50)
def test_decode_inverts_encode_for_periods(period: PeriodPayload) -> None:
    decoded = decode_period(encode_period(period))
    assert encode_period(decoded) == encode_period(period)
    assert decoded.tree().root == period.tree().root
    assert decoded.payouts() == period.payouts()


@given(values.batches(), st.data())
@settings(max_examples=50)
def test_a_changed_byte_is_never_silent(batch: Batch, data: st.DataObject) -> None:
    """Either the payload no longer decodes, or it decodes and its hash differs."""
    payload = bytearray(encode_batch(batch))
    original = keccak256(bytes(payload))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    assert keccak256(bytes(payload)) != original
    try:
        decode_batch(bytes(payload))
    except Corrupted as refusal:
        assert refusal.code.startswith(("payload", "batch"))


@given(values.batches())
def test_a_receipt_is_proven_and_another_is_not(batch: Batch) -> None:
    tree = batch_tree(batch)
    leaf = receipt_leaf(batch.receipts[0].receipt_id)
    proof = tree.proof(leaf)
    assert verify(tree.root, leaf, proof)
    assert not verify(tree.root, receipt_leaf(bytes(32)), proof)


@given(st.lists(values.ids, min_size=1, max_size=20, unique=True), st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_move_the_root(ids: list[bytes], rng: random.Random) -> None:
    assert merkle_tree(rng.sample(ids, len(ids))).root == merkle_tree(ids).root


@given(values.batches().filter(lambda batch: len(batch.receipts) > 1))
@settings(max_examples=20)
def test_receipts_in_another_order_are_refused(batch: Batch) -> None:
    swapped = replace(batch, receipts=batch.receipts[::-1])
    with pytest.raises(Corrupted, match="not sorted"):
        decode_batch(encode_batch(swapped))


@given(values.batches().filter(lambda batch: batch.blends))
@settings(max_examples=20)
def test_a_blend_that_no_receipt_names_is_refused(batch: Batch) -> None:
    unnamed = [replace(r, adapter_id=bytes(32)) for r in batch.receipts]
    receipts = tuple(sorted(unnamed, key=lambda r: r.receipt_id))
    with pytest.raises(Corrupted, match="listed and not used"):
        decode_batch(encode_batch(replace(batch, receipts=receipts)))


@given(values.batches())
def test_the_shares_of_a_fee_are_the_fee(batch: Batch) -> None:
    blends = {blend.blend_id: blend for blend in batch.blends}
    for receipt in batch.receipts:
        shares = fee_shares(receipt, blends)
        assert sum(gwei for _, gwei in shares) == receipt.fee_gwei
        blend = blends.get(receipt.adapter_id)
        for part in blend.parts if blend else ():
            gwei = dict(shares).get(part.adapter_id, 0)
            assert abs(gwei * PPM - receipt.fee_gwei * part.weight_ppm) < PPM


def test_a_blend_is_refused_where_its_words_have_two_meanings() -> None:
    one, other = BlendPart(b"\1" * 32, 400_000), BlendPart(b"\2" * 32, 600_000)
    assert Blend.from_canonical(Blend((one, other)).canonical()) == Blend((one, other))
    for parts, code in (
        ((one,), "blend_parts"),
        ((other, one), "blend_parts"),
        ((one, one), "blend_parts"),
        ((BlendPart(bytes(32), 400_000), other), "blend_parts"),
        ((one, replace(other, weight_ppm=600_001)), "blend_weights"),
        ((replace(one, weight_ppm=0), replace(other, weight_ppm=PPM)), "blend_weights"),
    ):
        with pytest.raises(Rejected) as refusal:
            Blend(parts)
        assert refusal.value.code == code


def test_a_payload_that_unpacks_to_gigabytes_is_refused() -> None:
    bomb = b"OLB2" + zlib.compress(bytes(300 * 2**20), 9)
    with pytest.raises(Corrupted, match="too large"):
        decode_batch(bomb)


@pytest.mark.parametrize(
    "payload", [b"", b"OLP1", b"OLB2" + zlib.compress(b"short"), b"OLB2" + zlib.compress(b"")]
)
def test_half_written_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(Corrupted):
        decode_batch(payload)


def test_the_head_binds_every_field() -> None:
    fields = (bytes(32), 1, b"\1" * 32, b"\2" * 32, 3, 4, b"commitment")
    others = (b"\3" * 32, 2, b"\4" * 32, b"\5" * 32, 4, 5, b"commitmenu")
    heads = {next_head(*fields)}
    for i, other in enumerate(others):
        heads.add(next_head(*fields[:i], other, *fields[i + 1 :]))  # type: ignore[arg-type]
    assert len(heads) == 8
