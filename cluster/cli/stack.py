"""``openledger up``, ``down``, ``status``: the whole platform on one machine, found again by every other
command.
"""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from attribution.errors import Refusal
from chain import settler_actor
from chain.deployment import Deployment, load_deployment
from chain.rollup import Rollup
from cluster import head, processes
from cluster.cli import laptop, people
from cluster.cli.screen import table
from cluster.config import Settings
from cluster.database import connect, migrate
from cluster.models import base_model
from serve_apps import app as serve_app
from serve_apps import evidence as evidence_app

CACHES = ("node", "models", "packages")  # set-up, not results: kept when everything else is redone


def up(settings: Settings) -> None:
    start_ground(settings)
    start_services(settings)
    print_doors(settings)


def down(settings: Settings, forget: bool) -> None:
    stop(settings)
    if forget:
        forget_results(settings)


def status(settings: Settings) -> None:
    rows = [(name, _state(check)) for name, check in _checks(settings).items()]
    table(f"openledger at {settings.home}", ["part", "state"], rows)


def start_ground(settings: Settings) -> Deployment:
    """Rows, base model, rollup, contracts, signer: all that needs no Ray."""
    settings.home.mkdir(parents=True, exist_ok=True)
    migrate(settings.database_url)
    laptop.say(f"rows: {settings.database_url}")
    model = base_model(settings)
    laptop.say(f"base model: {settings.base_model}, id {model.base_id.hex()[:16]}…")
    laptop.start_chain(settings)
    laptop.start_da(settings)
    deployment = laptop.deploy_contracts(settings)
    laptop.start_signer(settings, deployment)
    engine = connect(settings.database_url)
    people.register_beneficiaries(settings, engine, deployment)
    people.fund_sponsor(settings, engine, deployment)
    return deployment


def start_ray(settings: Settings) -> None:
    """The private head, and the settler on it."""
    found = head.start(settings)
    laptop.say(f"Ray: {found.address}, jobs at {found.jobs_url}")
    head.connect_driver(settings)
    settler = settler_actor.ensure_running(settings)
    laptop.say(f"settler: Ray actor of pid {settler.pid}")


def start_services(settings: Settings) -> None:
    start_ray(settings)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve_app.deploy(settings)
    evidence_app.start_pool(settings)
    laptop.say(f"gateway: {settings.public_url}")


def stop(settings: Settings) -> None:
    num_stopped = head.stop(settings)
    laptop.say(f"Ray: {num_stopped} processes stopped")
    for name in (laptop.SIGNER, laptop.DA, laptop.CHAIN):
        laptop.say(f"{name}: {'stopped' if processes.stop(name, settings.run_dir) else 'did not run'}")


def forget_results(settings: Settings) -> None:
    """Remove everything below ``home`` but the set-up caches."""
    for path in settings.home.iterdir() if settings.home.exists() else ():
        if path.name not in CACHES:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(settings.run_dir, ignore_errors=True)


def print_doors(settings: Settings) -> None:
    """Where everything runs."""
    rows = [
        ("OpenAI-compatible API", f"{settings.public_url}/v1"),
        ("rollup (JSON-RPC)", settings.chain.rpc_url),
        ("contracts", settings.chain.addresses_path),
        ("EigenDA proxy", settings.chain.da_url),
        ("archive of blobs", settings.storage_url),
        ("Ray jobs", head.find(settings).jobs_url),
        ("Ray token", settings.ray.token_path),
    ]
    table("Running at", ["door", "address"], rows)


def _checks(settings: Settings) -> dict[str, Callable[[], str]]:
    def rollup() -> str:
        deployment = load_deployment(Path(settings.chain.addresses_path))
        chain = Rollup(settings.chain.rpc_url, deployment)
        return f"block {chain.block_number()}, next batch {chain.next_batch_id()}"

    def da() -> str:
        return f"HTTP {httpx.get(f'{settings.chain.da_url}/health', timeout=3.0).status_code}"

    def signer() -> str:
        found = processes.find(laptop.SIGNER, settings.run_dir)
        return f"pid {found.pid}" if found else "down"

    def ray_head() -> str:
        found = head.find(settings)
        return f"{found.address}" if head.is_alive(settings, found) else "down"

    def settler() -> str:
        head.connect_driver(settings)
        found = settler_actor.status()
        age = time.strftime("%H:%M:%S")
        return f"{found.ticks} ticks at {age}{', STOPPED: ' + found.stopped if found.stopped else ''}"

    def gateway() -> str:
        return f"HTTP {httpx.get(f'{settings.public_url}/healthz', timeout=3.0).status_code}"

    parts = {"rollup": rollup, "DA": da, "signer": signer, "Ray": ray_head, "settler": settler}
    return {**parts, "gateway": gateway}


def _state(check: Callable[[], str]) -> str:
    try:
        return check()
    except (Refusal, httpx.HTTPError, ValueError) as error:
        return f"down ({error})"
