"""Rollup: what a node answers becomes our values and our three refusals, and nothing else."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from attribution.errors import Rejected, Unavailable
from chain import anvil
from chain.rollup import Rollup
from chain.transactions import Call, Fees, Transaction, tx_hash
from tests.chain.stage import Stage, address, key

pytestmark = pytest.mark.evm


def transfer(stage: Stage, *, nonce: int | None = None, fees: Fees | None = None, to: str = "bob") -> bytes:
    """Signed bytes by alice that do nothing much."""
    return Transaction(
        chain_id=stage.deployment.chain_id,
        nonce=stage.rollup.nonce(address("alice")) if nonce is None else nonce,
        gas=100_000,
        fees=fees or stage.rollup.suggest_fees(),
        call=Call(address(to), b""),
    ).sign(key("alice"))


def refusal(stage: Stage, raw: bytes) -> str:
    with pytest.raises(Rejected) as error:
        stage.rollup.send_raw(raw)
    return error.value.code


def test_a_receipt_is_none_until_mined(stage: Stage) -> None:
    raw = transfer(stage)
    assert stage.rollup.receipt(tx_hash(raw)) is None
    assert stage.rollup.send_raw(raw) == tx_hash(raw)
    anvil.mine(stage.rpc_url)  # it may still be at it when it has answered
    mined = stage.rollup.receipt(tx_hash(raw))
    assert mined is not None and mined.succeeded
    assert mined.block_hash == stage.rollup.block_hash(mined.block)
    assert mined.gas_used == 21_000


def test_sending_the_same_bytes_again_is_fine_while_they_wait(stage: Stage) -> None:
    """Whoever restarts sends its journal again."""
    anvil.ask(stage.rpc_url, "evm_setAutomine", False)
    raw = transfer(stage)
    try:
        assert stage.rollup.send_raw(raw) == stage.rollup.send_raw(raw) == tx_hash(raw)
    finally:
        anvil.ask(stage.rpc_url, "evm_setAutomine", True)
        anvil.mine(stage.rpc_url)
    assert stage.rollup.receipt(tx_hash(raw)) is not None


def test_refusals_by_the_mempool_have_codes(stage: Stage) -> None:
    """What the settler does next depends on them."""
    fees = stage.rollup.suggest_fees()
    nonce = stage.rollup.nonce(address("alice"))
    stage.rollup.send_raw(transfer(stage))
    assert refusal(stage, transfer(stage, nonce=nonce, to="carol")) == "nonce_too_low"
    assert refusal(stage, transfer(stage, fees=Fees(0, 1))) == "fee_too_low"
    assert refusal(stage, b"\x02\xc0") == "transaction_refused"
    anvil.ask(stage.rpc_url, "evm_setAutomine", False)
    try:
        stage.rollup.send_raw(transfer(stage, fees=fees))
        assert refusal(stage, transfer(stage, fees=fees, to="carol")) == "replacement_underpriced"
        dearer = Fees(2 * fees.tip_wei, 2 * fees.cap_wei)
        stage.rollup.send_raw(transfer(stage, fees=dearer, to="carol"))
    finally:
        anvil.ask(stage.rpc_url, "evm_setAutomine", True)
        anvil.mine(stage.rpc_url)


def test_a_sender_without_gas_money_is_to_be_retried(stage: Stage) -> None:
    poor = bytes.fromhex("11" * 32)
    raw = Transaction(
        stage.deployment.chain_id, 0, 21_000, stage.rollup.suggest_fees(), Call(address("bob"), b"")
    ).sign(poor)
    with pytest.raises(Unavailable) as error:
        stage.rollup.send_raw(raw)
    assert error.value.code == "insufficient_funds"


def test_a_revert_names_the_error_and_its_values(stage: Stage) -> None:
    with pytest.raises(Rejected) as error:
        stage.rollup.estimate_gas(address("guardian"), stage.rollup.encode_disable(7))
    assert (error.value.code, error.value.field) == ("reverted", "NotPending")
    assert error.value.message == "NotPending(periodId=7)"


def test_a_dead_node_is_unavailable(stage: Stage) -> None:
    nobody = Rollup("http://127.0.0.1:1", stage.deployment)
    for question in (nobody.chain_id, nobody.next_batch_id, lambda: list(nobody.events())):
        with pytest.raises(Unavailable) as error:
            question()
        assert error.value.code == "chain_unavailable"


@contextmanager
def a_node_that_says(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *said: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, b"slow down"),
        (503, b"no backend"),
        (200, b"<html>we are moving</html>"),
        (200, b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -32005, "message": "Rate limit reached"}}'),
        (200, b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "header not found"}}'),
    ],
)
def test_a_busy_node_is_unavailable(stage: Stage, status: int, body: bytes) -> None:
    """Nothing is lost and nobody is to blame: the caller tries again."""
    with a_node_that_says(status, body) as rpc_url, pytest.raises(Unavailable) as error:
        Rollup(rpc_url, stage.deployment).send_raw(b"\x02\xc0")
    assert error.value.code == "chain_unavailable"


def test_contracts_are_unavailable_before_they_are_there(stage: Stage) -> None:
    """A finalised block may be older than the deployment; a later one will not be."""
    for tag in (stage.deployment.block - 1, 10**9):
        with pytest.raises(Unavailable):
            stage.rollup.next_batch_id(tag)
    assert list(stage.rollup.events(tag=stage.deployment.block - 1)) == []


def test_reads_at_an_earlier_block_see_the_earlier_state(stage: Stage) -> None:
    stage.fund("alice", 10)
    before = stage.rollup.block_number()
    stage.settle({"alice": 1})
    assert stage.rollup.next_batch_id(before) == 1
    assert stage.rollup.next_batch_id() == 2
    assert stage.rollup.head(before) == bytes(32)


def test_a_bridged_deposit_mints_gas_money(stage: Stage) -> None:
    before = stage.rollup.balance_wei(address("alice"))
    sent = anvil.bridge(stage.rpc_url, address("alice"), 123)
    anvil.mine(stage.rpc_url)  # it may still be at it when it has answered
    mined = stage.rollup.receipt(sent)
    assert mined is not None and mined.succeeded
    assert stage.rollup.balance_wei(address("alice")) == before + 123
