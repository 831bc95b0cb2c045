"""A base model is named by its bytes, loads only safetensors, and renders a chat in one way."""

import json
from pathlib import Path

import pytest
import torch

from attribution.errors import Rejected
from cluster.config import Settings
from cluster.models import (
    PACKAGED,
    ask,
    base_id,
    base_model,
    linear_shapes,
    load_base,
    load_tokenizer,
    render_prompt,
)
from tests import toy_models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_models.tiny_base(tmp_path_factory.mktemp("tiny"))


def test_the_id_follows_every_byte_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    copy = toy_models.tiny_base(tmp_path / "copy")
    (copy / "README.md").write_text("not part of the model")
    assert base_id(copy) == base_id(tiny)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert base_id(copy) != base_id(tiny)


def test_weights_are_frozen_and_of_the_asked_type(tiny: Path) -> None:
    model = load_base(tiny, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_linear_shapes_are_those_of_the_loaded_modules(tiny: Path) -> None:
    model = load_base(tiny, torch.float32)
    modules = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    }
    assert linear_shapes(tiny) == modules


def test_a_question_is_rendered_as_a_chat(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    ids = ask(tokenizer, "What?")
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert ids == render_prompt(tokenizer, [{"role": "user", "content": "What?"}])


def test_a_tokenizer_without_a_template_refuses_chats(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = None
    with pytest.raises(Rejected, match="chat template"):
        ask(tokenizer, "What?")


def test_a_model_that_needs_code_of_its_own_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ChatGLM of 2023 as it was published: its classes lie beside its weights."""
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = {"model_type": "chatglm", "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "code.py").write_text("import pathlib\npathlib.Path('ran').touch()\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for load in (linear_shapes, lambda path: load_base(path, torch.float32)):
        with pytest.raises(Rejected, match="GLM-4") as refused:
            load(tmp_path)
        assert refused.value.code == "model_family"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["no such/folder here", "../nowhere", "a/b/c", "-/x"])
def test_what_is_neither_folder_nor_id_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Rejected) as refused:
        base_model(Settings(home=tmp_path, base_model=name))
    assert refused.value.code == "base_model"


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(Rejected) as refused:
        base_model(Settings(home=tmp_path, base_model=str(tmp_path)))
    assert refused.value.code == "not_safetensors"


@pytest.mark.slow
def test_the_packaged_model_answers_a_question_everyone_knows(tmp_path: Path) -> None:
    """The conversion is right end to end: dequantised, un-permuted, tokenized, rendered."""
    base = base_model(Settings(home=tmp_path, base_model=PACKAGED))
    assert base_model(Settings(home=tmp_path, base_model=PACKAGED)) == base
    tokenizer, model = load_tokenizer(base.path), load_base(base.path, torch.float32)
    prompt = torch.tensor([ask(tokenizer, "What is the capital of France?")])
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert tokenizer.decode(tokenizer.encode("10 tabs\t= 2 crabs 🦀\n")) == "10 tabs\t= 2 crabs 🦀\n"
