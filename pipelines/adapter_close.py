"""One adapter's close: its gradient sum published, and turned into credits by the replay or by the cheap
method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from attribution.errors import Corrupted, Rejected
from attribution.index import Index
from attribution.influence import integer_credits
from attribution.payout import AdapterClose, share_out
from attribution.sketch import make_sketch
from attribution.types import PPM, Credit, Manifest
from cluster.indexes import indexed_records
from cluster.models import base_model, load_tokenizer
from cluster.storage import Storage, put_content
from pipelines.answer_sums import encode_sum, total_sum
from pipelines.course import ChatAsker
from pipelines.job import Ground
from pipelines.method import Means
from pipelines.readiness import Ready
from pipelines.replayed import OpenWorkers, Replayable, Replayed, replay_method, replayed

ReplaySum = Callable[[Ready, Tensor], Replayed]
"""Credits of an adapter's sum by replay of its training; refuses where it cannot be replayed."""


def close_adapter(storage: Storage, ready: Ready, replay_sum: ReplaySum) -> AdapterClose:
    """Publish the sum and turn it into credits."""
    closable = ready.closable
    total = total_sum(storage, closable.chunks, ready.index.loras)
    published = put_content(storage, "gradient_sums", encode_sum(total))
    credited = _credited(ready, total, replay_sum)
    return AdapterClose(
        adapter_id=closable.outstanding.adapter_id,
        owner_id=closable.owner_id,
        fee_gwei=closable.outstanding.fee_gwei,
        method=f"{credited.method} index={closable.index_id.hex()} bits={closable.bits}; "
        f"{credited.reason}{closable.label}",
        gradient_sum_sha256=bytes.fromhex(published),
        credits=credited.credits,
        controls=credited.controls,
    )


@dataclass(frozen=True, slots=True)
class _Credited:
    """Credits sorted by group id, controls sorted, and how they came about."""

    method: str
    reason: str
    credits: tuple[Credit, ...]
    controls: tuple[int, ...]


def _credited(ready: Ready, total: Tensor, replay_sum: ReplaySum) -> _Credited:
    """By replay if that was chosen and it holds. Otherwise by the cheap method, and the statement says why: a
    training that does not come out as it is on record, or a replay in which no contributor stands above the
    controls. Records long learnt have next to no derivative at weight 1, a control has all of it at weight 0:
    over the demo's 120 records, right answers to 30 gave no contributor a share."""
    reason = ready.choice.reason
    if ready.choice.means is Means.REPLAY:
        try:
            found = replay_sum(ready, total)
        except (Rejected, Corrupted) as refusal:
            print(f"no replay: {refusal.code}: {refusal.message}", flush=True)
            reason = f"no replay: {refusal.code}"
        else:
            method = replay_method(ready.closable.trajectory, found)
            replayed_ = _Credited(method, reason, *replayed_credits(ready.manifests, found))
            if _tells_anything(replayed_):
                return replayed_
            reason = f"no replay: nothing_above_noise in {found.seconds} s"
    credits_ = credits_of(ready.index, ready.manifests, total)
    return _Credited(ready.index.card.method, reason, *credits_)


def _tells_anything(credited: _Credited) -> bool:
    """Whether somebody would be paid by these credits, or nobody could be."""
    shares, _ = share_out(credited.credits, credited.controls, PPM)
    return bool(shares) or not any(credit.value for credit in credited.credits)


def replayed_credits(
    manifests: Sequence[Manifest], found: Replayed
) -> tuple[tuple[Credit, ...], tuple[int, ...]]:
    """As ``credits_of``, of what a replay found."""
    groups = sorted((e.group for one in manifests for e in one.entries), key=lambda group: group.group_id)
    credits_ = (Credit(g.group_id, g.contributor_id, found.trained[g.group_id]) for g in groups)
    return tuple(credits_), tuple(sorted(found.controls.values()))


def credits_of(
    index: Index, manifests: Sequence[Manifest], total: Tensor
) -> tuple[tuple[Credit, ...], tuple[int, ...]]:
    """Signed credits of all trained groups, sorted by id, and of all controls, sorted: integers from a
    published sum and a published index, so anybody gets the same."""
    sketch = make_sketch(len(total), index.card.sketch_size, index.card.sketch_seed)
    values = integer_credits(sketch, total, index.features)
    records = indexed_records(index, manifests)
    credits_ = [
        Credit(record.record_id, record.contributor_id, value)
        for record, value in zip(records, values, strict=False)
    ]
    controls = values[len(records) :]
    return tuple(sorted(credits_, key=lambda credit: credit.group_id)), tuple(sorted(controls))


def replay_adapter(ground: Ground, ready: Ready, total: Tensor, open_workers: OpenWorkers) -> Replayed:
    """Credits of one adapter's sum by replay of its training."""
    what = Replayable(ready.closable.trajectory, ready.index.card.snapshots, ready.manifests)
    asker = ChatAsker(load_tokenizer(base_model(ground.settings).path))
    return replayed(ground.storage, ground.storage, what, asker, total, open_workers)
