"""The audits that need no model, for anybody: an RPC address, our contracts' addresses, a place with the
payloads.

``python -m chain.audit --rpc URL --addresses FILE [--da URL] [--archive URL]`` is the arithmetic audit: it
prints the same integers as everybody else's audit of the same block and exits with 1 if anything does not
hold. With ``--openings FILE --records URL`` it is the provenance audit. Loads neither torch, ray nor
sqlalchemy, and asks nothing of the operator but the payloads, whose hashes the chain knows."""

import argparse
import sys
from pathlib import Path

from attribution.errors import Refusal
from chain.da import DaClient
from chain.deployment import load_deployment
from chain.findings import Report
from chain.payload_source import PayloadSource
from chain.provenance import Provenance, audit_provenance, read_openings
from chain.replay import Replay
from chain.rollup import Rollup, Tag
from cluster.storage import open_storage


def audit_arithmetic(rollup: Rollup, source: PayloadSource, tag: Tag = "latest") -> Report:
    """Recompute everything up to ``tag``.

    Raises:
        Unavailable: the node does not answer. A payload that cannot be had is a finding.
    """
    return replayed(rollup, source, tag).report()


def bound_by_chain(rollup: Rollup, source: PayloadSource, tag: Tag = "latest") -> Provenance:
    """What a provenance audit has to lead back to records."""
    replay = replayed(rollup, source, tag)
    return Provenance(rollup.addresses.chain_id, frozenset(replay.adapter_ids), tuple(replay.closes))


def replayed(rollup: Rollup, source: PayloadSource, tag: Tag) -> Replay:
    block = rollup.block_number(tag)
    replay = Replay(rollup.addresses, source)
    for event in rollup.events(tag=block):
        replay.apply(event)
    replay.finish(
        rollup.token_balance_wei(rollup.addresses.escrow, block),
        rollup.token_balance_wei(rollup.addresses.distributor, block),
    )
    return replay


def main() -> None:
    parser = argparse.ArgumentParser(description="Recompute every capture, payout and root from the chain")
    parser.add_argument("--rpc", required=True, help="JSON-RPC address of the rollup")
    parser.add_argument("--addresses", type=Path, required=True, help="the deployment's JSON file")
    parser.add_argument("--da", help="address of an eigenda-proxy")
    parser.add_argument("--da-mode", default="standard", choices=("standard", "optimism_generic"))
    parser.add_argument("--archive", help="file:DIRECTORY or s3://BUCKET/PREFIX with blobs/<payload hash>")
    parser.add_argument("--tag", default="latest", choices=("latest", "safe", "finalized"))
    parser.add_argument("--openings", type=Path, help="audit provenance instead, with these commitments")
    parser.add_argument("--records", help="storage with shards/, manifests/, trajectories/, adapters/")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.da and not options.archive:
        parser.error("the payloads have to come from somewhere: --da, --archive or both")
    try:
        source = PayloadSource(
            DaClient(options.da, options.da_mode, patience_s=5.0) if options.da else None,
            open_storage(options.archive) if options.archive else None,
        )
        rollup = Rollup(options.rpc, load_deployment(options.addresses))
        if options.openings:
            records = open_storage(options.records or options.archive or "")
            bound = bound_by_chain(rollup, source, options.tag)
            report = audit_provenance(records, read_openings(options.openings), bound)
        else:
            report = audit_arithmetic(rollup, source, options.tag)
    except Refusal as error:
        raise SystemExit(f"audit: {error.message} ({error.code})") from None
    print(report.to_json() if options.json else report.to_text())
    sys.exit(0 if report.is_clean else 1)


if __name__ == "__main__":
    main()
