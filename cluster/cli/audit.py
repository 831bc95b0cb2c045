"""``openledger audit``: recompute from the chain what everybody was charged and paid. It believes no
database.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from attribution.errors import Corrupted, Rejected
from attribution.types import ZERO_ID
from chain.audit import audit_arithmetic, bound_by_chain
from chain.da import DaClient
from chain.deployment import load_deployment
from chain.findings import Finding, Report
from chain.openings import openings
from chain.payload_source import PayloadSource
from chain.provenance import Provenance, audit_provenance
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


def audit(settings: Settings, where: Where, also: Sequence[str], as_json: bool) -> bool:
    """Print the arithmetic audit and what is ``also`` asked for, ``provenance`` or ``influence``; return
    whether everything holds."""
    da_url, archive_url = where.da or settings.chain.da_url, where.archive or settings.storage_url
    source = PayloadSource(
        None if da_url == "none" else DaClient(da_url, settings.chain.da_mode, patience_s=5.0),
        None if archive_url == "none" else open_storage(archive_url, s3_endpoint=settings.s3_endpoint),
    )
    deployment = load_deployment(where.addresses or Path(settings.chain.addresses_path))
    rollup = Rollup(where.rpc or settings.chain.rpc_url, deployment)
    tag = block_tag(where.tag)
    reports = [audit_arithmetic(rollup, source, tag)]
    if "provenance" in also:
        records = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
        with reading(connect(settings.database_url)) as session:
            opened = openings(session)
        reports.append(audit_provenance(records, opened, bound_by_chain(rollup, source, tag)))
    if "influence" in also:
        reports.append(audit_influence(settings, bound_by_chain(rollup, source, tag)))
    for report in reports:
        print(report.to_json() if as_json else report.to_text())
    return all(report.is_clean for report in reports)


def audit_influence(settings: Settings, bound: Provenance) -> Report:
    """Credits again from each period's published gradient sum; this machine computes them, for as long as the
    trainings took and more."""
    from cluster.models import base_model, load_tokenizer
    from pipelines.course import ChatAsker
    from pipelines.influence_audit import differences, recompute
    from pipelines.row_derivatives import open_here

    storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
    results = open_storage(f"file:{settings.home / 'audit'}")
    asker = ChatAsker(load_tokenizer(base_model(settings).path))
    checked = dict.fromkeys(("closes", "credits", "controls"), 0)
    findings: list[Finding] = []
    for period_id, close in bound.closes:
        if close.adapter_id == ZERO_ID:
            continue
        subject = f"period {period_id}, adapter {close.adapter_id.hex()}"
        print(f"{subject}: {close.method!r}", file=sys.stderr)
        try:
            again = recompute(storage, results, close, asker, partial(open_here, settings))
        except (Rejected, Corrupted) as refusal:
            findings.append(Finding(refusal.code, subject, "credits recomputed", refusal.message))
            continue
        checked["closes"] += 1
        checked["credits"] += len(again.credits)
        checked["controls"] += len(again.controls)
        findings += [
            Finding("credit", f"{subject}, {one.subject}", one.expected, one.found)
            for one in differences(close, again)
        ]
    return Report("influence", checked, (), (), tuple(findings))


def block_tag(text: str) -> Literal["latest", "safe", "finalized"]:
    match text:
        case "latest" | "safe" | "finalized":
            return text
        case _:
            raise Rejected("bad_tag", f"{text!r} is none of latest, safe, finalized", field="tag")
