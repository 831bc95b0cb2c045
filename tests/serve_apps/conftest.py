"""A toy base model with adapters in storage, and engines over it that are driven by hand."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import pytest
import torch

from attribution.types import ZERO_ID
from cluster.adapters import AdapterWeights, pack, store_adapter
from cluster.models import BaseModel, base_id, linear_shapes
from cluster.storage import DirectoryStorage, Storage
from serve_apps.engine.engine import Engine
from serve_apps.engine.loading import EngineConfig, build_engine
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import EngineRequest, SamplingParams, TokenEvent
from tests import toy_models

_numbers = count(1)


@dataclass(frozen=True)
class Toys:
    base: BaseModel
    storage: Storage
    adapters: dict[bytes, AdapterWeights]

    @property
    def adapter_ids(self) -> list[bytes]:
        return list(self.adapters)

    def engine(self, limits: Limits | None = None, **config: object) -> Engine:
        values = {"dtype": torch.float32, "kv_bytes": 4 * 2**20, "limits": limits or Limits(), **config}
        return build_engine(self.base, self.storage, EngineConfig(**values))  # type: ignore[arg-type]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Toys are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Six adapters of different ranks; one touches attention only."""
    folder = tmp_path_factory.mktemp("toys")
    path = toy_models.tiny_base(folder / "base")
    base, storage = BaseModel(base_id(path), path), DirectoryStorage(folder / "storage")
    shapes, adapters = linear_shapes(path), {}
    for seed, rank in enumerate((1, 2, 4, 4, 8, 16), start=1):
        some = {name: shape for name, shape in shapes.items() if seed != 3 or "self_attn" in name}
        weights = toy_models.random_adapter(base.base_id, some, rank=rank, seed=seed, scale=0.3)
        adapters[store_adapter(storage, pack(weights))] = weights
    return Toys(base, storage, adapters)


@pytest.fixture
def engine(toys: Toys) -> Iterator[Engine]:
    engine = toys.engine()
    yield engine
    engine.close()


def request(
    prompt: tuple[int, ...], adapter_id: bytes = ZERO_ID, owner: str = "test", **sampling: object
) -> EngineRequest:
    params = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling}
    number = next(_numbers).to_bytes(32, "big")
    return EngineRequest(number, owner, "tenant", prompt, SamplingParams(**params), adapter_id)  # type: ignore[arg-type]


def run(engine: Engine, requests: list[EngineRequest], max_steps: int = 2000) -> dict[bytes, TokenEvent]:
    """Submit together, step until all are over; one merged event each."""
    for each in requests:
        engine.submit(each)
    return drive(engine, {each.request_id for each in requests}, max_steps)


def drive(engine: Engine, open_ids: set[bytes], max_steps: int = 2000) -> dict[bytes, TokenEvent]:
    merged: dict[bytes, TokenEvent] = {}
    for _ in range(max_steps):
        for event in engine.step().events:
            before = merged.get(event.request_id)
            merged[event.request_id] = before.then(event) if before else event
        if all(key in merged and merged[key].finish for key in open_ids):
            return merged
    raise AssertionError(f"{len(open_ids)} requests did not end in {max_steps} steps")
