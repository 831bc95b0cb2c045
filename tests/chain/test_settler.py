"""Receipts are settled exactly once, whatever dies, lies or goes away."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from attribution.errors import Corrupted
from attribution.payload import WEI_PER_GWEI
from chain.audit import audit_arithmetic
from chain.outbox import BatchRules
from chain.payload_source import PayloadSource
from chain.rollup import Rollup
from chain.settler import Settler
from chain.signer import SignerClient
from chain.transactions import Call, Fees, Transaction, parse
from chain.world import SettlerRules, World
from cluster.accounts import payer_of
from cluster.database import reading, writing
from cluster.ledger import DISTRIBUTOR, ESCROW, FEES, balance, imbalance
from cluster.tables import (
    BatchReceiptRow,
    BatchRow,
    LeaseRow,
    LedgerEntryRow,
    ReceiptRow,
    TransactionRow,
)
from tests.chain.crashing import Doom, Watched, forked
from tests.chain.settling import AT_ONCE, MAX_TICKS, Books, Site, paid_site, rewound, settle
from tests.chain.stage import FAR, address, key, set_stage

pytestmark = pytest.mark.evm


@pytest.fixture(scope="module")
def paid(rpc_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with paid_site(set_stage(rpc_url), tmp_path_factory.mktemp("site")) as opened:
        yield opened


@pytest.fixture
def here(paid: Site) -> Iterator[Site]:
    with rewound(paid, paid.folder / "paid.db"):
        yield paid


@pytest.fixture
def books(here: Site) -> Books:
    return Books(here)


@pytest.fixture
def no_automine(here: Site) -> None:
    here.rpc("evm_setAutomine", False)  # ``rewound`` switches it on again


def run(here: Site, rules: SettlerRules = AT_ONCE, **changed: Any) -> list[str]:
    world = replace(here.open(), **changed)
    return settle(Settler(world, rules, "one"), world, Books(here))


def assert_settled(here: Site, num_receipts: int = 6) -> None:
    """Each receipt once; ledger zero; escrow as the rows say; no transaction that is not in the journal; and
    a stranger's audit finds nothing."""
    world = here.open()
    with reading(world.rows) as session:
        assert session.scalar(select(func.count(ReceiptRow.receipt_id))) == num_receipts
        assert session.scalar(select(func.count(BatchReceiptRow.receipt_id))) == num_receipts
        assert imbalance(session) == {} and session.scalar(select(func.sum(LedgerEntryRow.amount_gwei))) == 0
        escrow_gwei, distributor_gwei = -balance(session, ESCROW), -balance(session, DISTRIBUTOR)
        assert balance(session, FEES) == distributor_gwei
        is_final = TransactionRow.state == "final"
        journalled = session.scalars(select(TransactionRow.nonce).where(is_final)).all()
        live = select(func.count()).where(TransactionRow.state.in_(("signed", "sent", "mined")))
        assert session.scalar(live) == 0
    d = here.stage.deployment
    assert world.rollup.token_balance_wei(d.escrow) == escrow_gwei * WEI_PER_GWEI
    assert world.rollup.token_balance_wei(d.distributor) == distributor_gwei * WEI_PER_GWEI
    ours = [nonce for nonce in journalled if nonce >= 0]
    assert len(set(ours)) == len(ours) and max(ours) + 1 == world.rollup.nonce(address("settler"))
    report = audit_arithmetic(world.rollup, PayloadSource(world.da, world.storage))
    assert report.is_clean, report.to_text()
    assert report.checked["receipts"] == num_receipts and report.checked["periods"] == 1
    world.rows.dispose()


def end_lease(world: World) -> None:
    with writing(world.rows) as session:
        session.execute(update(LeaseRow).values(expires_at=0))


def batch_row(world: World, batch_id: int = 1) -> BatchRow:
    with reading(world.rows) as session:
        return session.get_one(BatchRow, batch_id)


