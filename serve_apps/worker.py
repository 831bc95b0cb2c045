"""Ray shell of a worker: a Serve replica that keeps one engine, in an actor process of its own.

Gateways ask the replica where its engine is and then speak to the engine directly: short calls to submit and
cancel, one streaming call per gateway. A replica that Serve stops lets its engine finish first. Whoever
dies takes what it owned along: the replica its engine, the engine its answers, a silent gateway its requests.
Serve restarts a replica whose engine is gone."""

import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from attribution.errors import Refusal, Rejected, Unavailable
from cluster.config import EngineSettings, Settings
from cluster.database import connect, reading
from cluster.models import base_model, native_dtype
from cluster.storage import Storage, open_storage
from serve_apps import catalog
from serve_apps.autoscaling import pressure_of
from serve_apps.engine.adapter_cache import CacheLimits
from serve_apps.engine.engine import Engine
from serve_apps.engine.loading import EngineConfig, build_engine
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import Bundle, EngineLoad, EngineRequest
from serve_apps.engine.vllm_engine import VllmConfig, VllmEngine, build_vllm_engine
from serve_apps.engine_host import EngineHost
from serve_apps.loopback import bind_to_loopback

NAMESPACE = "openledger"


def engine_name(worker_id: str) -> str:
    """Name of the actor behind a worker. Handles found by name are passed on nowhere: Ray 2.60 crashes when
    a handle travels inside a result (reference_counter.cc, ``owned_by_us_``)."""
    return f"engine-{worker_id}"


class EngineActor:
    """An ``EngineHost`` behind Ray calls; decides nothing."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.engine.num_threads or os.cpu_count() or 1)
        storage = open_storage(
            settings.storage_url, s3_endpoint=settings.s3_endpoint, cache_dir=settings.home / "cache"
        )
        self._host = EngineHost(_engine(settings, storage))

    async def submit(self, request: EngineRequest) -> None:
        await self._host.submit(request)

    async def cancel(self, owner: str, request_id: bytes) -> None:
        await self._host.cancel(owner, request_id)

    async def prefetch(self, adapter_id: bytes) -> None:
        await self._host.prefetch(adapter_id)

    async def withdraw(self, adapter_ids: Sequence[bytes]) -> None:
        await self._host.withdraw(adapter_ids)

    async def renew(self, owner: str, num_read: int) -> EngineLoad:
        return await self._host.renew(owner, num_read)

    async def stream(self, owner: str) -> AsyncIterator[Bundle]:
        async for bundle in self._host.stream(owner):
            yield bundle

    async def load(self) -> EngineLoad:
        return self._host.engine_load()

    async def drain(self) -> None:
        await self._host.drain()

    async def check_health(self) -> int:
        """The engine's process id, if its thread is alive."""
        self._host.check_health()
        return os.getpid()


class Worker:
    """The Serve deployment: owns the engine's process and says where it is."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        if not settings.ray.address:
            bind_to_loopback()
        self._worker_id = uuid.uuid4().hex[:12]
        self._max_running = settings.engine.max_running
        # Threads that sleep while they wait. Measured with two at load 4 on two cores, batch 32, SmolLM2-135M
        # in fp32: 12 tok/s spinning, 54 sleeping (tests/bench/serving/engine_speed.py).
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        if settings.engine.backend == "vllm":  # it would bind threads to cores of its own choice
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        actor = ray.remote(EngineActor).options(
            name=engine_name(self._worker_id),
            namespace=NAMESPACE,
            num_cpus=settings.engine.num_cpus,
            num_gpus=settings.engine.tensor_parallel if settings.engine.device == "cuda" else 0,
            max_concurrency=10_000,
            runtime_env={"env_vars": environment},
        )
        self._engine = actor.remote(settings)
        await self._engine.check_health.remote()

    async def worker_id(self) -> str:
        return self._worker_id

    async def check_health(self) -> None:
        await self._engine.check_health.remote()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve collects for ``app.num_workers``."""
        return asdict(pressure_of(await self._engine.load.remote(), self._max_running))

    async def __del__(self) -> None:
        """Serve awaits this before it ends the replica, for ``engine.drain_timeout_s`` at most: answers go
        from the engine straight to the gateways, so Serve knows nothing of those that still run."""
        if hasattr(self, "_engine"):
            with suppress(RayError):  # it is gone already
                await self._engine.drain.remote()
            ray.kill(self._engine)


