"""The people whom one laptop plays: payers with deposits and signed ceilings, and the beneficiaries."""

import time
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from attribution.errors import Rejected
from attribution.payload import WEI_PER_GWEI
from chain.deployment import Deployment
from chain.rollup import Rollup
from chain.sending import execute
from cluster import accounts, signatures
from cluster.cli import laptop
from cluster.config import Settings
from cluster.contributions import register_contributor
from cluster.database import reading, writing
from cluster.wallets import Wallet

CEILING_DAYS = 90
SPONSOR = "sponsor"
SPONSOR_GWEI = 100 * 10**9  # bounds all trials together
BENEFICIARIES = ("platform", "host", "model-owner")


def register_beneficiaries(settings: Settings, engine: Engine, deployment: Deployment) -> None:
    """Put those who share in every fee on record, in rows and on chain. The pool is the timelock contract."""
    wallets = {name: laptop.own_wallet(settings, name).address for name in BENEFICIARIES}
    wallets["pool"] = deployment.pool
    with writing(engine) as session:
        for label, address in wallets.items():
            register_contributor(session, address, label)
    laptop.register_wallets(settings, deployment, list(wallets.values()))


def fund_payer(
    settings: Settings, engine: Engine, deployment: Deployment, payer: Wallet, amount_gwei: int
) -> None:
    """Top a payer's escrow up to ``amount_gwei``, and let it sign that ceiling. Repeating it changes nothing.

    The tokens come from the treasury; the payer deposits and signs itself. The settler sees the deposit on
    chain and puts the ceiling there before it captures.
    """
    rollup = Rollup(settings.chain.rpc_url, deployment)
    missing_wei = amount_gwei * WEI_PER_GWEI - rollup.payer_state(payer.address).deposited_wei
    if missing_wei > 0:
        treasury = laptop.own_wallet(settings, "platform")
        laptop.bridge_gas(settings, payer.address)
        execute(rollup, treasury.key, rollup.encode_transfer(payer.address, missing_wei))
        execute(rollup, payer.key, rollup.encode_approve(deployment.escrow, missing_wei))
        execute(rollup, payer.key, rollup.encode_deposit(payer.address, missing_wei))
    sign_ceiling(engine, deployment, payer, amount_gwei)


def sign_ceiling(engine: Engine, deployment: Deployment, payer: Wallet, ceiling_gwei: int) -> None:
    """Sign a ceiling unless one as high is on record that still holds for half of its time."""
    now = int(time.time())
    with writing(engine) as session:
        if _has_ceiling(session, payer, ceiling_gwei, now + CEILING_DAYS * 43_200):
            return
        expiry = now + CEILING_DAYS * 86_400
        ceiling = signatures.SpendCeiling(
            payer.address, deployment.ledger, ceiling_gwei * WEI_PER_GWEI, expiry
        )
        domain = signatures.escrow_domain(deployment.chain_id, deployment.escrow)
        signature = signatures.sign(payer.key, signatures.digest(ceiling, domain))
        signatures.verify(ceiling, domain, signature, payer.address)
        accounts.record_ceiling(session, payer.address, ceiling_gwei, expiry, signature)


def _has_ceiling(session: Session, payer: Wallet, ceiling_gwei: int, until: int) -> bool:
    try:
        state = accounts.payer_of(session, payer.address)
    except Rejected:
        return False
    return state.ceiling_gwei >= ceiling_gwei and state.ceiling_expiry > until


def open_key(settings: Settings, engine: Engine, payer: Wallet, label: str, budget_gwei: int) -> str:
    """An API key of ``payer`` for ``label``, the same one every time.

    Only its hash is in the database; ours is kept below ``home``, 0600."""
    path = key_path(settings, label)
    if path.exists():
        return path.read_text()
    now = int(time.time())
    with writing(engine) as session:
        account = accounts.open_account(session, payer.address, label, budget_gwei, now)
        key = accounts.issue_key(session, account, now)
    _write_private(path, key)
    return key


def trial_key(settings: Settings, engine: Engine, label: str) -> str:
    """A key with trial credit, which the platform's sponsor pays for; nobody needs a token to begin."""
    sponsor = laptop.own_wallet(settings, SPONSOR)
    return open_key(settings, engine, sponsor, label, settings.prices.trial_credit_gwei)


def fund_sponsor(settings: Settings, engine: Engine, deployment: Deployment) -> None:
    fund_payer(settings, engine, deployment, laptop.own_wallet(settings, SPONSOR), SPONSOR_GWEI)


def key_path(settings: Settings, label: str) -> Path:
    return settings.home / "keys" / f"{label}.api-key"


def deposits_are_seen(engine: Engine, payers: list[Wallet], amount_gwei: int) -> bool:
    """Whether the settler has mirrored these payers' deposits into their rows."""
    with reading(engine) as session:
        return all(accounts.payer_of(session, p.address).deposited_gwei >= amount_gwei for p in payers)


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.write_text(text)