def test_receipts_become_a_batch_and_a_period(here: Site, books: Books) -> None:
    """Ceilings first, then the batch, then the period; a second settler of the same books has nothing to
    do."""
    said = run(here)
    order = [line.split()[0].split(":")[0] for line in said if " sent as " in line]
    assert order == ["ceiling", "ceiling", "batch", "period"]
    assert_settled(here)
    assert here.settler().tick() == ["leads with term 3"]


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_settler_killed_between_any_two_steps_is_resumed_without_loss_or_repetition(
    here: Site, books: Books, tmp_path: Path, stride: int
) -> None:
    """For every n (every thirteenth in the quick suite): kill -9 at the n-th effect or commit, start another
    process, let it end; then all is settled exactly once. How many steps there are is found by running until
    a process survives."""
    template = tmp_path / "template.db"
    here.save_rows(template)

    def life(steps: int) -> int:
        def work() -> None:
            world = Doom(steps).watch(here.open())
            settle(Settler(world, AT_ONCE, "one"), world, Books(here))

        return forked(work)

    for steps in range(0, 200, stride):
        with rewound(here, template):
            ended = life(steps)
            if ended == -9:
                assert life(10**9) == 0
                assert_settled(here)
        if ended == 0:
            assert steps > 40, "the path has more steps than that"
            return
        assert ended == -9
    raise AssertionError("never survived")


def test_the_older_of_two_settlers_writes_nothing(here: Site, books: Books) -> None:
    """Another takes over while the first waits for its certificate: the first does not enter it, and
    stops."""
    first = here.open()
    late = here.settler("late")
    end_lease(first)

    def take_over() -> None:
        end_lease(first)
        assert any("leads with term" in line for line in late.tick())

    steps = iter([take_over])
    da: Any = Watched(first.da, "put", lambda: next(steps, lambda: None)())
    said = Settler(replace(first, da=da), AT_ONCE, "early").tick()
    assert "another settler leads" in said[-1]
    settle(late, here.open(), books)
    assert_settled(here)


def test_one_settler_waits_while_another_leads(here: Site, books: Books) -> None:
    early, late = here.settler("early"), here.settler("late")
    end_lease(here.open())
    assert "leads with term" in early.tick()[0]
    assert "does not lead: lease_held" in late.tick()[0]


@pytest.mark.parametrize("fault", ["da", "chain", "signer"])
def test_what_is_down_is_waited_for_and_the_rest_goes_on(here: Site, books: Books, fault: str) -> None:
    """The batch is sealed whatever is down; nothing is lost, and all is settled once it is back."""
    world = here.open()
    down: dict[str, Any] = {
        "da": {"da": type(world.da)("http://127.0.0.1:9", patience_s=0.1)},
        "chain": {"rollup": Rollup("http://127.0.0.1:9", here.stage.deployment)},
        "signer": {"signer": SignerClient(here.folder / "nobody")},
    }
    settler = Settler(replace(world, **down[fault]), AT_ONCE, "one")
    said = settler.tick() + settler.tick()
    assert any("waits: " in line and "unavailable" in line for line in said)
    assert batch_row(world).state == ("sealed" if fault == "da" else "dispersed")
    run(here)
    assert_settled(here)


def test_a_certificate_that_does_not_lead_to_the_payload_is_discarded_before_it_is_used(
    here: Site, books: Books
) -> None:
    """A byte of the blob changes between dispersal and commit: dispersed again under another certificate."""

    def spoil() -> None:
        for blob in (here.folder / "da").iterdir():
            data = bytearray(blob.read_bytes())
            data[40] ^= 1
            blob.write_bytes(data)
            (here.folder / "da").chmod(0o700)

    da = here.open().da
    spoils = iter([lambda: None, spoil])
    watched: Any = Watched(da, "put", lambda: next(spoils, lambda: None)())
    assert any("dispersing again" in line for line in run(here, da=watched))
    assert_settled(here)


def test_a_transaction_that_is_not_mined_is_outbid_by_a_tenth_until_one_version_lands(
    here: Site, books: Books, no_automine: None
) -> None:
    world = here.open()
    settler = Settler(world, replace(AT_ONCE, resubmit_s=0), "one")
    for _ in range(4):
        settler.tick()
    with reading(world.rows) as session:
        versions = [parse(raw) for raw in session.scalars(select(TransactionRow.raw))]
    fees = sorted((v.fees.cap_wei, v.fees.tip_wei) for v in versions)
    assert len(fees) >= 3 and len({v.nonce for v in versions}) == 1
    for (cap, tip), (next_cap, next_tip) in pairwise(fees):
        assert next_cap * 10 >= cap * 11 and next_tip * 10 >= tip * 11
    here.rpc("evm_setAutomine", True)
    here.rpc("evm_mine")
    run(here)
    assert_settled(here)


