"""The laptop's rollup: anvil in Optimism mode, with the fee predeploys that anvil leaves out.

With L1Block's costs set, anvil charges L1 data and operator fees as an OP chain does (and, unlike op-geth, in
calls too, which is why the zero address is given money). What it teaches wrongly about mempools is in
chain/README.md. Only for a loopback address: its development keys are known to everybody, so we use none."""

import contextlib
import json
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import rlp

from attribution.errors import Rejected, Unavailable
from attribution.hashing import keccak256
from chain.artifact import FOLDER
from chain.fees import L1_BLOCK, FeeParameters

GAS_PRICE_ORACLE = bytes.fromhex("420000000000000000000000000000000000000f")
BRIDGE = bytes.fromhex("deaddeaddeaddeaddeaddeaddeaddeaddead0001")  # OP's L1 attributes depositor
DEPOSIT_TYPE = b"\x7e"
DEPOSIT_GAS = 100_000
ENOUGH_WEI = 10**24
STATE_INTERVAL_S = 5  # what a killed node forgets at most
START_TIMEOUT_S = 20


# OP mainnet's scalars, L1 at 0.5 gwei, blobs at 0.01 gwei, no operator fee.
LAPTOP_FEES = FeeParameters(
    base_fee_wei=500_000_000,
    blob_base_fee_wei=10_000_000,
    base_fee_scalar=5_227,
    blob_base_fee_scalar=1_014_213,
    operator_fee_scalar=0,
    operator_fee_constant_wei=0,
)


def command(anvil: Path, port: int, chain_id: int, state: Path | None = None) -> list[str]:
    """The program and its arguments. ``state`` is loaded at the start and written at the end and every few
    seconds, so the chain outlives its process."""
    argv = [str(anvil), "--network", "optimism", "--host", "127.0.0.1", "--port", str(port), "--quiet"]
    argv += ["--chain-id", str(chain_id), "--accounts", "1", "--balance", "0", "--no-cors"]
    if state is not None:
        argv += ["--state", str(state), "--state-interval", str(STATE_INTERVAL_S)]
    return argv


def answers(rpc_url: str) -> bool:
    """Is there a node?"""
    try:
        return bool(ask(rpc_url, "eth_chainId"))
    except Unavailable:
        return False


def ask(rpc_url: str, method: str, *params: object) -> object:
    """One JSON-RPC question to a local node, its development methods included."""
    question = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    try:
        answer = httpx.post(rpc_url, json=question, timeout=10.0).json()
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable("chain_unavailable", f"{method}: no answer from {rpc_url}: {error}") from error
    if "error" in answer:
        raise Rejected("refused_by_node", f"{method}: {answer['error'].get('message')}", field=method)
    return answer["result"]


def prepare(rpc_url: str, fees: FeeParameters = LAPTOP_FEES) -> None:
    """Install the predeploys and say what L1 fees. Idempotent."""
    predeploys = json.loads((FOLDER / "predeploys.json").read_text(encoding="utf-8"))
    ask(rpc_url, "anvil_setCode", _hex(GAS_PRICE_ORACLE), predeploys["GasPriceOracle"])
    ask(rpc_url, "anvil_setCode", _hex(L1_BLOCK), predeploys["L1Block"])
    _store(rpc_url, GAS_PRICE_ORACLE, 0, 0x010101)  # isEcotone, isFjord, isIsthmus
    _store(rpc_url, L1_BLOCK, 1, fees.base_fee_wei)
    _store(rpc_url, L1_BLOCK, 3, fees.base_fee_scalar << 96 | fees.blob_base_fee_scalar << 64)
    _store(rpc_url, L1_BLOCK, 7, fees.blob_base_fee_wei)
    _store(rpc_url, L1_BLOCK, 8, fees.operator_fee_scalar << 64 | fees.operator_fee_constant_wei)
    ask(rpc_url, "anvil_setBalance", "0x" + "00" * 20, hex(ENOUGH_WEI))


def bridge(rpc_url: str, to: bytes, amount_wei: int) -> bytes:
    """Bring gas money to ``to``, as a deposit from L1 does: an unsigned type-0x7e transaction that mints.

    Source: https://specs.optimism.io/protocol/deposits.html. Returns its hash. ``Rejected`` by a real
    rollup, where only derivation makes deposits."""
    source = secrets.token_bytes(32)  # of L1's log in real life; here it only has to differ
    fields = [source, BRIDGE, to, amount_wei, amount_wei, DEPOSIT_GAS, b"", b""]
    raw = DEPOSIT_TYPE + bytes(rlp.encode(fields))
    ask(rpc_url, "eth_sendRawTransaction", _hex(raw))
    return keccak256(raw)


@contextlib.contextmanager
def running(anvil: Path, *, chain_id: int = 31337, state: Path | None = None, port: int = 0) -> Iterator[str]:
    """A prepared chain of one's own for as long as the block lasts; yields its RPC address."""
    port = port or _free_port()
    process = subprocess.Popen(command(anvil, port, chain_id, state), stdin=subprocess.DEVNULL)
    rpc_url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, rpc_url)
        prepare(rpc_url)
        yield rpc_url
    finally:
        process.terminate()
        process.wait(timeout=START_TIMEOUT_S)


def mine(rpc_url: str, seconds: int = 0) -> None:
    """Mine one block, ``seconds`` of chain time after the last."""
    if seconds:
        ask(rpc_url, "evm_increaseTime", seconds)
    ask(rpc_url, "evm_mine")


def _wait(process: "subprocess.Popen[bytes]", rpc_url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(rpc_url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable("anvil_not_up", f"anvil at {rpc_url}: exit code {process.poll()}, no answer")
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _store(rpc_url: str, address: bytes, slot: int, value: int) -> None:
    ask(rpc_url, "anvil_setStorageAt", _hex(address), hex(slot), _hex(value.to_bytes(32, "big")))


def _hex(value: bytes) -> str:
    return "0x" + value.hex()
