"""What a replay costs beside the training that it replays, and whom it credits.

Trains on the first ``--groups`` of the demo manifest (with a control for every five) through Ray Train and
DeepSpeed, sums the gradients of held-out questions about every fourth record, and replays the sum in the pool
that ``close_period`` uses. ``python -m tests.bench.attribution.replay OUT.json [--home DIR] [--groups N]``"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import yaml

from attribution.fixed_point import fraction_bits
from attribution.gradients import Example, Lora
from attribution.hashing import sha256
from attribution.influence import weighted_query_sum
from attribution.payout import noise_floor
from attribution.types import Manifest, ManifestEntry
from cluster.config import Settings
from cluster.database import connect, migrate, writing
from cluster.datanets import open_datanet
from cluster.models import base_model, load_base, load_tokenizer
from cluster.storage import open_storage, put_content
from pipelines.course import ChatAsker
from pipelines.finetune import FinetuneSpec, finetune
from pipelines.job import Ground, run
from pipelines.recorded import recorded_loras
from pipelines.replay_pool import open_pool
from pipelines.replayed import Replayable, replayed
from pipelines.sources import python_lint
from pipelines.trajectory import read_metrics

OWNER = sha256(b"owner")
FEE_GWEI = 100_000


def measure(home: Path, groups: int) -> dict[str, Any]:
    settings = Settings(home=home, run_dir=home / "run")
    migrate(settings.database_url)
    ground = Ground(settings, connect(settings.database_url), open_storage(settings.storage_url))
    with writing(ground.engine) as session:
        open_datanet(session, python_lint.DATANET, OWNER)
    whole = python_lint.demo_manifest()
    manifest = replace(whole, entries=whole.entries[:groups], controls=whole.controls[: groups // 5])
    manifest_id = put_content(ground.storage, "manifests", manifest.canonical())
    values = yaml.safe_load(Path("configs/train-python-lint.yaml").read_text(encoding="utf-8"))
    given = {**values, "run_id": f"bench-{groups}", "owner_id": OWNER.hex(), "manifest_ids": [manifest_id]}
    load = os.getloadavg()[0]
    asker = ChatAsker(load_tokenizer(base_model(settings).path))
    with tempfile.TemporaryDirectory(prefix="ol", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        trained = run("finetune", ground, FinetuneSpec.model_validate(given), finetune)
        trajectory = str(trained["trajectory"])
        asked = manifest.entries[::4]
        steps, loras = recorded_loras(ground.storage, trajectory, ())
        total = answers_sum(settings, loras, asker, manifest, asked)
        began = time.monotonic()
        what = Replayable(trajectory, steps, (manifest,))
        found = replayed(ground.storage, ground.storage, what, asker, total, partial(open_pool, settings))
        replay_s = time.monotonic() - began
        ray.shutdown()
    asked_ids = {entry.group.group_id for entry in asked}
    largest = max(map(abs, found.trained.values()))
    floor = noise_floor(list(found.controls.values()))
    steps_s = sum(one.seconds for one in read_metrics(ground.storage, trajectory))
    done_s = json.loads(ground.storage.get(f"{trajectory}/done.json"))["seconds"]
    return {
        "conditions": {
            "groups": groups,
            "controls": len(found.controls),
            "cores": len(os.sched_getaffinity(0)),
            "load_1min_before": load,
            "torch": torch.__version__,
            "spec": values,
        },
        "steps": trained["steps"],
        "is_bitwise": found.is_bitwise,
        "training_s": done_s,
        "training_steps_s": round(steps_s, 1),
        "replay_s": round(replay_s, 1),
        "asked": sorted((v / largest for k, v in found.trained.items() if k in asked_ids), reverse=True),
        "not_asked": sorted(
            (v / largest for k, v in found.trained.items() if k not in asked_ids), reverse=True
        ),
        "controls": sorted((v / largest for v in found.controls.values()), reverse=True),
        "above_floor_asked": sum(v > floor for k, v in found.trained.items() if k in asked_ids),
        "above_floor_not_asked": sum(v > floor for k, v in found.trained.items() if k not in asked_ids),
    }


def answers_sum(
    settings: Settings,
    loras: list[Lora],
    asker: ChatAsker,
    manifest: Manifest,
    asked: tuple[ManifestEntry, ...],
) -> torch.Tensor:
    """As a period's: the right answers to a held-out wording, at equal fees."""
    wording = manifest.heldout_wordings[0]
    examples = [
        Example(
            tuple(asker.prompt(wording.replace("{subject}", entry.record.subject))),
            tuple(asker.answer(entry.record.answer)),
        )
        for entry in asked
    ]
    model = load_base(base_model(settings).path, torch.float32)
    bits = fraction_bits(FEE_GWEI * len(examples))
    return weighted_query_sum(model, loras, [(example, FEE_GWEI) for example in examples], bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--groups", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.home or Path(folder), options.groups)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    ratio = round(found["replay_s"] / found["training_s"], 2)
    asked = len(found["asked"])
    print(f"goal replay_per_training {ratio} <=2.5 {'met' if ratio <= 2.5 else 'short'}")
    print(f"goal states_bitwise {found['is_bitwise']} True {'met' if found['is_bitwise'] else 'short'}")
    share = round(found["above_floor_asked"] / asked, 2)
    print(f"goal asked_above_floor {share} >=0.9 {'met' if share >= 0.9 else 'short'}")


if __name__ == "__main__":
    main()
