"""Every family: what the engine's torch runner says is what transformers, and with an adapter PEFT, says."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig

from attribution.errors import Rejected
from attribution.types import ZERO_ID
from cluster.adapters import AdapterWeights
from cluster.models import linear_shapes, load_base
from serve_apps.engine.decoder import Decoder
from serve_apps.engine.families import FAMILIES, fuse_decoder
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.native.library import PANEL
from serve_apps.engine.native_runner import runs
from serve_apps.engine.scheduler import Limits, Scheduler
from serve_apps.engine.types import EngineRequest
from tests import toy_families, toy_models
from tests.serve_apps.conftest import request as ask

TOYS = toy_families.toys()
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
ADAPTER_IDS = (bytes([1]) * 32, bytes([2]) * 32)
NUM_NEW, BLOCK, NUM_BLOCKS = 6, 4, 120


@dataclass(frozen=True)
class Loaded:
    """The engine's model with two adapters, and the libraries' models: the base, and with each adapter."""

    folder: Path
    decoder: Decoder
    adapters: dict[bytes, AdapterWeights]
    references: dict[bytes, torch.nn.Module]

    def expected(self, tokens: list[int], adapter_id: bytes) -> Tensor:
        """Logits of every token, by the libraries."""
        with torch.no_grad():
            output = self.references[adapter_id](input_ids=torch.tensor([tokens]), use_cache=False)
        return output.logits[0]  # type: ignore[no-any-return]


def with_peft(model: torch.nn.Module, weights: AdapterWeights) -> torch.nn.Module:
    """PEFT's own LoRA with these factors."""
    rank = next(iter(weights.factors.values())).a.shape[0]
    names = sorted({module.rpartition(".")[2] for module in weights.factors})
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=names, fan_in_fan_out=model.config.model_type == "gpt2"
    )
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for module, factors in weights.factors.items():
            layer = adapted.base_model.model.get_submodule(module)
            layer.lora_A["default"].weight.copy_(factors.a)
            layer.lora_B["default"].weight.copy_(factors.b)
    return adapted


