"""Put our contracts on a rollup, check that what is there is ours, and put wallets on record.

The contracts refer to each other in a circle through immutables, so their addresses are computed from the
deployer's nonces before the first is created; nobody can rewire them later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import rlp
from eth_abi.abi import encode

from attribution.errors import Corrupted
from attribution.hashing import keccak256
from attribution.types import contributor_id
from chain.abi import ARTIFACTS
from chain.artifact import load_artifact
from chain.deployment import CONTRACTS, Deployment
from chain.rollup import Rollup
from chain.sending import execute
from chain.transactions import Call, address_of

ZERO_ADDRESS = bytes(20)
ADMIN_ROLE = bytes(32)
SETTLER, GUARDIAN, PROPOSER, EXECUTOR, CANCELLER = (
    keccak256(name)
    for name in (b"SETTLER", b"GUARDIAN", b"PROPOSER_ROLE", b"EXECUTOR_ROLE", b"CANCELLER_ROLE")
)
REGISTER_AT_ONCE = 100  # wallets per transaction: about 5 million gas


@dataclass(frozen=True, slots=True)
class Terms:
    """Who may do what, and how long things wait. ``treasury`` receives the whole token supply.

    ``withdrawal_delay_s`` must exceed the age of a batch. ``activation_delay_s`` is the time to recompute a
    posted reward root; 0 suits a local test chain only. ``admin`` proposes and executes for the pool."""

    treasury: bytes
    admin: bytes
    settler: bytes
    guardian: bytes
    supply_wei: int = 10**27
    withdrawal_delay_s: int = 86_400
    activation_delay_s: int = 3_600
    pool_delay_s: int = 2 * 86_400


def deploy(rpc_url: str, private_key: bytes, terms: Terms, say: Callable[[str], None] = print) -> Deployment:
    """Create all contracts, put the pool on record, verify, and return where everything is.

    An attempt that dies halfway leaves unused contracts behind; the next one starts afresh."""
    deployer = address_of(private_key)
    node = Rollup(rpc_url, _plan(0, 0, [ZERO_ADDRESS] * len(CONTRACTS), terms))
    nonce = node.nonce(deployer)
    places = [_created(deployer, nonce + i) for i in range(len(CONTRACTS))]
    planned = _plan(node.chain_id(), node.block_number() + 1, places, terms)
    rollup = Rollup(rpc_url, planned)
    for name in CONTRACTS:
        mined = execute(rollup, private_key, Call(b"", _creation(name, planned, terms)))
        say(f"{name} {ARTIFACTS[name]} at 0x{getattr(planned, name).hex()}, {mined.gas_used} gas")
    register(rollup, private_key, [planned.pool])
    verify(rollup)
    return planned


def verify(rollup: Rollup) -> tuple[str, ...]:
    """What was checked, a line each: chain, code, wiring, delays, roles, the pool's registration.

    ``Corrupted`` with both values at the first thing that is not as the deployment file says."""
    d = rollup.addresses
    checked = [_agree("chain id", d.chain_id, rollup.chain_id())]
    for name in CONTRACTS:
        address: bytes = getattr(d, name)
        if not load_artifact(ARTIFACTS[name]).is_code(rollup.code(address)):
            found = keccak256(rollup.code(address)).hex()
            raise Corrupted(
                "foreign_code", f"0x{address.hex()} is no {ARTIFACTS[name]}: code {found}", field=name
            )
        checked.append(f"{name} at 0x{address.hex()} is {ARTIFACTS[name]}")
    for contract, getter, expected in _wiring(d):
        checked.append(_agree(f"{contract}.{getter}", expected, rollup.constant(contract, getter)))
    for contract, roles in _roles(d).items():
        holders = rollup.role_holders(contract)
        for role in sorted({*roles, *holders}):
            label = f"{contract} role {role.hex()[:8]}"
            checked.append(_agree(label, roles.get(role, frozenset()), holders.get(role, frozenset())))
    checked.append(_agree("wallet of the pool", d.pool, rollup.wallet_of(contributor_id(d.pool))))
    return tuple(checked)


def register(rollup: Rollup, private_key: bytes, wallets: Sequence[bytes]) -> int:
    """Put those wallets on record that are not yet; returns how many. Anyone may."""
    missing = [w for w in dict.fromkeys(wallets) if not any(rollup.wallet_of(contributor_id(w)))]
    for start in range(0, len(missing), REGISTER_AT_ONCE):
        execute(rollup, private_key, rollup.encode_register(missing[start : start + REGISTER_AT_ONCE]))
    return len(missing)


def _plan(chain_id: int, block: int, places: Sequence[bytes], terms: Terms) -> Deployment:
    token, registry, escrow, ledger, distributor, pool = places  # in the order of CONTRACTS
    return Deployment(
        chain_id=chain_id,
        block=block,
        token=token,
        registry=registry,
        escrow=escrow,
        ledger=ledger,
        distributor=distributor,
        pool=pool,
        admin=terms.admin,
        settler=terms.settler,
        guardian=terms.guardian,
        withdrawal_delay_s=terms.withdrawal_delay_s,
        activation_delay_s=terms.activation_delay_s,
        pool_delay_s=terms.pool_delay_s,
    )


def _creation(name: str, d: Deployment, terms: Terms) -> bytes:
    """Creation code with the constructor's arguments behind it."""
    arguments: dict[str, tuple[object, ...]] = {
        "token": (terms.treasury, terms.supply_wei),
        "registry": (),
        "escrow": (d.token, d.ledger, d.distributor, d.withdrawal_delay_s),
        "ledger": (d.escrow, d.admin, d.settler),
        "distributor": (
            d.token, d.registry, d.ledger, d.activation_delay_s, d.admin, d.settler, d.guardian
        ),
        "pool": (d.pool_delay_s, [d.admin], [d.admin], bytes(20)),
    }  # fmt: skip
    artifact = load_artifact(ARTIFACTS[name])
    kinds = [f["type"] for entry in artifact.abi if entry["type"] == "constructor" for f in entry["inputs"]]
    return artifact.bytecode + encode(kinds, arguments[name])


