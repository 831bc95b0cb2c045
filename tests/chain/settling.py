"""A whole settlement on a small stage: payers, receipts, a settler and what it needs, and the period that
follows.

Everything is real: the chain, the signer's socket, the stand-in's HTTP, the rows. ``Books`` plays the
gateway (it makes receipts) and the closing job (it makes periods)."""

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine, select

from attribution.hashing import keccak256, sha256
from attribution.payload import (
    WEI_PER_GWEI,
    PeriodPayload,
    add_payouts,
    decode_batch,
    decode_period,
    encode_period,
)
from attribution.payout import AdapterClose, Beneficiaries, Split
from attribution.types import ZERO_ID, Credit, Share
from chain import da_standin, signer
from chain.da import DaClient
from chain.outbox import BatchRules
from chain.settler import Settler
from chain.signer_policy import SignerPolicy
from chain.world import SettlerRules, World
from cluster.accounts import open_account, record_ceiling
from cluster.charges import ReceiptDraft, capture, reserve
from cluster.database import connect, migrate, reading, writing
from cluster.receipts import outbox
from cluster.signatures import SpendCeiling
from cluster.storage import open_storage
from cluster.tables import AccountRow, BatchRow, PeriodRow
from tests.chain.stage import FAR, Stage, address, key

NOW = 1_700_000_000
BASE, ADAPTER = sha256(b"base"), sha256(b"adapter")
SPLIT = Split(50_000, 150_000, 100_000, 50_000, 600_000, 50_000)
CALLS = {
    "ledger": ("commitBatch((uint64,bytes32,bytes32,uint32,uint256),bytes,(address,uint256)[])",),
    "distributor": ("postPeriod((uint64,bytes32,uint256,uint64,uint64,bytes32,bytes32),bytes)",),
    "escrow": ("authorize((address,address,uint256,uint64),bytes)",),
}
CREDITS = {"alice": 5, "carol": 7, "stranger": -2}
MAX_TICKS = 60
AT_ONCE = SettlerRules(BatchRules(max_age_s=0), "latest", resubmit_s=30)


@dataclass(frozen=True, slots=True)
class Site:
    """Where the outside of one settler lies. Opened anew by every process that plays the settler."""

    stage: Stage
    folder: Path
    da_url: str

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.folder}/rows.db"

    @property
    def socket(self) -> Path:
        return self.folder / "signer.sock"

    def open(self) -> World:
        return World(
            connect(self.database_url),
            open_storage(f"file:{self.folder}/storage"),
            DaClient(self.da_url, patience_s=0.3),
            type(self.stage.rollup)(self.stage.rpc_url, self.stage.deployment),
            signer.SignerClient(self.socket),
        )

    def save_rows(self, file: Path) -> None:
        with (
            closing(sqlite3.connect(self.folder / "rows.db")) as rows,
            closing(sqlite3.connect(file)) as copy,
        ):
            rows.backup(copy)

    def restore_rows(self, file: Path) -> None:
        for stale in self.folder.glob("rows.db*"):
            stale.unlink()
        shutil.copy(file, self.folder / "rows.db")

    def rpc(self, method: str, *params: object) -> Any:
        question = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = httpx.post(self.stage.rpc_url, json=question).json()
        assert "error" not in answer, answer
        return answer["result"]

    def settler(self, holder: str = "one", rules: SettlerRules = AT_ONCE) -> Settler:
        return Settler(self.open(), rules, holder)


@contextmanager
def site(stage: Stage, folder: Path) -> Iterator[Site]:
    """The signer and the stand-in run; rows are migrated, nobody has deposited."""
    (folder / "key").write_text(key("settler").hex())
    (folder / "key").chmod(0o600)
    contracts = {getattr(stage.deployment, name).hex(): calls for name, calls in CALLS.items()}
    policy = SignerPolicy(chain_id=stage.deployment.chain_id, contracts=contracts)
    here = Site(stage, folder, "")
    servers = [
        signer.make_server(here.socket, signer.Signer(folder / "key", policy)),
        da_standin.make_server(folder / "da"),
    ]
    threads = [threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.02}) for s in servers]
    for thread in threads:
        thread.start()
    migrate(here.database_url)
    try:
        yield Site(stage, folder, f"http://127.0.0.1:{servers[1].server_address[1]}")
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def paid_site(stage: Stage, folder: Path) -> Iterator[Site]:
    """Alice and Bob have paid in and have asked three questions each; nothing is settled. ``paid.db`` has the
    rows."""
    with site(stage, folder) as here:
        books = Books(here)
        books.open_payer("alice", 1000, 900)
        books.open_payer("bob", 500, 500)
        here.settler().tick()
        for i in range(6):
            books.serve("alice" if i % 2 else "bob", 10 + i, f"question {i}")
        here.save_rows(folder / "paid.db")
        yield here


@contextmanager
def rewound(here: Site, rows: Path) -> Iterator[None]:
    """Chain and rows as they were when ``rows`` was saved; the chain is taken back again at the end."""
    here.restore_rows(rows)
    snapshot = here.rpc("evm_snapshot")
    try:
        yield
    finally:
        here.rpc("evm_setAutomine", True)
        here.rpc("evm_revert", snapshot)


