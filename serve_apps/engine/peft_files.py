"""Packed adapters as the folders that PEFT writes and other engines read."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from attribution.errors import Corrupted, Rejected
from attribution.hashing import sha256
from attribution.types import ZERO_ID
from cluster.adapters import Factors, adapter_key, unpack
from cluster.storage import Storage


def write_peft(folder: Path, factors: Mapping[str, Factors]) -> None:
    """Write ``folder`` whole or not at all. PEFT knows one rank: smaller factors are padded with zeros, which
    changes no product."""
    rank = max(each.a.shape[0] for each in factors.values())
    tensors = {}
    for module, each in factors.items():
        missing = rank - each.a.shape[0]
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = F.pad(each.a, (0, 0, 0, missing)).contiguous()
        tensors[f"{name}.lora_B.weight"] = F.pad(each.b, (0, missing)).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,  # the scaling is in the factors already
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "bias": "none",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    save_file(tensors, unfinished / "adapter_model.safetensors")
    (unfinished / "adapter_config.json").write_text(json.dumps(config))
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster, with the same content
        shutil.rmtree(unfinished)


def peft_folders(
    storage: Storage, base_id: bytes, shapes: Mapping[str, tuple[int, int]], cache: Path, max_rank: int
) -> Callable[[bytes], Path]:
    """A function that gives an adapter's folder below ``cache``, converted at its first use; ``ZERO_ID`` is
    an adapter that changes nothing. It raises Corrupted, or Rejected for a rank above ``max_rank``."""

    def folder_of(adapter_id: bytes) -> Path:
        folder = cache / (adapter_id if adapter_id != ZERO_ID else b"base" + base_id).hex()
        if not folder.exists():
            write_peft(folder, factors_of(adapter_id))
        return folder

    def factors_of(adapter_id: bytes) -> Mapping[str, Factors]:
        if adapter_id == ZERO_ID:
            module = min(shapes)
            d_out, d_in = shapes[module]
            return {module: Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1))}
        packed = storage.get(adapter_key(adapter_id))
        if sha256(packed) != adapter_id:
            raise Corrupted("adapter_hash", f"{adapter_id.hex()} hashes to {sha256(packed).hex()}")
        factors = unpack(packed, base_id, shapes).factors
        rank = max(each.a.shape[0] for each in factors.values())
        if rank > max_rank:
            raise Rejected("adapter_rank", f"rank {rank}, this engine serves up to {max_rank}", field="model")
        return factors

    return folder_of
