"""``openledger chain``: our contracts on any rollup. Keys come from files, never from the command line."""

from pathlib import Path
from typing import Annotated

import typer
from eth_utils.address import is_address, to_canonical_address, to_checksum_address

from attribution.errors import Rejected
from chain import deploy as deployment_of
from chain.deployment import load_deployment
from chain.rollup import Rollup
from chain.signer import read_key
from chain.transactions import address_of
from cluster.cli.screen import console
from cluster.config import load_settings

app = typer.Typer(no_args_is_help=True)

Rpc = Annotated[str, typer.Option("--rpc", help="JSON-RPC address of the rollup; default: chain.rpc_url")]
KeyFile = Annotated[
    Path, typer.Option("--key-file", help="hex private key, mode 600, of whoever pays the gas")
]
Addresses = Annotated[Path | None, typer.Option(help="deployment file; default: chain.addresses_path")]


@app.command()
def deploy(
    key_file: KeyFile,
    settler: Annotated[str, typer.Option(help="address of the settler's signer")],
    guardian: Annotated[str, typer.Option(help="address that may disable a pending period")],
    treasury: Annotated[
        str, typer.Option(help="address that receives the token supply; default: the key's")
    ] = "",
    rpc: Rpc = "",
    addresses: Addresses = None,
) -> None:
    """Create all contracts, verify them, and write the deployment file."""
    settings = load_settings()
    key = read_existing_key(key_file)
    admin = address_of(key)
    terms = deployment_of.Terms(
        treasury=parse_address(treasury, "treasury") if treasury else admin,
        admin=admin,
        settler=parse_address(settler, "settler"),
        guardian=parse_address(guardian, "guardian"),
        withdrawal_delay_s=settings.chain.withdrawal_delay_s,
        activation_delay_s=settings.chain.activation_delay_s,
    )
    path = addresses or Path(settings.chain.addresses_path)
    if path.exists():
        raise Rejected("deployed_already", f"{path} exists: move it away to deploy anew", field="addresses")
    deployment_of.deploy(rpc or settings.chain.rpc_url, key, terms, console.print).save(path)
    console.print(f"deployment: {path}")


@app.command()
def verify(rpc: Rpc = "", addresses: Addresses = None) -> None:
    """Check code, wiring, delays and roles of what stands on the chain against the deployment file."""
    for line in deployment_of.verify(_rollup(rpc, addresses)):
        console.print(f"[green]ok[/] {line}")


@app.command()
def register(wallets: list[str], key_file: KeyFile, rpc: Rpc = "", addresses: Addresses = None) -> None:
    """Put wallets on record, so that they can be paid. Anyone may pay for it."""
    found = [parse_address(wallet, "wallets") for wallet in wallets]
    num_new = deployment_of.register(_rollup(rpc, addresses), read_existing_key(key_file), found)
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


def _rollup(rpc: str, addresses: Path | None) -> Rollup:
    settings = load_settings()
    deployment = load_deployment(addresses or Path(settings.chain.addresses_path))
    return Rollup(rpc or settings.chain.rpc_url, deployment)
