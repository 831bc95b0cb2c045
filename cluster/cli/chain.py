"""``openledger chain``: our contracts on any rollup. Keys come from files, never from the command line."""

from dataclasses import dataclass
from pathlib import Path

from eth_utils.address import is_address, to_canonical_address, to_checksum_address

from attribution.errors import Rejected
from chain import deploy as deployment_of
from chain.deployment import load_deployment
from chain.rollup import Rollup
from chain.signer import read_key
from chain.transactions import address_of
from cluster.cli.screen import console
from cluster.config import Settings


@dataclass(frozen=True, slots=True)
class People:
    """Addresses as text; an empty treasury is the deployer."""

    settler: str
    guardian: str
    treasury: str


def deploy(settings: Settings, key_file: Path, people: People, rpc: str, addresses: Path | None) -> None:
    key = read_existing_key(key_file)
    admin = address_of(key)
    terms = deployment_of.Terms(
        treasury=parse_address(people.treasury, "treasury") if people.treasury else admin,
        admin=admin,
        settler=parse_address(people.settler, "settler"),
        guardian=parse_address(people.guardian, "guardian"),
        withdrawal_delay_s=settings.chain.withdrawal_delay_s,
        activation_delay_s=settings.chain.activation_delay_s,
    )
    path = addresses or Path(settings.chain.addresses_path)
    if path.exists():
        raise Rejected("deployed_already", f"{path} exists: move it away to deploy anew", field="addresses")
    deployment_of.deploy(rpc or settings.chain.rpc_url, key, terms, console.print).save(path)
    console.print(f"deployment: {path}")


def verify(settings: Settings, rpc: str, addresses: Path | None) -> None:
    for line in deployment_of.verify(_rollup(settings, rpc, addresses)):
        console.print(f"[green]ok[/] {line}")


def register(
    settings: Settings, wallets: list[str], key_file: Path, rpc: str, addresses: Path | None
) -> None:
    found = [parse_address(wallet, "wallets") for wallet in wallets]
    rollup = _rollup(settings, rpc, addresses)
    num_new = deployment_of.register(rollup, read_existing_key(key_file), found)
    console.print(f"{num_new} of {len(found)} wallets put on record")


def read_existing_key(path: Path) -> bytes:
    """A key that is missing is refused here: only a laptop's own wallets are made on first use."""
    if not path.exists():
        raise Rejected("no_key", f"{path} does not exist", field="key_file")
    return read_key(path)


def parse_address(text: str, field: str) -> bytes:
    """20 bytes from EIP-55 or all-lower-case hex."""
    if not is_address(text) or (text != text.lower() and to_checksum_address(text) != text):
        raise Rejected("bad_address", f"{text!r} is no address with a right checksum", field=field)
    return to_canonical_address(text)


def _rollup(settings: Settings, rpc: str, addresses: Path | None) -> Rollup:
    deployment = load_deployment(addresses or Path(settings.chain.addresses_path))
    return Rollup(rpc or settings.chain.rpc_url, deployment)
