"""A tiny random model of every family that the engine runs, its weights so loud that each part matters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY, MAX_LENGTH, WINDOW = 97, 96, 7
NAMES: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_LENGTH,
    **NAMES,
}
FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    **NAMES,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PART_SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Toy:
    """``is_llama``: our kernels may run it, in the right sizes."""

    config: PreTrainedConfig
    is_llama: bool = False


def toys() -> dict[str, Toy]:
    return {
        "llama": Toy(LlamaConfig(**DENSE, tie_word_embeddings=True), is_llama=True),
        "llama3": Toy(LlamaConfig(**DENSE, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True), True),
        "llama yarn": Toy(LlamaConfig(**DENSE, rope_parameters=YARN), is_llama=True),
        "llama linear": Toy(LlamaConfig(**DENSE, rope_parameters=LINEAR), is_llama=True),
        "mistral": Toy(MistralConfig(**DENSE, sliding_window=WINDOW)),
        "mistral without window": Toy(MistralConfig(**DENSE, sliding_window=None), is_llama=True),
        "qwen2": Toy(Qwen2Config(**DENSE), is_llama=True),
        "qwen2 window": Toy(
            Qwen2Config(**DENSE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
        ),
        "qwen3": Toy(Qwen3Config(**DENSE)),
        "gemma": Toy(GemmaConfig(**DENSE, hidden_act="gelu_pytorch_tanh")),
        "gemma2": Toy(
            Gemma2Config(
                **DENSE,
                sliding_window=WINDOW,
                query_pre_attn_scalar=12,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        ),
        "gemma3_text": Toy(
            Gemma3TextConfig(
                **DENSE, sliding_window=WINDOW, layer_types=PART_SLIDES, query_pre_attn_scalar=12
            )
        ),
        "falcon 7b": Toy(FalconConfig(**FALCON)),
        "falcon 40b": Toy(FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
        "falcon 11b": Toy(
            FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)
        ),
        "falcon rw": Toy(
            FalconConfig(**FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True)
        ),
        "bloom": Toy(BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=3, n_head=6, **NAMES)),
        "glm": Toy(GlmConfig(**DENSE), is_llama=True),
        "glm4": Toy(Glm4Config(**DENSE)),
        "gpt2": Toy(
            GPT2Config(vocab_size=VOCABULARY, n_positions=MAX_LENGTH, n_embd=32, n_layer=3, n_head=4, **NAMES)
        ),
        "gpt2 scaled": Toy(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=MAX_LENGTH,
                n_embd=32,
                n_layer=3,
                n_head=4,
                scale_attn_by_inverse_layer_idx=True,
                **NAMES,
            )
        ),
    }


def save(config: PreTrainedConfig, folder: Path) -> Path:
    """A folder as ``load_base`` reads it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: none starts as 1 or 0
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
