"""The gateway's HTTP application, put together from its services. No Ray: tests drive it in process."""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import generate_latest
from sqlalchemy import text
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attribution.errors import Refusal, Unavailable
from cluster import charges
from serve_apps import datanet_api, embeddings_api, http_errors, openai_api, receipts_api, responses_api
from serve_apps.services import Services, Shared
from serve_apps.withdrawals import follow_withdrawals

log = logging.getLogger(__name__)

RECURSION_LIMIT = 1000  # Python's own
OPERATORS = ("/healthz", "/metrics")  # answered however full it is

Keeper = Callable[[Services], Awaitable[None]]


def build_app(services: Services, *keepers: Keeper, release_every_s: float = 5.0) -> FastAPI:
    """``keepers`` run beside the server for as long as it lives."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(keeper(services)) for keeper in keepers]
        tasks.append(asyncio.ensure_future(_release_orphans(services, release_every_s)))
        tasks.append(asyncio.ensure_future(follow_withdrawals(services)))
        for task in tasks:
            task.add_done_callback(_report)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await services.sessions.close()
        await services.pool.close()

    # py_ecc, which eth-account imports, sets 100,000: at that, nested brackets overflow the stack and take
    # the process along, instead of being refused.
    sys.setrecursionlimit(RECURSION_LIMIT)
    app = FastAPI(title="OpenLedger gateway", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.services = services
    http_errors.install(app)
    app.add_middleware(_Guard, services=services)
    app.include_router(openai_api.router)
    app.include_router(responses_api.router)
    app.include_router(embeddings_api.router)
    app.include_router(receipts_api.router)
    app.include_router(datanet_api.router)
    app.get("/healthz")(healthz)
    app.get("/metrics")(metrics)
    return app


def _report(task: "asyncio.Future[None]") -> None:
    """A keeper never ends by itself: if one did, its reason must be seen."""
    if not task.cancelled():
        log.error("a keeper of the gateway ended", exc_info=task.exception())


async def healthz(shared: Shared) -> JSONResponse:
    """200 while the database answers and a worker that takes requests is attached; the body says which is
    missing."""
    try:
        await shared.read(lambda session: session.execute(text("SELECT 1")).one())
        is_database_up = True
    except Unavailable:
        is_database_up = False
    num_workers = sum(not load.is_draining for load in shared.pool.loads.values())
    is_well = is_database_up and num_workers > 0
    body = {
        "status": "ok" if is_well else "unavailable",
        "database": is_database_up,
        "workers": num_workers,
    }
    return JSONResponse(body) if is_well else JSONResponse(body, 503, {"Retry-After": "1"})


async def metrics(shared: Shared) -> Response:
    lines = [generate_latest(shared.metrics.registry).decode()]
    for worker_id, load in shared.pool.loads.items():
        label = f'{{worker="{worker_id}"}}'
        lines += [
            f"openledger_engine_running{label} {load.num_running}",
            f"openledger_engine_waiting{label} {load.num_waiting}",
            f"openledger_engine_free_blocks{label} {load.num_free_blocks}",
            f"openledger_engine_draining{label} {int(load.is_draining)}",
            f"openledger_engine_blocks{label} {load.num_blocks}",
            f"openledger_engine_adapters{label} {load.num_adapters}",
            f"openledger_engine_leases{label} {load.num_leases}",
            f"openledger_engine_prefilled_tokens{label} {load.num_prefilled}",
            f"openledger_engine_reused_tokens{label} {load.num_reused}",
        ]
    lines.append(f"openledger_open_answers {shared.sessions.num_open}")
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


class _Guard:
    """Refuses a body that is too large, announced or not, or too slow, and whoever comes while as many
    requests are open here as may be. Counts every answer by route and status."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_bounded = scope["path"] not in OPERATORS
        self._num_open += is_bounded
        try:
            is_full = self._num_open > self._services.limits.max_open_requests
            await self._answer(scope, receive, send, is_full and is_bounded)
        finally:
            self._num_open -= is_bounded

    async def _answer(self, scope: Scope, receive: Receive, send: Send, is_full: bool) -> None:
        limits, size, is_whole = self._services.limits, 0, False
        deadline = asyncio.get_running_loop().time() + limits.body_within_s
        most = limits.max_shard_bytes if scope["path"].startswith("/datanets/") else limits.max_body_bytes

        async def bounded() -> Message:
            nonlocal size, is_whole
            try:
                async with asyncio.timeout_at(None if is_whole else deadline):
                    message = await receive()
            except TimeoutError as error:
                late = f"the body was not there after {limits.body_within_s:g} s"
                raise HTTPException(408, late) from error
            is_whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, f"the body has more than {most} bytes")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "unknown")
                self._services.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        if is_full:
            full = Unavailable("gateway_full", f"{limits.max_open_requests} requests are open here already")
            await http_errors.respond(Request(scope), full)(scope, receive, counted)
            return
        await self._app(scope, bounded, counted)


async def _release_orphans(services: Services, every_s: float) -> None:
    """Reservations whose gateway died are given back by whoever is alive."""
    while True:
        await asyncio.sleep(every_s)
        try:
            released = await services.write(
                lambda session: charges.release_orphans(session, int(time.time()))
            )
            if released:
                log.warning("released %d orphaned reservations", released)
        except Refusal as refusal:
            log.warning("orphaned reservations wait: %s", refusal.message)
