"""The shell every pipeline starts in: spec in, outcome into the row of its run, one line on failure.

``python -m pipelines.X --spec FILE_OR_URI``. A run that has succeeded is not done again: starting it a second
time prints the outcome it had."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError
from sqlalchemy import Engine

from attribution.errors import Refusal, Rejected, Unavailable
from cluster.config import Settings, load_settings
from cluster.database import connect, writing
from cluster.storage import Storage, open_storage
from cluster.tables import RunRow
from pipelines.spec import Spec, load_spec

S = TypeVar("S", bound=Spec)
Outcome = Mapping[str, object]  # what JSON can say
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


@dataclass(frozen=True, slots=True)
class Ground:
    """What a pipeline stands on."""

    settings: Settings
    engine: Engine
    storage: Storage


def main(kind: str, model: type[S], work: Callable[[Ground, S], Outcome]) -> int:
    """Parse the command line, do the work under its ``run_id``, and return the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m pipelines.{kind}")
    parser.add_argument("--spec", required=True, help="a path, file:PATH or storage:KEY")
    options = parser.parse_args()
    try:
        settings = load_settings()
        storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
        spec = load_spec(model, options.spec, storage)
        ground = Ground(settings, connect(settings.database_url), storage)
        print(json.dumps(run(kind, ground, spec, work)), flush=True)
    except Refusal as refusal:
        print(f"{kind}: {refusal.code}: {refusal.message}", file=sys.stderr, flush=True)
        return TRY_AGAIN if isinstance(refusal, Unavailable) else 1
    return 0


def run(kind: str, ground: Ground, spec: S, work: Callable[[Ground, S], Outcome]) -> Outcome:
    """Do ``work`` once per ``spec.run_id``; its outcome, or the error that ended it, stays in the row."""
    done = _begin(ground.engine, kind, spec)
    if done is not None:
        return done
    try:
        outcome = work(ground, spec)
    except Exception as error:
        failure = {"code": getattr(error, "code", type(error).__name__), "message": str(error)[:2000]}
        _finish(ground.engine, spec.run_id, "failed", {"error": failure})
        raise
    _finish(ground.engine, spec.run_id, "succeeded", outcome)
    return outcome


def _begin(engine: Engine, kind: str, spec: Spec) -> Outcome | None:
    with writing(engine) as session:
        row = session.get(RunRow, spec.run_id)
        if row is None:
            row = RunRow(
                run_id=spec.run_id, kind=kind, spec_json=spec.model_dump_json(), created_at=int(time.time())
            )
            session.add(row)
        elif row.kind != kind or not _is_same(spec, row.spec_json):
            raise Rejected(
                "run_exists", f"{spec.run_id} is a run of {row.kind} with another spec", field="run_id"
            )
        elif row.state == "succeeded":
            found: Outcome = json.loads(row.outcome_json)
            return found
        row.state = "running"
    return None


def _is_same(spec: Spec, spec_json: str) -> bool:
    """Whoever submitted the job may have left out what has a default."""
    try:
        return type(spec).model_validate_json(spec_json) == spec
    except ValidationError:
        return False


def _finish(engine: Engine, run_id: str, state: str, outcome: Outcome) -> None:
    with writing(engine) as session:
        row = session.get_one(RunRow, run_id)
        row.state, row.outcome_json = state, json.dumps(outcome)
