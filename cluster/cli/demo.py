"""``openledger demo``: the whole path on real input, from shard to claim, printed from what really happened.

It does nothing that the other commands and the public API do not do; what was made before from the same
content is found again and said to be reused.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine, func, select

from attribution.errors import Unavailable
from attribution.hashing import sha256
from attribution.payload import WEI_PER_GWEI
from attribution.types import Manifest, ManifestEntry, contributor_id
from chain.rollup import Rollup
from cluster import jobs
from cluster.cli import data, laptop, models, money, people, stack
from cluster.cli.screen import Story, console, sparkline, table, tokens
from cluster.config import Settings
from cluster.database import connect, reading
from cluster.storage import get_content, open_storage
from cluster.tables import BatchRow, ReceiptRow, ShardRow
from pipelines.sources import python_lint

NAME = "demo/python-lint"
PAYERS = tuple(f"demo-payer-{i}" for i in range(1, 6))
DEPOSIT_GWEI = 100 * 10**9
QUESTIONS_PER_PAYER = 12
AT_ONCE = 8
MAX_TOKENS = 32
SHARES = ("base_heldout", "tuned_heldout", "base_controls", "tuned_controls")
ANSWER_TIMEOUT_S = 300.0
RAY_LINE = re.compile(r"(\(|\d{4}-\d\d-\d\d \S+\s+(INFO|WARNING))")


@dataclass(frozen=True, slots=True)
class Paid:
    """One answered question: what was asked about, what came, and the receipt."""

    entry: ManifestEntry
    answer: str
    receipt_id: str
    cost_gwei: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What every step of the demo stands on."""

    settings: Settings
    engine: Engine
    story: Story


def demo(settings: Settings, fresh: bool) -> None:
    story = Story()
    if fresh:
        stack.stop(settings)
        stack.forget_results(settings)
    with story.stage("ground", "Ground: rows, rollup, data availability, contracts, signer, Ray"):
        stack.start_ground(settings)
        stack.start_ray(settings)
    stage = Stage(settings, connect(settings.database_url), story)
    with story.stage(
        "contribute", "Contribute: commitments first, signed shards after; payers deposit and sign"
    ):
        contribute(stage)
        fund(stage)
    with story.stage("ingest", "Ingest: validate, group duplicates, seal"):
        manifest = ingest(stage)
    with story.stage("train", "Train: LoRA on the sealed manifest, with a trajectory that can be replayed"):
        ref = train(stage, manifest)
    with story.stage("evaluate", "Evaluate: base against tuned on wordings never trained with"):
        evaluate(stage, ref)
    with story.stage("index", "Index: what evidence and credits are computed from"):
        index(stage, ref)
    with story.stage("serve", "Serve: gateway and engine"):
        stack.start_services(settings)
    with story.stage("ask", "Ask: one answer with its evidence, then the paid questions of the period"):
        ask_one(stage, ref, manifest)
        ask_many(stage, ref, manifest)
    with story.stage("settle", "Settle: receipts into batches, blobs to EigenDA, captures on chain"):
        settle(stage)
    with story.stage("close", "Close: credits, payouts, one reward root"):
        period_id = close(stage)
    with story.stage("claim", "Claim: tokens to contributors' wallets"):
        claim(stage, period_id)
    stack.print_doors(settings)
    story.save(settings.home / "demo.json")
    table("Wall time", ["stage", "seconds"], list(story.seconds.items()))
    console.print(
        f"[bold]Done in {time.monotonic() - story.started:.0f} s.[/] Next: "
        "[bold]openledger audit[/] recomputes it from the chain; [bold]openledger down[/] stops it."
    )


def contribute(stage: Stage) -> None:
    datanet, drafts = data.from_source(stage.settings, "python-lint")
    with bar("shards", len(drafts)) as advance:
        num_new = data.contribute(stage.settings, stage.engine, datanet, drafts, advance)
    num_rows = sum(draft.data.count(b"\n") for draft in drafts)
    what = f"{num_new} shards committed, revealed and signed" if num_new else "reused: all shards are there"
    console.print(f"{datanet.name}: {len(drafts)} contributors, {num_rows} rows, {what}")


def fund(stage: Stage) -> None:
    deployment = money.deployment_of(stage.settings)
    wallets = [laptop.own_wallet(stage.settings, name) for name in PAYERS]
    for payer in wallets:
        people.fund_payer(stage.settings, stage.engine, deployment, payer, DEPOSIT_GWEI)
    for payer in wallets:
        people.open_key(stage.settings, stage.engine, payer, payer.name, DEPOSIT_GWEI)
    money.wait_until(
        lambda: people.deposits_are_seen(stage.engine, wallets, DEPOSIT_GWEI), "deposits in rows", 60.0
    )
    console.print(
        f"{len(wallets)} payers, {tokens(DEPOSIT_GWEI)} each in escrow, each with a signed spend ceiling"
    )


