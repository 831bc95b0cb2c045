"""Quantised weights: how near they are, what they take, and which models may not have them."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from torch import Tensor

from attribution.errors import Rejected
from attribution.types import ZERO_ID
from cluster.config import EngineSettings
from cluster.models import BaseModel, base_id, linear_shapes, load_base, load_tokenizer
from serve_apps.engine.decoder import Decoder, Linear, on_device
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.quality import check_quality, compare, fixed_sequences, next_token_logits
from serve_apps.engine.quantization import BITS, GROUP, quantize, quantize_decoder
from serve_apps.worker import engine_config
from tests.serve_apps.conftest import Toys, request, run
from tests.toy_families import save
from tests.toy_families import toys as families

CPU = torch.device("cpu")
WIDTHS = (GROUP, 3 * GROUP, 40, GROUP + 1)


def weight(d_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(50, d_in, generator=torch.Generator().manual_seed(d_in)).to(dtype)


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("d_in", WIDTHS)
def test_no_number_moves_by_more_than_half_a_step(bits: int, d_in: int) -> None:
    given = weight(d_in)
    given[3] = 0
    stored = quantize(given, bits)
    dense, steps = stored.dense(), stored.scales.repeat_interleave(GROUP if bits == 4 else 10**4, dim=1)
    assert dense.shape == given.shape and torch.equal(dense[3], given[3])
    assert ((dense - given).abs() <= steps[:, :d_in] / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("d_in", WIDTHS)
def test_what_was_quantised_once_stays(bits: int, d_in: int) -> None:
    dense = quantize(weight(d_in), bits).dense()
    torch.testing.assert_close(quantize(dense, bits).dense(), dense, atol=1e-6, rtol=0)
    assert quantize(dense.bfloat16(), bits).dense().dtype == torch.bfloat16


def test_it_takes_a_half_or_a_quarter_of_bf16() -> None:
    given = torch.zeros(1024, 4096, dtype=torch.bfloat16)
    fraction = {bits: quantize(given, bits).num_bytes / given.nbytes for bits in BITS.values()}
    assert fraction[8] < 0.501 and fraction[4] < 0.266


def test_moving_a_decoder_keeps_what_layers_share(toys: Toys) -> None:
    decoder = fuse_decoder(load_base(toys.base.path, torch.float32))
    moved = on_device(decoder, torch.device("meta"))
    assert moved.device.type == "meta" and moved.head is moved.embed
    assert all(layer.attention is moved.layers[0].attention for layer in moved.layers)


def loud(decoder: Decoder) -> Decoder:
    """With a few inputs of every projection three times as strong, as large models have them."""

    def louder(linear: Linear) -> Linear:
        factors = torch.ones(linear.weight.shape[1])
        factors[::13] = 3
        return Linear(linear.weight * factors, linear.bias)

    return replace(
        decoder,
        layers=tuple(
            replace(layer, projections={name: louder(each) for name, each in layer.projections.items()})
            for layer in decoder.layers
        ),
    )


def test_a_base_that_bears_it_passes_and_one_that_does_not_is_refused(tmp_path: Path) -> None:
    """Of one random model: in 8 bits it is nearly itself; with outliers, 4 bits lose what lies beside
    them."""
    config = families()["llama"].config
    decoder = loud(fuse_decoder(load_base(save(config, tmp_path), torch.float32)))
    sequences = [tuple((7 * i + j) % 90 + 3 for j in range(40)) for i in range(4)]
    assert check_quality(decoder, quantize_decoder(decoder, 8, CPU), sequences).top_1 > 0.85
    with pytest.raises(Rejected, match="nats from itself") as refused:
        check_quality(decoder, quantize_decoder(decoder, 4, CPU), sequences)
    assert (refused.value.code, refused.value.field) == ("weights_quality", "engine.weights")


def test_a_model_is_no_distance_from_itself_and_nan_is_refused(toys: Toys) -> None:
    decoder = fuse_decoder(load_base(toys.base.path, torch.float32))
    sequences = fixed_sequences(load_tokenizer(toys.base.path))
    found = check_quality(decoder, decoder, sequences)
    assert (abs(found.mean_kl) < 1e-6, found.top_1) == (True, 1.0)
    broken = replace(decoder, embed=torch.full_like(decoder.embed, float("nan")))
    with pytest.raises(Rejected, match="nan"):
        check_quality(decoder, broken, sequences)


def test_every_token_of_the_texts_is_compared(toys: Toys) -> None:
    """The one step of single tokens says what the library says of whole sequences."""
    model = load_base(toys.base.path, torch.float32)
    sequences = [(5, 9, 7, 30), (8, 3)]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([each])).logits[0] for each in sequences])
    found = next_token_logits(fuse_decoder(model), sequences)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert compare(found, expected).top_1 == 1


def test_an_engine_of_int8_weights_answers_and_adds_adapters(toys: Toys, tmp_path: Path) -> None:
    """End to end in torch: the answers are those of a base that was rounded before, adapters unrounded."""
    rounded = tmp_path / "rounded"
    copytree(toys.base.path, rounded)
    model = load_base(rounded, torch.float32)
    with torch.no_grad():
        for name in linear_shapes(rounded):
            parameter = model.get_submodule(name).weight
            parameter.copy_(quantize(parameter, 8).dense())
    model.save_pretrained(rounded)
    requests = [request(tuple(range(3, 9 + i)), key) for i, key in enumerate((ZERO_ID, *toys.adapter_ids))]
    base = BaseModel(toys.base.base_id, rounded)  # under its old id, by which its adapters know it
    answers = []
    for engine in (
        toys.engine(is_native=False, weights="int8"),
        replace(toys, base=base).engine(is_native=False),
    ):
        found = run(engine, requests)
        answers.append([found[each.request_id].token_ids for each in requests])
        engine.close()
    assert answers[0] == answers[1] and len(set(answers[0])) == len(requests)


def test_who_cannot_compute_them_says_so(toys: Toys) -> None:
    """Our CPU kernels pack weights of their own; nothing is ignored in silence."""
    with pytest.raises(Rejected, match="int8") as refused:
        toys.engine(weights="int8")
    assert (refused.value.code, refused.value.field) == ("weights_unsupported", "engine.weights")
    assert engine_config(EngineSettings(weights="int4")).weights == "int4"
    with pytest.raises(Rejected, match="vllm has no weights int4"):
        engine_config(EngineSettings(weights="int4", backend="vllm"))


def test_a_base_that_would_answer_otherwise_is_not_loaded(tmp_path: Path, toys: Toys) -> None:
    """The gate stands in the way of the engine, not beside it."""
    path = tmp_path / "base"
    copytree(toys.base.path, path)
    model = load_base(path, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                parameter[:, ::13] *= 300
            parameter *= 4
    model.save_pretrained(path)
    bad = replace(toys, base=BaseModel(base_id(path), path))
    with pytest.raises(Rejected, match="nats from itself"):
        bad.engine(is_native=False, weights="int4")
