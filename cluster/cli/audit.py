"""``openledger audit``: recompute from the chain what everybody was charged and paid. It believes no
database.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attribution.errors import Rejected
from chain.audit import audit_arithmetic, bound_by_chain
from chain.da import DaClient
from chain.deployment import load_deployment
from chain.openings import openings
from chain.payload_source import PayloadSource
from chain.provenance import audit_provenance
from chain.rollup import Rollup
from cluster.config import Settings
from cluster.database import connect, reading
from cluster.storage import open_storage


@dataclass(frozen=True, slots=True)
class Where:
    """Where an auditor looks; empty means what the settings say, ``none`` means nowhere."""

    rpc: str
    addresses: Path | None
    da: str
    archive: str
    tag: str


def audit(settings: Settings, where: Where, provenance: bool, as_json: bool) -> bool:
    """Print the audit and return whether everything holds."""
    da_url, archive_url = where.da or settings.chain.da_url, where.archive or settings.storage_url
    source = PayloadSource(
        None if da_url == "none" else DaClient(da_url, settings.chain.da_mode, patience_s=5.0),
        None if archive_url == "none" else open_storage(archive_url, s3_endpoint=settings.s3_endpoint),
    )
    deployment = load_deployment(where.addresses or Path(settings.chain.addresses_path))
    rollup = Rollup(where.rpc or settings.chain.rpc_url, deployment)
    tag = block_tag(where.tag)
    reports = [audit_arithmetic(rollup, source, tag)]
    if provenance:
        records = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
        with reading(connect(settings.database_url)) as session:
            opened = openings(session)
        reports.append(audit_provenance(records, opened, bound_by_chain(rollup, source, tag)))
    for report in reports:
        print(report.to_json() if as_json else report.to_text())
    return all(report.is_clean for report in reports)


def block_tag(text: str) -> Literal["latest", "safe", "finalized"]:
    match text:
        case "latest" | "safe" | "finalized":
            return text
        case _:
            raise Rejected("bad_tag", f"{text!r} is none of latest, safe, finalized", field="tag")
