"""``openledger audit``: recompute from the chain what everybody was charged and paid. It believes no
database.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from chain.audit import audit_arithmetic
from chain.da import DaClient
from chain.deployment import load_deployment
from chain.payload_source import PayloadSource
from chain.rollup import Rollup
from cluster.config import load_settings
from cluster.storage import open_storage

FOUND_SOMETHING = 4


def audit(
    rpc: Annotated[str, typer.Option(help="JSON-RPC address of the rollup; default: chain.rpc_url")] = "",
    addresses: Annotated[
        Path | None, typer.Option(help="deployment file; default: chain.addresses_path")
    ] = None,
    da: Annotated[str, typer.Option(help="eigenda-proxy; `none` for the archive alone")] = "",
    archive: Annotated[
        str, typer.Option(help="file:DIRECTORY or s3://BUCKET/PREFIX; `none` for DA alone")
    ] = "",
    tag: Annotated[str, typer.Option(help="latest, safe or finalized")] = "latest",
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """The arithmetic audit: every capture, payout and root, the same integers. Exits 4 if anything does not
    hold.
    """
    settings = load_settings()
    da_url, archive_url = da or settings.chain.da_url, archive or settings.storage_url
    source = PayloadSource(
        None if da_url == "none" else DaClient(da_url, settings.chain.da_mode, patience_s=5.0),
        None if archive_url == "none" else open_storage(archive_url, s3_endpoint=settings.s3_endpoint),
    )
    deployment = load_deployment(addresses or Path(settings.chain.addresses_path))
    report = audit_arithmetic(Rollup(rpc or settings.chain.rpc_url, deployment), source, block_tag(tag))
    print(report.to_json() if as_json else report.to_text())
    if not report.is_clean:
        sys.exit(FOUND_SOMETHING)


def block_tag(text: str) -> Literal["latest", "safe", "finalized"]:
    match text:
        case "latest" | "safe" | "finalized":
            return text
        case _:
            raise typer.BadParameter(f"{text!r} is none of latest, safe, finalized")


def register(app: typer.Typer) -> None:
    app.command()(audit)
