"""HAProxy's environment: everything of one head in one folder, and its statistics on loopback."""

import itertools
import subprocess
from pathlib import Path

from cluster.haproxy import environment

CONFIG = """frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
    bind 10.0.0.1:8001
listen stats
  bind *:9102
"""


def test_only_the_statistics_are_kept_on_loopback(tmp_path: Path) -> None:
    """A gateway that is meant for others stays theirs. The configuration lies where Ray puts it."""
    ports = itertools.count(9101)
    names = environment(tmp_path / "haproxy", lambda: next(ports))
    config = tmp_path / "a node's.cfg"
    config.write_text(CONFIG)
    binary = names["RAY_SERVE_HAPROXY_BINARY_PATH"]
    subprocess.run([binary, "-db", "-f", config, "-c"], check=False, capture_output=True)
    kept = CONFIG.replace(" :9101", " 127.0.0.1:9101").replace(" *:9102", " 127.0.0.1:9102")
    assert config.read_text() == kept
    assert "HAProxy" in subprocess.run([binary, "-v"], check=True, capture_output=True, text=True).stdout


def test_two_heads_share_neither_files_nor_ports(tmp_path: Path) -> None:
    ports = itertools.count(9101)
    one, other = (environment(tmp_path / name, lambda: next(ports)) for name in "ab")
    assert all(
        one[name] != other[name]
        for name in one
        if name.endswith(("_LOC", "_PATH", "_BASE", "_FILE", "_PORT"))
    )


def test_sockets_have_room_for_the_folder_that_ray_puts_into_their_path(tmp_path: Path) -> None:
    """HAProxy takes 97 characters; Ray's folder is named by a node's id."""
    names = environment(tmp_path / "ha", lambda: 9101)
    for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
        socket = Path(names[name]).relative_to(tmp_path)
        assert len(f"/tmp/openledger-65534-0123abcd/{socket.parent}/{'n' * 56}/{socket.name}") <= 97
