import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.gradients import Factors

VOCAB = 97


@pytest.fixture(scope="session")
def toy_model() -> torch.nn.Module:
    """A random two-layer Llama, frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def toy_lora(toy_model: torch.nn.Module) -> dict[str, Factors]:
    """Rank 3 on every linear of the last layer but one projection, and on one of the first."""
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for path, module in toy_model.named_modules():
        is_target = "layers.1." in path or path.endswith("layers.0.mlp.down_proj")
        if isinstance(module, torch.nn.Linear) and is_target and not path.endswith("k_proj"):
            d_out, d_in = module.weight.shape
            a = torch.randn(3, d_in, generator=generator) / d_in**0.5
            lora[path] = Factors(a, 0.1 * torch.randn(d_out, 3, generator=generator), scale=2.0)
    return lora
