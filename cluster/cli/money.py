"""``openledger usage``, ``evidence``, ``period close``, ``claim``: what was used, why, who earned, and
drawing it.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine, func, select

from attribution.errors import Rejected, Unavailable
from attribution.payload import WEI_PER_GWEI, PeriodPayload, decode_period
from attribution.types import contributor_id
from chain import claims
from chain.deployment import Deployment, load_deployment
from chain.rollup import Rollup
from chain.transactions import MinedTransaction
from cluster import jobs
from cluster.cli import laptop, people
from cluster.cli.screen import console, table, tokens
from cluster.config import Settings
from cluster.database import connect, reading
from cluster.receipts import outbox
from cluster.storage import open_storage
from cluster.tables import BatchRow, ContributorRow, PayoutRow, PeriodRow


def usage(settings: Settings, key_of: str) -> None:
    answer = get(settings, "/v1/usage", key_of)
    rows = [(line["model"], line["num_requests"], tokens(line["fee_gwei"])) for line in answer["by_model"]]
    table(f"Usage of {answer['account_id']}, payer {answer['payer']}", ["model", "requests", "fees"], rows)
    console.print(f"spent {tokens(answer['spent_gwei'])} of {tokens(answer['budget_gwei'])}")


def evidence(settings: Settings, receipt_id: str, key_of: str) -> None:
    engine = connect(settings.database_url)
    print_receipt(engine, get(settings, f"/v1/receipts/{receipt_id}", key_of))


def explain(settings: Settings, receipt_id: str, top: int = 12) -> None:
    """Run the job and show the largest parts, of either sign, in gwei of directed loss."""
    plain = receipt_id.lower().removeprefix("0x")
    run_id = f"explain-{plain[:16]}-{secrets.token_hex(4)}"  # again after the close it says something else
    outcome = run_job(settings, "explain", {"receipt_id": plain}, run_id, console.print)
    for adapter_id, part in outcome.items():
        credits_ = sorted(part["credits"].items(), key=lambda one: (-abs(one[1]), one[0]))
        rows = [(group, f"{value / 2 ** part['bits']:+.3f}") for group, value in credits_[:top]]
        rest = sum(value for _, value in credits_[top:])
        rows += [(f"{len(credits_) - top} more", f"{rest / 2 ** part['bits']:+.3f}")] if rest else []
        paid = f"period {part['period_id']}" if part["period_id"] else "not paid yet"
        table(f"Adapter {adapter_id[:12]}…, {part['fee_gwei']} gwei, {paid}", ["group", "part"], rows)


def close(settings: Settings) -> None:
    period_id = close_period(settings, console.print)
    print_payouts(settings, period_id)
    print_methods(settings, period_id)


def claim(settings: Settings, contributors: Sequence[str]) -> None:
    engine = connect(settings.database_url)
    ids = (
        everyone(settings, engine)
        if list(contributors) == ["all"]
        else [find_contributor(engine, c) for c in contributors]
    )
    for mined in claim_for(settings, engine, ids):
        console.print(f"claimed in 0x{mined.tx_hash.hex()}, {mined.gas_used:,} gas")
    rows = []
    rollup = Rollup(settings.chain.rpc_url, deployment_of(settings))
    for contributor in ids:
        wallet = rollup.wallet_of(contributor)
        held_gwei = rollup.token_balance_wei(wallet) // WEI_PER_GWEI
        rows.append((label_of(engine, contributor), f"0x{wallet.hex()}", tokens(held_gwei)))
    table("Wallets", ["who", "wallet", "holds"], rows)


def close_period(settings: Settings, on_log: Callable[[str], None]) -> int:
    """Run the job, then wait until the settler has its root on chain. Returns the period's number."""
    engine = connect(settings.database_url)
    wait_until(lambda: is_settled(engine), "receipts in final batches", 120.0)
    deployment = deployment_of(settings)
    with reading(engine) as session:
        period_id = int(session.scalar(select(func.max(PeriodRow.period_id))) or 0) + 1
    spec = {
        "chain_id": deployment.chain_id,
        "distributor": deployment.distributor.hex(),
        "platform": contributor_id(laptop.own_wallet(settings, "platform").address).hex(),
        "host": contributor_id(laptop.own_wallet(settings, "host").address).hex(),
        "pool": contributor_id(deployment.pool).hex(),
    }
    run_job(settings, "close_period", spec, f"close-period-{period_id}", on_log)
    wait_until(lambda: _period_state(engine, period_id) == "final", f"period {period_id} on chain", 120.0)
    return period_id


