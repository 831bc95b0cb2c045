"""The Serve application: gateways in front of workers, and how it is deployed."""

import time
from typing import Any

import httpx
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, HTTPOptions

from attribution.errors import Unavailable
from cluster.config import EngineSettings, Settings
from serve_apps.autoscaling import Pressure, workers_wanted
from serve_apps.gateway import Gateway
from serve_apps.worker import Worker

NAME = "openledger"
READY_WITHIN_S = 120
LOOK_BACK_S = 15.0  # over which load is averaged; workers tell theirs every ten seconds


def build(settings: Settings) -> serve.Application:
    """Gateways hold only connections; the engine behind each worker holds the model."""
    worker = serve.deployment(Worker).options(
        **_scale(settings.engine),
        ray_actor_options={"num_cpus": 0.05},
        health_check_period_s=2,
        health_check_timeout_s=60,  # a busy engine answers late
        graceful_shutdown_timeout_s=settings.engine.drain_timeout_s,
    )
    gateway = serve.deployment(serve.ingress()(Gateway)).options(
        name="Gateway",
        ray_actor_options={"num_cpus": 0.05},
        max_ongoing_requests=100_000,  # it refuses by itself: Serve's own 503 has no Retry-After
        graceful_shutdown_timeout_s=settings.engine.drain_timeout_s,
    )
    return gateway.bind(settings, worker.bind(settings))


def num_workers(context: AutoscalingContext) -> tuple[int, dict[str, object]]:
    """Serve's autoscaling policy, in Serve's terms; keeps no state."""
    taken = context.aggregated_metrics or {}
    slots, kv = taken.get("slots", {}), taken.get("kv", {})
    return workers_wanted(Pressure(slots[worker], kv[worker]) for worker in slots), {}


def _scale(engine: EngineSettings) -> dict[str, Any]:
    least, most = engine.num_replicas, engine.max_replicas
    if most <= least:
        return {"num_replicas": least}
    config = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        upscale_delay_s=engine.upscale_delay_s,
        downscale_delay_s=engine.downscale_delay_s,
        look_back_period_s=LOOK_BACK_S,
        policy=AutoscalingPolicy(policy_function=num_workers),
    )
    return {"autoscaling_config": config}


def deploy(settings: Settings) -> str:
    """Run the application on the Ray cluster this process is connected to, and wait until it serves.

    Deploying again replaces what runs; the address stays. Returns the address.

    Raises:
        Unavailable: no worker was ready in ``READY_WITHIN_S``.
    """
    serve.start(http_options=HTTPOptions(host=settings.gateway_host, port=settings.gateway_port))
    serve.run(build(settings), name=NAME, route_prefix="/")
    address = f"http://{settings.gateway_host}:{settings.gateway_port}"
    deadline = time.monotonic() + READY_WITHIN_S
    while not _is_well(address):
        if time.monotonic() > deadline:
            raise Unavailable("not_serving", f"{address}/healthz is not well after {READY_WITHIN_S} s")
        time.sleep(0.2)
    return address


def _is_well(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def undeploy() -> None:
    serve.delete(NAME)
