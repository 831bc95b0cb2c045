"""The job ``ingest``: revealed shards in; records, rejections, groups, conflicts and a sealed manifest out.

Ray only scales ``judge``: ``one_by_one`` gives the same rows in a loop. Grouping looks at every record that
the Datanet ever accepted, in the order of commitments, so a shard that was committed early and revealed late
takes its place; manifests that are sealed already do not change."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter

import ray
import ray.data
from ray.exceptions import RayTaskError

from attribution.errors import Corrupted, Refusal, Rejected
from attribution.groups import Committed, Grouping, group
from attribution.types import Manifest, Record, Rejection, Shard
from cluster.database import reading
from cluster.datanets import Rules
from cluster.shards import SHARDS, split_lines
from cluster.storage import Storage, get_content, put_content
from pipelines.ingest_rows import Intake, Known, Refused, load, store
from pipelines.job import Ground, Outcome, main
from pipelines.manifests import SealPolicy, seal
from pipelines.spec import Spec
from pipelines.validation import validate_shard

MANIFESTS = "manifests"  # storage prefix


class IngestSpec(Spec):
    datanet: str
    seal: SealPolicy = SealPolicy()


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one line of a shard, or on all of it. Every field is always set: blocks of any rows fit together."""

    kind: str  # accepted, rejected, quarantined
    committed_seq: int
    row: int = 0
    canonical: bytes = b""  # of the accepted record
    code: str = ""
    field: str = ""
    detail: str = ""


Scale = Callable[[Sequence[Shard], Storage, Rules], Iterable[Verdict]]


def judge(shard: Shard, storage: Storage, rules: Rules) -> Iterator[Verdict]:
    """A verdict per line; or one that says why the shard cannot be read as it was signed."""
    seq = shard.committed_seq
    try:
        data = get_content(storage, SHARDS, shard.content_sha256.hex())
        found = len(split_lines(data))
        if found != shard.num_rows:
            raise Corrupted("num_rows", f"signed for {shard.num_rows} rows, holds {found}")
    except (Corrupted, Rejected) as error:
        yield Verdict("quarantined", seq, code=error.code, detail=f"{error.code}: {error.message}")
        return
    for verdict in validate_shard(shard, data, rules):
        if isinstance(verdict, Rejection):
            yield Verdict("rejected", seq, verdict.row, b"", verdict.code, verdict.field, verdict.detail)
        else:
            yield Verdict("accepted", seq, verdict.row, verdict.record.canonical())


def one_by_one(shards: Sequence[Shard], storage: Storage, rules: Rules) -> Iterator[Verdict]:
    for shard in shards:
        yield from judge(shard, storage, rules)


def on_ray(shards: Sequence[Shard], storage: Storage, rules: Rules) -> Iterator[Verdict]:
    """Some shards per task. A task that fails is a bug or a lost machine: a bad shard is a verdict."""
    if not shards:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that "storage is away" is not mistaken for a bug
    if not ray.is_initialized():
        ray.init()
    tasks = min(len(shards), 2 * int(ray.cluster_resources()["CPU"]))
    numbers = ray.data.range(len(shards), override_num_blocks=tasks)
    rows = numbers.flat_map(lambda item: [asdict(one) for one in judge(shards[item["id"]], storage, rules)])
    try:
        for row in rows.iter_rows():
            yield Verdict(**row)
    except RayTaskError as error:
        if isinstance(error.cause, Refusal):
            raise error.cause from error
        raise


def settle(known: Known, verdicts: Iterable[Verdict]) -> Intake:
    """Old and new records together, each at the earliest place its contributor sent it; its later rows are
    refused."""
    accepted, refused, quarantined = list(known.accepted), [], {}
    for one in verdicts:
        if one.kind == "accepted":
            record = Record.from_canonical(one.canonical)
            accepted.append(Committed(record, record.record_id, one.committed_seq, one.row))
        elif one.kind == "rejected":
            refused.append(Refused(one.committed_seq, one.row, one.code, one.field, one.detail))
        else:
            quarantined[one.committed_seq] = one.detail
    first: dict[bytes, Committed] = {}
    for again in sorted(accepted, key=attrgetter("place")):
        earliest = first.setdefault(again.record_id, again)
        if earliest is not again:
            where = f"row {earliest.row} of shard {earliest.committed_seq}"
            refused.append(
                Refused(again.committed_seq, again.row, "duplicate_record", "", f"the same record as {where}")
            )
    return Intake(tuple(first.values()), tuple(refused), quarantined)


def ingest(ground: Ground, spec: IngestSpec, scale: Scale = on_ray) -> Outcome:
    """Judge every revealed shard, group the whole Datanet, seal what may be trained on."""
    with reading(ground.engine) as session:
        known = load(session, spec.datanet)
    verdicts = list(scale(known.waiting, ground.storage, known.datanet.rules))
    intake = settle(known, verdicts)
    grouping = group(intake.accepted)
    manifest = _sealed(known, intake, grouping, spec.seal)
    if manifest is not None:
        put_content(ground.storage, MANIFESTS, manifest.canonical())
    store(ground.engine, known, intake, grouping, spec.seal.control_ppm, manifest, int(time.time()))
    return _outcome(known, verdicts, intake, grouping, manifest)


def _sealed(known: Known, intake: Intake, grouping: Grouping, policy: SealPolicy) -> Manifest | None:
    records = {one.record_id: one.record for one in intake.accepted}
    try:
        return seal(known.datanet, grouping, records, policy, known.withdrawn)
    except Rejected as refusal:
        if refusal.code != "nothing_to_seal":
            raise
        return None  # all that came was refused: the rows say why


def _outcome(
    known: Known, verdicts: Sequence[Verdict], intake: Intake, grouping: Grouping, manifest: Manifest | None
) -> Outcome:
    """``rows`` and ``shards`` count this run, the rest the whole Datanet."""
    return {
        "rows_read": sum(one.kind != "quarantined" for one in verdicts),
        "rows_rejected": dict(sorted(Counter(one.code for one in intake.refused).items())),
        "shards_ingested": len(known.waiting) - len(intake.quarantined),
        "shards_quarantined": {str(seq): reason for seq, reason in sorted(intake.quarantined.items())},
        "records": len(intake.accepted),
        "groups": len(grouping.groups),
        "duplicates": len(intake.accepted) - len(grouping.groups),
        "conflicts": len(grouping.conflicts),
        "manifest_id": "" if manifest is None else manifest.manifest_id.hex(),
        "groups_trained_on": 0 if manifest is None else len(manifest.entries),
        "controls": 0 if manifest is None else len(manifest.controls),
    }


if __name__ == "__main__":
    from pipelines import ingest as by_name  # Ray cannot send to workers what is of __main__

    sys.exit(main("ingest", by_name.IngestSpec, by_name.ingest))
