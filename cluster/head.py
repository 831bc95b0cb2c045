"""Ray: start a private head on this machine, or join the cluster that the settings name.

A private head has a token (mode 0600) that every call must carry, its own directory and ports, and listens on
loopback alone. It holds caches only, so killing it loses nothing: starting again clears what is left and
begins anew. Only processes that carry this head's directory are ever stopped; other Rays are not ours."""

import fcntl
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from attribution.errors import Rejected, Unavailable
from cluster import haproxy
from cluster.config import Settings, child_environment, private_dir

NAMESPACE = "openledger"
_PORTS = range(20_000, 32_000)  # below what systems hand out to outgoing connections
_ROOT = Path(__file__).parent.parent
_STOP_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True)
class Head:
    """Where Ray is: ``address`` for drivers, ``jobs_url`` for the Jobs API."""

    address: str
    jobs_url: str


def start(settings: Settings) -> Head:
    """The running head: joined, found alive, or started. Safe to call again and from several processes.

    Raises:
        Unavailable: Ray did not come up within ``ray.start_timeout_s``.
    """
    if settings.ray.address:
        return find(settings)
    private_dir(settings.run_dir)
    settings.home.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(settings):
        _make_token(Path(settings.ray.token_path))
        if _state_path(settings).exists():
            head = find(settings)
            if is_alive(settings, head):
                return head
            _stop(settings)
        return _start(settings)


def find(settings: Settings) -> Head:
    """Where Ray should be, whether or not it answers.

    Raises:
        Unavailable: ``ray_not_started``: no head was started for this home.
    """
    if settings.ray.address:
        if not settings.ray.jobs_url:
            raise Rejected("config_value", "ray.address needs ray.jobs_url beside it", field="ray.jobs_url")
        return Head(settings.ray.address, settings.ray.jobs_url)
    try:
        return Head(**json.loads(_state_path(settings).read_text()))
    except FileNotFoundError as error:
        raise Unavailable("ray_not_started", f"no Ray head was started for {settings.home}") from error


def is_alive(settings: Settings, head: Head) -> bool:
    """Whether the head answers to our token."""
    try:
        reply = httpx.get(f"{head.jobs_url}/api/version", headers=token_header(settings), timeout=10)
    except httpx.HTTPError:
        return False
    return reply.status_code == 200


def stop(settings: Settings) -> int:
    """Stop the private head and all that runs on it; returns how many processes. A joined one is left."""
    if settings.ray.address or not settings.home.exists():
        return 0
    with _one_at_a_time(settings):
        return _stop(settings)


def processes(settings: Settings) -> list[psutil.Process]:
    """Our head's processes: those whose environment names its directory, and all that they started.

    Workers rewrite their title, and with it the environment that others see, hence the second half."""
    everyone = {process.pid: process for process in psutil.process_iter(["ppid"])}
    own = {pid for pid, process in everyone.items() if _is_marked(process, settings.ray.temp_dir)}
    while more := {pid for pid, process in everyone.items() if process.info["ppid"] in own} - own:
        own |= more
    return [everyone[pid] for pid in own - {os.getpid()}]


def token_header(settings: Settings) -> dict[str, str]:
    """What every HTTP call to Ray must carry.

    Raises:
        Unavailable: the token file does not exist yet.
    """
    try:
        return {"Authorization": f"Bearer {Path(settings.ray.token_path).read_text().strip()}"}
    except FileNotFoundError as error:
        raise Unavailable("ray_not_started", f"no token at {settings.ray.token_path}") from error


def prepare_environment(settings: Settings) -> None:
    """Make this process a driver's; inside a job of the head everything is set already."""
    os.environ.update(driver_environment(settings))
    if "ray" in sys.modules:  # it read the environment when it was imported, and must read it again
        from ray._private import ray_constants
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")
        ray_constants.ENABLE_RAY_CLUSTER = bool(settings.ray.address)


