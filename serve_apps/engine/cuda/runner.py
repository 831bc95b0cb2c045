"""The forward pass on a CUDA device: projections by cuBLAS or, of quantised weights, by ``weights.py``; all
else by the kernels of this folder.

``ModelRunner`` is the oracle and runs what this does not. A step of single tokens is padded to the next of a
few sizes of rows and of LoRA tiles and replayed as a CUDA graph; a step with chunks of prompts is launched as
it comes. Every kernel of ours gives a row the same bits whatever else is in the batch; cuBLAS picks another
kernel, hence another order of sums, for another number of rows, so the whole step does not promise that.

This was written without a GPU at hand: the tests run it on a CPU in Triton's interpreter, and compile the
kernels for an H100 (tests/serve_apps/engine/test_cuda_*.py). No figure of its speed has been measured."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.adapters import Factors, check_finite
from serve_apps.engine.cuda.attention import attend, tokens_per_tile
from serve_apps.engine.cuda.graphs import CapturedStep, host_numbers, memory_pool
from serve_apps.engine.cuda.layers import add_and_norm, gate, rotate_and_store
from serve_apps.engine.cuda.lora import DeviceAdapter, Layout, add_lora_tiles
from serve_apps.engine.cuda.step import Numbers, Sizes, Step
from serve_apps.engine.cuda.weights import project
from serve_apps.engine.decoder import Decoder, Shape, is_llama, part_sizes
from serve_apps.engine.peers import ALONE, Peers
from serve_apps.engine.runner import Outputs
from serve_apps.engine.scheduler import StepPlan
from serve_apps.engine.sharding import TAKES_A_PART

DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64)


class CudaRunner:
    """Holds the weights and the cache. One thread at a time may call ``run``; ``fit`` may be called from
    others meanwhile."""

    def __init__(
        self, model: Decoder, num_blocks: int, block_size: int, max_length: int, peers: Peers = ALONE
    ) -> None:
        """
        Args:
            max_length: no sequence will have more tokens.
            peers: who has the rest of a model of which ``model`` is a part. Steps are not captured then:
                nobody has tried how a graph ends whose collective never does.
        """
        assert is_llama(model)
        self._peers = peers
        self._is_captured = peers.num_ranks == 1
        shape = model.shape
        self._model = model
        self.num_blocks = num_blocks
        self._block_size = block_size
        self._table_width = -(-min(max_length, shape.max_length) // block_size)
        self._sizes = part_sizes(model)
        self._layout = Layout(shape.num_layers, self._sizes)
        size = (shape.num_layers, shape.num_kv_heads, num_blocks, block_size, shape.head_dim)
        self._keys = torch.zeros(size, dtype=model.dtype, device=model.device)
        self._values = torch.zeros_like(self._keys)
        rotary = model.layers[0].attention.rotary
        assert rotary is not None
        angles = torch.outer(torch.arange(shape.max_length, device=model.device).float(), rotary.inv_freq)
        self._rotary = (
            (angles.cos() * rotary.scale).to(model.dtype),
            (angles.sin() * rotary.scale).to(model.dtype),
        )
        self._uploads = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._pool = memory_pool(model.device)
        self._captured: dict[Sizes, CapturedStep] = {}

    @staticmethod
    def block_bytes(model: Decoder, block_size: int) -> int:
        shape = model.shape
        return 2 * shape.num_layers * shape.num_kv_heads * block_size * shape.head_dim * model.dtype.itemsize

    @property
    def shape(self) -> Shape:
        return self._model.shape

    @torch.inference_mode()
    def capture(self) -> None:
        """Make every step of single tokens ready, so that no request waits for it: seconds, before the
        first."""
        for num_rows in DECODE_SIZES if self._is_captured else ():
            for num_tiles in (0, *(size for size in DECODE_SIZES if size <= num_rows)):
                self._decoding(num_rows, num_tiles)

    def fit(self, factors: Mapping[str, Factors]) -> DeviceAdapter:
        """Pack an adapter and send it to the device, past the steps that are running.

        Raises:
            Rejected: ``adapter_values``, where one is not finite.
        """
        check_finite(factors)
        packed = self._layout.pack(partial(self._model.part_factors, factors), self._model.dtype)
        if self._uploads is None:
            return DeviceAdapter(packed)
        with torch.cuda.stream(self._uploads):
            data = packed.pin_memory().to(self._model.device, non_blocking=True)
        self._uploads.synchronize()
        # Once nobody holds it, its memory is used again only when the steps before have run.
        data.record_stream(torch.cuda.default_stream(self._model.device))
        return DeviceAdapter(data)

    @torch.inference_mode()
    def run(self, plan: StepPlan, adapters: Mapping[bytes, DeviceAdapter]) -> Outputs:
        """Compute every row of ``plan``; logits are fp32."""
        shape, device = self.shape, self._model.device
        tile_tokens = tokens_per_tile(shape.num_heads, shape.num_kv_heads)
        numbers = Numbers.of(plan, adapters, tile_tokens, self._block_size)
        is_decoding = plan.num_single == len(plan.rows) <= DECODE_SIZES[-1]
        if not (is_decoding and self._is_captured):
            sizes = numbers.sizes
            flat = host_numbers(numbers, sizes, device).to(device, non_blocking=True)
            return self._forward(Step.of(flat, sizes, self._block_size))
        num_rows, num_tiles = _next_size(len(plan.rows)), _next_size(len(numbers.lora))
        of_all = self._decoding(num_rows, num_tiles)(numbers.padded(num_rows))
        return Outputs.of(of_all.hidden[numbers.sampled], of_all.logits[numbers.sampled])

    def _decoding(self, num_rows: int, num_tiles: int) -> CapturedStep:
        sizes = Sizes.decoding(num_rows, num_tiles, self._table_width)
        if sizes not in self._captured:
            self._captured[sizes] = CapturedStep(
                self._forward, sizes, self._block_size, self._model.device, self._pool
            )
        return self._captured[sizes]

    def _forward(self, step: Step) -> Outputs:
        model = self._model
        hidden, update = F.embedding(step.token_ids, model.embed), None
        for index, layer in enumerate(model.layers):
            x = add_and_norm(hidden, update, layer.attn_norm)
            update = self._project(self._attend(x, index, step), index, "o", step)
            x = add_and_norm(hidden, update, layer.mlp_norm)
            update = self._project(gate(self._project(x, index, "gate_up", step)), index, "down", step)
        last = add_and_norm(hidden, update, model.final_norm)[step.sampled]
        logits = self._peers.side_by_side(F.linear(last, model.head), self.shape.vocabulary)
        return Outputs.of(last, logits.float())

    def _project(self, x: Tensor, layer: int, name: str, step: Step) -> Tensor:
        linear = self._model.layers[layer].projections[name]
        out = project(x, linear)
        add_lora_tiles(out, x, step.lora, self._layout.entry(layer, name), self._sizes[name])
        if name in TAKES_A_PART:
            self._peers.add_up(out)
        return out

    def _attend(self, x: Tensor, layer: int, step: Step) -> Tensor:
        shape, keys, values = self.shape, self._keys[layer], self._values[layer]
        qkv = self._project(x, layer, "qkv", step).view(len(x), -1, shape.head_dim)
        query = rotate_and_store(qkv, self._rotary, step.positions, step.slots, keys, values)
        return attend(query, keys, values, step.queries, step.positions, step.longest).flatten(1)


def _next_size(number: int) -> int:
    return next(size for size in (0, *DECODE_SIZES) if size >= number)
