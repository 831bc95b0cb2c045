"""Hypothesis strategies for the vocabulary: small values of every kind, valid by construction."""

from dataclasses import replace

from hypothesis import strategies as st

from attribution.payload import PeriodPayload, add_payouts
from attribution.payout import AdapterClose, Beneficiaries, Split, largest_remainder, pay
from attribution.types import (
    MAX_BLEND_PARTS,
    PPM,
    Batch,
    Blend,
    BlendPart,
    Capture,
    Credit,
    Group,
    Manifest,
    ManifestEntry,
    Receipt,
    Record,
    Share,
)

ids = st.binary(min_size=32, max_size=32)
addresses = st.binary(min_size=20, max_size=20)
u32 = st.integers(0, 2**32 - 1)
gwei = st.integers(0, 2**60)
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
records = st.builds(Record, text, ids, text, text, text, text, text, text)
receipts = st.builds(
    Receipt, ids, addresses, st.integers(1, 2**40), ids, ids, u32, u32, st.integers(0, 2**40), ids, u32
)
credits = st.builds(
    Credit, ids, st.sampled_from([bytes([i]) * 32 for i in range(1, 6)]), st.integers(-(2**50), 2**50)
)
beneficiaries = st.builds(Beneficiaries, ids, ids, st.just(bytes(32)) | ids, st.just(bytes(32)) | ids, ids)


@st.composite
def blends(draw: st.DrawFn) -> Blend:
    parts = draw(st.lists(ids.filter(any), min_size=2, max_size=MAX_BLEND_PARTS, unique=True))
    extra = largest_remainder([1 + draw(st.integers(0, 9)) for _ in parts], PPM - len(parts))
    return Blend(tuple(BlendPart(one, 1 + ppm) for one, ppm in zip(sorted(parts), extra, strict=True)))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    found = draw(st.lists(receipts, min_size=1, max_size=12, unique_by=lambda r: r.receipt_id))
    blended = draw(st.lists(blends(), max_size=len(found), unique_by=lambda b: b.blend_id))
    for index, blend in enumerate(blended):
        found[index] = replace(found[index], adapter_id=blend.blend_id)
    payers = sorted({r.payer for r in found})
    return Batch(
        draw(st.integers(1, 2**40)),
        tuple(sorted(found, key=lambda r: r.receipt_id)),
        tuple(Capture(payer, draw(gwei)) for payer in payers),
        tuple(sorted(blended, key=lambda b: b.blend_id)),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    found = draw(st.lists(records, max_size=5, unique_by=lambda r: r.record_id))
    kept = sorted(found, key=lambda r: r.record_id)
    entries = tuple(
        ManifestEntry(Group(r.record_id, r.contributor_id, tuple(sorted({r.record_id, draw(ids)}))), r)
        for r in kept
    )
    controls = tuple(draw(st.lists(records, max_size=2)))
    return Manifest("d", "MIT", entries, controls, ("{subject}?",), ("so: {subject}",))


@st.composite
def splits(draw: st.DrawFn) -> Split:
    weights = draw(st.lists(st.integers(0, 100), min_size=6, max_size=6).filter(any))
    return Split(*largest_remainder(weights, PPM))


@st.composite
def closes(draw: st.DrawFn) -> AdapterClose:
    found = draw(st.lists(credits, max_size=8, unique_by=lambda c: c.group_id))
    controls = tuple(sorted(draw(st.lists(st.integers(-(2**40), 2**40), max_size=5))))
    ordered = tuple(sorted(found, key=lambda c: c.group_id))
    return AdapterClose(draw(ids), draw(ids), draw(gwei), draw(text), draw(ids), ordered, controls)


@st.composite
def periods(draw: st.DrawFn) -> PeriodPayload:
    split, who = draw(splits()), draw(beneficiaries)
    adapters = draw(st.lists(closes(), max_size=3, unique_by=lambda c: c.adapter_id))
    adapters.sort(key=lambda close: close.adapter_id)
    earlier = [Share(bytes([7]) * 32, draw(st.integers(0, 2**40)))]
    carried = sorted(dict(draw(st.lists(st.tuples(ids, gwei), max_size=2))).items())
    rewards = add_payouts(earlier, [pay(close, split, who) for close in adapters])
    head, distributor = draw(ids), draw(addresses)
    return PeriodPayload(
        3, 5, 9, head, 31337, distributor, split, who, tuple(adapters), tuple(carried), rewards
    )
