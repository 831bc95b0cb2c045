"""The laptop's chain: it survives its process, killed or ended, and its predeploys are the real ones."""

import subprocess
import time
from pathlib import Path

import pytest

from attribution.errors import Unavailable
from chain import anvil
from chain.deploy import verify
from chain.rollup import Rollup
from chain.toolchain import Toolchain
from tests.chain.stage import Stage, address, set_stage

pytestmark = pytest.mark.evm


def test_the_chain_survives_a_restart(toolchain: Toolchain, tmp_path: Path) -> None:
    """Contracts, balances, receipts and events are there again."""
    state = tmp_path / "state.json"
    with anvil.running(toolchain.anvil, state=state) as rpc_url:
        stage = set_stage(rpc_url)
        stage.fund("alice", 100)
        stage.settle({"alice": 7})
        said = list(stage.rollup.events())
        sent = stage.rollup.receipt(said[-1].at.tx_hash)
        block = stage.rollup.block_number()
    with anvil.running(toolchain.anvil, state=state) as rpc_url:
        again = Stage(rpc_url, Rollup(rpc_url, stage.deployment))
        verify(again.rollup)
        assert list(again.rollup.events()) == said
        assert again.rollup.receipt(said[-1].at.tx_hash) == sent
        assert again.rollup.block_number() == block
        again.settle({"alice": 8})


def test_a_killed_chain_forgets_seconds_at_most(toolchain: Toolchain, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    argv = anvil.command(toolchain.anvil, 0, 31337, state)
    with anvil.running(toolchain.anvil, state=state) as rpc_url:
        port = int(rpc_url.rpartition(":")[2])
    argv[argv.index("--port") + 1] = str(port)
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        while not anvil.answers(rpc_url):
            time.sleep(0.02)
        anvil.bridge(rpc_url, address("alice"), 5)
        time.sleep(anvil.STATE_INTERVAL_S + 1.5)
    finally:
        process.kill()
        process.wait()
    with anvil.running(toolchain.anvil, state=state) as rpc_url:
        assert (
            int(str(anvil.ask(rpc_url, "eth_getBalance", "0x" + address("alice").hex(), "latest")), 16) == 5
        )


def test_a_program_that_is_no_node_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as error, anvil.running(Path("/bin/false")):
        pass
    assert error.value.code == "anvil_not_up"


def test_the_predeploys_say_who_they_are(stage: Stage) -> None:
    """GasPriceOracle 1.4.0 and L1Block 1.6.0 of the OP Stack."""
    for place, version in ((anvil.GAS_PRICE_ORACLE, b"1.4.0"), (anvil.L1_BLOCK, b"1.6.0")):
        call = {"to": "0x" + place.hex(), "data": "0x54fd4d50"}
        assert version in bytes.fromhex(str(anvil.ask(stage.rpc_url, "eth_call", call, "latest"))[2:])
