"""A runner whose model is spread over devices of this machine: this process is rank 0, each other rank one of
its own, which follows.

Followers read orders from a pipe, in turn: an adapter to fit, a step to compute. They never answer; within a
step the ranks meet in its sums, and only rank 0's logits are looked at. Nobody outlives anybody: a follower
ends when its pipe closes, and at once when rank 0's process is gone, in a step or not; when a follower is
gone the step fails with ``rank_lost``, and so does every later one, whoever else waits being woken and ended.
Each rank reads the whole base into host memory, and keeps its part.

Written without devices: the tests run it on CPUs over gloo. It has not run over NCCL."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from attribution.errors import Unavailable
from cluster.adapters import Factors
from serve_apps.engine.decoder import Shape
from serve_apps.engine.peers import Group, Peers, meeting_point
from serve_apps.engine.runner import FittedAdapter, Outputs, Runner
from serve_apps.engine.scheduler import StepPlan

MakeRunner = Callable[[Peers, torch.device], Runner]
END_TIMEOUT_S = 2.0  # of a follower that was told to end, before it is killed


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SharedAdapter:
    """Rank 0's part of an adapter, and the number by which the others know theirs."""

    own: FittedAdapter
    number: int

    @property
    def size_bytes(self) -> int:
        return self.own.size_bytes


@dataclass(frozen=True, slots=True)
class _Fit:
    number: int
    factors: dict[str, Factors]


@dataclass(frozen=True, slots=True)
class _Step:
    plan: StepPlan
    numbers: dict[bytes, int]  # of the adapters in it
    forgotten: tuple[int, ...]  # that nobody will use again


class TensorParallelRunner:
    """A ``Runner``. ``fit`` may be called from other threads than ``run``."""

    def __init__(self, make: MakeRunner, num_ranks: int, kind: str) -> None:
        """Returns when every rank has its part.

        Args:
            make: the runner of one rank on its device; can be pickled, and is called in each process.
            kind: of device, ``cuda`` or ``cpu``.

        Raises:
            Refusal: what ``make`` raises.
            Unavailable: ``rank_lost``.
        """
        spawning = multiprocessing.get_context("spawn")
        folder = tempfile.TemporaryDirectory(prefix="openledger-ranks-")
        pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(1, num_ranks):
            ours, theirs = spawning.Pipe()
            given = (make, rank, num_ranks, kind, Path(folder.name), theirs, torch.get_num_threads())
            process = spawning.Process(target=_follow, args=given, name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            self._processes.append(process)
        self._pipes = pipes
        self._telling = threading.Lock()
        self._numbers = count()
        self._forgotten: deque[int] = deque()
        self.close = weakref.finalize(self, _end, self._processes, pipes, folder)
        try:
            device = device_of(kind, 0)
            group = Group(meeting_point(Path(folder.name), num_ranks), 0, num_ranks, device)
            watching = (group, [process.sentinel for process in self._processes])
            threading.Thread(target=_abort_when_one_ends, args=watching, daemon=True).start()
            self._runner = make(group, device)
            for pipe in pipes:
                pipe.recv_bytes()
        except (OSError, EOFError, RuntimeError) as error:
            raise self._lost_or(error) from error
        except BaseException:
            self.close()
            raise

    @property
    def shape(self) -> Shape:
        return self._runner.shape

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks

    @property
    def process_ids(self) -> list[int]:
        """Of the followers."""
        return [process.pid for process in self._processes if process.pid is not None]

    def fit(self, factors: Mapping[str, Factors]) -> SharedAdapter:
        """Raises: Rejected, as the ranks' own runner does; Unavailable, ``rank_lost``."""
        adapter = SharedAdapter(self._runner.fit(factors), next(self._numbers))
        # Copied: a view is pickled with all of the file that it points into.
        copies = {name: Factors(each.a.clone(), each.b.clone()) for name, each in factors.items()}
        self._tell(_Fit(adapter.number, copies))
        weakref.finalize(adapter, self._forgotten.append, adapter.number).atexit = False
        return adapter

    def run(self, plan: StepPlan, adapters: Mapping[bytes, SharedAdapter]) -> Outputs:
        """Raises: Unavailable, ``rank_lost``."""
        forgotten = tuple(self._forgotten.popleft() for _ in range(len(self._forgotten)))
        self._tell(_Step(plan, {key: adapter.number for key, adapter in adapters.items()}, forgotten))
        try:
            outputs = self._runner.run(plan, {key: adapter.own for key, adapter in adapters.items()})
            if outputs.logits.is_cuda:
                torch.cuda.synchronize(outputs.logits.device)
        except RuntimeError as error:  # as torch says that a rank is gone
            raise self._lost_or(error) from error
        if not all(process.is_alive() for process in self._processes):
            # Its sum was perhaps cut short.
            raise self._lost_or(AssertionError("a rank ended in a step"))
        return outputs

    def _tell(self, order: _Fit | _Step) -> None:
        data = pickle.dumps(order)
        try:
            with self._telling:
                for pipe in self._pipes:
                    pipe.send_bytes(data)
        except OSError as error:
            raise self._lost_or(error) from error

    def _lost_or(self, error: Exception) -> Exception:
        """``rank_lost`` if a follower is gone, else the error as it is; either way nothing runs any more."""
        wait([process.sentinel for process in self._processes], END_TIMEOUT_S)
        for rank, process in enumerate(self._processes, start=1):
            if not process.is_alive():
                code, num_ranks = process.exitcode, len(self._processes) + 1
                error = Unavailable("rank_lost", f"rank {rank} of {num_ranks} ended with code {code}")
                break
        self.close()
        return error


def device_of(kind: str, rank: int) -> torch.device:
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def _end(
    processes: Sequence[BaseProcess],
    pipes: Sequence[Connection],
    folder: "tempfile.TemporaryDirectory[str]",
) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(END_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
    folder.cleanup()


def _abort_when_one_ends(group: Group, sentinels: Sequence[int]) -> None:
    wait(sentinels)
    group.abort()


def _follow(
    make: MakeRunner,
    rank: int,
    num_ranks: int,
    kind: str,
    folder: Path,
    orders: Connection,
    num_threads: int,
) -> None:
    """What the process of another rank does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 is told, and we end with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, num_threads // num_ranks))
    device = device_of(kind, rank)
    _use(device)
    group = Group(meeting_point(folder, num_ranks), rank, num_ranks, device)
    runner = make(group, device)
    orders.send_bytes(b"ready")
    fitting = ThreadPoolExecutor(1, "adapter-load", initializer=_use, initargs=(device,))
    fitted: dict[int, Future[FittedAdapter]] = {}
    while True:
        try:
            order = pickle.loads(orders.recv_bytes())
        except (EOFError, OSError):
            break
        if isinstance(order, _Fit):
            fitted[order.number] = fitting.submit(runner.fit, order.factors)
        else:
            for number in order.forgotten:
                del fitted[number]
            runner.run(order.plan, {key: fitted[number].result() for key, number in order.numbers.items()})
    os._exit(0)  # whatever still waits: there is nobody to wait for


def _use(device: torch.device) -> None:
    """By this thread, where it names none."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
