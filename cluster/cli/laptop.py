"""What a laptop plays besides the platform: the rollup, the EigenDA proxy, the signer, and the people's
wallets.

A cluster reaches the real ones at the same settings, so nothing outside this module knows the difference.
Every function may be repeated: what runs or exists already is left as it is.
"""

import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from attribution.errors import Rejected, Unavailable
from chain import anvil
from chain.deploy import Terms, deploy, register, verify
from chain.deployment import Deployment, load_deployment
from chain.rollup import Rollup
from chain.signer import SignerClient
from chain.signer_policy import SignerPolicy
from chain.toolchain import install
from cluster import processes
from cluster.cli.screen import console
from cluster.config import Settings, child_environment, private_dir
from cluster.wallets import Wallet, wallet

CHAIN, DA, SIGNER = "chain", "da", "signer"
GAS_MONEY_WEI = 10**18
MAX_BATCH_GAS = 30_000_000


def say(line: str) -> None:
    console.print(f"  {line}", style="dim")


def own_wallet(settings: Settings, name: str) -> Wallet:
    return wallet(Path(settings.chain.signer_keys_dir), name)


def start_chain(settings: Settings) -> None:
    """anvil in Optimism mode, with its state on disk, unless a node answers at the configured address."""
    rpc_url = settings.chain.rpc_url
    if processes.find(CHAIN, settings.run_dir) is None and anvil.answers(rpc_url):
        say(f"a node answers at {rpc_url}: using it")
        return
    tools = install(settings.home / "node", say)
    state = settings.home / "chain" / "anvil.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    argv = anvil.command(tools.anvil, _local_port(rpc_url), settings.chain.chain_id, state)
    processes.start(CHAIN, argv, private_dir(settings.run_dir), is_ready=lambda: anvil.answers(rpc_url))
    anvil.prepare(rpc_url)
    say(f"rollup: anvil in Optimism mode at {rpc_url}, chain {settings.chain.chain_id}")


def start_da(settings: Settings) -> None:
    """The EigenDA stand-in, unless something speaks its protocol at the configured address."""
    url = settings.chain.da_url
    if processes.find(DA, settings.run_dir) is None and _is_healthy(url):
        say(f"an EigenDA proxy answers at {url}: using it")
        return
    folder = str(settings.home / "da")
    argv = [sys.executable, "-m", "chain.da_standin", "--port", str(_local_port(url)), "--dir", folder]
    processes.start(DA, argv, private_dir(settings.run_dir), is_ready=lambda: _is_healthy(url))
    say(f"data availability: EigenDA stand-in at {url}")


def deploy_contracts(settings: Settings) -> Deployment:
    """Deploy once; afterwards check that the contracts on the chain are the ones in the deployment file."""
    path = Path(settings.chain.addresses_path)
    if not path.exists():
        platform, guardian = own_wallet(settings, "platform"), own_wallet(settings, "guardian")
        settler = own_wallet(settings, "settler")
        bridge_gas(settings, platform.address, settler.address)
        terms = Terms(
            treasury=platform.address,
            admin=platform.address,
            settler=settler.address,
            guardian=guardian.address,
            withdrawal_delay_s=settings.chain.withdrawal_delay_s,
            activation_delay_s=settings.chain.activation_delay_s,
        )
        deploy(settings.chain.rpc_url, platform.key, terms, say).save(path)
    deployment = load_deployment(path)
    try:
        verify(Rollup(settings.chain.rpc_url, deployment))
    except Rejected as refusal:
        raise Rejected(
            "other_chain", f"{path} is of another chain ({refusal.message}); remove it to deploy anew"
        ) from refusal
    return deployment


def bridge_gas(settings: Settings, *holders: bytes) -> None:
    """Bring gas money from L1, as anyone on an OP chain would; the local chain mines it at once."""
    for holder in holders:
        anvil.bridge(settings.chain.rpc_url, holder, GAS_MONEY_WEI)


def register_wallets(settings: Settings, deployment: Deployment, wallets: list[bytes]) -> int:
    """Put wallets on record at the platform's expense: a contributor needs no gas money to be paid."""
    rollup = Rollup(settings.chain.rpc_url, deployment)
    return register(rollup, own_wallet(settings, "platform").key, wallets)


def start_signer(settings: Settings, deployment: Deployment) -> None:
    """The process with the settler's key, which signs the settler's calls of our contracts only."""
    policy = SignerPolicy(
        chain_id=deployment.chain_id,
        contracts={
            deployment.ledger.hex(): (
                "commitBatch((uint64,bytes32,bytes32,uint32,uint256),bytes,(address,uint256)[])",
            ),
            deployment.distributor.hex(): (
                "postPeriod((uint64,bytes32,uint256,uint64,uint64,bytes32,bytes32),bytes)",
            ),
            deployment.escrow.hex(): ("authorize((address,address,uint256,uint64),bytes)",),
        },
        max_gas=MAX_BATCH_GAS,
    )
    policy_path = settings.home / "chain" / "signer-policy.json"
    policy_path.write_text(policy.model_dump_json(indent=2), encoding="utf-8")
    own_wallet(settings, "settler")
    key = Path(settings.chain.signer_keys_dir) / "settler.key"
    socket = Path(settings.chain.signer_socket)
    argv = [sys.executable, "-m", "chain.signer", "--socket", str(socket), "--key", str(key)]
    processes.start(
        SIGNER,
        [*argv, "--policy", str(policy_path)],
        private_dir(settings.run_dir),
        is_ready=lambda: _signs(socket, deployment.settler),
        env=child_environment(settings),
    )
    say(f"signer of 0x{deployment.settler.hex()} at {socket}")


def _signs(socket: Path, expected: bytes) -> bool:
    try:
        return SignerClient(socket).address() == expected
    except Unavailable:
        return False


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def _local_port(url: str) -> int:
    """A laptop starts servers on loopback only; anything else must be running already."""
    parts = urlsplit(url)
    if parts.hostname not in {"127.0.0.1", "localhost"} or parts.port is None:
        raise Unavailable("not_running", f"nothing answers at {url}, and it is not ours to start")
    return parts.port
