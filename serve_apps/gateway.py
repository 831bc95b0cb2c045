"""Ray shell of a gateway: a Serve replica that runs the HTTP application and keeps finding workers."""

import asyncio
import logging
import uuid
from pathlib import Path

from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from attribution.errors import Unavailable
from cluster.config import Settings
from cluster.database import connect
from cluster.models import base_model, load_tokenizer
from cluster.storage import open_storage
from cluster.transcripts import key_path, load_key
from serve_apps.engine.grammar import Grammars
from serve_apps.http_app import build_app
from serve_apps.loopback import bind_to_loopback
from serve_apps.services import Limits, Services
from serve_apps.sessions import Sessions, Terms
from serve_apps.worker import ActorDoor
from serve_apps.worker_pool import WorkerPool

log = logging.getLogger(__name__)


class Gateway:
    """The Serve ingress. Any number of replicas may run: all they share is the database."""

    def __init__(self, settings: Settings, workers: DeploymentHandle) -> None:
        if not settings.ray.address:
            bind_to_loopback()
        self._settings = settings
        self._workers = workers

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(open_services(self._settings), self._find_workers)

    async def _find_workers(self, services: Services) -> None:
        """Connect to every worker there is, those that come later included."""
        while True:
            try:
                for worker_id in await self._workers.broadcast("worker_id").results_async(timeout_s=10):
                    if not services.pool.knows(worker_id):
                        services.pool.connect(worker_id, await asyncio.to_thread(ActorDoor, worker_id))
            except (RayError, RayServeException, TimeoutError, Unavailable) as error:  # none yet, or one went
                log.info("workers: %s", error)
            await asyncio.sleep(1.0)


def open_services(settings: Settings) -> Services:
    """Everything a gateway needs, opened in the process that calls; workers connect later."""
    base = base_model(settings)
    tokenizer = load_tokenizer(base.path)
    database = connect(settings.database_url)
    pool = WorkerPool(gateway_id=uuid.uuid4().hex[:12])
    terms = Terms(settings.prices.reservation_lease_s, load_key(key_path(Path(settings.home))))
    return Services(
        database=database,
        storage=open_storage(
            settings.storage_url, s3_endpoint=settings.s3_endpoint, cache_dir=settings.home / "cache"
        ),
        base=base,
        tokenizer=tokenizer,
        grammars=Grammars(tokenizer, len(tokenizer)),
        pool=pool,
        sessions=Sessions(database, pool, terms),
        limits=Limits(settings.engine.max_context_tokens, settings.engine.max_completion_tokens),
        base_gwei_per_token=settings.prices.base_gwei_per_token,
        chain_id=settings.chain.chain_id,
        home=Path(settings.home),
    )