class ActorDoor:
    """The door to an engine in another process; Ray's exceptions become ours here."""

    def __init__(self, worker_id: str) -> None:
        """Raises: Unavailable when the engine is not there (any more)."""
        try:
            self._engine: ActorHandle = ray.get_actor(engine_name(worker_id), NAMESPACE)
        except ValueError as error:
            raise Unavailable("worker_lost", f"worker {worker_id} has no engine") from error

    async def submit(self, request: EngineRequest) -> None:
        await _translated(self._engine.submit.remote(request))

    async def cancel(self, owner: str, request_id: bytes) -> None:
        await _translated(self._engine.cancel.remote(owner, request_id))

    async def prefetch(self, adapter_id: bytes) -> None:
        await _translated(self._engine.prefetch.remote(adapter_id))

    async def withdraw(self, adapter_ids: Sequence[bytes]) -> None:
        await _translated(self._engine.withdraw.remote(adapter_ids))

    async def renew(self, owner: str, num_read: int) -> EngineLoad:
        load = await _translated(self._engine.renew.remote(owner, num_read))
        assert isinstance(load, EngineLoad)
        return load

    async def stream(self, owner: str) -> AsyncIterator[Bundle]:
        try:
            async for reference in self._engine.stream.options(num_returns="streaming").remote(owner):
                yield await reference
        except RayError as error:
            raise _refusal(error) from error


def _engine(settings: Settings, storage: Storage) -> Engine | VllmEngine:
    base, config = base_model(settings), engine_config(settings.engine)
    if settings.engine.backend == "openlora":
        if settings.engine.pinned_adapters:
            with reading(connect(settings.database_url)) as session:
                pinned = catalog.pinned(session, settings.engine.pinned_adapters, base.base_id)
            config = replace(config, pinned=pinned)
        return build_engine(base, storage, config)
    vllm = VllmConfig(
        dtype=str(config.dtype).removeprefix("torch."),
        kv_bytes=config.kv_bytes,
        limits=config.limits,
        max_adapters=settings.engine.vllm_max_adapters,
        max_rank=settings.engine.vllm_max_rank,
    )
    return build_vllm_engine(base, storage, settings.home / "cache" / "peft", vllm)


def engine_config(settings: EngineSettings) -> EngineConfig:
    """Raises: Rejected, for what the backend does not have."""
    if settings.backend == "vllm" and settings.weights != "auto":
        raise Rejected(
            "weights_unsupported",
            f"engine.backend vllm has no weights {settings.weights}; openlora has",
            field="engine.weights",
        )
    if settings.backend == "vllm" and settings.tensor_parallel != 1:
        raise Rejected(
            "tensor_parallel",
            f"engine.backend vllm has no tensor_parallel {settings.tensor_parallel}; openlora has",
            field="engine.tensor_parallel",
        )
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {
        "auto": native_dtype(device),
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
    }
    return EngineConfig(
        device=device,
        dtype=dtypes[settings.dtype],
        weights=settings.weights,
        num_ranks=settings.tensor_parallel,
        kv_bytes=settings.kv_bytes,
        is_deterministic=settings.is_deterministic,
        limits=Limits(
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_length=settings.max_context_tokens,
            reuses_prefixes=settings.reuses_prefixes,
        ),
        adapters=CacheLimits(
            budget_bytes=settings.adapter_bytes, max_adapter_bytes=settings.adapter_bytes // 4
        ),
    )


async def _translated(call: "ray.ObjectRef[object]") -> object:
    try:
        return await call
    except RayError as error:
        raise _refusal(error) from error


def _refusal(error: RayError) -> Refusal:
    """What the engine refused with, or that it is gone."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Refusal):
        return error.cause
    return Unavailable("worker_lost", f"the worker is gone: {type(error).__name__}")