def run_job(
    settings: Settings, kind: str, spec: dict[str, Any], run_id: str, on_log: Callable[[str], None]
) -> dict[str, Any]:
    """Submit, follow, and return what the pipeline said. A run that has succeeded before is not done again.

    Raises:
        Rejected: the job failed, with the pipeline's own code and words.
    """
    jobs.submit(settings, kind, spec, run_id)
    outcome = jobs.wait(settings, run_id, on_log)
    if outcome.state != "succeeded":
        error: Any = outcome.result.get("error", {})
        raise Rejected(
            error.get("code", "job_failed"), f"{run_id}: {error.get('message', 'failed')}", field=kind
        )
    return dict(outcome.result)


def claim_for(settings: Settings, engine: Engine, ids: Sequence[bytes]) -> tuple[MinedTransaction, ...]:
    """One claim of many leaves. The wallets are put on record first, at the platform's expense."""
    deployment = deployment_of(settings)
    rollup = Rollup(settings.chain.rpc_url, deployment)
    period = active_payload(settings, engine, rollup)
    with reading(engine) as session:
        wanted = select(ContributorRow.wallet).where(
            ContributorRow.contributor_id.in_([i.hex() for i in ids])
        )
        wallets = [bytes.fromhex(wallet) for wallet in session.scalars(wanted)]
    laptop.register_wallets(settings, deployment, wallets)
    return claims.claim(rollup, laptop.own_wallet(settings, "platform").key, period, ids)


def active_payload(settings: Settings, engine: Engine, rollup: Rollup) -> PeriodPayload:
    """The payload of the period that is active on chain, from our archive."""
    return archived_period(settings, engine, rollup.active_period().period_id)


def archived_period(settings: Settings, engine: Engine, period_id: int) -> PeriodPayload:
    with reading(engine) as session:
        row = session.get(PeriodRow, period_id)
        if row is None:
            raise Rejected("no_such_period", f"none of our periods has the number {period_id}")
        key = f"blobs/{row.payload_hash}"
    return decode_period(open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint).get(key))


def everyone(settings: Settings, engine: Engine) -> list[bytes]:
    """All who have earned and have a wallet that can use it; the pool's timelock is not among them."""
    deployment = deployment_of(settings)
    rewards = active_payload(settings, engine, Rollup(settings.chain.rpc_url, deployment)).rewards
    pool = contributor_id(deployment.pool)
    return [reward.contributor_id for reward in rewards if reward.contributor_id != pool]


def find_contributor(engine: Engine, text: str) -> bytes:
    """By id, wallet or label."""
    plain = text.lower().removeprefix("0x")
    wanted = (
        (ContributorRow.contributor_id == plain)
        | (ContributorRow.wallet == plain)
        | (ContributorRow.label == text)
    )
    with reading(engine) as session:
        found = session.scalars(select(ContributorRow.contributor_id).where(wanted)).all()
    if len(found) != 1:
        raise Rejected(
            "unknown_contributor", f"{text!r} names {len(found)} contributors", field="contributor"
        )
    return bytes.fromhex(found[0])


def label_of(engine: Engine, contributor: bytes) -> str:
    with reading(engine) as session:
        row = session.get(ContributorRow, contributor.hex())
        return row.label if row else contributor.hex()


def print_payouts(settings: Settings, period_id: int, top: int = 12) -> int:
    """The statement of one period, largest lines first; returns the sum that it pays."""
    engine = connect(settings.database_url)
    with reading(engine) as session:
        lines = [
            (row.role, row.contributor_id, row.amount_gwei)
            for row in session.scalars(select(PayoutRow).where(PayoutRow.period_id == period_id))
        ]
    lines.sort(key=lambda line: -line[2])
    shown = [
        (role, label_of(engine, bytes.fromhex(who)), tokens(amount)) for role, who, amount in lines[:top]
    ]
    rest = lines[top:]
    if rest:
        shown.append((f"{len(rest)} more", "", tokens(sum(amount for _, _, amount in rest))))
    total = sum(amount for _, _, amount in lines)
    table(f"Period {period_id} pays", ["role", "who", "amount"], [*shown, ("sum", "", tokens(total))])
    return total