def _wiring(d: Deployment) -> tuple[tuple[str, str, bytes | int], ...]:
    return (
        ("escrow", "token", d.token),
        ("escrow", "ledger", d.ledger),
        ("escrow", "distributor", d.distributor),
        ("escrow", "withdrawalDelay", d.withdrawal_delay_s),
        ("ledger", "escrow", d.escrow),
        ("distributor", "token", d.token),
        ("distributor", "registry", d.registry),
        ("distributor", "ledger", d.ledger),
        ("distributor", "activationDelay", d.activation_delay_s),
        ("pool", "getMinDelay", d.pool_delay_s),
    )


def _roles(d: Deployment) -> dict[str, dict[bytes, frozenset[bytes]]]:
    """Exactly who holds what. The pool is its own admin: only a queued proposal changes its roles."""
    admin = frozenset({d.admin})
    settling = {ADMIN_ROLE: admin, SETTLER: frozenset({d.settler})}
    return {
        "ledger": settling,
        "distributor": {**settling, GUARDIAN: frozenset({d.guardian})},
        "pool": {ADMIN_ROLE: frozenset({d.pool}), PROPOSER: admin, CANCELLER: admin, EXECUTOR: admin},
    }


def _agree(what: str, expected: object, found: object) -> str:
    if expected != found:
        message = f"{what} is {_shown(found)}, the deployment says {_shown(expected)}"
        raise Corrupted("deployment_differs", message, field=what)
    return f"{what} is {_shown(found)}"


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, frozenset):
        return ", ".join(sorted("0x" + address.hex() for address in value)) or "nobody"
    return str(value)


def _created(deployer: bytes, nonce: int) -> bytes:
    """The address of what ``deployer`` creates with its transaction ``nonce``."""
    return keccak256(bytes(rlp.encode([deployer, nonce])))[12:]
