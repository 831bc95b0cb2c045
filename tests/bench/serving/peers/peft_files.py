"""Our random adapters as PEFT writes them: what every peer loads, so that all compute the same updates."""

import json
from pathlib import Path

from safetensors.torch import save_file

from tests import toy_models
from tests.bench.serving.workloads import RANKS

SCALE = 0.01


def write_adapters(folder: Path, base: Path, shapes: dict[str, tuple[int, int]], num: int) -> list[Path]:
    """Folders of ``num`` adapters of the ranks in turn, the most popular first; those that exist stay."""
    return [
        _write(folder / f"a{index}-rank{rank}", base, shapes, rank, index)
        for index in range(num)
        for rank in [RANKS[index % len(RANKS)]]
    ]


def _write(folder: Path, base: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Path:
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, factors in toy_models.random_adapter(bytes(32), shapes, rank, seed, SCALE).factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = factors.a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = factors.b.float().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,  # the scaling is in B already
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