def test_bidding_ends_at_five_times_the_suggestion(here: Site, books: Books, no_automine: None) -> None:
    """From there on the same bytes are offered again."""
    world = here.open()
    settler = Settler(world, replace(AT_ONCE, resubmit_s=0), "one")
    said = [line for _ in range(40) for line in settler.tick()]
    assert "the limit" in said[-1]
    with reading(world.rows) as session:
        caps = [parse(raw).fees.cap_wei for raw in session.scalars(select(TransactionRow.raw))]
    assert max(caps) <= 5 * world.rollup.suggest_fees().cap_wei


def test_a_transaction_dropped_by_the_node_is_sent_again_byte_for_byte_after_a_restart(
    here: Site, books: Books, no_automine: None
) -> None:
    here.settler().tick()
    here.rpc("anvil_dropAllTransactions")
    here.rpc("evm_setAutomine", True)
    said = here.settler().tick()
    assert any(" sent as " in line for line in said)
    with reading(here.open().rows) as session:
        assert session.scalar(select(func.count(TransactionRow.tx_hash))) == 1
    run(here)
    assert_settled(here)


def test_a_batch_whose_block_is_reorganised_away_is_sent_again(here: Site, books: Books) -> None:
    """Not final before the safe block is past it; until then it may fall out, and comes back."""
    rules = replace(AT_ONCE, final_tag="safe")
    world = here.open()
    settler = Settler(world, rules, "one")
    while batch_row_state(world) != "mined":
        settler.tick()
    here.rpc("evm_setAutomine", False)
    here.rpc("anvil_reorg", 1, [])
    said = settler.tick()
    assert any("fell out of block" in line for line in said)
    assert batch_row(world).state == "sent"
    here.rpc("evm_setAutomine", True)
    here.rpc("evm_mine")
    settler.tick()
    assert batch_row(world).state == "mined"
    here.rpc("anvil_mine", hex(40))
    settler.tick()
    assert batch_row(world).state == "final"


def batch_row_state(world: World) -> str:
    with reading(world.rows) as session:
        return session.scalar(select(BatchRow.state)) or "none"


def test_what_is_on_chain_already_is_adopted(here: Site, books: Books, tmp_path: Path) -> None:
    """Rows restored from before the sending (a lost journal): the chain's batch and period are ours to the
    byte, so they are taken over, and nothing is sent twice."""
    world = here.open()
    settler = here.settler()
    while batch_row_state(world) != "dispersed":
        settler.tick()
    here.save_rows(tmp_path / "backup.db")
    run(here)
    used = world.rollup.nonce(address("settler"))
    here.restore_rows(tmp_path / "backup.db")
    said = [line for _ in range(4) for line in here.settler().tick()]
    assert any("batch:1 was on chain already" in line for line in said)
    assert batch_row(here.open()).state == "final"
    assert world.rollup.nonce(address("settler")) == used


def test_what_a_killed_chain_forgot_is_sent_again_byte_for_byte(here: Site, books: Books) -> None:
    """A local chain comes back some blocks younger than it was when rows called them final."""
    world = here.open()
    nowhere = type(world.da)("http://127.0.0.1:9", patience_s=0.1)
    Settler(replace(world, da=nowhere), AT_ONCE, "one").tick()
    snapshot = here.rpc("evm_snapshot")
    run(here)
    with reading(world.rows) as session:
        sent = set(session.scalars(select(TransactionRow.tx_hash)))
    here.rpc("evm_revert", snapshot)
    settler = here.settler()
    said = settler.tick()
    assert sum("gone from the chain" in line for line in said) == 4
    while settler.tick():
        pass
    with reading(world.rows) as session:
        assert set(session.scalars(select(TransactionRow.tx_hash))) == sent
    assert_settled(here)


def test_another_batch_under_our_number_stops_the_settler(here: Site, books: Books) -> None:
    world = here.open()
    settler = here.settler()
    while batch_row_state(world) != "dispersed":
        settler.tick()
    for name, most in (("alice", 900), ("bob", 500)):
        here.stage.authorize(name, ceiling_gwei=most, expiry=2**40, by="treasury")
    here.stage.settle({"alice": 7})
    with pytest.raises(Corrupted) as found:
        for _ in range(MAX_TICKS):
            here.settler().tick()
    assert found.value.code == "foreign_batch"


