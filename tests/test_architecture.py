"""The arrows of the house: who may import whom, where heavy libraries live, who reads the environment."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("pipelines", "serve_apps", "chain")
OURS = ("attribution", "cluster", *WINGS)
MODULES = sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))

ADDRESSES = {
    "deepspeed": ("pipelines/finetune_worker.py",),
    "triton": ("serve_apps/engine/cuda/",),
    "web3": ("chain/rollup.py",),
    "vllm": ("serve_apps/engine/vllm_engine.py",),
    "llguidance": ("serve_apps/engine/grammar.py",),
    "torch": (
        "attribution/",
        "cluster/models.py",
        "cluster/adapters.py",
        "cluster/peft_files.py",
        "pipelines/",
        "serve_apps/",
    ),
    "ray": ("cluster/", "pipelines/", "serve_apps/", "chain/settler_actor.py"),
    "sqlalchemy": ("cluster/", "pipelines/", "serve_apps/", "chain/"),
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_arrows_point_down(path: Path) -> None:
    """attribution ◀ cluster ◀ wings; wings never meet; nobody imports the CLI, which knows everybody."""
    folder = place(path).split("/")[0]
    is_cli = place(path).startswith("cluster/cli/")
    below = {"attribution": {"attribution"}, "cluster": {"attribution", "cluster"}}
    allowed = set(OURS) if is_cli else below.get(folder, {"attribution", "cluster", folder})
    found = {name.split(".")[0] for name in imports(path)} & {*OURS, "tests"}
    assert found <= allowed, f"{place(path)} imports {sorted(found - allowed)}"
    if not is_cli:
        assert not any(name.startswith("cluster.cli") for name in imports(path))


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_heavy_libraries_have_addresses(path: Path) -> None:
    for name in imports(path):
        addresses = ADDRESSES.get(name.split(".")[0])
        if addresses is not None:
            assert place(path).startswith(addresses), f"{place(path)} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=place)
def test_packages_are_empty(path: Path) -> None:
    assert path.read_text() == ""


@pytest.mark.parametrize("path", [p for p in MODULES if place(p) != "cluster/config.py"], ids=place)
def test_only_the_config_reads_the_environment(path: Path) -> None:
    """Reading is the config's; handing a child process or a library its environment is not reading."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_getenv = isinstance(node, ast.Attribute) and node.attr == "getenv"
        is_lookup = (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and isinstance(node.func.value, ast.Attribute)
            and node.func.value.attr == "environ"
        )
        assert not (is_getenv or is_lookup), f"{place(path)}:{node.lineno} reads the environment"
