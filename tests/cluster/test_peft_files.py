"""What PEFT saved says the same in our runner; what we cannot compute, or should not touch, is refused."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from attribution.errors import Rejected
from cluster import peft_files
from cluster.adapters import MAX_RANK, load_adapter, price_gwei_per_token, resolve
from cluster.cli import models
from cluster.config import Settings
from cluster.database import connect, migrate, reading
from cluster.models import base_id, linear_shapes, load_base
from cluster.peft_files import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, read_peft
from cluster.storage import open_storage
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.scheduler import Row, StepPlan
from tests import toy_families

BASE = bytes(range(32))
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = (5, 17, 23, 42, 8, 61, 3)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_families.save(toy_families.toys()["llama"].config, tmp_path_factory.mktemp("llama"))


def peft_model(base: Path, config: dict[str, Any]) -> PeftModel:
    """With random factors that are exact in bf16, as ours are stored. Scales that are powers of two keep the
    product exact."""
    torch.manual_seed(7)
    model = get_peft_model(load_base(base, torch.float32), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((0.2 * torch.randn_like(parameter)).bfloat16())
    return model.eval()


def runner_logits(base: Path, folder: Path) -> Tensor:
    """Of the last token, by the engine, with the imported adapter."""
    runner = ModelRunner(fuse_decoder(load_base(base, torch.float32)), 8, 4)
    fitted = runner.fit(read_peft(folder, BASE, linear_shapes(base)).factors)
    row = Row(b"request", b"adapter", TOKENS, 0, (1, 2), (1, 2), True)
    return runner.run(StepPlan((row,)), {b"adapter": fitted}).logits[0]


PATTERNS = {"q_proj": 2, "layers.1.mlp.down_proj": 8, r"model\.layers\.(0|2)\.self_attn\.v_proj": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": DENSE},
    "attention only": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    },
    "rank pattern": {"r": 4, "lora_alpha": 4, "target_modules": DENSE, "rank_pattern": PATTERNS},
    "alpha pattern": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": DENSE,
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 16, ".*o_proj": 2},
    },
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": DENSE, "use_rslora": True},
    "all": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": DENSE,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 16},
        "alpha_pattern": {"q_proj": 32, "down_proj": 2},
        "layers_to_transform": [0, 2],
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.1,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_imported_adapter_says_what_peft_says(variant: str, llama: Path, tmp_path: Path) -> None:
    model = peft_model(llama, VARIANTS[variant])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0, -1]
        with model.disable_adapter():
            base = model(input_ids=torch.tensor([TOKENS])).logits[0, -1]
    found = runner_logits(llama, tmp_path)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - base).abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "falcon 40b", "bloom", "glm", "gemma2"])
def test_modules_that_are_fused_or_transposed_come_in_as_they_were(family: str, tmp_path: Path) -> None:
    base = toy_families.save(toy_families.toys()[family].config, tmp_path / "base")
    names = sorted({name.rpartition(".")[2] for name in linear_shapes(base)})
    config = {"r": 4, "lora_alpha": 8, "target_modules": names, "fan_in_fan_out": family == "gpt2"}
    model = peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0, -1]
    torch.testing.assert_close(runner_logits(base, tmp_path / "adapter"), expected, **CLOSE)


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Path:
    """A good adapter, to be spoiled."""
    peft_model(llama, VARIANTS["plain"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@dataclass(frozen=True)
class Spoiled:
    code: str
    field: str
    spoil: Callable[[Path], object]


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, change)


def config(**values: object) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **values)


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / PICKLE_FILE)


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])


def a_link(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return spoil


def of_size(name: str, num_bytes: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, num_bytes)


def a_zip_bomb_named_safetensors(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS_FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10**7))


def wide_ranks(found: dict[str, Tensor]) -> None:
    found[A], found[B] = torch.zeros(MAX_RANK + 1, 32), torch.zeros(32, MAX_RANK + 1)


SPOILED: dict[str, Spoiled] = {
    "DoRA": Spoiled("adapter_feature", "use_dora", config(use_dora=True)),
    "bias": Spoiled("adapter_feature", "bias", config(bias="lora_only")),
    "LoRA bias": Spoiled("adapter_feature", "lora_bias", config(lora_bias=True)),
    "whole modules": Spoiled("adapter_feature", "modules_to_save", config(modules_to_save=["lm_head"])),
    "trained tokens": Spoiled(
        "adapter_feature", "trainable_token_indices", config(trainable_token_indices=[1])
    ),
    "layers repeated": Spoiled("adapter_feature", "layer_replication", config(layer_replication=[[0, 2]])),
    "parameters": Spoiled("adapter_feature", "target_parameters", config(target_parameters=["experts"])),
    "activated": Spoiled("adapter_feature", "alora_invocation_tokens", config(alora_invocation_tokens=[1])),
    "base changed": Spoiled(
        "adapter_feature", "init_lora_weights", config(init_lora_weights="pissa_niter_4")
    ),
    "of a later version": Spoiled("adapter_feature", "use_something_new", config(use_something_new=True)),
    "no LoRA": Spoiled("adapter_config", "peft_type", config(peft_type="IA3")),
    "no language model": Spoiled("adapter_config", "task_type", config(task_type="SEQ_CLS")),
    "alpha is NaN": Spoiled("adapter_config", "lora_alpha", config(lora_alpha=float("nan"))),
    "rank 0": Spoiled("adapter_config", "r", config(r=0)),
    "no JSON": Spoiled("adapter_config", "", lambda folder: (folder / CONFIG_FILE).write_text("{")),
    "deep JSON": Spoiled("adapter_config", "", lambda folder: (folder / CONFIG_FILE).write_text("[" * 10**5)),
    "pattern for ever": Spoiled("adapter_pattern", "rank_pattern", config(rank_pattern={"(.*)*x": 4})),
    "pattern broken": Spoiled("adapter_pattern", "rank_pattern", config(alpha_pattern={"(": 4})),
    "another rank": Spoiled("adapter_shape", "model.layers.0.mlp.down_proj", config(r=5)),
    "rank over the limit": Spoiled(
        "adapter_shape",
        "model.layers.0.self_attn.q_proj",
        lambda folder: (
            change_config(folder, rank_pattern={"layers.0.self_attn.q_proj": MAX_RANK + 1}),
            change_tensors(folder, wide_ranks),
        ),
    ),
    "wrong shape": Spoiled(
        "adapter_shape",
        "model.layers.0.self_attn.q_proj",
        tensors(lambda found: found.update({A: torch.zeros(4, 31)})),
    ),
    "a vector": Spoiled("adapter_dtype", A, tensors(lambda found: found.update({A: torch.zeros(32)}))),
    "integers": Spoiled(
        "adapter_dtype", A, tensors(lambda found: found.update({A: found[A].to(torch.int8)}))
    ),
    "NaN": Spoiled(
        "adapter_values", "model.layers.0.self_attn.q_proj", tensors(lambda found: found[A].fill_(torch.nan))
    ),
    "infinite": Spoiled(
        "adapter_values", "model.layers.0.self_attn.q_proj", tensors(lambda found: found[B].fill_(torch.inf))
    ),
    "too large for bf16": Spoiled(
        "adapter_values", "model.layers.0.self_attn.q_proj", tensors(lambda found: found[B].fill_(3.4e38))
    ),
    "half a module": Spoiled(
        "adapter_module", "model.layers.0.self_attn.q_proj", tensors(lambda found: found.pop(B))
    ),
    "embeddings": Spoiled(
        "adapter_module",
        WEIGHTS_FILE,
        tensors(
            lambda found: found.update(
                {"base_model.model.model.embed_tokens.lora_embedding_A": found[A].clone()}
            )
        ),
    ),
    "unknown module": Spoiled(
        "adapter_module",
        "adapter",
        tensors(
            lambda found: found.update({key.replace("q_proj", "z_proj"): found.pop(key) for key in (A, B)})
        ),
    ),
    "nothing": Spoiled("adapter_module", "adapter", tensors(lambda found: found.clear())),
    "a pickle": Spoiled("not_safetensors", "folder", only_a_pickle),
    "truncated": Spoiled("not_safetensors", WEIGHTS_FILE, truncated),
    "empty": Spoiled("not_safetensors", WEIGHTS_FILE, of_size(WEIGHTS_FILE, 0)),
    "zip bomb": Spoiled("not_safetensors", WEIGHTS_FILE, a_zip_bomb_named_safetensors),
    "huge header": Spoiled(
        "not_safetensors",
        WEIGHTS_FILE,
        lambda folder: (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 10**8) + b"{" * 100),
    ),
    "huge file": Spoiled(
        "adapter_file", WEIGHTS_FILE, of_size(WEIGHTS_FILE, peft_files.MAX_WEIGHTS_BYTES + 1)
    ),
    "huge config": Spoiled(
        "adapter_file", CONFIG_FILE, of_size(CONFIG_FILE, peft_files.MAX_CONFIG_BYTES + 1)
    ),
    "link out, weights": Spoiled("adapter_file", WEIGHTS_FILE, a_link(WEIGHTS_FILE)),
    "link out, config": Spoiled("adapter_file", CONFIG_FILE, a_link(CONFIG_FILE)),
    "no weights": Spoiled("adapter_file", WEIGHTS_FILE, lambda folder: (folder / WEIGHTS_FILE).unlink()),
    "no config": Spoiled("adapter_file", CONFIG_FILE, lambda folder: (folder / CONFIG_FILE).unlink()),
}


@pytest.mark.parametrize("which", SPOILED)
def test_a_bad_folder_is_refused(which: str, saved: Path, llama: Path) -> None:
    shapes, spoiled = linear_shapes(llama), SPOILED[which]
    read_peft(saved, BASE, shapes)
    spoiled.spoil(saved)
    with pytest.raises(Rejected) as refused:
        read_peft(saved, BASE, shapes)
    assert (refused.value.code, refused.value.field) == (spoiled.code, spoiled.field)


def test_an_adapter_of_another_base_is_refused_by_its_shapes(saved: Path, tmp_path: Path) -> None:
    other = toy_families.save(toy_families.toys()["gpt2"].config, tmp_path / "other")
    with pytest.raises(Rejected) as refused:
        read_peft(saved, BASE, linear_shapes(other))
    assert refused.value.code == "adapter_module"


def test_an_archive_is_not_opened(saved: Path, llama: Path, tmp_path: Path) -> None:
    archive = tmp_path / "adapter.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in saved.iterdir():
            file.write(path, path.name)
    with pytest.raises(Rejected) as refused:
        read_peft(archive, BASE, linear_shapes(llama))
    assert refused.value.code == "adapter_folder"


def test_the_command_packs_stores_and_publishes(saved: Path, llama: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", base_model=str(llama))
    migrate(settings.database_url)
    for _ in range(2):  # again changes nothing
        models.import_peft(settings, saved, "ada/metals", 3)
    with reading(connect(settings.database_url)) as session:
        adapter = resolve(session, "ada/metals")
        assert price_gwei_per_token(session, adapter) == 3
    assert (adapter.version, adapter.base_id, adapter.manifest_ids) == (1, base_id(llama), ())
    found = load_adapter(open_storage(settings.storage_url), adapter, linear_shapes(llama))
    given = read_peft(saved, base_id(llama), linear_shapes(llama))
    assert found.factors.keys() == given.factors.keys() and len(given.factors) == 21
    assert all(torch.equal(found.factors[name].b, each.b) for name, each in given.factors.items())


def test_the_command_refuses_a_bad_name_before_it_looks_at_anything(tmp_path: Path) -> None:
    with pytest.raises(Rejected) as refused:
        models.import_peft(Settings(home=tmp_path), tmp_path / "nowhere", "../etc", 0)
    assert refused.value.code == "model_name"