def test_an_archive_that_was_changed_stops_the_settler(here: Site, books: Books) -> None:
    world = here.open()
    Settler(replace(world, da=type(world.da)("http://127.0.0.1:9", patience_s=0.1)), AT_ONCE, "one").tick()
    world.storage.put(f"blobs/{batch_row(world).payload_hash}", b"something else")
    with pytest.raises(Corrupted) as found:
        here.settler().tick()
    assert found.value.code == "archive_hash"


def test_a_nonce_that_went_to_somebody_elses_transaction_is_given_up(
    here: Site, books: Books, no_automine: None
) -> None:
    """The settler's key was used elsewhere: a new transaction takes a new nonce."""
    world = here.open()
    settler = Settler(world, AT_ONCE, "one")
    settler.tick()
    here.rpc("anvil_dropAllTransactions")
    d = here.stage.deployment
    nonce = world.rollup.nonce(address("settler"))
    other = Transaction(d.chain_id, nonce, 100_000, Fees(10**9, 10**10), Call(d.token, b""))
    other = replace(other, call=world.rollup.encode_register([address("bob")]))
    world.rollup.send_raw(other.sign(key("settler")))
    here.rpc("evm_setAutomine", True)
    here.rpc("evm_mine")
    assert any("went to another transaction" in line for line in settler.tick())
    run(here)
    with reading(world.rows) as session:
        assert {r.state for r in session.scalars(select(TransactionRow))} == {"final", "replaced"}


def test_deposits_count_when_final_and_wishes_to_withdraw_at_once(here: Site, books: Books) -> None:
    """``safe`` is 32 blocks behind on this chain."""
    carol = address("carol")
    books.open_payer("carol", 1000, 900)
    world = here.open()
    settler = Settler(world, SettlerRules(BatchRules(max_age_s=2**40), "safe"), "one")

    def spendable() -> tuple[int, int]:
        settler.tick()
        with reading(world.rows) as session:
            payer = payer_of(session, carol)
        return payer.deposited_gwei, payer.withdrawing_gwei

    assert spendable() == (0, 0)
    here.rpc("anvil_mine", hex(40))
    assert spendable() == (1000, 0)
    here.stage.do("carol", world.rollup.encode_request_withdrawal(300 * WEI_PER_GWEI))
    assert spendable() == (1000, 300)
    here.stage.pass_time(4_000)
    here.stage.do("carol", world.rollup.encode_withdraw())
    assert spendable() == (1000, 300)
    here.rpc("anvil_mine", hex(40))
    assert spendable() == (700, 0)
    with reading(world.rows) as session:
        assert balance(session, ESCROW) == -2200


def test_a_batch_that_fails_on_chain_waits_for_what_it_lacks_and_takes_a_new_transaction(
    here: Site, books: Books
) -> None:
    """Carol's ceiling ends while the batch waits for its block: it fails there, costs nothing more while the
    contract would refuse it, and is settled when she has signed again."""
    world = here.open()
    books.open_payer("carol", 100, 100, expiry=world.rollup.timestamp() + 1000)
    Settler(world, SettlerRules(BatchRules(max_age_s=2**40), "latest"), "one").tick()
    books.serve("carol", 9, "hers")
    settler = here.settler()
    while sum(state == "final" for state in transaction_states(world)) < 2:
        settler.tick()
    here.rpc("evm_setAutomine", False)
    assert any("batch:1 sent as" in line for line in settler.tick())
    here.rpc("evm_increaseTime", 2000)
    here.rpc("evm_mine")
    said = settler.tick()
    assert any("batch:1 reverted" in line for line in said)
    assert any("CeilingExpired" in line for line in said)
    num_signed = len(transaction_states(world))
    assert any("CeilingExpired" in line for line in settler.tick())
    assert len(transaction_states(world)) == num_signed
    books.sign_ceiling("carol", 100, FAR)
    here.rpc("evm_setAutomine", True)
    run(here)
    assert "reverted" in transaction_states(world)
    assert_settled(here, num_receipts=7)


def transaction_states(world: World) -> list[str]:
    with reading(world.rows) as session:
        return list(session.scalars(select(TransactionRow.state)))


def test_many_batches_follow_one_another(here: Site, books: Books) -> None:
    """Two receipts a batch: three batches, captures cumulative, heads chained."""
    world = here.open()
    rules = replace(AT_ONCE, batch=BatchRules(max_receipts=2, max_age_s=0))
    settle(Settler(world, rules, "one"), world, books)
    with reading(world.rows) as session:
        assert session.scalars(select(BatchRow.num_receipts)).all() == [2, 2, 2]
    assert_settled(here)
