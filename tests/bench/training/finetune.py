"""Does the demo's training teach its records, only its records, and in time?

Seals the demo manifest, trains with ``configs/train-python-lint.yaml`` through Ray Train and DeepSpeed on a
Ray of its own, and asks base and tuned. ``python -m tests.bench.training.finetune OUT.json [--home DIR]``"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
import yaml

from attribution.hashing import sha256
from cluster.config import Settings
from cluster.database import connect, migrate, writing
from cluster.datanets import open_datanet
from cluster.storage import open_storage, put_content
from pipelines.evaluate import EvaluateSpec, evaluate_in_parallel
from pipelines.finetune import FinetuneSpec, finetune
from pipelines.job import Ground, run
from pipelines.sources import python_lint

OWNER = sha256(b"owner")


def measure(home: Path) -> dict[str, Any]:
    settings = Settings(home=home, run_dir=home / "run")
    migrate(settings.database_url)
    ground = Ground(settings, connect(settings.database_url), open_storage(settings.storage_url))
    with writing(ground.engine) as session:
        open_datanet(session, python_lint.DATANET, OWNER)
    manifest_id = put_content(ground.storage, "manifests", python_lint.demo_manifest().canonical())
    values = yaml.safe_load(Path("configs/train-python-lint.yaml").read_text(encoding="utf-8"))
    given = {**values, "run_id": "bench", "owner_id": OWNER.hex(), "manifest_ids": [manifest_id]}

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ol", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        trained = run("finetune", ground, FinetuneSpec.model_validate(given), finetune)
        trained_s = time.monotonic() - began
        spec = EvaluateSpec(run_id="bench-eval", adapter=str(trained["adapter"]))
        asked = run("evaluate", ground, spec, evaluate_in_parallel)
        ray.shutdown()
    return {
        "conditions": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load_1min_before": os.getloadavg()[0],
            "torch": torch.__version__,
            "spec": values,
        },
        "training": dict(trained),
        "training_wall_s": round(trained_s, 1),
        "evaluation": dict(asked),
        "evaluation_wall_s": round(time.monotonic() - began - trained_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.home or Path(folder))
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    asked = found["evaluation"]
    base, tuned = asked["base_heldout"]["share"], asked["tuned_heldout"]["share"]
    drift = abs(asked["tuned_controls"]["share"] - asked["base_controls"]["share"])
    goals = (
        ("training_wall_s", found["training_wall_s"], "<= 120", found["training_wall_s"] <= 120),
        ("base_heldout_exact", base, "< 0.15", base < 0.15),
        ("tuned_heldout_exact", tuned, ">= 0.80", tuned >= 0.80),
        (
            "heldout_questions",
            asked["tuned_heldout"]["asked"],
            ">= 150",
            asked["tuned_heldout"]["asked"] >= 150,
        ),
        ("control_drift", round(drift, 4), "<= 0.10", drift <= 0.10),
    )
    for name, value, target, is_met in goals:
        print(f"goal {name} {value} {target} {'met' if is_met else 'short'}")


if __name__ == "__main__":
    main()
