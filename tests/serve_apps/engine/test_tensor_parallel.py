"""A model over two processes: the answers of one, and nobody who outlives or waits for the other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from attribution.errors import Rejected, Unavailable
from attribution.types import ZERO_ID
from cluster.config import EngineSettings
from cluster.models import load_base
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.loading import EngineConfig, rank_runner
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.peers import ALONE, Peers
from serve_apps.engine.runner import Runner
from serve_apps.engine.scheduler import Limits, Scheduler, StepPlan
from serve_apps.engine.sharding import shard
from serve_apps.engine.tensor_parallel import TensorParallelRunner
from serve_apps.engine_host import EngineHost
from serve_apps.worker import engine_config
from tests import toy_families
from tests.serve_apps.conftest import Toys, request, run

ROOT = Path(__file__).parents[3]
CONFIG = EngineConfig(dtype=torch.float32, kv_bytes=2**20, is_native=False)
CPU = torch.device("cpu")


@pytest.fixture
def two_ranks(toys: Toys) -> Iterator[TensorParallelRunner]:
    runner = TensorParallelRunner(partial(rank_runner, toys.base, CONFIG), 2, "cpu")
    yield runner
    runner.close()


def first_step(*adapter_ids: bytes) -> StepPlan:
    scheduler = Scheduler(Limits(), BlockPool(20, 16))
    for i, adapter_id in enumerate(adapter_ids):
        scheduler.add(request(tuple(range(3, 9 + i)), adapter_id))
    return scheduler.schedule(lambda _: True)


def is_there(process_id: int) -> bool:
    """A process that has ended and that nobody has asked about is not."""
    stat = Path(f"/proc/{process_id}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(is_so: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.02)


@pytest.mark.parametrize("weights", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_an_engine_over_two_ranks_answers_as_one(toys: Toys, weights: str) -> None:
    """Every adapter beside the base model, loaded while others run; quantised, each rank its own part."""
    requests = [
        request(tuple((7 * i + j) % 90 + 3 for j in range(5 + 9 * i)), key)
        for i, key in enumerate((ZERO_ID, *toys.adapter_ids, ZERO_ID))
    ]
    answers = []
    for num_ranks in (2, 1):
        engine = toys.engine(num_ranks=num_ranks, is_native=False, weights=weights)
        found = run(engine, requests)
        answers.append([found[each.request_id].token_ids for each in requests])
        engine.close()
    # In 8 bits the scales of a part's rows are of its inputs alone: another rounding, now and then a token.
    same = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
    assert same == len(requests) if weights == "auto" else same > len(requests) // 2


def test_an_adapter_that_nobody_has_any_more_is_forgotten_everywhere(
    toys: Toys, two_ranks: TensorParallelRunner
) -> None:
    """And the others stay what they are."""
    key, other = toys.adapter_ids[:2]
    plan = first_step(ZERO_ID, key)
    alone = rank_runner(toys.base, CONFIG, ALONE, CPU)
    expected = alone.run(plan, {key: alone.fit(toys.adapters[key].factors)}).logits
    kept = two_ranks.fit(toys.adapters[key].factors)
    for _ in range(3):
        brief = two_ranks.fit(toys.adapters[other].factors)
        two_ranks.run(first_step(other), {other: brief})
        del brief
        found = two_ranks.run(plan, {key: kept}).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_killed_rank_fails_the_step_and_every_later_one(
    toys: Toys, two_ranks: TensorParallelRunner
) -> None:
    two_ranks.run(first_step(ZERO_ID), {})
    (other,) = two_ranks.process_ids
    os.kill(other, signal.SIGKILL)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(Unavailable, match="rank 1 of 2 ended with code -9") as lost:
            two_ranks.run(first_step(ZERO_ID), {})
        assert lost.value.code == "rank_lost"
    with pytest.raises(Unavailable, match="rank 1 of 2"):
        two_ranks.fit(toys.adapters[toys.adapter_ids[0]].factors)
    assert time.monotonic() - started < 10


def test_a_rank_killed_in_a_step_wakes_who_waits_for_it(two_ranks: TensorParallelRunner) -> None:
    """It is stopped, so that the sum is never complete, and killed while rank 0 waits in it."""
    (other,) = two_ranks.process_ids
    os.kill(other, signal.SIGSTOP)
    killer = subprocess.Popen(
        [sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({other}, 9)"], cwd=ROOT
    )
    started = time.monotonic()
    with pytest.raises(Unavailable, match="rank 1 of 2 ended with code -9"):
        two_ranks.run(first_step(ZERO_ID), {})
    assert 0.2 < time.monotonic() - started < 10
    killer.wait()


def test_a_host_whose_engine_lost_a_rank_says_so(toys: Toys) -> None:
    """As of any engine that is dead: whoever asks is sent elsewhere, and Serve replaces the worker."""
    engine = toys.engine(num_ranks=2, is_native=False)
    (other,) = children()
    host = EngineHost(engine)
    os.kill(other, signal.SIGKILL)
    engine.submit(request((3, 4, 5)))

    def is_dead() -> bool:
        try:
            host.check_health()
        except Unavailable as dead:
            return "rank 1 of 2" in str(dead)
        return False

    wait_until(is_dead)
    host.stop()


def test_ranks_end_with_their_runner(toys: Toys) -> None:
    engine = toys.engine(num_ranks=2, is_native=False)
    others = children()
    assert len(others) == 1
    engine.close()
    assert not any(is_there(each) for each in others)


def children() -> list[int]:
    """Of this process, that spawn made for us."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_ours = parent == os.getpid() and "spawn_main" in (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if is_ours:
            found.append(int(folder.name))
    return found