class Books:
    """The gateway's and the closing job's part."""

    def __init__(self, here: Site) -> None:
        self._site = here
        self._rows: Engine = connect(here.database_url)
        self._storage = open_storage(f"file:{here.folder}/storage")
        with reading(self._rows) as session:
            self._accounts = {row.label: row.account_id for row in session.scalars(select(AccountRow))}

    def open_payer(self, name: str, deposit_gwei: int, ceiling_gwei: int, expiry: int = FAR) -> None:
        """Deposits on chain; signs a ceiling that only the rows know yet."""
        stage = self._site.stage
        amount_wei = deposit_gwei * WEI_PER_GWEI
        stage.do("treasury", stage.rollup.encode_approve(stage.deployment.escrow, amount_wei))
        stage.do("treasury", stage.rollup.encode_deposit(address(name), amount_wei))
        self.sign_ceiling(name, ceiling_gwei, expiry)
        with writing(self._rows) as session:
            self._accounts[name] = open_account(session, address(name), name, ceiling_gwei, NOW)

    def sign_ceiling(self, name: str, ceiling_gwei: int, expiry: int) -> None:
        stage = self._site.stage
        ceiling = SpendCeiling(address(name), stage.deployment.ledger, ceiling_gwei * WEI_PER_GWEI, expiry)
        with writing(self._rows) as session:
            record_ceiling(session, address(name), ceiling_gwei, expiry, stage.sign(name, ceiling))

    def serve(self, name: str, fee_gwei: int, label: str, adapter_id: bytes = ADAPTER) -> bytes:
        """One paid answer; returns its receipt id."""
        request_id = keccak256(label.encode())
        draft = ReceiptDraft(BASE, adapter_id, 12, 34, fee_gwei, keccak256(request_id), "{}", None, "none")
        with writing(self._rows) as session:
            reserve(session, self._accounts[name], request_id, fee_gwei, None, request_id, 60, NOW)
            return capture(session, request_id, draft, NOW).receipt_id

    def close_period(self, credits: dict[str, int]) -> None:
        """Close all final batches that no period has, as the closing job does."""
        period = self.next_period(credits)
        if period is not None:
            self.post(period)

    def next_period(self, credits: dict[str, int]) -> PeriodPayload | None:
        """None if no batch waits for one."""
        with reading(self._rows) as session:
            last = session.scalars(select(PeriodRow).order_by(PeriodRow.period_id.desc())).first()
            batches = session.scalars(select(BatchRow).where(BatchRow.state == "final")).all()
        first_batch = last.last_batch + 1 if last else 1
        taken = sorted((b for b in batches if b.batch_id >= first_batch), key=lambda b: b.batch_id)
        if not taken:
            return None
        earlier: tuple[Share, ...] = ()
        if last:
            earlier = decode_period(self._storage.get(f"blobs/{last.payload_hash}")).rewards
        payloads = [self._storage.get(f"blobs/{b.payload_hash}") for b in taken]
        receipts = [r for payload in payloads for r in decode_batch(payload).receipts]
        stage = self._site.stage
        id_of = stage.id_of
        values = [Credit(sha256(name.encode()), id_of(name), value) for name, value in credits.items()]
        sorted_credits = tuple(sorted(values, key=lambda credit: credit.group_id))
        fees: dict[bytes, int] = {}
        for receipt in receipts:
            fees[receipt.adapter_id] = fees.get(receipt.adapter_id, 0) + receipt.fee_gwei
        adapters = tuple(
            AdapterClose(adapter_id, id_of("bob"), fee_gwei, "made up", ZERO_ID, sorted_credits, ())
            for adapter_id, fee_gwei in sorted(fees.items())
        )
        period = PeriodPayload(
            last.period_id + 1 if last else 1,
            first_batch,
            taken[-1].batch_id,
            stage.rollup.head_of(taken[-1].batch_id),
            stage.deployment.chain_id,
            stage.deployment.distributor,
            SPLIT,
            Beneficiaries(id_of("admin"), id_of("treasury"), ZERO_ID, ZERO_ID, id_of("guardian")),
            adapters,
            (),
            (),
        )
        return replace(period, rewards=add_payouts(earlier, period.payouts()))

    def post(self, period: PeriodPayload) -> None:
        """Archive and enter a period as the closing job does."""
        payload = encode_period(period)
        self._storage.put(f"blobs/{keccak256(payload).hex()}", payload)
        with writing(self._rows) as session:
            session.add(
                PeriodRow(
                    period_id=period.period_id,
                    state="closed",
                    first_batch=period.first_batch,
                    last_batch=period.last_batch,
                    root=period.tree().root.hex(),
                    total_gwei=period.total_gwei,
                    payload_hash=keccak256(payload).hex(),
                    closed_at=NOW,
                )
            )


def settle(settler: Settler, world: World, books: Books) -> list[str]:
    """Tick to the end: all receipts settled, one period posted."""
    said = []
    for _ in range(MAX_TICKS):
        said += settler.tick()
        with reading(world.rows) as session:
            waits = outbox(session).num_receipts
            batches = set(session.scalars(select(BatchRow.state)))
            periods = set(session.scalars(select(PeriodRow.state)))
        if not waits and batches == {"final"} and periods == {"final"}:
            return said
        if not waits and batches == {"final"} and not periods:
            books.close_period(CREDITS)
    raise AssertionError(said)
