"""From files to an engine: the base model taken apart, adapters fused as they arrive."""

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from attribution.errors import Corrupted
from attribution.hashing import sha256
from cluster import adapters as adapter_files
from cluster.models import BaseModel, linear_shapes, load_base, load_tokenizer
from cluster.storage import Storage
from serve_apps.engine.adapter_cache import AdapterCache, CacheLimits, Loaded, yield_to_others
from serve_apps.engine.engine import Engine
from serve_apps.engine.families import Decoder, fuse_decoder
from serve_apps.engine.grammar import Grammars
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.native.library import load_kernels
from serve_apps.engine.native_runner import NativeRunner, runs
from serve_apps.engine.runner import FittedAdapter, Runner
from serve_apps.engine.scheduler import Limits, Scheduler


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one engine may use. ``kv_bytes`` is for keys and values; adapters have their own budget."""

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    kv_bytes: int = 512 * 2**20
    block_size: int = 16
    limits: Limits = field(default_factory=Limits)
    adapters: CacheLimits = field(default_factory=CacheLimits)
    pinned: tuple[bytes, ...] = ()  # adapters that are loaded before the first request, and stay
    is_native: bool = True  # our kernels wherever they apply; False: torch alone, the oracle of the tests


def build_engine(base: BaseModel, storage: Storage, config: EngineConfig) -> Engine:
    """An engine for ``base`` that finds adapters in ``storage`` by id.

    Raises:
        Refusal: an adapter that is to be pinned cannot be, or all of them leave no room for others.
    """
    model = load_base(base.path, config.dtype).to(config.device)
    eos = model.generation_config.eos_token_id
    decoder = fuse_decoder(model)
    del model
    runner = _runner(decoder, config)
    del decoder
    load = adapter_loader(
        storage, base.base_id, linear_shapes(base.path), runner.fit, config.adapters.num_loaders
    )
    cache = AdapterCache(load, config.adapters)
    cache.pin(config.pinned)
    tokenizer = load_tokenizer(base.path)
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    engine = Engine(
        runner,
        Scheduler(config.limits, BlockPool(runner.num_blocks, config.block_size)),
        cache,
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        constrain=Grammars(tokenizer, runner.shape.vocabulary, eos_ids).constraint,
        eos_ids=frozenset(eos_ids),
    )
    _return_free_memory()
    return engine


def _return_free_memory() -> None:
    """What was read has been packed; the allocator would keep its pages (150 MiB of SmolLM2-135M)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _runner(decoder: Decoder, config: EngineConfig) -> Runner:
    """The kernels of this processor where they compute this model, else torch."""
    kernels = load_kernels() if config.is_native and runs(decoder, config.block_size) else None
    if kernels is None:
        num_blocks = config.kv_bytes // ModelRunner.block_bytes(decoder, config.block_size)
        return ModelRunner(decoder, num_blocks, config.block_size)
    num_blocks = config.kv_bytes // NativeRunner.block_bytes(decoder)
    return NativeRunner(decoder, num_blocks, kernels, torch.get_num_threads())


def adapter_loader(
    storage: Storage,
    base_id: bytes,
    shapes: Mapping[str, tuple[int, int]],
    fit: Callable[[Mapping[str, adapter_files.Factors]], FittedAdapter],
    num_loaders: int = 1,
) -> Callable[[bytes], Loaded[FittedAdapter]]:
    """Read, check and fit one adapter to a runner; the result runs on a thread of the cache.

    The file is mapped, and hashed on one thread while it is fitted on another; nothing is used, and no fault
    of it believed, before its hash is right."""
    hashing = ThreadPoolExecutor(num_loaders, "adapter-hash", initializer=yield_to_others)

    def load(adapter_id: bytes) -> Loaded[FittedAdapter]:
        packed = storage.map(adapter_files.adapter_key(adapter_id))
        found = hashing.submit(sha256, packed)
        try:
            fitted = fit(adapter_files.view(packed, base_id, shapes).factors)
        finally:
            if found.result() != adapter_id:
                raise Corrupted("adapter_hash", f"{adapter_id.hex()} hashes to {found.result().hex()}")
        return Loaded(fitted, fitted.size_bytes)

    return load
