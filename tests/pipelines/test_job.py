"""The shell of every pipeline: a run happens once, and says how it went."""

import json
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine

from attribution.errors import Rejected, Unavailable
from cluster.config import Settings
from cluster.database import migrate, reading, writing
from cluster.storage import Storage
from cluster.tables import RunRow
from pipelines.job import TRY_AGAIN, Ground, Outcome, main, run
from pipelines.spec import Spec, load_spec


class CountSpec(Spec):
    to: int = 3


def count(ground: Ground, spec: CountSpec) -> Outcome:
    if spec.to > 10:
        raise Unavailable("tired", "ten is enough")
    return {"counted": list(range(spec.to))}


@pytest.fixture
def ground(settings: Settings, engine: Engine, storage: Storage) -> Ground:
    return Ground(settings, engine, storage)


def row(ground: Ground, run_id: str) -> RunRow:
    with reading(ground.engine) as session:
        return session.get_one(RunRow, run_id)


def test_a_run_is_done_once(ground: Ground) -> None:
    done = []

    def work(ground: Ground, spec: CountSpec) -> Outcome:
        done.append(spec.run_id)
        return count(ground, spec)

    first = run("count", ground, CountSpec(run_id="a"), work)
    assert run("count", ground, CountSpec(run_id="a"), work) == first
    assert done == ["a"]
    assert row(ground, "a").state == "succeeded"
    assert json.loads(row(ground, "a").outcome_json) == first


def test_a_failed_run_says_why_and_may_be_tried_again(ground: Ground) -> None:
    with pytest.raises(Unavailable):
        run("count", ground, CountSpec(run_id="b", to=11), count)
    assert row(ground, "b").state == "failed"
    assert json.loads(row(ground, "b").outcome_json)["error"]["code"] == "tired"
    with pytest.raises(ZeroDivisionError):  # a bug is written down, too
        run("count", ground, CountSpec(run_id="b", to=11), lambda ground, spec: {"never": 1 // 0})
    assert json.loads(row(ground, "b").outcome_json)["error"]["code"] == "ZeroDivisionError"
    assert run("count", ground, CountSpec(run_id="b", to=11), lambda ground, spec: {"ok": True}) == {
        "ok": True
    }


def test_a_run_id_is_never_reused_for_something_else(ground: Ground) -> None:
    run("count", ground, CountSpec(run_id="c"), count)
    for kind, spec in (("count", CountSpec(run_id="c", to=4)), ("other", CountSpec(run_id="c"))):
        with pytest.raises(Rejected) as refusal:
            run(kind, ground, spec, count)
        assert refusal.value.code == "run_exists"


def test_a_submitted_row_with_defaults_left_out_is_the_same_run(ground: Ground) -> None:
    with writing(ground.engine) as session:
        session.add(
            RunRow(run_id="d", kind="count", spec_json='{"run_id": "d"}', state="submitted", created_at=0)
        )
    assert run("count", ground, CountSpec(run_id="d"), count) == {"counted": [0, 1, 2]}


def test_a_spec_comes_from_a_file_or_from_storage(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "spec.yaml").write_text("run_id: e\nto: 5\n")
    storage.put("specs/e.json", b'{"run_id": "e", "to": 5}')
    wanted = CountSpec(run_id="e", to=5)
    for location in (str(tmp_path / "spec.yaml"), f"file:{tmp_path}/spec.yaml", "storage:specs/e.json"):
        assert load_spec(CountSpec, location, storage) == wanted


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("to: 5", "spec_value", "run_id"),
        ("run_id: x\nto: many", "spec_value", "to"),
        ("run_id: x\ntoo: 5", "spec_value", "too"),
        ("- run_id", "spec_yaml", "mapping"),
        ("run_id: [", "spec_yaml", "spec"),
        ("\xff", "spec_yaml", "spec"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(
    tmp_path: Path, storage: Storage, text: str, code: str, names: str
) -> None:
    (tmp_path / "spec").write_bytes(text.encode("latin-1"))
    with pytest.raises(Rejected, match=names) as refusal:
        load_spec(CountSpec, str(tmp_path / "spec"), storage)
    assert refusal.value.code == code


@pytest.mark.parametrize("location", ["/nowhere/spec.yaml", "storage:specs/none", "storage:../escape"])
def test_a_missing_spec_is_refused(storage: Storage, location: str) -> None:
    with pytest.raises(Rejected):
        load_spec(CountSpec, location, storage)


def test_the_command_prints_one_line_and_exits_non_zero(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENLEDGER_HOME", str(settings.home))
    migrate(settings.database_url)
    spec = tmp_path / "spec.json"
    for to, code in ((2, 0), (11, TRY_AGAIN), ("no", 1)):
        spec.write_text(json.dumps({"run_id": f"run-{to}", "to": to}))
        monkeypatch.setattr(sys, "argv", ["count", "--spec", str(spec)])
        assert main("count", CountSpec, count) == code
        said = capsys.readouterr()
        assert (said.out if code == 0 else said.err).count("\n") == 1
