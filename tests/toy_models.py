"""A random Llama with a byte tokenizer, and random adapters: small, and they behave like the real ones."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.adapters import AdapterWeights, Factors

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_base(folder: Path, seed: int = 0, width: int = 64) -> Path:
    """A random llama (4 blocks, fp32 on disk) with a tokenizer of single bytes and a chat template; a wide
    one is slow."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def random_adapter(
    base_id: bytes,
    linear_shapes: dict[str, tuple[int, int]],
    rank: int = 4,
    seed: int = 0,
    scale: float = 0.1,
) -> AdapterWeights:
    """Factors for every linear module given, loud enough to change answers."""
    random = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        base_id,
        {
            module: Factors(
                (scale * torch.randn(rank, d_in, generator=random)).bfloat16(),
                (scale * torch.randn(d_out, rank, generator=random)).bfloat16(),
            )
            for module, (d_out, d_in) in linear_shapes.items()
        },
    )
