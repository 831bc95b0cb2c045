"""The compiled contracts, as they are checked in: whoever deploys or settles needs no compiler."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "artifacts"


@dataclass(frozen=True, slots=True)
class Artifact:
    """``immutables`` are the (start, length) pairs of the runtime code that the constructor fills in."""

    name: str
    abi: tuple[dict[str, Any], ...]
    bytecode: bytes
    runtime: bytes
    immutables: tuple[tuple[int, int], ...]

    def is_code(self, code: bytes) -> bool:
        """Is ``code``, found on a chain, this contract, whatever its immutables?"""
        return len(code) == len(self.runtime) and self._blank(code) == self._blank(self.runtime)

    def _blank(self, code: bytes) -> bytes:
        blanked = bytearray(code)
        for start, length in self.immutables:
            blanked[start : start + length] = bytes(length)
        return bytes(blanked)


@cache
def load_artifact(name: str) -> Artifact:
    found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Artifact(
        name,
        tuple(found["abi"]),
        bytes.fromhex(found["bytecode"][2:]),
        bytes.fromhex(found["deployedBytecode"][2:]),
        tuple((start, length) for start, length in found["immutables"]),
    )
