"""From files to an engine: the base model taken apart, adapters fused as they arrive."""

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec

import torch

from attribution.errors import Corrupted, Rejected
from attribution.hashing import sha256
from cluster import adapters as adapter_files
from cluster.models import BaseModel, eos_ids, linear_shapes, load_base, load_tokenizer
from cluster.storage import Storage
from serve_apps.engine.adapter_cache import AdapterCache, CacheLimits, Loaded, yield_to_others
from serve_apps.engine.blending import RecentBlends, blended
from serve_apps.engine.decoder import Decoder, is_llama, on_device
from serve_apps.engine.engine import Engine
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.grammar import Grammars
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.native.library import load_kernels
from serve_apps.engine.native_runner import NativeRunner, runs
from serve_apps.engine.one_by_one import OneByOne
from serve_apps.engine.peers import ALONE, Peers
from serve_apps.engine.quality import check_quality, fixed_sequences
from serve_apps.engine.quantization import BITS, quantize_decoder
from serve_apps.engine.runner import FittedAdapter, Runner
from serve_apps.engine.scheduler import Limits, Scheduler
from serve_apps.engine.sharding import shard
from serve_apps.engine.tensor_parallel import TensorParallelRunner


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one engine may use. ``kv_bytes`` is for keys and values; adapters have their own budget."""

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    weights: str = "auto"  # as ``dtype`` says, or one of ``quantization.BITS``
    num_ranks: int = 1  # devices that share the model; each has ``kv_bytes`` and its part of every adapter
    kv_bytes: int = 512 * 2**20
    block_size: int = 16
    limits: Limits = field(default_factory=Limits)
    adapters: CacheLimits = field(default_factory=CacheLimits)
    pinned: tuple[bytes, ...] = ()  # adapters that are loaded before the first request, and stay
    is_native: bool = True  # our kernels wherever they apply; False: torch alone, the oracle of the tests
    is_deterministic: bool = False  # the company in a batch moves no bit; our kernels promise that anyway


def build_engine(base: BaseModel, storage: Storage, config: EngineConfig) -> Engine:
    """An engine for ``base`` that finds adapters in ``storage`` by id.

    Raises:
        Refusal: an adapter that is to be pinned cannot be, or all of them leave no room for others.
        Rejected: ``weights_quality`` or ``weights_unsupported``, of quantised weights; ``tensor_parallel``.
    """
    runner, close_runner = _whole_runner(base, config)
    eos = eos_ids(base.path)
    blends = RecentBlends()
    load = adapter_loader(
        storage, base.base_id, linear_shapes(base.path), runner.fit, blends, config.adapters.num_loaders
    )
    cache = AdapterCache(load, config.adapters)
    cache.pin(config.pinned)
    tokenizer = load_tokenizer(base.path)
    engine = Engine(
        runner,
        Scheduler(
            replace(config.limits, max_length=runner.shape.max_length),
            BlockPool(runner.num_blocks, config.block_size),
        ),
        cache,
        blends,
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        constrain=Grammars(tokenizer, runner.shape.vocabulary, eos).constraint,
        eos_ids=frozenset(eos),
        close_runner=close_runner,
    )
    _return_free_memory()
    return engine


def _whole_runner(base: BaseModel, config: EngineConfig) -> tuple[Runner, Callable[[], object]]:
    """Who computes all of it, and what ends that."""
    make = partial(rank_runner, base, config)
    if config.num_ranks == 1:
        return make(ALONE, torch.device(config.device)), lambda: None
    spread = TensorParallelRunner(make, config.num_ranks, config.device)
    return spread, spread.close


def rank_runner(base: BaseModel, config: EngineConfig, peers: Peers, device: torch.device) -> Runner:
    """Who computes on ``device``: everything, or one rank's part. A base that is to be cut or quantised is
    never whole there."""
    model = load_base(base.path, config.dtype)
    if config.weights == "auto" and peers.num_ranks == 1:
        model = model.to(device)
    decoder = shard(fuse_decoder(model, config.limits.max_length), peers.rank, peers.num_ranks)
    del model
    if config.weights == "auto":
        return _runner(on_device(decoder, device), config, peers)
    return _runner(_quantized(decoder, base, config, peers, device), config, peers)


def _quantized(
    decoder: Decoder, base: BaseModel, config: EngineConfig, peers: Peers, device: torch.device
) -> Decoder:
    if device.type == "cpu" and _has_kernels(decoder, config, peers):
        raise Rejected(
            "weights_unsupported",
            f"our kernels for CPUs do not compute {config.weights} weights; CUDA devices and torch do",
            field="engine.weights",
        )
    small = quantize_decoder(decoder, BITS[config.weights], device)
    check_quality(decoder, small, fixed_sequences(load_tokenizer(base.path)), peers)
    return small


def _has_kernels(decoder: Decoder, config: EngineConfig, peers: Peers) -> bool:
    """Whether our kernels for CPUs run it; they know of no other ranks."""
    is_ours = config.is_native and peers.num_ranks == 1 and runs(decoder, config.block_size)
    return is_ours and load_kernels() is not None


def _return_free_memory() -> None:
    """What was read has been packed; the allocator would keep its pages (150 MiB of SmolLM2-135M)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _runner(decoder: Decoder, config: EngineConfig, peers: Peers) -> Runner:
    """The kernels of this processor or device where they compute this model, else torch."""
    if config.is_native and decoder.device.type == "cuda" and is_llama(decoder) and find_spec("triton"):
        from serve_apps.engine.cuda.runner import CudaRunner

        num_blocks = config.kv_bytes // CudaRunner.block_bytes(decoder, config.block_size)
        ours = CudaRunner(decoder, num_blocks, config.block_size, decoder.shape.max_length, peers)
        ours.capture()
        return ours
    kernels = load_kernels() if _has_kernels(decoder, config, peers) else None
    if kernels is None:
        num_blocks = config.kv_bytes // ModelRunner.block_bytes(decoder, config.block_size)
        plain = ModelRunner(decoder, num_blocks, config.block_size, peers)
        return OneByOne(plain) if config.is_deterministic else plain
    num_blocks = config.kv_bytes // NativeRunner.block_bytes(decoder)
    return NativeRunner(decoder, num_blocks, kernels, torch.get_num_threads())


