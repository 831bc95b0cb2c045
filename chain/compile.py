"""Compile the contracts to ``artifacts/*.json``, or check that those are what the sources give.

``python -m chain.compile [--check] [--tools FOLDER]``. An artifact holds ABI, creation and runtime code,
where the runtime code has immutables, and the settings that made it; with the metadata hash left out, the
same sources give the same bytes in every folder. The ``solcjs`` program is not used: it loses output on
pipes."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from attribution.errors import Corrupted, Refusal, Rejected
from chain.toolchain import PACKAGES, Toolchain, install

FOLDER = Path(__file__).parent
CONTRACTS = {
    "OpenToken": "OpenToken.sol",
    "ContributorRegistry": "ContributorRegistry.sol",
    "Escrow": "Escrow.sol",
    "AttributionLedger": "AttributionLedger.sol",
    "Distributor": "Distributor.sol",
    "TimelockController": "@openzeppelin/contracts/governance/TimelockController.sol",
}
SETTINGS = {
    "evmVersion": "cancun",
    "optimizer": {"enabled": True, "runs": 20_000},
    "metadata": {"bytecodeHash": "none", "appendCBOR": False},
}
OUTPUTS = [
    "abi",
    "evm.bytecode.object",
    "evm.deployedBytecode.object",
    "evm.deployedBytecode.immutableReferences",
]
# Files in and out: require("solc").compile is the one entry that works everywhere.
SHIM = (
    'const fs = require("fs");'
    "const [input, output, modules] = process.argv.slice(1);"
    'const compiled = require(modules + "/solc").compile(fs.readFileSync(input, "utf8"));'
    "fs.writeFileSync(output, compiled);"
)


def compile_contracts(tools: Toolchain) -> dict[str, str]:
    """Name → artifact as JSON text. ``Rejected`` with the compiler's own words if it has any."""
    request = {
        "language": "Solidity",
        "sources": {name: {"content": text} for name, text in _sources(tools.modules).items()},
        "settings": {**SETTINGS, "outputSelection": {"*": {"*": OUTPUTS}}},
    }
    answer = _solc(tools, json.dumps(request))
    faults = [
        e["formattedMessage"] for e in answer.get("errors", []) if e["severity"] in ("error", "warning")
    ]
    if faults:
        raise Rejected("does_not_compile", "\n".join(faults), field="sources")
    return {name: _artifact(name, file, answer["contracts"][file][name]) for name, file in CONTRACTS.items()}


def check(compiled: dict[str, str], folder: Path) -> None:
    """``Corrupted`` unless the artifacts in ``folder`` are exactly these."""
    for name, text in compiled.items():
        path = folder / f"{name}.json"
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found != text:
            message = f"{path.name} ({len(found)} bytes) is not what the sources give ({len(text)} bytes)"
            raise Corrupted("stale_artifact", f"{message}: run python -m chain.compile", field=name)


def _sources(modules: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting = list(CONTRACTS.values())
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = modules / name if name.startswith("@") else FOLDER / "contracts" / name
        found[name] = path.read_text(encoding="utf-8")
        for imported in re.findall(r'^import[^;]*?"([^"]+)";', found[name], re.MULTILINE):
            waiting.append(_resolve(name, imported))
    return dict(sorted(found.items()))


def _resolve(importer: str, imported: str) -> str:
    if not imported.startswith("."):
        return imported
    parts = importer.split("/")[:-1]
    for step in imported.split("/"):
        if step == "..":
            parts.pop()
        elif step != ".":
            parts.append(step)
    return "/".join(parts)


def _solc(tools: Toolchain, request: str) -> dict:  # type: ignore[type-arg]
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "in.json"), Path(folder, "out.json")
        question.write_text(request, encoding="utf-8")
        command = [str(tools.node), "-e", SHIM, str(question), str(answer), str(tools.modules)]
        subprocess.run(command, check=True)
        parsed = json.loads(answer.read_text(encoding="utf-8"))
        assert isinstance(parsed, dict)
        return parsed


def _artifact(name: str, file: str, output: dict) -> str:  # type: ignore[type-arg]
    runtime = output["evm"]["deployedBytecode"]
    holes = [(r["start"], r["length"]) for refs in runtime["immutableReferences"].values() for r in refs]
    artifact = {
        "contract": name,
        "source": file,
        "solc": PACKAGES["solc"],
        "openzeppelin": PACKAGES["@openzeppelin/contracts"],
        "settings": SETTINGS,
        "abi": output["abi"],
        "bytecode": "0x" + output["evm"]["bytecode"]["object"],
        "deployedBytecode": "0x" + runtime["object"],
        "immutables": sorted(holes),
    }
    return json.dumps(artifact, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument(
        "--tools", type=Path, default=Path(".openledger/node"), help="where npm's packages lie"
    )
    chosen = parser.parse_args()
    try:
        compiled = compile_contracts(install(chosen.tools))
        if chosen.check:
            check(compiled, FOLDER / "artifacts")
    except Refusal as refusal:
        sys.exit(f"{refusal.code}: {refusal.message}")
    for name, text in compiled.items():
        if not chosen.check:
            (FOLDER / "artifacts").mkdir(exist_ok=True)
            (FOLDER / "artifacts" / f"{name}.json").write_text(text, encoding="utf-8")
        code = (len(json.loads(text)["deployedBytecode"]) - 2) // 2
        print(f"{name}: {code} bytes of 24576, {'as checked in' if chosen.check else 'written'}")


if __name__ == "__main__":
    main()
