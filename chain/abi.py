"""The words of our contracts, from their artifacts: which error a selector is, which event a topic."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args

from eth_abi.abi import decode

from attribution.hashing import keccak256
from chain.artifact import load_artifact
from chain.events import Event

ARTIFACTS = {
    "token": "OpenToken",
    "registry": "ContributorRegistry",
    "escrow": "Escrow",
    "ledger": "AttributionLedger",
    "distributor": "Distributor",
    "pool": "TimelockController",
}


def contract_error(data: object) -> tuple[str, str]:
    """The error's name, and ``Name(field=value, …)``; both empty if it is none of ours."""
    if not isinstance(data, str) or not data.startswith("0x") or len(data) < 10:
        return "", ""
    raw = bytes.fromhex(data[2:])
    abi = _error_abis().get(raw[:4])
    if abi is None:
        return "", ""
    values = decode([field["type"] for field in abi["inputs"]], raw[4:])
    pairs = zip(abi["inputs"], values, strict=True)
    shown = ", ".join(f"{f['name']}={'0x' + v.hex() if isinstance(v, bytes) else v}" for f, v in pairs)
    return abi["name"], f"{abi['name']}({shown})"


@cache
def _error_abis() -> Mapping[bytes, dict[str, Any]]:
    entries = [e for name in ARTIFACTS.values() for e in load_artifact(name).abi if e["type"] == "error"]
    return {keccak256(_signature(entry).encode())[:4]: entry for entry in entries}


@cache
def event_kinds() -> Mapping[bytes, tuple[str, type[Event]]]:
    """First topic → event name and our value for it. Events of OpenZeppelin's contracts have none."""
    kinds = {kind.__name__: kind for kind in get_args(Event)}
    entries = [e for name in ARTIFACTS.values() for e in load_artifact(name).abi if e["type"] == "event"]
    named = {keccak256(_signature(entry).encode()): entry["name"] for entry in entries}
    return {topic: (name, kinds[name]) for topic, name in named.items() if name in kinds}


def _signature(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']}({','.join(field['type'] for field in entry['inputs'])})"


def field_name(name: str) -> str:
    return re.sub("([A-Z])", lambda found: "_" + found[1].lower(), name)
