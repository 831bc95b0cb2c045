"""A platform in a temporary home, as the jobs of attribution find it: a tiny base, the toy manifest, a
recorded training of random factors, a published adapter, paid answers, final batches."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from attribution.hashing import keccak256, sha256
from attribution.influence import sketched_gradients
from attribution.payload import encode_batch
from attribution.types import Adapter, Blend, Manifest, Receipt
from chain.outbox import BatchRules, next_batch, record
from cluster.accounts import open_account
from cluster.adapters import pack, publish, store_adapter
from cluster.charges import ReceiptDraft, SealedTranscript, capture
from cluster.config import Settings
from cluster.database import connect, migrate, reading, writing
from cluster.models import ask, base_model, linear_shapes, load_base, load_tokenizer
from cluster.storage import Storage, open_storage, put_content
from cluster.tables import AdapterRow, BatchRow
from cluster.transcripts import Transcript, key_path, load_key, seal
from pipelines.index import IndexSpec, SketchAll, build_index
from pipelines.job import Ground
from pipelines.training import adapter_weights
from pipelines.trajectory import read_state, recorded_steps, write_done
from tests import toys
from tests.cluster.money import NOW, fund, hold
from tests.toy_models import random_adapter, tiny_base
from tests.toy_trainings import record_training

TRAJECTORY = "trajectories/toy"
STEPS = (0, 4, 8)
ALPHA, RANK = 8, 4
OWNER = b"\x0e" * 32


@dataclass(frozen=True, slots=True)
class World:
    ground: Ground
    manifest: Manifest
    adapter: Adapter

    def ask(self, question: str) -> tuple[int, ...]:
        return tuple(ask(load_tokenizer(self.base_path), question))

    @property
    def base_path(self) -> Path:
        return base_model(self.ground.settings).path


def build(home: Path, base: Path, *, allow_small: bool = True) -> World:
    settings = Settings(
        home=home, run_dir=home / "run", base_model=str(base), period={"allow_small": allow_small}
    )
    torch.set_num_threads(1)  # threads cost more than they bring at this size
    migrate(settings.database_url)
    storage = open_storage(settings.storage_url)
    ground = Ground(settings, connect(settings.database_url), storage)
    manifest = toys.manifest()
    put_content(storage, "manifests", manifest.canonical())
    return World(ground, manifest, _published(ground, manifest, "toy/metals"))


def _published(ground: Ground, manifest: Manifest, name: str, seed: int = 0) -> Adapter:
    base = base_model(ground.settings)
    shapes = {path: shape for path, shape in linear_shapes(base.path).items() if ".layers.3." in path}
    trajectory = f"{TRAJECTORY}-{seed}"
    _record_training(ground.storage, trajectory, shapes, seed)
    packed = pack(random_adapter(base.base_id, shapes, rank=RANK, seed=seed))
    with writing(ground.engine) as session:
        return publish(
            session,
            adapter_id=store_adapter(ground.storage, packed),
            name=name,
            base_id=base.base_id,
            manifest_ids=(manifest.manifest_id,),
            owner_id=OWNER,
            trajectory=trajectory,
            price_gwei_per_token=2000,
            now=NOW,
        )


def publish_trained(world: World, name: str, **how: Any) -> Adapter:
    """An adapter whose training really happened and can be replayed; it answers as that training ended."""
    storage = world.ground.storage
    training = record_training(storage, world.base_path, world.manifest, **how)
    last = recorded_steps(storage, training.trajectory)[-1]
    trained = {n: s.value for n, s in read_state(storage, training.trajectory, last).items()}
    adapter_id = store_adapter(storage, pack(adapter_weights(training.base_id, trained, training.config)))
    write_done(storage, training.trajectory, adapter_id, 1.0)
    with writing(world.ground.engine) as session:
        return publish(
            session,
            adapter_id=adapter_id,
            name=name,
            base_id=training.base_id,
            manifest_ids=training.manifest_ids,
            owner_id=OWNER,
            trajectory=training.trajectory,
            price_gwei_per_token=2000,
            now=NOW,
        )


def publish_another(world: World, name: str, seed: int) -> Adapter:
    return _published(world.ground, world.manifest, name, seed)


def _record_training(
    storage: Storage, trajectory: str, shapes: dict[str, tuple[int, int]], seed: int
) -> None:
    storage.put(f"{trajectory}/spec.json", json.dumps({"config": {"alpha": ALPHA, "rank": RANK}}).encode())
    generator = torch.Generator().manual_seed(seed)
    for step in STEPS:
        tensors = {}
        for path, (d_out, d_in) in shapes.items():
            tensors[f"{path}.a"] = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
            tensors[f"{path}.b"] = 0.05 * torch.randn(d_out, RANK, generator=generator)
        moments = {f"{name}.exp_avg": tensor * tensor for name, tensor in tensors.items()}
        storage.put(f"{trajectory}/step_{step}.safetensors", save({**tensors, **moments}))


def index_spec(adapter: Adapter, **changes: object) -> IndexSpec:
    values: dict[str, object] = {"run_id": "index-1", "adapter": adapter.ref, "sketch_size": 1024}
    return IndexSpec.model_validate({**values, **changes})


def locally(world: World) -> SketchAll:
    """The plain loop in place of the cluster."""
    model = load_base(world.base_path, torch.float32)
    return lambda lora, sketch, examples: sketched_gradients(model, lora, examples, sketch)


def index(world: World, adapter: Adapter | None = None, **changes: object) -> bytes:
    """Build the adapter's index and name it in its row."""
    one = adapter or world.adapter
    with reading(world.ground.engine) as session:
        trajectory = session.get_one(AdapterRow, one.adapter_id.hex()).trajectory
    index_id = build_index(world.ground, one, trajectory, index_spec(one, **changes), locally(world))
    with writing(world.ground.engine) as session:
        session.get_one(AdapterRow, one.adapter_id.hex()).index_id = index_id.hex()
    return index_id