def driver_environment(settings: Settings) -> dict[str, str]:
    """What a process that speaks to our Ray needs, ``ray job submit`` of a shell included; no secret."""
    names = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": settings.ray.token_path}
    if not settings.ray.address:
        # Ray's switch for laptops: without it 127.0.0.1 is replaced by the machine's address and every port
        # is opened on all interfaces (measured on Linux, Ray 2.60; tests/cluster/test_head.py watches it).
        names["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return names


def connect_driver(settings: Settings) -> None:
    """``ray.init`` to our head, in our namespace; a process that is connected stays so."""
    prepare_environment(settings)
    head = find(settings)
    import ray

    if not ray.is_initialized():
        if not is_alive(settings, head):  # Ray itself would try for minutes
            raise Unavailable("ray_unreachable", f"no Ray answers at {head.jobs_url}")
        try:
            ray.init(address=head.address, namespace=NAMESPACE, log_to_driver=False, logging_level="warning")
        except (ConnectionError, RuntimeError) as error:
            raise Unavailable("ray_unreachable", f"no Ray at {head.address}: {error}") from error


def _start(settings: Settings) -> Head:
    ray = settings.ray
    gcs, dashboard, agent, client, metrics, autoscaler = _free_ports(6, ray.port, ray.dashboard_port)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={ray.temp_dir}"),
        *(
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
        ),
        *(f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"),
        *(f"--num-cpus={ray.num_cpus or os.cpu_count()}", f"--object-store-memory={ray.object_store_bytes}"),
    ]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **driver_environment(settings),
        **child_environment(settings),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve other processes
        **(haproxy.environment(settings.run_dir / "ha", _random_port) if ray.has_haproxy else {}),
        **ray.environment,
        "RAY_TMPDIR": ray.temp_dir,
        "DASHBOARD_METRIC_PORT": str(metrics),
        "AUTOSCALER_METRIC_PORT": str(autoscaler),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(_ROOT),
    }
    head = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")
    _write_state(settings, head)  # before the processes exist, so that a crash here leaves none unknown
    log = settings.home / "ray-start.log"
    with log.open("wb") as output:
        started = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=ray.start_timeout_s,
            check=False,
            start_new_session=True,  # Ctrl-C in the shell that started it is not meant for the head
        )
    deadline = time.monotonic() + ray.start_timeout_s
    while started.returncode == 0 and time.monotonic() < deadline:
        if is_alive(settings, head):
            return head
        time.sleep(0.5)
    _stop(settings)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise Unavailable("ray_start", f"Ray did not start ({started.returncode}): {' '.join(last)}; see {log}")


def _stop(settings: Settings) -> int:
    own = processes(settings)
    for process in own:
        _signal(process, "terminate")
    _, alive = psutil.wait_procs(own, timeout=_STOP_TIMEOUT_S)
    left = {process.pid: process for process in [*alive, *processes(settings)]}
    for process in left.values():
        _signal(process, "kill")
    psutil.wait_procs(list(left.values()), timeout=_STOP_TIMEOUT_S)
    _state_path(settings).unlink(missing_ok=True)
    return len({process.pid for process in own} | set(left))


def _is_marked(process: psutil.Process, temp_dir: str) -> bool:
    try:
        return bool(process.environ().get("RAY_TMPDIR") == temp_dir)
    except (psutil.Error, OSError):
        return False  # gone meanwhile, or somebody else's


def _signal(process: psutil.Process, name: str) -> None:
    with suppress(psutil.Error):  # it may have ended by itself
        getattr(process, name)()


def _free_ports(count: int, *wanted: int) -> list[int]:
    """``wanted`` first, where they are not 0, then free ones, all different."""
    ports: list[int] = []
    for number in range(count):
        fixed = wanted[number] if number < len(wanted) else 0
        ports.append(fixed or next(port for port in iter(_random_port, 0) if port not in ports))
    return ports


def _random_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _make_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            raise Rejected(
                "unsafe_token", f"{path}: mode {path.stat().st_mode & 0o777:o}, expected 600"
            ) from None
        return
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))


def _state_path(settings: Settings) -> Path:
    return settings.home / "ray-head.json"


def _write_state(settings: Settings, head: Head) -> None:
    temporary = settings.home / ".ray-head.json"
    temporary.write_text(json.dumps(asdict(head)))
    temporary.replace(_state_path(settings))


@contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    with (settings.home / "ray-head.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
