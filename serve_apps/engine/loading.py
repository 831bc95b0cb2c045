"""From files to an engine: the base model taken apart, adapters fused as they arrive."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from attribution.errors import Corrupted
from attribution.hashing import sha256
from cluster import adapters as adapter_files
from cluster.models import BaseModel, linear_shapes, load_base, load_tokenizer
from cluster.storage import Storage
from serve_apps.engine.adapter_cache import AdapterCache, CacheLimits, Loaded
from serve_apps.engine.engine import Engine
from serve_apps.engine.families import Decoder, fuse_decoder
from serve_apps.engine.grammar import Grammars
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.lora import Factors, LoraWeights, fuse
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.scheduler import Limits, Scheduler
from serve_apps.engine.unembedding import Unembedding


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one engine may use. ``kv_bytes`` is for keys and values; adapters have their own budget."""

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    kv_bytes: int = 512 * 2**20
    block_size: int = 16
    limits: Limits = field(default_factory=Limits)
    adapters: CacheLimits = field(default_factory=CacheLimits)


def build_engine(base: BaseModel, storage: Storage, config: EngineConfig) -> Engine:
    """An engine for ``base`` that finds adapters in ``storage`` by id."""
    model = load_base(base.path, config.dtype).to(config.device)
    eos = model.generation_config.eos_token_id
    decoder = fuse_decoder(model)
    del model
    num_blocks = config.kv_bytes // ModelRunner.block_bytes(decoder, config.block_size)
    load = adapter_loader(storage, base.base_id, linear_shapes(base.path), decoder)
    tokenizer = load_tokenizer(base.path)
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return Engine(
        ModelRunner(decoder, num_blocks, config.block_size),
        Scheduler(config.limits, BlockPool(num_blocks, config.block_size)),
        AdapterCache(load, config.adapters),
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        constrain=Grammars(tokenizer, decoder.shape.vocabulary, eos_ids).constraint,
        embed=Unembedding(decoder.head).embedding,
        eos_ids=frozenset(eos_ids),
    )


def adapter_loader(
    storage: Storage, base_id: bytes, shapes: Mapping[str, tuple[int, int]], decoder: Decoder
) -> Callable[[bytes], Loaded[LoraWeights]]:
    """Read, check and fuse one adapter; runs on a thread of the cache."""

    def load(adapter_id: bytes) -> Loaded[LoraWeights]:
        packed = storage.get(adapter_files.adapter_key(adapter_id))
        if sha256(packed) != adapter_id:
            raise Corrupted("adapter_hash", f"{adapter_id.hex()} hashes to {sha256(packed).hex()}")
        fused = fuse_adapter(adapter_files.unpack(packed, base_id, shapes).factors, decoder)
        return Loaded(fused, fused.size_bytes)

    return load


def fuse_adapter(factors: Mapping[str, adapter_files.Factors], decoder: Decoder) -> LoraWeights:
    """Factors per module (``a [rank, d_in]``, ``b [d_out, rank]``) as the runner wants them: per fused
    projection, transposed, in the model's own type and place."""
    sizes = _sizes(decoder)
    layers = []
    for index in range(decoder.shape.num_layers):
        prefix = decoder.family.layer.format(i=index)
        layer = {}
        for name, parts in decoder.family.projections.items():
            given = [_turned(factors.get(prefix + part), decoder) for part in parts]
            fused = fuse(list(zip(given, sizes[name], strict=True)))
            if fused is not None:
                layer[name] = fused
        layers.append(layer)
    return LoraWeights(tuple(layers))


def _turned(factors: adapter_files.Factors | None, decoder: Decoder) -> Factors | None:
    if factors is None:
        return None
    a, b = (t.t().to(decoder.device, decoder.dtype).contiguous() for t in (factors.a, factors.b))
    return Factors(a, b)


def _sizes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """``d_out`` of the parts of each fused projection."""
    shape, first = decoder.shape, decoder.layers[0].projections
    key_value = shape.num_kv_heads * shape.head_dim
    half = first["gate_up"].weight.shape[0] // 2
    return {
        "qkv": (shape.num_heads * shape.head_dim, key_value, key_value),
        "o": (first["o"].weight.shape[0],),
        "gate_up": (half, half),
        "down": (first["down"].weight.shape[0],),
    }
