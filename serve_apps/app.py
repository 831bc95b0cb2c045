"""The Serve application: gateways in front of workers, and how it is deployed."""

from ray import serve
from ray.serve.config import HTTPOptions

from cluster.config import Settings
from serve_apps.gateway import Gateway
from serve_apps.worker import Worker

NAME = "openledger"


def build(settings: Settings) -> serve.Application:
    """Gateways hold only connections; the engine behind each worker holds the model."""
    worker = serve.deployment(Worker).options(
        num_replicas=settings.engine.num_replicas,
        ray_actor_options={"num_cpus": 0.05},
        health_check_period_s=2,
        health_check_timeout_s=60,  # a busy engine answers late
        graceful_shutdown_timeout_s=10,
    )
    gateway = serve.deployment(serve.ingress()(Gateway)).options(
        name="Gateway",
        ray_actor_options={"num_cpus": 0.05},
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        graceful_shutdown_timeout_s=60,
    )
    return gateway.bind(settings, worker.bind(settings))


def deploy(settings: Settings) -> str:
    """Run the application on the Ray cluster this process is connected to, and wait until it serves.

    Deploying again replaces what runs; the address stays. Returns the address.
    """
    serve.start(http_options=HTTPOptions(host=settings.gateway_host, port=settings.gateway_port))
    serve.run(build(settings), name=NAME, route_prefix="/")
    return f"http://{settings.gateway_host}:{settings.gateway_port}"


def undeploy() -> None:
    serve.delete(NAME)