ABANDONED = """
import sys, time
from functools import partial
from pathlib import Path
from cluster.models import BaseModel
from serve_apps.engine.loading import rank_runner
from serve_apps.engine.tensor_parallel import TensorParallelRunner
from tests.serve_apps.engine.test_tensor_parallel import CONFIG

if __name__ == "__main__":
    make = partial(rank_runner, BaseModel(bytes(32), Path(sys.argv[1])), CONFIG)
    runner = TensorParallelRunner(make, 2, "cpu")
    print(*runner.process_ids, flush=True)
    time.sleep(600)
"""


def test_ranks_end_when_rank_0_is_killed(toys: Toys, tmp_path: Path) -> None:
    """No orphan keeps a device, whatever became of its parent."""
    script = tmp_path / "abandoned.py"
    script.write_text(ABANDONED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(toys.base.path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    others = [int(each) for each in process.stdout.readline().split()]
    assert len(others) == 1 and all(map(is_there, others))
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_there, others)))


def test_what_does_not_divide_ends_every_rank(tmp_path: Path, toys: Toys) -> None:
    before = children()
    make = partial(rank_runner, toys.base, CONFIG)
    with pytest.raises(Rejected, match="2 key heads cannot be divided among 3"):
        TensorParallelRunner(make, 3, "cpu")
    assert children() == before


def test_the_setting_reaches_the_engine_and_vllm_refuses_it() -> None:
    assert engine_config(EngineSettings(tensor_parallel=2)).num_ranks == 2
    with pytest.raises(Rejected, match="vllm has no tensor_parallel 2"):
        engine_config(EngineSettings(tensor_parallel=2, backend="vllm"))


def cuda_runner(folder: Path, peers: Peers, device: torch.device) -> Runner:
    from serve_apps.engine.cuda.runner import CudaRunner

    model = fuse_decoder(load_base(folder, torch.float32))
    return CudaRunner(shard(model, peers.rank, peers.num_ranks), 20, 16, 64, peers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_the_kernels_for_devices_work_on_parts(tmp_path: Path) -> None:
    """In Triton's interpreter, over gloo."""
    pytest.importorskip("triton", reason="no Triton: its kernels are for CUDA devices")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are compiled")
    folder = toy_families.save(toy_families.toys()["llama3"].config, tmp_path / "base")
    plan = first_step(ZERO_ID, ZERO_ID)
    expected = ModelRunner(fuse_decoder(load_base(folder, torch.float32)), 20, 16).run(plan, {}).logits
    two_ranks = TensorParallelRunner(partial(cuda_runner, folder), 2, "cpu")
    found = two_ranks.run(plan, {}).logits
    two_ranks.close()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