def ingest(stage: Stage) -> Manifest:
    with reading(stage.engine) as session:
        newest = session.scalar(select(func.max(ShardRow.committed_seq))) or 0
    spec = {"datanet": python_lint.DATANET.name, "seal": {"max_groups": 120}}
    run_id = models.run_id("ingest", {**spec, "newest": newest})
    outcome = job(stage, "ingest", spec, run_id)
    rows = [(name, value) for name, value in outcome.items() if not isinstance(value, dict)]
    rejected: dict[str, int] = outcome["rows_rejected"]
    table("Ingest", ["figure", "value"], [*rows, *((f"rejected: {k}", v) for k, v in rejected.items())])
    stage.story.note(ingest=outcome)
    storage = open_storage(stage.settings.storage_url, s3_endpoint=stage.settings.s3_endpoint)
    return Manifest.from_canonical(get_content(storage, "manifests", outcome["manifest_id"]))


def train(stage: Stage, manifest: Manifest) -> str:
    owner = contributor_id(laptop.own_wallet(stage.settings, "model-owner").address)
    spec = {"name": NAME, "owner_id": owner.hex(), "manifest_ids": [manifest.manifest_id.hex()]}
    outcome = job(stage, "finetune", spec, models.run_id("finetune", spec))
    models.print_outcome("Training", outcome)
    losses = losses_of(stage, str(outcome["trajectory"]))
    console.print(f"loss {losses[0]:.2f} {sparkline(losses)} {losses[-1]:.2f}")
    stage.story.note(train=outcome)
    return str(outcome["adapter"])


def losses_of(stage: Stage, trajectory: str) -> list[float]:
    storage = open_storage(stage.settings.storage_url, s3_endpoint=stage.settings.s3_endpoint)
    lines = storage.get(f"{trajectory}/metrics.jsonl").decode().splitlines()
    return [float(json.loads(line)["loss"]) for line in lines]


def evaluate(stage: Stage, ref: str) -> None:
    spec = {"adapter": ref, "num_questions": 150, "num_controls": 40}
    outcome = job(stage, "evaluate", spec, models.run_id("evaluate", spec))
    shares = {name: outcome[name]["share"] for name in SHARES}
    rows = [
        (name, f"{outcome[name]['right']} of {outcome[name]['asked']}", f"{shares[name]:.3f}")
        for name in SHARES
    ]
    table("Exact normalised match", ["who, what", "right", "share"], rows)
    stage.story.note(evaluate=outcome)
    gain = shares["tuned_controls"] - shares["base_controls"]
    stage.story.goal("heldout_tuned", shares["tuned_heldout"], ">=0.80", shares["tuned_heldout"] >= 0.80)
    stage.story.goal("heldout_base", shares["base_heldout"], "<0.15", shares["base_heldout"] < 0.15)
    stage.story.goal("controls_gain", gain, "<=0.10", gain <= 0.10)


def index(stage: Stage, ref: str) -> None:
    spec = {"adapter": ref}
    outcome = job(stage, "index", spec, models.run_id("index", spec))
    models.print_outcome("Index", outcome)


def ask_one(stage: Stage, ref: str, manifest: Manifest) -> None:
    """A streamed answer, then its receipt with the records found behind it."""
    entry, question = questions(manifest, 1, b"show")[0]
    console.print(f"[bold]{question}[/]")
    last: dict[str, Any] = {}
    for piece, event in models.stream(stage.settings, ref, question, PAYERS[0]):
        console.print(piece, end="")
        last |= event
    console.print()
    receipt_id = last["openledger"]["receipt_id"]
    receipt = wait_for_evidence(stage.settings, receipt_id)
    money.print_receipt(stage.engine, receipt)
    found = [record["record_id"] for record in receipt["evidence"]["result"]["records"]]
    asked = entry.record.record_id.hex()
    rank = found.index(asked) + 1 if asked in found else 0
    console.print(f"asked about {entry.record.source_key}; evidence has it at rank {rank or 'none'}")
    stage.story.note(shown_rank=rank)


def ask_many(stage: Stage, ref: str, manifest: Manifest) -> None:
    """The period's paid questions, over HTTP, from every payer at once."""
    wanted = questions(manifest, QUESTIONS_PER_PAYER * len(PAYERS), b"paid")
    keys = {name: people.key_path(stage.settings, name).read_text() for name in PAYERS}
    began = time.monotonic()
    with (
        bar("questions", len(wanted)) as advance,
        ThreadPoolExecutor(AT_ONCE) as pool,
        httpx.Client() as client,
    ):

        def ask(numbered: tuple[int, tuple[ManifestEntry, str]]) -> Paid:
            i, (entry, question) = numbered
            paid = post_question(stage.settings, client, keys[PAYERS[i % len(PAYERS)]], ref, entry, question)
            advance()
            return paid

        answers = list(pool.map(ask, enumerate(wanted)))
    seconds = time.monotonic() - began
    right = sum(normalised(paid.answer) == normalised(paid.entry.record.answer) for paid in answers)
    cost = sum(paid.cost_gwei for paid in answers)
    console.print(
        f"{len(answers)} answers in {seconds:.1f} s for {tokens(cost)}; {right} name the right rule exactly"
    )
    stage.story.note(paid_questions=len(answers), paid_right=right, paid_cost_gwei=cost)


