"""The signer as the process it is: over its socket, with its key file, under its policy."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from eth_account import Account
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import Corrupted, Rejected, Unavailable
from attribution.hashing import keccak256
from chain.signer import Signer, SignerClient, make_server, read_key
from chain.signer_policy import DAY_S, SignerPolicy
from chain.transactions import Call, Fees, Transaction, address_of, parse, tx_hash

LEDGER = bytes.fromhex("aa" * 20)
POKE = keccak256(b"poke(uint256)")[:4]
POLICY = SignerPolicy(
    chain_id=31337, contracts={"0x" + LEDGER.hex(): ("poke(uint256)",)}, max_gas=1_000_000, max_fee_wei=10**9
)
GOOD = Transaction(31337, 7, 100_000, Fees(10**6, 10**9), Call(LEDGER, POKE + bytes(32)))


@dataclass(frozen=True)
class Running:
    socket: Path
    key: Path
    process: subprocess.Popen[str]

    @property
    def client(self) -> SignerClient:
        return SignerClient(self.socket)


def start(folder: Path, policy: SignerPolicy = POLICY) -> Running:
    socket_path, key, policy_file = folder / "signer.sock", folder / "signer.key", folder / "policy.json"
    policy_file.write_text(policy.model_dump_json())
    command = [
        sys.executable,
        "-m",
        "chain.signer",
        "--socket",
        socket_path,
        "--key",
        key,
        "--policy",
        policy_file,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("signer of 0x")
    return Running(socket_path, key, process)


@pytest.fixture
def signer(tmp_path: Path) -> Iterator[Running]:
    running = start(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()


def test_the_signature_is_the_signers_and_the_bytes_parse_back(signer: Running) -> None:
    raw = signer.client.sign(GOOD)
    recovered = Account.recover_transaction(raw)
    assert bytes.fromhex(recovered[2:]) == signer.client.address()
    assert parse(raw) == GOOD
    assert signer.client.sign(GOOD) == raw


def test_key_and_socket_are_private_and_the_key_is_said_nowhere(signer: Running) -> None:
    """Nobody else may open either; after a signature and a refusal the output holds no key."""
    signer.client.sign(GOOD)
    with pytest.raises(Rejected):
        signer.client.sign(replace(GOOD, value_wei=1))
    for path in (signer.key, signer.socket, signer.key.with_name("signer.key.fees")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    signer.process.terminate()
    assert signer.process.stdout is not None
    assert read_key(signer.key).hex() not in signer.process.stdout.read()


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("signer_chain_id", {"chain_id": 10}),
        ("signer_contract", {"call": Call(bytes(20), POKE)}),
        ("signer_selector", {"call": Call(LEDGER, keccak256(b"transfer(address,uint256)")[:4] + bytes(64))}),
        ("signer_selector", {"call": Call(LEDGER, b"")}),
        ("signer_contract", {"call": Call(b"", POKE)}),
        ("signer_value", {"value_wei": 1}),
        ("signer_gas", {"gas": 1_000_001}),
        ("signer_fee", {"fees": Fees(10**6, 10**9 + 1)}),
        ("signer_fee", {"fees": Fees(10**9 + 1, 10**9)}),
    ],
)
def test_what_the_policy_does_not_allow_is_refused(
    signer: Running, code: str, change: dict[str, object]
) -> None:
    with pytest.raises(Rejected) as refused:
        signer.client.sign(replace(GOOD, **change))  # type: ignore[arg-type]
    assert refused.value.code == code


def test_the_daily_cap_survives_a_restart_and_ends_with_the_day(tmp_path: Path) -> None:
    """A bump of the same nonce costs its increase only; a refused one costs nothing; tomorrow is new."""
    policy = POLICY.model_copy(update={"max_daily_fee_wei": 2 * GOOD.worst_fee_wei})
    now = time.time()
    signer = Signer(tmp_path / "key", policy)
    signer.sign(replace(GOOD, fees=Fees(10**6, 10**9 // 2)), now)
    signer.sign(GOOD, now)
    again = Signer(tmp_path / "key", policy)
    again.sign(replace(GOOD, nonce=8), now)
    for _ in range(2):
        with pytest.raises(Rejected) as refused:
            again.sign(replace(GOOD, nonce=9), now)
        assert refused.value.code == "signer_daily_fee"
    again.sign(replace(GOOD, nonce=8), now)
    again.sign(replace(GOOD, nonce=9), now + DAY_S)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("signer_question", b"not json\n"),
        ("signer_question", b"[]\n"),
        ("signer_question", b'{"op": "sign"}\n'),
        ("signer_op", b'{"op": "export"}\n'),
    ],
)
def test_nonsense_is_answered_with_a_refusal(signer: Running, code: str, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(signer.socket))
        connection.sendall(line)
        assert json.loads(connection.makefile().readline())["code"] == code
    assert signer.client.address()


def test_a_dead_signer_is_unavailable_until_it_is_back(tmp_path: Path) -> None:
    """Killed hard, it leaves its socket behind; the next one takes the path and has the same key."""
    first = start(tmp_path)
    address = first.client.address()
    first.process.kill()
    first.process.communicate()
    with pytest.raises(Unavailable) as failed:
        first.client.address()
    assert failed.value.code == "signer_unavailable"
    second = start(tmp_path)
    assert second.client.address() == address
    second.process.kill()
    second.process.communicate()


def test_a_signer_that_signs_something_else_is_corrupted(tmp_path: Path) -> None:
    """The client compares what it gets with what it asked for."""

    class Other(Signer):
        def sign(self, transaction: Transaction, now_s: float):  # type: ignore[no-untyped-def]
            return super().sign(replace(transaction, nonce=transaction.nonce + 1), now_s)

    server = make_server(tmp_path / "socket", Other(tmp_path / "key", POLICY))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    with pytest.raises(Corrupted) as found:
        SignerClient(tmp_path / "socket").sign(GOOD)
    assert found.value.code == "signer_answer"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("code", "content", "mode"), [("signer_key_mode", "11" * 32, 0o644), ("signer_key", "no key", 0o600)]
)
def test_a_key_file_others_can_read_or_without_a_key_is_refused(
    tmp_path: Path, code: str, content: str, mode: int
) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(Rejected) as refused:
        read_key(path)
    assert refused.value.code == code and content not in refused.value.message


@pytest.mark.parametrize("policy", ["{}", '{"chain_id": 1, "contracts": {}, "max_gaz": 1}', "text"])
def test_a_policy_that_does_not_parse_stops_the_signer_in_one_line(tmp_path: Path, policy: str) -> None:
    (tmp_path / "policy").write_text(policy)
    flags = ["--socket", tmp_path / "s", "--key", tmp_path / "k", "--policy", tmp_path / "policy"]
    done = subprocess.run([sys.executable, "-m", "chain.signer", *flags], capture_output=True, text=True)
    assert done.returncode == 1 and "signer_policy" in done.stderr and "Traceback" not in done.stderr


@given(
    st.builds(
        Transaction,
        *[st.integers(0, 2**64)] * 3,
        fees=st.builds(Fees, st.integers(0, 2**64), st.integers(0, 2**64)),
        call=st.builds(Call, st.binary(min_size=20, max_size=20) | st.just(b""), st.binary(max_size=200)),
    )
)
def test_signed_bytes_are_those_of_eth_account(transaction: Transaction) -> None:
    key = b"\x11" * 32
    theirs = Account.sign_transaction(
        {
            "type": 2,
            "chainId": transaction.chain_id,
            "nonce": transaction.nonce,
            "maxPriorityFeePerGas": transaction.fees.tip_wei,
            "maxFeePerGas": transaction.fees.cap_wei,
            "gas": transaction.gas,
            "to": transaction.call.to,
            "value": 0,
            "data": transaction.call.data,
        },
        key,
    )
    raw = transaction.sign(key)
    assert raw == bytes(theirs.raw_transaction) and tx_hash(raw) == bytes(theirs.hash)
    assert parse(raw) == transaction
    assert "0x" + address_of(key).hex() == Account.from_key(key).address.lower()


@pytest.mark.parametrize(
    "raw", [b"", b"\x02", b"\x02\xc0", b"\x01" + GOOD.sign(b"\x11" * 32)[1:], os.urandom(50)]
)
def test_other_bytes_are_no_transaction(raw: bytes) -> None:
    with pytest.raises(Corrupted):
        parse(raw)
