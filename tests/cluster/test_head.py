"""A private head: on loopback, behind its token, dead and alive again, touching no others; and its jobs.

One head serves all tests of this file, because it takes some twenty seconds to start on two cores."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy import update

from attribution.errors import Rejected, Unavailable
from cluster import head, jobs
from cluster.config import Settings, child_environment
from cluster.database import connect, migrate, writing
from cluster.tables import RunRow

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    home = tmp_path_factory.mktemp("home")
    run_dir = Path(f"/tmp/ol{os.getpid()}")
    settings = Settings(home=home, run_dir=run_dir, ray={"num_cpus": 2, "object_store_bytes": 100_000_000})
    migrate(settings.database_url)
    head.start(settings)
    yield settings
    head.stop(settings)
    shutil.rmtree(run_dir, ignore_errors=True)


def listening(settings: Settings) -> dict[tuple[str, int], str]:
    """Address and port → command, of all processes of the head."""
    found = {}
    for process in head.processes(settings):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found[connection.laddr.ip, connection.laddr.port] = " ".join(process.cmdline())[:80]
    return found


def test_every_port_listens_on_loopback_only(settings: Settings) -> None:
    """With a worker running, too. ``-rP`` prints which ports Ray opens, on what, and whose they are."""
    script = (
        "import ray, cluster.head as h, cluster.config as c; h.connect_driver(c.load_settings()); "
        "print(ray.get(ray.remote(lambda: 7).remote()), flush=True); input()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **child_environment(settings)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "7\n"
    ports = listening(settings)
    for process in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                ports[connection.laddr.ip, connection.laddr.port] = "driver"
    driver.communicate("\n")
    for (address, port), command in sorted(ports.items()):
        print(f"{address}:{port} {command}")
    assert len(ports) >= 8
    assert {address for address, _ in ports} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    own_address = socket.gethostbyname(socket.gethostname())
    if not own_address.startswith("127."):
        for _, port in ports:
            with socket.socket() as probe:
                assert probe.connect_ex((own_address, port)) != 0


def test_without_the_token_nothing_is_told_or_run(settings: Settings) -> None:
    url = head.find(settings).jobs_url
    assert Path(settings.ray.token_path).stat().st_mode & 0o777 == 0o600
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.get(f"{url}/api/version", headers=headers).status_code in (401, 403)
        assert httpx.get(f"{url}/nodes", headers=headers).status_code in (401, 403)
        job = {"entrypoint": "echo owned"}
        assert httpx.post(f"{url}/api/jobs/", json=job, headers=headers).status_code in (401, 403)


def test_starting_again_finds_the_same_head(settings: Settings) -> None:
    before = head.find(settings)
    assert head.start(settings) == before
    assert head.is_alive(settings, before)


def run_pipeline(settings: Settings, run_id: str, spec: dict[str, object]) -> jobs.Outcome:
    lines: list[str] = []
    jobs.submit(settings, "ingest", spec, run_id)
    outcome = jobs.wait(settings, run_id, lines.append, timeout_s=240, poll_s=0.3)
    print("".join(lines))
    return outcome


def test_a_run_that_fails_says_why_and_can_be_tried_again(settings: Settings) -> None:
    """A spec without a datanet is refused by the pipeline, in the job, under the settings of this home."""
    assert run_pipeline(settings, "broken-1", {"no_such_field": 1}).state == "failed"
    again = run_pipeline(settings, "broken-1", {"no_such_field": 1})
    assert again.state == "failed"
    url, header = head.find(settings).jobs_url, head.token_header(settings)
    found = {job["submission_id"]: job for job in httpx.get(f"{url}/api/jobs/", headers=header).json()}
    assert {"broken-1", "broken-1.2"} <= set(found)
    secrets_of_ours = Path(settings.ray.token_path).read_text().strip()
    assert secrets_of_ours not in json.dumps(found)


def test_submitting_twice_starts_one_job(settings: Settings) -> None:
    spec: dict[str, object] = {"no_such_field": 2}
    jobs.submit(settings, "ingest", spec, "twice")
    jobs.submit(settings, "ingest", spec, "twice")
    jobs.wait(settings, "twice", timeout_s=240)
    url, header = head.find(settings).jobs_url, head.token_header(settings)
    ids = [job["submission_id"] for job in httpx.get(f"{url}/api/jobs/", headers=header).json()]
    assert [name for name in ids if name and name.startswith("twice")] == ["twice"]


def test_a_run_that_succeeded_is_not_started_again(settings: Settings) -> None:
    engine = connect(settings.database_url)
    spec = json.dumps({"run_id": "done"})
    with writing(engine) as session:
        session.add(
            RunRow(
                run_id="done",
                kind="index",
                spec_json=spec,
                state="succeeded",
                outcome_json='{"n": 3}',
                created_at=0,
            )
        )
    jobs.submit(settings, "index", {}, "done")
    assert jobs.wait(settings, "done").result == {"n": 3}
    with writing(engine) as session:
        session.execute(update(RunRow).where(RunRow.run_id == "done").values(state="running"))
    with pytest.raises(Unavailable, match="submit it again"):
        jobs.wait(settings, "done")


@pytest.mark.parametrize(
    ("kind", "run_id", "spec", "code"),
    [
        ("rm -rf", "x", {}, "unknown_kind"),
        ("ingest", "../x", {}, "bad_run_id"),
        ("ingest", "x; ls", {}, "bad_run_id"),
        ("finetune", "done", {"other": 1}, "run_exists"),
    ],
)
def test_a_wrong_submission_is_refused(
    settings: Settings, kind: str, run_id: str, spec: dict[str, object], code: str
) -> None:
    with pytest.raises(Rejected) as refusal:
        jobs.submit(settings, kind, spec, run_id)
    assert refusal.value.code == code


def test_a_killed_head_starts_again_and_nobody_else_is_touched(settings: Settings) -> None:
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env={**os.environ, "RAY_TMPDIR": f"{settings.ray.temp_dir}-other"},
    )
    before, family = head.find(settings), head.processes(settings)
    victims = [p for p in family if re.search("gcs_server|raylet|dashboard", " ".join(p.cmdline()))]
    for process in victims:
        with suppress(psutil.NoSuchProcess):  # they die of each other, too
            process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while head.is_alive(settings, before) and time.monotonic() < deadline:
        time.sleep(0.2)
    with pytest.raises(Unavailable):
        jobs.submit(settings, "ingest", {"no_such_field": 3}, "after")
    after = head.start(settings)
    assert after != before
    # Nothing of the dead head lives on: orphaned agents notice by themselves, measured up to a minute after.
    alive = psutil.wait_procs(family, timeout=180)[1]
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert run_pipeline(settings, "after", {"no_such_field": 3}).state == "failed"  # it ran, and said no
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_stopped_head_leaves_no_process(settings: Settings) -> None:
    assert head.stop(settings) > 3
    assert head.processes(settings) == []
    assert head.stop(settings) == 0
    with pytest.raises(Unavailable, match="no Ray head was started"):
        head.find(settings)
