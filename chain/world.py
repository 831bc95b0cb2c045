"""What the settler acts on, and its rules: opened from settings inside the process that uses them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import Engine

from chain.da import DaClient
from chain.deployment import load_deployment
from chain.outbox import BatchRules
from chain.rollup import Rollup
from chain.signer import SignerClient
from cluster.config import Settings
from cluster.database import connect
from cluster.storage import Storage, open_storage


@dataclass(frozen=True, slots=True)
class World:
    """All of it outside of the settler's process."""

    rows: Engine
    storage: Storage
    da: DaClient
    rollup: Rollup
    signer: SignerClient


@dataclass(frozen=True, slots=True)
class SettlerRules:
    """``final_tag`` names the block up to which the chain is taken not to change; a transaction that is in no
    block after ``resubmit_s`` is outbid."""

    batch: BatchRules
    final_tag: Literal["finalized", "safe", "latest"]
    resubmit_s: int = 30
    lease_s: int = 15


def open_world(settings: Settings) -> World:
    """``Rejected`` where the contracts are not deployed yet."""
    chain = settings.chain
    return World(
        connect(settings.database_url),
        open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint),
        DaClient(chain.da_url, chain.da_mode, timeout_s=chain.da_timeout_s),
        Rollup(chain.rpc_url, load_deployment(Path(chain.addresses_path))),
        SignerClient(Path(chain.signer_socket)),
    )


def settler_rules(settings: Settings) -> SettlerRules:
    chain = settings.chain
    batch = BatchRules(chain.batch_max_receipts, chain.batch_max_age_s, chain.batch_max_fee_gwei)
    return SettlerRules(batch, chain.final_tag, lease_s=chain.lease_s)
