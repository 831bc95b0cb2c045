"""What an ingest reads from the database and writes back; to repeat a write is harmless."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from attribution.errors import Unavailable
from attribution.groups import Committed, Grouping
from attribution.types import Manifest, Record, Shard
from cluster.database import insert_new, writing
from cluster.datanets import Datanet, load_datanet
from cluster.tables import DatanetRow, ManifestRow, RecordRow, RejectionRow, ShardRow
from pipelines.manifests import is_control

ROWS_AT_ONCE = 500  # a short transaction each, so that nobody who charges a request waits long


@dataclass(frozen=True, slots=True)
class Known:
    """A Datanet before the run."""

    datanet: Datanet
    waiting: tuple[Shard, ...]  # revealed; in the order of commitments
    ingested: frozenset[int]  # committed_seq of the shards that earlier runs took in
    accepted: tuple[Committed, ...]  # their records, each once
    withdrawn: frozenset[bytes]  # record ids: keep their place, are never sealed again


@dataclass(frozen=True, slots=True)
class Refused:
    committed_seq: int
    row: int
    code: str
    field: str
    detail: str


@dataclass(frozen=True, slots=True)
class Intake:
    """A Datanet with this run's shards."""

    accepted: tuple[Committed, ...]  # old and new, each record once
    refused: tuple[Refused, ...]
    quarantined: Mapping[int, str]  # reason by committed_seq


def load(session: Session, name: str) -> Known:
    shards = session.scalars(
        select(ShardRow)
        .where(ShardRow.datanet == name, ShardRow.state.in_(("revealed", "ingested")))
        .order_by(ShardRow.committed_seq)
    ).all()
    ingested = frozenset(row.committed_seq for row in shards if row.state == "ingested")
    records = [
        row
        for row in session.scalars(select(RecordRow).where(RecordRow.datanet == name))
        if row.shard_seq in ingested  # others are left over from a run that died
    ]
    return Known(
        load_datanet(session, name),
        tuple(_shard(row) for row in shards if row.state == "revealed"),
        ingested,
        tuple(
            Committed(
                Record.from_canonical(row.canonical), bytes.fromhex(row.record_id), row.shard_seq, row.row
            )
            for row in records
        ),
        frozenset(bytes.fromhex(row.record_id) for row in records if row.state == "withdrawn"),
    )


def store(
    engine: Engine,
    known: Known,
    intake: Intake,
    grouping: Grouping,
    control_ppm: int,
    manifest: Manifest | None,
    now: int,
) -> None:
    """Rows first, in small transactions; then, in one, what makes them count.

    Raises:
        Unavailable: another run took shards of this Datanet in meanwhile; nothing counts, start again.
    """
    wanted = list(_records(known.datanet.name, intake.accepted, grouping, control_ppm))
    refused = [
        {
            "shard_seq": one.committed_seq,
            "row": one.row,
            "code": one.code,
            "field": one.field,
            "detail": one.detail,
        }
        for one in intake.refused
    ]
    for table, rows in ((RecordRow, wanted), (RejectionRow, refused)):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            with writing(engine) as session:
                insert_new(session, table, *rows[start : start + ROWS_AT_ONCE])
    with writing(engine) as session:
        _check_nobody_was_quicker(session, known)
        _update_records(session, known.datanet.name, wanted)
        for shard in known.waiting:
            reason = intake.quarantined.get(shard.committed_seq)
            session.execute(
                update(ShardRow)
                .where(ShardRow.committed_seq == shard.committed_seq, ShardRow.state == "revealed")
                .values(state="ingested" if reason is None else "quarantined", reason=reason or "")
            )
        if manifest is not None:
            insert_new(
                session,
                ManifestRow,
                {
                    "manifest_id": manifest.manifest_id.hex(),
                    "datanet": manifest.datanet,
                    "num_groups": len(manifest.entries),
                    "created_at": now,
                },
            )


def _records(
    datanet: str, accepted: Sequence[Committed], grouping: Grouping, control_ppm: int
) -> Iterator[dict[str, Any]]:
    group_of = {member: found.group_id for found in grouping.groups for member in found.members}
    disputed = {conflict.record_id for conflict in grouping.conflicts}
    for one in accepted:
        if group_of[one.record_id] != one.record_id:
            state = "duplicate"
        elif one.record_id in disputed:
            state = "conflict"
        else:
            state = "control" if is_control(one.record_id, control_ppm) else "kept"
        yield {
            "record_id": one.record_id.hex(),
            "datanet": datanet,
            "shard_seq": one.committed_seq,
            "row": one.row,
            "contributor_id": one.record.contributor_id.hex(),
            "group_id": group_of[one.record_id].hex(),
            "state": state,
            "canonical": one.record.canonical(),
        }


def _check_nobody_was_quicker(session: Session, known: Known) -> None:
    name = known.datanet.name
    session.execute(select(DatanetRow.name).where(DatanetRow.name == name).with_for_update())
    ingested = session.scalars(
        select(ShardRow.committed_seq).where(ShardRow.datanet == name, ShardRow.state == "ingested")
    )
    if frozenset(ingested) != known.ingested:
        raise Unavailable("ingest_race", f"another run took shards of {name} in since this one began")


def _update_records(session: Session, datanet: str, wanted: Sequence[dict[str, Any]]) -> None:
    """A shard that was committed early and comes late may move the records of others."""
    columns = ("shard_seq", "row", "group_id", "state")
    found = {
        row.record_id: (row.shard_seq, row.row, row.group_id, row.state)
        for row in session.execute(
            select(
                RecordRow.record_id, RecordRow.shard_seq, RecordRow.row, RecordRow.group_id, RecordRow.state
            ).where(RecordRow.datanet == datanet)
        )
    }
    for row in wanted:
        known = found[row["record_id"]]
        values = {name: row[name] for name in columns}
        if known[-1] == "withdrawn":
            values["state"] = "withdrawn"
        if known != tuple(values.values()):
            session.execute(update(RecordRow).where(RecordRow.record_id == row["record_id"]).values(**values))


def _shard(row: ShardRow) -> Shard:
    assert row.content_sha256 is not None and row.num_rows is not None, row.committed_seq
    return Shard(
        row.datanet,
        bytes.fromhex(row.contributor_id),
        bytes.fromhex(row.commitment),
        bytes.fromhex(row.content_sha256),
        row.num_rows,
        row.committed_seq,
    )