def adapter_loader(
    storage: Storage,
    base_id: bytes,
    shapes: Mapping[str, tuple[int, int]],
    fit: Callable[[Mapping[str, adapter_files.Factors]], FittedAdapter],
    blends: RecentBlends,
    num_loaders: int = 1,
) -> Callable[[bytes], Loaded[FittedAdapter]]:
    """Read, check and fit one adapter, or the parts of a blend, to a runner; the result runs on a thread of
    the cache.

    Files are mapped, and hashed on one thread while they are fitted on another; nothing is used, and no fault
    of theirs believed, before their hash is right."""
    hashing = ThreadPoolExecutor(num_loaders, "adapter-hash", initializer=yield_to_others)

    def load(adapter_id: bytes) -> Loaded[FittedAdapter]:
        blend = blends.get(adapter_id)
        ids = [adapter_id] if blend is None else [part.adapter_id for part in blend.parts]
        packed = [storage.map(adapter_files.adapter_key(each)) for each in ids]
        found = [hashing.submit(sha256, each) for each in packed]
        try:
            factors = [adapter_files.view(each, base_id, shapes).factors for each in packed]
            weights = None if blend is None else [part.weight_ppm for part in blend.parts]
            fitted = fit(factors[0] if weights is None else blended(factors, weights))
        finally:
            for each, hashed in zip(ids, found, strict=True):
                if hashed.result() != each:
                    raise Corrupted("adapter_hash", f"{each.hex()} hashes to {hashed.result().hex()}")
        return Loaded(fitted, fitted.size_bytes)

    return load
