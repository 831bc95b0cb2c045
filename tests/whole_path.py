"""A platform of one test's own, everything real: ground, rollup, Ray, services, on free ports and in a
temporary directory."""

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from cluster import head
from cluster.cli import money, stack
from cluster.config import Settings, load_settings

HURRIED = {"batch_max_age_s": 2, "poll_s": 0.2, "lease_s": 3}  # settling within seconds
CACHES = ("node", "models", "packages")  # what set-up fetched: the same for everybody


@contextmanager
def own_platform(
    folder: Path, monkeypatch: pytest.MonkeyPatch, base_model: str, pace: Mapping[str, float] = HURRIED
) -> Iterator[Settings]:
    """Settings of a laptop platform; whatever was started with them is stopped at the end."""
    cached = Path(os.environ.get("OPENLEDGER_HOME", ".openledger"))
    monkeypatch.delenv("OPENLEDGER_HOME", raising=False)  # the environment would win over what is set here
    monkeypatch.delenv("OPENLEDGER_CONFIG", raising=False)
    gateway = free_port()
    values = {
        "home": str(folder / "home"),
        "run_dir": f"/tmp/olpath{os.getpid()}",
        "base_model": base_model,
        "gateway_port": gateway,
        "public_url": f"http://127.0.0.1:{gateway}",
        "ray": {"num_cpus": 2, "object_store_bytes": 100_000_000},
        "chain": {
            "rpc_url": f"http://127.0.0.1:{free_port()}",
            "da_url": f"http://127.0.0.1:{free_port()}",
            "final_tag": "latest",
            "activation_delay_s": 0,
            **pace,
        },
        "period": {"allow_small": True},
    }
    config = folder / "own.yaml"  # jobs and actors load their settings from the file themselves
    config.write_text(yaml.safe_dump(values))
    settings = load_settings(config)
    settings.home.mkdir()
    for name in CACHES:
        if (cached / name).exists():
            (settings.home / name).symlink_to((cached / name).resolve())
    try:
        yield settings
    finally:
        stack.stop(settings)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kill_head(settings: Settings) -> None:
    """``kill -9`` of everything that Ray started: what a power cut does."""
    doomed = head.processes(settings)
    assert doomed
    for process in doomed:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(doomed, timeout=20)
    import ray

    ray.shutdown()


def job(settings: Settings, kind: str, spec: dict[str, object]) -> dict[str, object]:
    return money.run_job(settings, kind, spec, f"{kind}-own", print)


def ask(settings: Settings, key: str, ref: str, questions: list[str], max_tokens: int = 4) -> None:
    for question in questions:
        body = {"model": ref, "max_tokens": max_tokens, "messages": [{"role": "user", "content": question}]}
        answer = httpx.post(
            f"{settings.public_url}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {key}"},
            timeout=120,
        )
        assert answer.status_code == 200, answer.text
