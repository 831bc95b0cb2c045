"""The kernels over quantised weights equal dequantising and multiplying, and a row's bits are its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="no Triton: its kernels are for CUDA devices")

from serve_apps.engine.cuda.launch import IS_INTERPRETED
from serve_apps.engine.cuda.weights import MOST_ROWS, project, project_quantized
from serve_apps.engine.decoder import Linear
from serve_apps.engine.quantization import GROUP, quantize

# What numpy says of NaN, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="the kernels are compiled")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Sums in another order; in bf16 also another rounding, the interpreter's being towards zero.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def found_and_expected(
    device: str, bits: int, x: Tensor, d_out: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """By the kernels, and by torch in fp32 over the dequantised weight."""
    weight = quantize(normal(d_out, x.shape[1], seed=1).float(), bits)
    bias = normal(d_out, seed=2).to(x.dtype) if has_bias else None
    expected = F.linear(x.float(), weight.dense(), None if bias is None else bias.float())
    on_device = type(weight)(weight.values.to(device), weight.scales.to(device), weight.d_in, x.dtype)
    found = project_quantized(x.to(device), on_device, None if bias is None else bias.to(device))
    return found.cpu(), expected


# Rows beside a tile's; inputs in one piece, in several, and not a multiple of a group.
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("num_tokens", "d_in", "d_out"),
    [(1, 40, 70), (3, 3 * GROUP, 64), (17, 5 * GROUP + 6, 130), (MOST_ROWS + 2, 2 * GROUP, 65)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_that_of_the_dequantised_weight(
    device: str, bits: int, num_tokens: int, d_in: int, d_out: int, dtype: torch.dtype
) -> None:
    x = (normal(num_tokens, d_in) / d_in**0.5).to(dtype)
    for has_bias in (False, True):
        found, expected = found_and_expected(device, bits, x, d_out, has_bias)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_meets_no_other_row(device: str, bits: int) -> None:
    """Bitwise, with NaN in every other row."""
    clean = normal(5, 3 * GROUP)
    spoiled = torch.full_like(clean, float("nan"))
    spoiled[3] = clean[3]
    rows = [found_and_expected(device, bits, x, 70, has_bias=False)[0][3] for x in (clean, spoiled)]
    assert torch.equal(*rows)


def test_a_weight_that_is_not_quantised_is_multiplied_as_in_torch(device: str) -> None:
    x, weight, bias = normal(3, 8).to(device), normal(5, 8, seed=1).to(device), normal(5, seed=2).to(device)
    assert torch.equal(project(x, Linear(weight, bias)), F.linear(x, weight, bias))
