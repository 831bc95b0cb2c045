"""The kernels compile for an H100 as they would run there: Triton's compiler and ptxas need no device.

In a process of its own, where Triton compiles; in this one it interprets (tests/conftest.py)."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="no Triton: its kernels are for CUDA devices")

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cluster.adapters import MAX_RANK
from serve_apps.engine.cuda import attention, layers, lora, weights
from serve_apps.engine.cuda.launch import ROWS
from serve_apps.engine.quantization import GROUP

HOPPER = GPUTarget("cuda", 90, 32)
ROOT = Path(__file__).parents[3]
NUMBERS = (
    "entry",
    "num_tokens",
    "num_splits",
    "num_blocks",
    "table_width",
    "query_stride",
    "cache_rows",
    "steps",
)
INTEGERS = ("firsts", "counts", "addresses", "starts", "table_rows", "tables", "positions", "slots")
SUMS = ("y", "parts", "sums", "scales")  # fp32; whatever else is an argument is bf16
SHARED = {"ROWS": ROWS, "OPERAND": tl.bfloat16}
OF_LORA = {**SHARED, "RANKS": lora.RANKS, "MOST": 3 * MAX_RANK, "ALIGNED": lora.ALIGNED}
SHRINK = {**OF_LORA, "D_IN": 4096, "SPLIT": lora.SPLIT, "STEP": lora.STEP}
EXPAND = {
    **OF_LORA,
    "D_OUT": 6144,
    "SPLITS": 4,
    "COLUMNS": lora.COLUMNS,
    "HEAD": lora.HEAD,
    "PART": lora.PART,
}
OF_WEIGHTS = {
    "OPERAND": tl.bfloat16,
    "D_IN": 4096,
    "D_OUT": 6144,
    "ADDS": False,
    "GROUP": GROUP,
    "COLUMNS": weights.COLUMNS,
}
OF_ATTENTION = {"HEADS": 32, "DIM": 128, "WIDTH": 128, "SPLIT": attention.SPLIT}
LLAMA_8B: list[tuple[Any, dict[str, Any], dict[str, int]]] = [  # kernel, constants, options
    (lora.shrink, SHRINK, {}),
    (lora.expand, EXPAND, {}),
    (
        attention.attend_split,
        {**SHARED, **OF_ATTENTION, "GROUP": 4, "BLOCK": 16, "KEYS": attention.KEYS},
        {},
    ),
    (attention.merge_splits, {**OF_ATTENTION, "ROWS": 32}, {"num_warps": 8}),
    (layers.add_and_norm_row, {"ADDS": True, "WIDTH": 4096, "COLUMNS": 4096}, {}),
    (layers.rotate_and_store_token, {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "ROWS": 64, "COLUMNS": 64}, {}),
    (layers.gate_row, {"WIDTH": 14336, "COLUMNS": layers.COLUMNS}, {}),
    (weights.sum_parts, {"D_OUT": 4096, "ADDS": True, "COLUMNS": 4 * weights.COLUMNS}, {}),
    *(
        (
            weights.multiply_tile,
            {**OF_WEIGHTS, "ROWS": rows, "IS_FOUR_BIT": is_four_bit},
            weights.options(rows),
        )
        for rows in (ROWS, 2 * ROWS, weights.MOST_ROWS)
        for is_four_bit in (False, True)
    ),
]


def type_of(name: str, constants: dict[str, Any]) -> str:
    if name == "integers":
        return "*u8" if constants["IS_FOUR_BIT"] else "*i8"
    if name in NUMBERS:
        return "i32"
    if name in INTEGERS:
        return "*i64"
    return "*fp32" if name in SUMS else "fp32" if name in ("scale", "eps") else "*bf16"


def compiled() -> Iterator[dict[str, Any]]:
    """Each kernel at the shapes of an 8B Llama: what it takes of a multiprocessor, and how it multiplies."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel, constants, options in LLAMA_8B:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else type_of(name, constants) for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
        source = ASTSource(kernel, signature, constants, aligned)
        built = triton.compile(source, target=HOPPER, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            told = subprocess.run(
                [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        usage = dict(
            pair.split(":") for pair in told.split() if pair.startswith(("REG:", "LOCAL:", "STACK:"))
        )
        yield {
            "kernel": kernel.__name__,
            "shared_bytes": built.metadata.shared,
            "registers": int(usage["REG"]),
            "spilled_bytes": int(usage["LOCAL"]) + int(usage["STACK"]),
            "uses_tensor_cores": "mma.sync" in built.asm["ptx"] or "wgmma" in built.asm["ptx"],
        }


@pytest.mark.skipif(sys.platform != "linux", reason="ptxas comes with Triton on Linux")
def test_the_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """Nothing spills, four programs fit into a multiprocessor, and what multiplies does so on tensor
    cores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve_apps.engine.test_cuda_compile"],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == len(LLAMA_8B)
    for found in kernels:
        assert found["spilled_bytes"] == 0 and found["shared_bytes"] <= 227 * 1024 // 4, found
    assert {found["kernel"] for found in kernels if found["uses_tensor_cores"]} == {
        "shrink",
        "expand",
        "attend_split",
        "multiply_tile",
    }


if __name__ == "__main__":
    print(json.dumps(list(compiled())))