def payers(world: World, count: int) -> list[str]:
    """Accounts of as many different payers."""
    with writing(world.ground.engine) as session:
        return [open_account(session, fund(session, 10**12), f"p{i}", 10**12, NOW) for i in range(count)]


def pay_for(
    world: World,
    account_id: str,
    question: str,
    answer: str,
    *,
    fee_gwei: int = 1000,
    adapter_id: bytes | None = None,
    blend: Blend | None = None,
    keeps_transcript: bool = True,
) -> Receipt:
    """One captured answer, its transcript sealed as the gateway seals it."""
    tokenizer = load_tokenizer(world.base_path)
    prompt = world.ask(question)
    ids = (*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id) if answer else ()
    request_id = secrets.token_bytes(32)
    key = load_key(key_path(world.ground.settings.home))
    sealed = seal(key, Transcript(prompt, tuple(ids), question, answer), request_id)
    draft = ReceiptDraft(
        base_id=world.adapter.base_id,
        adapter_id=blend.blend_id if blend else adapter_id or world.adapter.adapter_id,
        prompt_tokens=len(prompt),
        completion_tokens=len(ids),
        fee_gwei=fee_gwei,
        commitment=sha256(request_id),
        response_json="{}",
        transcript=SealedTranscript(b"salt", sealed) if keeps_transcript else None,
        evidence_state="pending",
        blend=blend,
    )
    with writing(world.ground.engine) as session:
        hold(session, account_id, request_id, max_gwei=fee_gwei)
        return capture(session, request_id, draft, NOW)


def settle(world: World, *, state: str = "final") -> int:
    """Seal what waits into a batch, as the settler does, and let it be ``state`` on chain; returns its id."""
    with writing(world.ground.engine) as session:
        batch = next_batch(session, BatchRules())
        record(session, batch, keccak256(encode_batch(batch)), 1, NOW)
        session.flush()
        row = session.get_one(BatchRow, batch.batch_id)
        row.state, row.da_commitment = state, b"\x01certificate"
    return batch.batch_id


def toy_base(folder: Path) -> Path:
    return tiny_base(folder)