def print_methods(settings: Settings, period_id: int) -> None:
    """By which method each adapter's credits were made, what it cost and why; and who was carried."""
    period = archived_period(settings, connect(settings.database_url), period_id)
    for close in period.adapters:
        console.print(f"{close.adapter_id.hex()[:12]}… by {close.method}", highlight=False, markup=False)
    for adapter_id, fee_gwei in period.carried:
        console.print(f"{adapter_id.hex()[:12]}… is carried with {tokens(fee_gwei)}", highlight=False)


def captured_gwei(engine: Engine, period_id: int) -> int:
    """The fees captured by the period's batches."""
    with reading(engine) as session:
        period = session.get_one(PeriodRow, period_id)
        within = BatchRow.batch_id.between(period.first_batch, period.last_batch)
        return int(session.scalar(select(func.sum(BatchRow.fee_gwei)).where(within)) or 0)


def best_paid(engine: Engine, period_id: int) -> bytes:
    """The contributor with the largest line of the period."""
    lines = select(PayoutRow.contributor_id).where(
        PayoutRow.period_id == period_id, PayoutRow.role == "contributor"
    )
    with reading(engine) as session:
        found = session.scalar(lines.order_by(PayoutRow.amount_gwei.desc()).limit(1))
    if found is None:
        raise Rejected("nobody_earned", f"period {period_id} pays no contributor", http_status=404)
    return bytes.fromhex(found)


def wallet_of(engine: Engine, contributor: bytes) -> bytes:
    with reading(engine) as session:
        return bytes.fromhex(session.get_one(ContributorRow, contributor.hex()).wallet)


def print_receipt(engine: Engine, receipt: dict[str, Any]) -> None:
    """Receipt first, then evidence by rank."""
    usage = receipt["usage"]
    rows = [(field, str(receipt[field])) for field in ("id", "model", "adapter_id", "payer", "payer_seq")]
    rows.append(("tokens", f"{usage['prompt_tokens']} read, {usage['completion_tokens']} written"))
    rows.append(("cost", tokens(usage["cost_gwei"])))
    rows.append(("evidence", receipt["evidence"]["state"]))
    table("Receipt", ["field", "value"], rows)
    found = receipt["evidence"]["result"] or {"records": []}
    shown = [
        (
            rank,
            record["source_key"],
            label_of(engine, bytes.fromhex(record["contributor_id"])),
            f"{record['score']:.2f}",
            ", ".join(f"{kind} {part:.1f}" for kind, part in record["parts"].items()),
        )
        for rank, record in enumerate(found["records"], start=1)
    ]
    table("Evidence only: no money follows from it", ["#", "record", "contributor", "score", "parts"], shown)


def get(settings: Settings, path: str, key_of: str) -> dict[str, Any]:
    """Ask our own public API, as anybody would."""
    key = api_key(settings, key_of)
    try:
        answer = httpx.get(
            settings.public_url + path,
            headers={"Authorization": f"Bearer {key}"},
            timeout=30.0,
        )
    except httpx.HTTPError as error:
        raise Unavailable("gateway_unreachable", f"{settings.public_url}: {error}") from error
    if answer.status_code != 200:
        raise Rejected("refused", f"{path}: HTTP {answer.status_code}: {answer.text[:300]}")
    found: dict[str, Any] = answer.json()
    return found


def api_key(settings: Settings, label: str) -> str:
    path = people.key_path(settings, label)
    if not path.exists():
        raise Rejected("no_api_key", f"no key of {label!r}: openledger key {label}", field="key_of")
    return path.read_text()


def deployment_of(settings: Settings) -> Deployment:
    return load_deployment(Path(settings.chain.addresses_path))


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise Unavailable("timeout", f"{what}: not after {timeout_s:.0f} s")
        time.sleep(0.25)


def is_settled(engine: Engine) -> bool:
    """No receipt waits for a batch and no batch waits for the chain."""
    with reading(engine) as session:
        unfinished = session.scalar(
            select(func.count()).select_from(BatchRow).where(BatchRow.state != "final")
        )
        return outbox(session).num_receipts == 0 and unfinished == 0


def _period_state(engine: Engine, period_id: int) -> str:
    with reading(engine) as session:
        row = session.get(PeriodRow, period_id)
        return row.state if row else ""
