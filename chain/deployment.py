"""Where our contracts are on one chain, and on which terms they were deployed: ``deployment.json``."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from eth_utils.address import is_checksum_address, to_checksum_address

from attribution.errors import Rejected

CONTRACTS = ("token", "registry", "escrow", "ledger", "distributor", "pool")


@dataclass(frozen=True, slots=True)
class Deployment:
    """Addresses are 20 bytes here and EIP-55 text in the file. ``ledger`` is the operator that payers name in
    their spend ceilings."""

    chain_id: int
    block: int  # no event of ours is older
    token: bytes
    registry: bytes
    escrow: bytes
    ledger: bytes
    distributor: bytes
    pool: bytes  # an OpenZeppelin TimelockController: what nobody earned
    admin: bytes  # may grant and revoke roles
    settler: bytes
    guardian: bytes  # may disable a pending period
    withdrawal_delay_s: int
    activation_delay_s: int
    pool_delay_s: int

    def save(self, path: Path) -> None:
        values = {k: to_checksum_address(v) if isinstance(v, bytes) else v for k, v in asdict(self).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_deployment(path: Path) -> Deployment:
    """``Rejected`` when the file is missing, lacks a field, or holds an address whose checksum is wrong."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Rejected("no_deployment", f"{path} does not exist: deploy first", field="addresses") from error
    except ValueError as error:
        raise Rejected("bad_deployment", f"{path} is not JSON: {error}", field="addresses") from error
    wanted = {field.name: field.type for field in fields(Deployment)}
    if not isinstance(values, dict) or set(values) != set(wanted):
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise Rejected("bad_deployment", f"{path} has {found}, needs {sorted(wanted)}", field="addresses")
    for name, kind in wanted.items():
        value = values[name]
        if kind is bytes:
            if not (isinstance(value, str) and is_checksum_address(value)):
                raise Rejected(
                    "bad_address", f"{path}: {name} is {value!r}, not an EIP-55 address", field=name
                )
            values[name] = bytes.fromhex(value[2:])
        elif not isinstance(value, int):
            raise Rejected("bad_deployment", f"{path}: {name} is {value!r}, not an integer", field=name)
    return Deployment(**values)
