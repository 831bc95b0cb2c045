"""The command line: quick to start, one line per refusal, and the commands that the README names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attribution.errors import Rejected
from cluster.cli import chain, demo, screen

ROOT = Path(__file__).parent.parent.parent


def openledger(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPENLEDGER_HOME": str(home), "COLUMNS": "200"}
    command = [sys.executable, "-m", "cluster.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_help_loads_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from cluster.cli.main import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "print([n for n in ('torch', 'ray', 'web3', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["audit"], "no_deployment"),
        (["chain", "verify"], "no_deployment"),
        (["chain", "register", "0x00", "--key-file", "nowhere"], "bad_address"),
        (["usage"], "no_api_key"),
        (["train", "nowhere.yaml"], "spec_unreadable"),
        (["datanet", "fill", "nothing"], "unknown_source"),
        (["model", "import", "nowhere", "--name", "No/Name"], "model_name"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(tmp_path: Path, arguments: list[str], code: str) -> None:
    done = openledger(tmp_path, *arguments)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(code) and len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_the_readme_names_only_commands_that_exist(tmp_path: Path) -> None:
    words = re.findall(r"openledger ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    listed = openledger(tmp_path, "--help").stdout
    missing = [word for word in words if not re.search(rf"\b{word}\b", listed)]
    assert words and not missing


@pytest.mark.parametrize(
    ("gwei", "text"),
    [
        (0, "0.000000000 OPEN"),
        (1, "0.000000001 OPEN"),
        (-1, "-0.000000001 OPEN"),
        (10**18, "1,000,000,000.000000000 OPEN"),
    ],
)
def test_money_is_shown_exactly(gwei: int, text: str) -> None:
    assert screen.tokens(gwei) == text


def test_an_address_with_a_wrong_checksum_is_refused() -> None:
    right = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
    assert chain.parse_address(right, "a") == chain.parse_address(right.lower(), "a")
    with pytest.raises(Rejected, match="checksum"):
        chain.parse_address(right.replace("aA", "Aa"), "a")


def test_answers_are_compared_without_case_and_punctuation() -> None:
    assert demo.normalised(" Unused-Loop  control_variable.") == "unused loop control variable"


def test_a_sparkline_falls_as_the_loss_does() -> None:
    assert screen.sparkline([5.0, 4.0, 3.0, 2.0, 1.0]) == "█▆▄▂▁"
    assert screen.sparkline([2.0, 2.0]) == "▁▁"
    assert len(screen.sparkline([float(i) for i in range(1000)])) == 60