def post_question(
    settings: Settings, client: httpx.Client, key: str, ref: str, entry: ManifestEntry, question: str
) -> Paid:
    body = {
        "model": ref,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    answer = client.post(
        f"{settings.public_url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=ANSWER_TIMEOUT_S,
    )
    if answer.status_code != 200:
        raise Unavailable("question_failed", f"HTTP {answer.status_code}: {answer.text[:300]}")
    found = answer.json()
    text = found["choices"][0]["message"]["content"]
    return Paid(entry, text, found["openledger"]["receipt_id"], found["usage"]["cost_gwei"])


def settle(stage: Stage) -> None:
    money.wait_until(lambda: money.is_settled(stage.engine), "every receipt in a final batch", 180.0)
    with reading(stage.engine) as session:
        rows = [
            (b.batch_id, b.num_receipts, b.fee_gwei, f"{b.root[:12]}…", f"{b.payload_hash[:12]}…",
             f"{b.da_commitment.hex()[:12]}… ({len(b.da_commitment)} B)", f"0x{b.tx_hash[:12]}…", b.gas_used)
            for b in session.scalars(select(BatchRow).order_by(BatchRow.batch_id.desc()).limit(6))
        ]  # fmt: skip
        receipts = session.scalar(select(func.count()).select_from(ReceiptRow))
    columns = ["batch", "receipts", "fee gwei", "root", "payload", "DA commitment", "transaction", "gas"]
    table(f"Batches ({receipts} receipts in all)", columns, rows[::-1])


def close(stage: Stage) -> int:
    period_id = money.close_period(stage.settings, show_log)
    paid = money.print_payouts(stage.settings, period_id)
    money.print_methods(stage.settings, period_id)
    fees = money.captured_gwei(stage.engine, period_id)
    console.print(f"payouts with the pool {paid} gwei, captured fees {fees} gwei")
    stage.story.goal("payouts_minus_captured_gwei", paid - fees, "0", paid == fees)
    return period_id


def claim(stage: Stage, period_id: int) -> None:
    """Claim for everyone who earned; show what it moved for the best-paid contributor."""
    settings = stage.settings
    rollup = Rollup(settings.chain.rpc_url, money.deployment_of(settings))
    best = money.best_paid(stage.engine, period_id)
    ids = money.everyone(settings, stage.engine)
    before = rollup.token_balance_wei(money.wallet_of(stage.engine, best))
    mined = money.claim_for(settings, stage.engine, ids)
    after = rollup.token_balance_wei(money.wallet_of(stage.engine, best))
    for transaction in mined:
        console.print(f"{len(ids)} claims in 0x{transaction.tx_hash.hex()}, {transaction.gas_used:,} gas")
    moved = tokens((after - before) // WEI_PER_GWEI)
    console.print(f"[bold]{money.label_of(stage.engine, best)}[/] received {moved} in its wallet")
    stage.story.note(claimed_wei=after - before)


def job(stage: Stage, kind: str, spec: dict[str, Any], run_id: str) -> dict[str, Any]:
    """As ``ray job submit`` would; a run of the same content that has succeeded is reused, and it is said."""
    if jobs.is_done(stage.settings, run_id):
        console.print(f"reused: run {run_id} has this content")
    return money.run_job(stage.settings, kind, spec, run_id, show_log)


def show_log(text: str) -> None:
    """The pipeline's own lines; Ray's stay in the job's log."""
    for line in text.splitlines():
        if not RAY_LINE.match(line) and not line.startswith(("{", "Running entrypoint")):
            console.print(f"  {line[:200]}", style="dim", markup=False)


def questions(manifest: Manifest, count: int, purpose: bytes) -> list[tuple[ManifestEntry, str]]:
    """Held-out wordings of trained records, in an order that only a hash decides."""
    every = [(entry, wording) for entry in manifest.entries for wording in manifest.heldout_wordings]
    every.sort(key=lambda one: sha256(purpose + one[0].group.group_id + one[1].encode()))
    return [(entry, wording.format(subject=entry.record.subject)) for entry, wording in every[:count]]


def wait_for_evidence(settings: Settings, receipt_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def is_ready() -> bool:
        found.update(money.get(settings, f"/v1/receipts/{receipt_id}", PAYERS[0]))
        return bool(found["evidence"]["state"] == "ready")

    money.wait_until(is_ready, f"evidence of receipt {receipt_id}", 120.0)
    return found


def normalised(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, nothing but its end elsewhere."""
    columns = (TextColumn(f"  {what}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
