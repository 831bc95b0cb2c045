"""The influence audit: a period's published gradient sum turned into credits again, by the method that its
statement names, and compared with those that were paid by.

Needs the model and, from a storage, ``gradient_sums/``, ``indexes/``, ``manifests/`` and ``trajectories/``.
What the operator keeps of its own replays is not looked at; the auditor's go to a storage of their own, so
that a long audit may be interrupted. No Ray."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from attribution.errors import Corrupted, Rejected
from attribution.payout import AdapterClose
from attribution.types import Credit
from cluster.indexes import stored_index, stored_manifest
from cluster.storage import Storage, get_content
from pipelines.adapter_close import credits_of, replayed_credits
from pipelines.answer_sums import decode_sum
from pipelines.packing import Asker
from pipelines.replayed import NAME, ROUNDING_PPM, OpenWorkers, Replayable, replayed
from pipelines.trajectory import done_adapter

_INDEX = re.compile(r" index=([0-9a-f]{64}) ")
_REPLAY = re.compile(rf"{re.escape(NAME)} (trajectories/[0-9a-f]{{64}}) ")


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Credits by group id and controls, both sorted, and by how much they may differ from those paid by."""

    credits: tuple[Credit, ...]
    controls: tuple[int, ...]
    bound: int


@dataclass(frozen=True, slots=True)
class Difference:
    """``subject`` was paid by ``found``; it should have been ``expected``."""

    subject: str
    expected: str
    found: str


def recompute(
    storage: Storage, results: Storage, close: AdapterClose, asker: Asker, open_workers: OpenWorkers
) -> Recomputed:
    """
    Raises:
        Rejected: something that the statement names is not in storage; ``method_unknown``.
        Corrupted: it is there and is not what it is named, or the training does not come out again.
    """
    named = _INDEX.search(close.method)
    if named is None:
        raise Rejected("method_unknown", f"adapter {close.adapter_id.hex()}: paid by {close.method!r}")
    index = stored_index(storage, bytes.fromhex(named[1]))
    _same(close, index.card.adapter_id, "index", named[1])
    manifests = tuple(stored_manifest(storage, bytes.fromhex(one)) for one in index.card.manifest_ids)
    total = decode_sum(get_content(storage, "gradient_sums", close.gradient_sum_sha256.hex()))
    replay = _REPLAY.match(close.method)
    if replay is None:
        return Recomputed(*credits_of(index, manifests, total), bound=0)
    ended = done_adapter(storage, replay[1])
    _same(close, ended.hex() if ended else "nothing", "trajectory", replay[1])
    what = Replayable(replay[1], index.card.snapshots, manifests)
    found = replayed(storage, results, what, asker, total, open_workers)
    largest = max((abs(value) for value in found.trained.values()), default=0)
    return Recomputed(*replayed_credits(manifests, found), bound=largest * ROUNDING_PPM // 1_000_000)


def _same(close: AdapterClose, adapter_id: str, what: str, name: str) -> None:
    if adapter_id != close.adapter_id.hex():
        raise Corrupted(
            f"{what}_adapter", f"{what} {name} is of {adapter_id}, paid is {close.adapter_id.hex()}"
        )


def differences(close: AdapterClose, again: Recomputed) -> Iterator[Difference]:
    """Groups and controls whose credits are further apart than the bound, or not the same groups."""
    paid = {credit.group_id: credit.value for credit in close.credits}
    due = {credit.group_id: credit.value for credit in again.credits}
    for group_id in sorted(paid.keys() | due.keys()):
        if not _is_close(due.get(group_id), paid.get(group_id), again.bound):
            yield _difference(f"group {group_id.hex()}", due.get(group_id), paid.get(group_id), again.bound)
    if len(close.controls) != len(again.controls):
        yield Difference("controls", f"{len(again.controls)} of them", f"{len(close.controls)}")
        return
    for place, (value, found) in enumerate(zip(again.controls, close.controls, strict=True)):
        if not _is_close(value, found, again.bound):
            yield _difference(f"control {place} by size", value, found, again.bound)


def _is_close(expected: int | None, found: int | None, bound: int) -> bool:
    return expected is not None and found is not None and abs(expected - found) <= bound


def _difference(subject: str, expected: int | None, found: int | None, bound: int) -> Difference:
    within = f" within {bound}" if bound else ""
    return Difference(subject, f"{expected}{within}", str(found))
