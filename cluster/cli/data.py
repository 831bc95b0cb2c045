"""``openledger datanet``: open one, contribute to it, turn what was contributed into a sealed manifest."""

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from sqlalchemy import Engine, func, select

from attribution.errors import Rejected
from attribution.types import contributor_id
from cluster import contributions, signatures
from cluster.cli import laptop
from cluster.cli.screen import console, table
from cluster.config import Settings
from cluster.database import connect, reading, writing
from cluster.datanets import Datanet, open_datanet
from cluster.storage import open_storage
from cluster.tables import DatanetRow, ManifestRow, RecordRow, ShardRow
from pipelines.sources import computing_terms, python_lint
from pipelines.sources.drafts import ShardDraft

SOURCES = ("python-lint", "computing-terms")


def list_datanets(settings: Settings) -> None:
    engine = connect(settings.database_url)
    with reading(engine) as session:
        shards = dict(
            session.execute(select(ShardRow.datanet, func.count()).group_by(ShardRow.datanet)).tuples().all()
        )
        kept = (
            select(RecordRow.datanet, func.count())
            .where(RecordRow.state == "kept")
            .group_by(RecordRow.datanet)
        )
        records = dict(session.execute(kept).tuples().all())
        rows = [
            (row.name, row.title, row.licence, shards.get(row.name, 0), records.get(row.name, 0))
            for row in session.scalars(select(DatanetRow).order_by(DatanetRow.name))
        ]
    table("Datanets", ["name", "title", "licence", "shards", "records kept"], rows)


def fill(settings: Settings, source: str) -> None:
    datanet, drafts = from_source(settings, source)
    num_new = contribute(settings, connect(settings.database_url), datanet, drafts)
    console.print(
        f"{datanet.name}: {len(drafts)} shards of {len(drafts)} contributors, {num_new} of them new"
    )


def contribute_file(settings: Settings, datanet: str, file: Path, wallet: str) -> None:
    owner = laptop.own_wallet(settings, wallet)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise Rejected("unreadable_file", f"{file}: {error.strerror}", field="file") from error
    seq = contribute_shard(
        settings, connect(settings.database_url), datanet, wallet, owner.address, owner.key, data
    )
    console.print(f"{datanet}: shard {seq}, committed, revealed and signed by 0x{owner.address.hex()}")


def from_source(settings: Settings, source: str) -> tuple[Datanet, Sequence[ShardDraft]]:
    if source == python_lint.DATANET.name:
        return python_lint.DATANET, python_lint.drafts()
    if source == computing_terms.DATANET.name:
        return computing_terms.DATANET, computing_terms.drafts(settings.home / "packages")
    raise Rejected("unknown_source", f"{source!r} is none of {', '.join(SOURCES)}", field="source")


def contribute(
    settings: Settings,
    engine: Engine,
    datanet: Datanet,
    drafts: Sequence[ShardDraft],
    on_shard: Callable[[], None] = lambda: None,
) -> int:
    """Open the Datanet and contribute every draft under its demo key; returns how many were not there yet."""
    with writing(engine) as session:
        owner = laptop.own_wallet(settings, "platform").address
        open_datanet(session, datanet, contributions.register_contributor(session, owner, "platform"))
    num_new = 0
    for draft in drafts:
        try:
            contribute_shard(
                settings, engine, datanet.name, draft.contributor, draft.wallet, draft.demo_key, draft.data
            )
            num_new += 1
        except Rejected as refusal:
            if refusal.code != "duplicate_shard":
                raise
        on_shard()
    return num_new


def contribute_shard(
    settings: Settings, engine: Engine, datanet: str, label: str, wallet: bytes, key: bytes, data: bytes
) -> int:
    """Salted commitment first, signed bytes after. Returns the commitment's place in the order."""
    now = int(time.time())
    domain = signatures.datanets_domain(settings.chain.chain_id)
    salt = secrets.token_bytes(32)
    with writing(engine) as session:
        contributor = contributions.register_contributor(session, wallet, label)
        claim = contributions.claim_of(data, datanet, contributor, salt)
        contributions.refuse_duplicate(session, claim)
        contributions.commit(session, datanet, contributor, claim.commitment, now)
    signature = signatures.sign(key, signatures.digest(claim, domain))
    storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
    sent = contributions.Reveal(claim, salt, signature)
    return contributions.reveal(engine, storage, sent, data, domain, now).committed_seq


def finetune_spec(settings: Settings, datanet: str, name: str) -> str:
    """YAML for ``pipelines.finetune`` on the Datanet's newest manifest; this laptop's model owner owns it."""
    with reading(connect(settings.database_url)) as session:
        newest = select(ManifestRow.manifest_id).where(ManifestRow.datanet == datanet)
        manifest_id = session.scalar(newest.order_by(ManifestRow.created_at.desc()).limit(1))
    if manifest_id is None:
        raise Rejected("no_manifest", f"nothing of {datanet!r} is sealed yet: ingest first", field="datanet")
    owner = contributor_id(laptop.own_wallet(settings, "model-owner").address).hex()
    document = {"run_id": f"finetune-{manifest_id[:12]}", "name": name, "owner_id": owner}
    return yaml.safe_dump({**document, "manifest_ids": [manifest_id]}, sort_keys=False)
