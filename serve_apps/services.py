"""What the routes of one gateway share, made once in its process, and how a route finds it."""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request
from prometheus_client import CollectorRegistry, Counter, Histogram
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from transformers import PreTrainedTokenizerBase

from attribution.errors import Rejected
from attribution.types import Receipt
from cluster import accounts
from cluster.accounts import Account
from cluster.database import reading, writing
from cluster.models import BaseModel
from cluster.storage import Storage
from serve_apps.engine.grammar import Grammars
from serve_apps.public_prefixes import PublicPrefixes
from serve_apps.sessions import Sessions
from serve_apps.worker_pool import WorkerPool

T = TypeVar("T")
TRUST_S = 1.0
MAX_TRUSTED = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for; the engine has its own, which are no smaller."""

    max_context_tokens: int
    max_completion_tokens: int
    max_body_bytes: int = 2**20
    body_within_s: float = 30.0
    max_open_requests: int = 1000  # of one gateway, answers under way included
    max_shard_bytes: int = 64 * 2**20


class Metrics:
    """Counters of one gateway process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "openledger_requests", "Answered requests", ["route", "status"], registry=self.registry
        )
        self.tokens = Counter("openledger_tokens", "Tokens charged for", ["kind"], registry=self.registry)
        self.fees = Counter("openledger_fees_gwei", "Fees captured, gwei", registry=self.registry)
        self.first_token = Histogram(
            "openledger_first_token_seconds", "Time to first token", registry=self.registry
        )

    def count(self, receipt: Receipt) -> None:
        self.tokens.labels("prompt").inc(receipt.prompt_tokens)
        self.tokens.labels("completion").inc(receipt.completion_tokens)
        self.fees.inc(receipt.fee_gwei)


class Keys:
    """Who the keys of the last second belong to: a key that is revoked is refused ``TRUST_S`` later at the
    latest. Refusals are not kept, nor the keys themselves."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._known: dict[bytes, tuple[Account, float]] = {}  # SHA-256 of a key → its account, and since when

    def account_of(self, key: str) -> Account | None:
        known = self._known.get(_digest(key))
        return known[0] if known is not None and self.clock() - known[1] < TRUST_S else None

    def trust(self, key: str, account: Account, asked_at: float) -> None:
        """``asked_at``: when the database was asked, which may have been a while before it answered."""
        if len(self._known) >= MAX_TRUSTED:
            self._known.clear()
        self._known[_digest(key)] = (account, asked_at)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class Services:
    database: Engine
    storage: Storage
    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    grammars: Grammars
    pool: WorkerPool
    sessions: Sessions
    limits: Limits
    base_gwei_per_token: int
    chain_id: int
    home: Path
    metrics: Metrics = field(default_factory=Metrics)
    keys: Keys = field(default_factory=Keys)
    prefixes: PublicPrefixes = field(default_factory=PublicPrefixes)

    async def read(self, query: Callable[[Session], T]) -> T:
        """Run ``query`` in a transaction of a thread of its own."""

        def work() -> T:
            with reading(self.database) as session:
                return query(session)

        return await asyncio.to_thread(work)

    async def write(self, change: Callable[[Session], T]) -> T:
        def work() -> T:
            with writing(self.database) as session:
                return change(session)

        return await asyncio.to_thread(work)


def services_of(request: Request) -> Services:
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


async def account_of(request: Request, authorization: Annotated[str | None, Header()] = None) -> Account:
    """Whose key came with the request; what the account has spent may be a second old.

    Raises:
        Rejected: 401, in the same words for no key, a malformed one, an unknown one and a revoked one.
    """
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer":
        raise Rejected("invalid_api_key", "no such API key", field="authorization", http_status=401)
    shared, key = services_of(request), key.strip()
    account = shared.keys.account_of(key)
    if account is None:
        asked_at = shared.keys.clock()
        account = await shared.read(lambda session: accounts.authenticate(session, key))
        shared.keys.trust(key, account, asked_at)
    return account


Shared = Annotated[Services, Depends(services_of)]
Caller = Annotated[Account, Depends(account_of)]
