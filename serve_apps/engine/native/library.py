"""Builds ``kernels.cpp`` for an instruction set and loads the build that this processor runs fastest.

The builds lie in ``build/`` beside the source, named by a hash of it, so a stale one is never loaded. Set-up
makes the one that fits (``python -m serve_apps.engine.native.library``; ``--all`` of them for an image); a
missing one is made when it is first wanted. The structures below mirror those of the source, field by field.
Why ctypes and a C interface: no headers of torch or Python to match, one compiler call, and a build that
outlives upgrades of both."""

import ctypes
import logging
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = tuple(
    HERE / name for name in ("kernels.cpp", "attention.h", "projections.h", "tile.h", "vectors.h", "team.h")
)
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wno-psabi")
# By torch's name for what the processor can do, each more than the next; LANES is the number of floats in a
# register.
_AVX512 = ("-DLANES=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
VARIANTS = {
    "AVX512_BF16": (*_AVX512, "-mavx512bf16"),
    "AVX512": _AVX512,
    "AVX2": ("-DLANES=8", "-mavx2", "-mfma"),
    "DEFAULT": ("-DLANES=4",),
}

PANEL = 16  # columns that lie together in a packed weight; tokens of a block of the cache
SLIM_PANEL = 8  # columns that lie together in the first factor of an adapter
MAX_HEAD_DIM = 256

_log = logging.getLogger(__name__)
_address, _count = ctypes.c_void_p, ctypes.c_int64


def _structure(name: str, fields: dict[str, object]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Linear = _structure(
    "Linear", {"panels": _address, "bias": _address, "d_in": _count, "d_out": _count, "kind": _count}
)
Part = _structure(
    "Part",
    {
        "b": _address,
        "first_rank": _count,
        "rank": _count,
        "first_panel": _count,
        "panel_step": _count,
        "num_columns": _count,
    },
)
Update = _structure("Update", {"a": _address, "rank": _count, "num_parts": _count, "parts": Part * 3})
Matrix = _structure(
    "Matrix",
    {
        "from": _address,
        "panels": _address,
        "num_rows": _count,
        "depth": _count,
        "first_row": _count,
        "width": _count,
    },
)
Segment = _structure("Segment", {"updates": _address, "start": _count, "end": _count})
Span = _structure("Span", {"first": _count, "num_tokens": _count, "start": _count, "blocks": _address})
Cache = _structure("Cache", {"keys": _address, "values": _address})
Shape = _structure(
    "Shape",
    {
        "num_layers": _count,
        "num_heads": _count,
        "num_kv_heads": _count,
        "head_dim": _count,
        "hidden": _count,
        "inner": _count,
        "vocabulary": _count,
        "num_blocks": _count,
        "is_half": _count,
        "cos": _address,
        "sin": _address,
        "norm_eps": ctypes.c_double,
    },
)
Layer = _structure(
    "Layer",
    {
        "attn_norm": _address,
        "mlp_norm": _address,
        "qkv": Linear,
        "o": Linear,
        "gate_up": Linear,
        "down": Linear,
        "cache": Cache,
    },
)
Decoder = _structure("Decoder", {"shape": Shape, "layers": _address, "final_norm": _address, "head": Linear})
Step = _structure(
    "Step",
    {
        "num_tokens": _count,
        "num_spans": _count,
        "num_segments": _count,
        "num_sampled": _count,
        "spans": _address,
        "segments": _address,
        "sampled": _address,
        "hidden": _address,
        "logits": _address,
        "best": _address,
        "highest": _address,
        "buffer": _address,
    },
)


@cache
def load_kernels() -> ctypes.CDLL | None:
    """The kernels for this processor, or ``None`` (and a line in the log) where they cannot be built."""
    try:
        return load(variant())
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        _log.warning("no native kernels, torch computes everything and is several times slower: %s", reason)
        return None


def load(variant: str) -> ctypes.CDLL:
    """Raises: as ``build`` does."""
    library = ctypes.CDLL(str(build(variant)))
    library.openledger_team.restype = ctypes.c_void_p
    library.openledger_pack.restype = ctypes.c_int64
    for name in ("disband", "step", "linear", "attend", "gated", "norm", "best"):
        getattr(library, f"openledger_{name}").restype = None
    return library


def variant() -> str:
    """Which of ``VARIANTS`` computes here: the widest of what torch finds the processor to be."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return "AVX512_BF16" if torch.cpu.get_capabilities()["avx512_bf16"] else "AVX512"
    return "AVX2" if capability == "AVX2" else "DEFAULT"


def runnable() -> list[str]:
    """All variants that this processor can run, the fastest first."""
    names = list(VARIANTS)
    return names[names.index(variant()) :]


def multiplies_bf16() -> bool:
    return variant() == "AVX512_BF16"


def build(variant: str) -> Path:
    """The shared object of ``variant``, compiled unless it is there. Builders may race; the last one wins.

    Raises:
        OSError: there is no compiler, or no place to put the build.
        subprocess.CalledProcessError: the compiler refused.
    """
    flags = (*FLAGS, *VARIANTS[variant])
    text = b"\0".join([*(source.read_bytes() for source in SOURCES), " ".join(flags).encode()])
    path = HERE / "build" / f"kernels-{variant.lower()}-{sha256(text).hexdigest()[:16]}.so"
    if not path.exists():
        found = compiler()
        if found is None:
            raise OSError("no C++ compiler on the PATH")
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [found, *flags, str(SOURCES[0]), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            made.rename(path)
    return path


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def address(tensor: torch.Tensor | None) -> int | None:
    """Where the kernels find a tensor; the caller keeps it alive."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


if __name__ == "__main__":
    for each in VARIANTS if "--all" in sys.argv else (variant(),):
        print(build(each))
