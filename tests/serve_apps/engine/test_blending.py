"""A blend is the weighted sum of its parts, and an adapter like any other to all but the loader."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from attribution.errors import Rejected
from attribution.types import PPM, ZERO_ID, Blend, BlendPart
from cluster.adapters import MAX_RANK, Factors
from cluster.models import load_base
from serve_apps.engine.blending import blended
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.scheduler import Limits, Scheduler
from serve_apps.engine.types import EngineRequest
from tests.serve_apps.conftest import Toys, request, run

PROMPT = tuple((7 * i) % 250 + 3 for i in range(40))
WEIGHTS = (500_000, 300_000, 200_000)
# ``w * b`` is rounded to bf16 once more: 2**-9 of an update whose effect on a logit is of the order of 1.
CLOSE = {"atol": 1e-2, "rtol": 0.0}  # 0.003 was seen; a quarter of a percent of weight moves as much


def blend_of(toys: Toys, weights: tuple[int, ...] = WEIGHTS) -> Blend:
    """Of adapters of several ranks, the third for attention alone."""
    ids = sorted(toys.adapter_ids[2 : 2 + len(weights)])
    return Blend(tuple(BlendPart(key, weight) for key, weight in zip(ids, weights, strict=True)))


def asking(blend: Blend, **sampling: object) -> EngineRequest:
    return replace(request(PROMPT, blend.blend_id, **sampling), blend=blend)


def logits_by_engine_runner(toys: Toys, blend: Blend) -> torch.Tensor:
    runner = ModelRunner(fuse_decoder(load_base(toys.base.path, torch.float32)), 30, 16)
    scheduler = Scheduler(Limits(), BlockPool(30, 16))
    scheduler.add(asking(blend))
    parts = [toys.adapters[part.adapter_id].factors for part in blend.parts]
    fitted = runner.fit(blended(parts, [part.weight_ppm for part in blend.parts]))
    return runner.run(scheduler.schedule(lambda _: True), {blend.blend_id: fitted}).logits[0]


def test_logits_are_those_of_the_sum_of_the_updates(toys: Toys) -> None:
    blend, model = blend_of(toys), load_base(toys.base.path, torch.float32)
    for part in blend.parts:
        for module, factors in toys.adapters[part.adapter_id].factors.items():
            update = factors.b.float() @ factors.a.float()
            model.get_submodule(module).weight.data += part.weight_ppm / PPM * update
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(logits_by_engine_runner(toys, blend), expected, **CLOSE)


def test_logits_are_those_of_peft(toys: Toys) -> None:
    blend, names = blend_of(toys), []
    model = load_base(toys.base.path, torch.float32)
    for number, part in enumerate(blend.parts):
        factors = toys.adapters[part.adapter_id].factors
        rank = next(iter(factors.values())).a.shape[0]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors))
        names.append(f"part{number}")
        if number:
            model.add_adapter(names[-1], config)
        else:
            model = get_peft_model(model, config, adapter_name=names[-1])
        for module, each in factors.items():
            lora = model.get_base_model().get_submodule(module)
            lora.lora_A[names[-1]].weight.data = each.a.float()
            lora.lora_B[names[-1]].weight.data = each.b.float()
    weights = [part.weight_ppm / PPM for part in blend.parts]
    model.add_weighted_adapter(names, weights, "blend", combination_type="cat")
    model.set_adapter("blend")
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(logits_by_engine_runner(toys, blend), expected, **CLOSE)


@pytest.mark.parametrize("is_native", [True, False], ids=["kernels", "torch"])
def test_a_blend_shares_a_batch_with_its_parts_and_other_blends(toys: Toys, is_native: bool) -> None:
    """Everybody gets what it would get alone, and they all differ; of the same parts, weights matter."""
    engine = toys.engine(is_native=is_native)
    blends = [blend_of(toys), blend_of(toys, (100_000, 200_000, 700_000)), blend_of(toys, (1, PPM - 1))]
    asked = [*map(asking, blends), *(request(PROMPT, key) for key in (ZERO_ID, *toys.adapter_ids))]
    answers = run(engine, asked)
    for each in asked:
        again = replace(each, request_id=each.request_id[::-1])
        lone = run(toys.engine(is_native=is_native), [again])[again.request_id]
        assert answers[each.request_id].token_ids == lone.token_ids
    assert len({answers[each.request_id].token_ids for each in asked}) >= len(asked) - 1  # the last is a part
    engine.close()


def test_parts_weigh_what_they_should(toys: Toys) -> None:
    """With all the weight but a millionth, a part answers as if it were alone."""
    engine, blend = toys.engine(is_native=False), blend_of(toys, (1, PPM - 1))
    both = [asking(blend), request(PROMPT, blend.parts[1].adapter_id)]
    answers = run(engine, both)
    assert answers[both[0].request_id].token_ids == answers[both[1].request_id].token_ids
    engine.close()


def test_a_blend_with_a_missing_part_fails_its_own_requests_only(toys: Toys) -> None:
    engine = toys.engine()
    parts = tuple(sorted([b"\x77" * 32, toys.adapter_ids[0]]))
    broken = Blend(tuple(BlendPart(key, PPM // 2) for key in parts))
    asked = [asking(broken), asking(blend_of(toys)), request(PROMPT, toys.adapter_ids[0])]
    finishes = [run(engine, [each])[each.request_id].finish for each in asked]
    assert [finish.reason for finish in finishes if finish] == ["failed", "length", "length"]
    assert finishes[0] and finishes[0].refusal and finishes[0].refusal.code == "not_found"
    engine.close()


def test_ranks_that_sum_to_too_much_are_refused() -> None:
    half = {"q": Factors(torch.ones(MAX_RANK // 2, 4).bfloat16(), torch.ones(4, MAX_RANK // 2).bfloat16())}
    assert blended([half, half], [1, PPM - 1])["q"].a.shape == (MAX_RANK, 4)
    with pytest.raises(Rejected) as refusal:
        blended([half, half, half], [1, 1, PPM - 2])
    assert refusal.value.code == "blend_rank" and str(MAX_RANK) in refusal.value.message