@pytest.fixture(scope="module", params=TOYS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = toy_families.save(TOYS[request.param].config, tmp_path_factory.mktemp("family"))
    decoder = fuse_decoder(load_base(folder, torch.float32))
    shapes = linear_shapes(folder)
    adapters = {
        key: toy_models.random_adapter(ZERO_ID, shapes, rank=rank, seed=rank, scale=0.3)
        for key, rank in zip(ADAPTER_IDS, (2, 5), strict=True)
    }
    references = {ZERO_ID: load_base(folder, torch.float32)}
    for key, weights in adapters.items():
        references[key] = with_peft(load_base(folder, torch.float32), weights)
    return Loaded(folder, decoder, adapters, references)


def answers(
    loaded: Loaded, requests: list[EngineRequest], limits: Limits
) -> dict[bytes, tuple[list[int], Tensor]]:
    """All together, greedily: of each its tokens, and the logits that each of its answer came from."""
    runner = ModelRunner(loaded.decoder, NUM_BLOCKS, BLOCK)
    fitted = {key: runner.fit(weights.factors) for key, weights in loaded.adapters.items()}
    scheduler, found = Scheduler(limits, BlockPool(NUM_BLOCKS, BLOCK)), {}
    for each in requests:
        scheduler.add(each)
        found[each.request_id] = (list(each.prompt_ids), torch.empty(0, toy_families.VOCABULARY))
    while scheduler.num_running or scheduler.num_waiting:
        plan = scheduler.schedule(lambda _: True)
        used = {row.adapter_id: fitted[row.adapter_id] for row in plan.rows if row.adapter_id != ZERO_ID}
        logits = runner.run(plan, used).logits
        for row, row_logits in zip((row for row in plan.rows if row.samples), logits, strict=True):
            sequence = scheduler.sequence(row.request_id)
            sequence.tokens.append(int(row_logits.argmax()))
            found[row.request_id] = (
                list(sequence.tokens),
                torch.cat((found[row.request_id][1], row_logits[None])),
            )
            if sequence.num_generated == NUM_NEW:
                scheduler.remove(row.request_id)
    return found


def prompt(length: int) -> tuple[int, ...]:
    return tuple((11 * i + 3 * length) % (toy_families.VOCABULARY - 3) + 3 for i in range(length))


@pytest.mark.parametrize("max_batch_tokens", [200, 13, 5], ids=["whole prompts", "chunks", "small chunks"])
def test_every_step_of_a_mixed_batch_says_what_the_libraries_say(
    loaded: Loaded, max_batch_tokens: int
) -> None:
    """Prompts of one token and of many, the base model and two adapters, prefill and decode in one batch."""
    keys = (ZERO_ID, *ADAPTER_IDS)
    asked = [ask(prompt(length), keys[i % 3]) for i, length in enumerate((1, 5, 40, 17, 33, 2))]
    found = answers(loaded, asked, Limits(max_batch_tokens=max_batch_tokens))
    for each in asked:
        tokens, logits = found[each.request_id]
        expected = loaded.expected(tokens, each.adapter_id)[len(each.prompt_ids) - 1 : -1]
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_in_bf16_the_engine_is_as_near_to_fp32_as_the_library_is(loaded: Loaded) -> None:
    model = load_base(loaded.folder, torch.bfloat16)
    asked = ask(prompt(30))
    half = replace(loaded, decoder=fuse_decoder(model))
    tokens, logits = answers(half, [asked], Limits(max_batch_tokens=16))[asked.request_id]
    exact = loaded.expected(tokens, ZERO_ID)[len(asked.prompt_ids) - 1 : -1]
    library = replace(loaded, references={ZERO_ID: model}).expected(tokens, ZERO_ID)
    error = (library[len(asked.prompt_ids) - 1 : -1] - exact).abs().mean()
    assert (logits - exact).abs().mean() < 1.5 * error


def test_an_adapter_of_one_module_is_applied_to_that_module_alone(loaded: Loaded) -> None:
    key = ADAPTER_IDS[0]
    whole, reference = loaded.adapters[key], loaded.references[key].base_model.model
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for module in [name for name in whole.factors if ".1." in name]:
        one = AdapterWeights(ZERO_ID, {module: whole.factors[module]})
        asked = ask(prompt(9), key)
        tokens, logits = answers(replace(loaded, adapters={key: one}), [asked], Limits())[asked.request_id]
        with torch.no_grad():
            for name, layer in reference.named_modules():
                if hasattr(layer, "lora_B") and name != module:
                    layer.lora_B["default"].weight.zero_()
        expected = loaded.expected(tokens, key)[len(asked.prompt_ids) - 1 : -1]
        reference.load_state_dict(before)
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_poison_in_other_rows_and_pages_does_not_reach_a_row(loaded: Loaded) -> None:
    """Bitwise: a neighbour whose adapter overflows to NaN, whose pages are used again afterwards."""
    loudest = AdapterWeights(
        ZERO_ID,
        {
            name: type(each)(torch.full_like(each.a, torch.finfo(each.a.dtype).max), each.b)
            for name, each in loaded.adapters[ADAPTER_IDS[1]].factors.items()
        },
    )
    poisoned = replace(loaded, adapters={**loaded.adapters, ADAPTER_IDS[1]: loudest})
    logits = []
    for each in (loaded, poisoned):
        own = ask(prompt(19), ADAPTER_IDS[0])
        late = ask(prompt(11))
        asked = [ask(prompt(14), ADAPTER_IDS[1]), own, late]
        found = answers(each, asked, Limits(max_running=2, reuses_prefixes=False))
        is_poisoned = each is poisoned
        assert bool(found[asked[0].request_id][1].isnan().all()) is is_poisoned
        logits.append(torch.cat([found[own.request_id][1], found[late.request_id][1]]))
    assert torch.equal(logits[0], logits[1]) and logits[0].isfinite().all()


def test_the_hidden_state_is_the_librarys_last_one(loaded: Loaded) -> None:
    model, tokens = loaded.references[ZERO_ID], prompt(9)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
    scheduler = Scheduler(Limits(), BlockPool(NUM_BLOCKS, BLOCK))
    scheduler.add(ask(tokens))
    found = ModelRunner(loaded.decoder, NUM_BLOCKS, BLOCK).run(scheduler.schedule(lambda _: True), {}).hidden
    torch.testing.assert_close(found[0], hidden, atol=1e-4, rtol=1e-4)


def test_the_kernels_take_llamas_shape_and_no_other(tmp_path: Path) -> None:
    wide = {"head_dim": PANEL, "hidden_size": 12 * PANEL, "n_embd": 12 * PANEL}
    for name, toy in TOYS.items():
        given = toy.config.to_dict()
        config = type(toy.config)(**{**given, **{key: wide[key] for key in wide if key in given}})
        folder = toy_families.save(config, tmp_path / name)
        decoder = fuse_decoder(load_base(folder, torch.float32))
        assert runs(decoder, PANEL) == toy.is_llama, name


def test_a_window_that_no_request_outgrows_is_none(tmp_path: Path) -> None:
    folder = toy_families.save(TOYS["mistral"].config, tmp_path)
    model = load_base(folder, torch.float32)
    windows = [fuse_decoder(model, length).layers[0].attention.window for length in (toy_families.WINDOW, 8)]
    assert windows == [None, toy_families.WINDOW]
    assert fuse_decoder(model, 10**6).shape.max_length == toy_families.MAX_LENGTH


def test_every_family_has_a_toy() -> None:
    assert {toy.config.model_type for toy in TOYS.values()} == set(FAMILIES)


DENSE = toy_families.DENSE
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "mixtral": (MixtralConfig(**DENSE, num_local_experts=2), "mixture of experts"),
    "qwen2 moe": (Qwen2MoeConfig(**DENSE, num_experts=2), "mixture of experts"),
    "dynamic rotary": (LlamaConfig(**DENSE, rope_parameters=DYNAMIC), "dynamic"),
    "activation": (LlamaConfig(**DENSE, hidden_act="mish"), "mish"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_would_be_computed_otherwise_is_refused(which: str, tmp_path: Path) -> None:
    config, reason = REFUSED[which]
    folder = toy_families.save(config, tmp_path)
    with pytest.raises(Rejected, match=reason) as refused:
        fuse_decoder(load_base(folder, torch.float32))
    assert (refused.value.code, refused.value.field) == ("model_family", "base_model")
