"""Jobs: hand a pipeline to Ray's Jobs API and find out what became of it.

A run is a row. Its id is the submission id, so submitting twice starts one job. Ray's own records die with
the head: the spec is in storage, the outcome is in the row, which the pipeline itself writes. The API is
called over plain HTTP, so submitting imports no Ray. A job's environment and command line are readable in the
dashboard: they name files and hold no secret."""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import httpx
from sqlalchemy import Engine, select, update

from attribution.errors import Rejected, Unavailable
from cluster.config import Settings, child_environment
from cluster.database import connect, insert_new, reading, writing
from cluster.head import find, token_header
from cluster.storage import open_storage
from cluster.tables import RunRow

Json = Mapping[str, object]
KINDS = ("ingest", "finetune", "evaluate", "index", "close_period", "explain")
_RUN_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_SUBMIT_TIMEOUT_S = 120  # a head that has just started has no agent to take jobs for a while
_MAX_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run stands: ``submitted``, ``running``, ``succeeded`` or ``failed``. ``result`` is what the
    pipeline said, or ``{"error": {"code", "message"}}``."""

    run_id: str
    kind: str
    state: str
    result: Json


def submit(settings: Settings, kind: str, spec: Json, run_id: str) -> str:
    """Start a pipeline, or find it started: a run that runs or has succeeded is not started again, one that
    failed or whose head died is.

    Raises:
        Rejected: 409 ``run_exists`` as another kind or with another spec; ``bad_run_id``; ``unknown_kind``.
        Unavailable: Ray does not answer.
    """
    if kind not in KINDS:
        raise Rejected("unknown_kind", f"{kind!r} is none of {', '.join(KINDS)}", field="kind")
    if not _RUN_ID.fullmatch(run_id):
        raise Rejected("bad_run_id", f"expected {_RUN_ID.pattern}, given {run_id!r}", field="run_id")
    document = {**spec, "run_id": run_id}
    engine = connect(settings.database_url)
    try:
        if _enter_row(engine, kind, document, run_id) == "succeeded":
            return run_id
        storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
        storage.put(f"specs/{run_id}.json", json.dumps(document, sort_keys=True).encode())
        submission_id, status = _attempt(settings, run_id)
        if status is None:
            _reopen_row(engine, run_id)
            _submit(settings, kind, run_id, submission_id)
    finally:
        engine.dispose()
    return run_id


def wait(
    settings: Settings,
    run_id: str,
    on_log: Callable[[str], None] | None = None,
    timeout_s: float = 3600.0,
    poll_s: float = 1.0,
) -> Outcome:
    """Follow a run to its end; ``on_log`` gets its new output, whole lines at a time.

    Raises:
        Unavailable: ``run_lost`` if the head that ran it died (submit it again: it resumes); ``run_timeout``.
    """
    engine = connect(settings.database_url)
    deadline = time.monotonic() + timeout_s
    shown = 0
    try:
        while time.monotonic() < deadline:
            submission_id, status = _attempt(settings, run_id, latest=True)
            if on_log is not None:
                shown += _show(_logs(settings, submission_id)[shown:], on_log, to_the_end=status in _ENDED)
            if status in _ENDED:
                _end_row(engine, run_id, f"the job ended as {status}")
                return _outcome(engine, run_id)
            if status is None:
                found = _outcome(engine, run_id)
                if found.state in ("succeeded", "failed"):
                    return found
                raise Unavailable("run_lost", f"{run_id}: Ray knows nothing of it; submit it again")
            time.sleep(poll_s)
    finally:
        engine.dispose()
    raise Unavailable("run_timeout", f"{run_id}: no end after {timeout_s} s")


def is_done(settings: Settings, run_id: str) -> bool:
    """Whether a run of this id has succeeded, so that submitting it again would do nothing."""
    try:
        return outcome_of(settings, run_id).state == "succeeded"
    except Rejected:
        return False


def outcome_of(settings: Settings, run_id: str) -> Outcome:
    """How a run stands according to its row; Ray is not asked."""
    engine = connect(settings.database_url)
    try:
        return _outcome(engine, run_id)
    finally:
        engine.dispose()


def _enter_row(engine: Engine, kind: str, document: Json, run_id: str) -> str:
    spec_json = json.dumps(document, sort_keys=True)
    row = {
        "run_id": run_id,
        "kind": kind,
        "spec_json": spec_json,
        "state": "submitted",
        "created_at": int(time.time()),
    }
    with writing(engine) as session:
        if insert_new(session, RunRow, row):
            return "submitted"
        found = session.get_one(RunRow, run_id)
        if found.kind != kind or json.loads(found.spec_json) != document:
            raise Rejected(
                "run_exists",
                f"{run_id} is a run of {found.kind} with another spec",
                field="run_id",
                http_status=409,
            )
        return found.state


def _reopen_row(engine: Engine, run_id: str) -> None:
    again = update(RunRow).where(RunRow.run_id == run_id, RunRow.state != "succeeded")
    with writing(engine) as session:
        session.execute(again.values(state="submitted", outcome_json=""))


def _end_row(engine: Engine, run_id: str, why: str) -> None:
    """A pipeline that was killed could not write its own end."""
    failure = json.dumps({"error": {"code": "job_ended", "message": why}})
    open_row = update(RunRow).where(RunRow.run_id == run_id, RunRow.state.in_(("submitted", "running")))
    with writing(engine) as session:
        session.execute(open_row.values(state="failed", outcome_json=failure))


def _outcome(engine: Engine, run_id: str) -> Outcome:
    with reading(engine) as session:
        row = session.scalars(select(RunRow).where(RunRow.run_id == run_id)).one_or_none()
    if row is None:
        raise Rejected("run_not_found", f"no run {run_id!r}", field="run_id", http_status=404)
    return Outcome(run_id, row.kind, row.state, json.loads(row.outcome_json or "{}"))


def _attempt(settings: Settings, run_id: str, *, latest: bool = False) -> tuple[str, str | None]:
    """The submission id to look at and its status, None if Ray does not know it.

    One head takes a submission id once, so a run that ended and is tried again gets ``.2``, ``.3`` …"""
    before: tuple[str, str | None] = (run_id, None)
    for number in range(1, _MAX_ATTEMPTS + 1):
        submission_id = run_id if number == 1 else f"{run_id}.{number}"
        status = _status(settings, submission_id)
        if status is None:
            return before if latest else (submission_id, None)
        if status not in _ENDED:
            return submission_id, status
        before = (submission_id, status)
    raise Rejected("too_many_attempts", f"{run_id} ended {_MAX_ATTEMPTS} times", field="run_id")


def _submit(settings: Settings, kind: str, run_id: str, submission_id: str) -> None:
    # In a cluster that we joined, the pods carry their own OPENLEDGER_*; here the job is told our paths.
    environment = {} if settings.ray.address else child_environment(settings)
    request = {
        "entrypoint": f"python -m pipelines.{kind} --spec storage:specs/{run_id}.json",
        "submission_id": submission_id,
        "runtime_env": {"env_vars": environment},
        "metadata": {"run_id": run_id, "kind": kind},
    }
    deadline = time.monotonic() + _SUBMIT_TIMEOUT_S
    pause_s = 0.5
    while True:
        reply = _call(settings, "POST", "/api/jobs/", request)
        if reply.status_code == 200 or "already exists" in reply.text:
            return
        if reply.status_code < 500:
            raise Rejected("job_refused", f"{run_id}: {reply.status_code}: {_last_line(reply.text)}")
        if "No available agent" not in reply.text or time.monotonic() > deadline:
            raise Unavailable("ray_busy", f"{run_id}: {reply.status_code}: {_last_line(reply.text)}")
        time.sleep(pause_s)
        pause_s = min(5.0, pause_s * 2)


def _status(settings: Settings, submission_id: str) -> str | None:
    reply = _call(settings, "GET", f"/api/jobs/{submission_id}")
    if reply.status_code == 404:
        return None
    if reply.status_code != 200:
        raise Unavailable("ray_busy", f"{submission_id}: {reply.status_code}: {_last_line(reply.text)}")
    return str(reply.json()["status"])


def _logs(settings: Settings, submission_id: str) -> str:
    reply = _call(settings, "GET", f"/api/jobs/{submission_id}/logs")
    return str(reply.json().get("logs") or "") if reply.status_code == 200 else ""


def _show(text: str, on_log: Callable[[str], None], *, to_the_end: bool) -> int:
    """Hand on whole lines; returns how many characters were handed on."""
    whole = text if to_the_end else text[: text.rfind("\n") + 1]
    if whole:
        on_log(whole)
    return len(whole)


def _call(settings: Settings, method: str, path: str, body: Json | None = None) -> httpx.Response:
    url = find(settings).jobs_url
    try:
        reply = _client().request(method, url + path, json=body, headers=token_header(settings))
    except httpx.HTTPError as error:
        raise Unavailable("ray_unreachable", f"{url}: {error or type(error).__name__}") from error
    if reply.status_code in (401, 403):
        raise Rejected(
            "ray_token", f"{url} does not accept the token of {settings.ray.token_path}", http_status=401
        )
    return reply


@cache
def _client() -> httpx.Client:
    """One for all calls: every new one reads the machine's certificates, a tenth of a core while we wait."""
    return httpx.Client(timeout=30)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]
