"""The bytes that go to the DA layer, and the header chain that binds them on chain.

A batch payload is columnar: ``OLB2``, then zlib of: ``u64`` batch id, ``u32`` counts of payers, models,
blends and receipts; payers sorted (20 bytes, ``u64`` cumulative capture in gwei); models sorted (32 bytes
base id, 32 bytes adapter or blend id); the blends that models name, sorted by id (``u32`` length, canonical
bytes, of which the id is the SHA-256); then one column after the other over the receipts sorted by receipt
id: request id (32), payer index (``u32``), payer seq (``u64``), model index (``u32``), prompt and completion
tokens (``u32`` each), fee gwei (``u64``), commitment (32), hour (``u32``). Integers are big-endian. No column
holds text of a user.

A period payload is ``OLP1``, then zlib of the canonical bytes (attribution/codec.py) of ``PeriodPayload``.
Decoders refuse what an encoder would not have written, so a payload has one reading; ``payload_hash`` is
keccak-256 of the payload as posted.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from attribution.codec import Decoder, Encoder
from attribution.errors import Corrupted
from attribution.hashing import keccak256
from attribution.merkle import MerkleTree, merkle_tree, receipt_leaf, reward_leaf
from attribution.payout import AdapterClose, Beneficiaries, Payouts, Split, pay
from attribution.types import Batch, Blend, Capture, Credit, Receipt, Share

WEI_PER_GWEI = 10**9
MAX_DECODED_BYTES = 256 * 2**20  # a payload of DA size (16 MiB) that unpacks to more is an attack

_BATCH_MAGIC = b"OLB2"
_PERIOD_MAGIC = b"OLP1"


def batch_tree(batch: Batch) -> MerkleTree:
    """Tree over the receipts' ids; its root is the batch's ``root``."""
    return merkle_tree([receipt_leaf(receipt.receipt_id) for receipt in batch.receipts])


def next_head(
    head: bytes,
    batch_id: int,
    root: bytes,
    payload_hash: bytes,
    num_receipts: int,
    fee_gwei: int,
    da_commitment: bytes,
) -> bytes:
    """The ledger contract's hash chain: keccak of ``abi.encode`` of these, the fee in wei, the commitment
    hashed.
    """
    words = (
        head,
        _word(batch_id),
        root,
        payload_hash,
        _word(num_receipts),
        _word(fee_gwei * WEI_PER_GWEI),
        keccak256(da_commitment),
    )
    return keccak256(b"".join(words))


def encode_batch(batch: Batch) -> bytes:
    """Receipts and blends must be sorted by id and captures by payer, one for every payer of the batch."""
    receipts = batch.receipts
    payers = [capture.payer for capture in batch.captures]
    models = sorted({(receipt.base_id, receipt.adapter_id) for receipt in receipts})
    payer_index = {payer: i for i, payer in enumerate(payers)}
    model_index = {model: i for i, model in enumerate(models)}
    columns = [
        b"".join(r.request_id for r in receipts),
        _ints(4, [payer_index[r.payer] for r in receipts]),
        _ints(8, [r.payer_seq for r in receipts]),
        _ints(4, [model_index[r.base_id, r.adapter_id] for r in receipts]),
        _ints(4, [r.prompt_tokens for r in receipts]),
        _ints(4, [r.completion_tokens for r in receipts]),
        _ints(8, [r.fee_gwei for r in receipts]),
        b"".join(r.commitment for r in receipts),
        _ints(4, [r.hour for r in receipts]),
    ]
    counts = [len(payers), len(models), len(batch.blends), len(receipts)]
    dictionaries = [
        *(c.payer + _ints(8, [c.cumulative_gwei]) for c in batch.captures),
        *(base + adapter for base, adapter in models),
        *(_ints(4, [len(canonical)]) + canonical for canonical in (b.canonical() for b in batch.blends)),
    ]
    body = b"".join([_ints(8, [batch.batch_id]), _ints(4, counts), *dictionaries, *columns])
    return _BATCH_MAGIC + zlib.compress(body, 9)


def decode_batch(payload: bytes) -> Batch:
    """The inverse. ``Corrupted`` if the payload is not what ``encode_batch`` writes."""
    read = _Columns(_unzip(payload, _BATCH_MAGIC))
    (batch_id,) = read.ints(8, 1)
    num_payers, num_models, num_blends, n = read.ints(4, 4)
    captures = tuple(Capture(read.take(20), read.ints(8, 1)[0]) for _ in range(num_payers))
    models = [(read.take(32), read.take(32)) for _ in range(num_models)]
    blends = tuple(Blend.from_canonical(read.take(read.ints(4, 1)[0])) for _ in range(num_blends))
    request_ids = read.chunks(32, n)
    payers, seqs, model_of = read.ints(4, n), read.ints(8, n), read.ints(4, n)
    prompts, completions, fees = read.ints(4, n), read.ints(4, n), read.ints(8, n)
    commitments, hours = read.chunks(32, n), read.ints(4, n)
    read.finish()
    if max(payers, default=0) >= max(num_payers, 1) or max(model_of, default=0) >= max(num_models, 1):
        raise Corrupted("batch_index", f"an index points past {num_payers} payers or {num_models} models")
    receipts = tuple(
        Receipt(
            request_ids[i],
            captures[payers[i]].payer,
            seqs[i],
            *models[model_of[i]],
            prompts[i],
            completions[i],
            fees[i],
            commitments[i],
            hours[i],
        )
        for i in range(n)
    )
    batch = Batch(batch_id, receipts, captures, blends)
    _check_order([r.receipt_id for r in receipts], "receipts")
    _check_order([c.payer for c in captures], "captures")
    _check_order(models, "models")
    _check_order([blend.blend_id for blend in blends], "blends")
    is_used = len(set(model_of)) == num_models and {b.blend_id for b in blends} <= {a for _, a in models}
    if {r.payer for r in receipts} != {c.payer for c in captures} or not is_used:
        raise Corrupted("batch_dictionary", "a payer, model or blend is listed and not used")
    return batch


@dataclass(frozen=True, slots=True)
class PeriodPayload:
    """Everything from which a period's payouts and reward root follow.

    ``adapters`` are paid in this period, all that they had outstanding; ``carried`` (adapter id, gwei) were
    not ready and wait. ``rewards`` are what every beneficiary has earned since genesis, this period included.
    All are sorted by id.
    """

    period_id: int
    first_batch: int
    last_batch: int
    ledger_head: bytes
    chain_id: int
    distributor: bytes
    split: Split
    beneficiaries: Beneficiaries
    adapters: tuple[AdapterClose, ...]
    carried: tuple[tuple[bytes, int], ...]
    rewards: tuple[Share, ...]

    def payouts(self) -> tuple[Payouts, ...]:
        return tuple(pay(close, self.split, self.beneficiaries) for close in self.adapters)

    def tree(self) -> MerkleTree:
        return merkle_tree([self.leaf(reward) for reward in self.rewards])

    def leaf(self, reward: Share) -> bytes:
        wei = reward.amount_gwei * WEI_PER_GWEI
        return reward_leaf(self.chain_id, self.distributor, reward.contributor_id, wei)

    @property
    def total_gwei(self) -> int:
        """All that is owed since genesis: the contract refuses a period whose total is not funded."""
        return sum(reward.amount_gwei for reward in self.rewards)


def add_payouts(earlier: Sequence[Share], payouts: Sequence[Payouts]) -> tuple[Share, ...]:
    """Rewards after a period: what each had earned before, and its lines of this one; sorted by id."""
    total = {share.contributor_id: share.amount_gwei for share in earlier}
    for payout in payouts:
        for line in payout.lines:
            total[line.contributor_id] = total.get(line.contributor_id, 0) + line.amount_gwei
    return tuple(Share(contributor, total[contributor]) for contributor in sorted(total))


def encode_period(period: PeriodPayload) -> bytes:
    s, who = period.split, period.beneficiaries
    e = Encoder("openledger/period/1")
    e.u64(period.period_id).u64(period.first_batch).u64(period.last_batch).id32(period.ledger_head)
    e.u64(period.chain_id).address(period.distributor)
    e.u64(s.platform_ppm).u64(s.owner_ppm).u64(s.host_ppm)
    e.u64(s.stakers_ppm).u64(s.contributors_ppm).u64(s.retrieval_ppm)
    e.id32(who.platform).id32(who.host).id32(who.stakers).id32(who.retrieval).id32(who.pool)
    e.each(period.adapters, _write_close)
    e.each(period.carried, lambda enc, item: enc.id32(item[0]).u64(item[1]))
    e.each(period.rewards, lambda enc, share: enc.id32(share.contributor_id).u64(share.amount_gwei))
    return _PERIOD_MAGIC + zlib.compress(e.finish(), 9)


def decode_period(payload: bytes) -> PeriodPayload:
    """The inverse of ``encode_period``; ``Corrupted`` on anything else."""
    d = Decoder(_unzip(payload, _PERIOD_MAGIC), "openledger/period/1")
    period = PeriodPayload(
        d.u64(),
        d.u64(),
        d.u64(),
        d.id32(),
        d.u64(),
        d.address(),
        Split(d.u64(), d.u64(), d.u64(), d.u64(), d.u64(), d.u64()),
        Beneficiaries(d.id32(), d.id32(), d.id32(), d.id32(), d.id32()),
        d.each(_read_close),
        d.each(lambda dec: (dec.id32(), dec.u64())),
        d.each(lambda dec: Share(dec.id32(), dec.u64())),
    )
    d.finish()
    _check_order([close.adapter_id for close in period.adapters], "adapters")
    _check_order([adapter for adapter, _ in period.carried], "carried")
    _check_order([share.contributor_id for share in period.rewards], "rewards")
    return period


def _write_close(e: Encoder, close: AdapterClose) -> None:
    e.id32(close.adapter_id).id32(close.owner_id).u64(close.fee_gwei).text(close.method)
    e.id32(close.gradient_sum_sha256)
    e.each(close.credits, lambda enc, c: enc.id32(c.group_id).id32(c.contributor_id).i64(c.value))
    e.each(close.controls, Encoder.i64)


def _read_close(d: Decoder) -> AdapterClose:
    return AdapterClose(
        d.id32(),
        d.id32(),
        d.u64(),
        d.text(),
        d.id32(),
        d.each(lambda dec: Credit(dec.id32(), dec.id32(), dec.i64())),
        d.each(Decoder.i64),
    )


def _unzip(payload: bytes, magic: bytes) -> bytes:
    if payload[:4] != magic:
        raise Corrupted("payload_magic", f"expected {magic!r}, found {payload[:4]!r}", field="payload")
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(payload[4:], MAX_DECODED_BYTES)
    except zlib.error as error:
        raise Corrupted("payload_zlib", f"does not unpack: {error}", field="payload") from error
    if not inflate.eof or inflate.unused_data:
        raise Corrupted("payload_zlib", "is cut short, too large or followed by other bytes", field="payload")
    return body


def _check_order(ids: Sequence[bytes] | Sequence[tuple[bytes, bytes]], what: str) -> None:
    for before, after in pairwise(ids):
        if before >= after:  # type: ignore[operator]  # both are of one kind
            raise Corrupted("payload_order", f"{what} are not sorted and distinct", field=what)


def _ints(size: int, values: Sequence[int]) -> bytes:
    return b"".join(value.to_bytes(size, "big") for value in values)


def _word(value: int) -> bytes:
    return value.to_bytes(32, "big")


class _Columns:
    """Reads fixed-width columns off a body and insists that nothing is left over."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, size: int) -> bytes:
        taken = self._body[self._at : self._at + size]
        if len(taken) != size:
            raise Corrupted("payload_truncated", f"needs {self._at + size} bytes, has {len(self._body)}")
        self._at += size
        return taken

    def chunks(self, size: int, count: int) -> list[bytes]:
        column = self.take(size * count)
        return [column[i * size : (i + 1) * size] for i in range(count)]

    def ints(self, size: int, count: int) -> list[int]:
        return [int.from_bytes(chunk, "big") for chunk in self.chunks(size, count)]

    def finish(self) -> None:
        if self._at != len(self._body):
            raise Corrupted("payload_trailing", f"{len(self._body) - self._at} bytes follow the last column")
