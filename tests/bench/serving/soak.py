"""Half an hour of everything at once, and then the books: ``make soak``.

    python -m tests.bench.serving.soak --minutes 30 [--out soak.json]

Clients stream from the base model and from hot adapters, leave in the middle, ask for adapters that were just
published, that were withdrawn, and whose files are bad; in the first third engines and the worker around them
are killed. Afterwards nothing may be left: no request, block, lease or reservation; every answer that was
finished has exactly one receipt and every receipt an answer; the ledger adds up; and the memory of the engine
and the gateway has not grown through the second half by more than ``MAX_GROWTH_MIB``. A 5xx is 503 with
``Retry-After``, but for the file whose bytes are not those of its name: there a person must look (500)."""

import argparse
import asyncio
import json
import pickle
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import psutil
import torch
from sqlalchemy import select

from cluster.adapters import AdapterWeights, Factors, pack
from cluster.database import reading
from cluster.models import linear_shapes
from cluster.tables import ChargeRow, ReceiptRow
from tests import toy_models
from tests.bench.serving.deployment import Deployment, deployed
from tests.bench.serving.report import Goal
from tests.cluster.money import assert_money_adds_up

NUM_CLIENTS, NUM_HOT = 10, 6
MAX_GROWTH_MIB = 24.0
WATCHED = ("EngineActor", ":Gateway")
PROMPT = "Once upon a time there was a model that"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended for its client. ``end``: ``finished`` (the last event came), ``left`` (we hung
    up), ``refused`` (a status), ``broken`` (an error event, or the connection ended)."""

    kind: str
    end: str
    request_id: str = ""
    receipt_id: str = ""
    status: int = 0
    code: str = ""
    has_retry_after: bool = False

    @property
    def is_wrong(self) -> bool:
        """A refusal that says too little: 5xx other than 503 with ``Retry-After``."""
        if self.status < 500 or (self.kind == "rotten" and self.code == "adapter_hash"):
            return False
        return not (self.status == 503 and self.has_retry_after)


@dataclass
class Load:
    """The clients and what became of their requests. ``models`` are references by kind."""

    target: Deployment
    draw: random.Random
    models: dict[str, list[str]]
    outcomes: list[Outcome] = field(default_factory=list)
    is_over: bool = False

    async def client(self, http: aiohttp.ClientSession) -> None:
        while not self.is_over:
            kind = self.draw.choices(
                ["base", "hot", "cold", "withdrawn", "bad", "rotten"], [20, 60, 8, 4, 6, 2]
            )[0]
            known = self.models[kind]
            if known:
                model = known.pop() if kind == "cold" else self.draw.choice(known)
                leaves_after = self.draw.randrange(1, 40) if self.draw.random() < 0.25 else None
                outcome = await self._ask(http, kind, model, leaves_after)
                self.outcomes.append(outcome)
                if outcome.status == 503:
                    await asyncio.sleep(0.2)

    async def publisher(self) -> None:
        """New adapters all the time; every other one is withdrawn while it may be in use."""
        while not self.is_over:
            ref = await asyncio.to_thread(self.target.publish_random, self.draw.choice((1, 4, 8, 16)))
            self.models["cold"].append(ref)
            await asyncio.sleep(0.3)
            hot = self.models["hot"]
            if len(hot) > NUM_HOT:
                gone = hot.pop(0)
                await asyncio.to_thread(self.target.withdraw, gone)
                self.models["withdrawn"] = [*self.models["withdrawn"][-20:], gone]
            hot.append(ref)

    async def _ask(
        self, http: aiohttp.ClientSession, kind: str, model: str, leaves_after: int | None
    ) -> Outcome:
        body = {
            "model": model,
            "prompt": PROMPT[: self.draw.randrange(5, len(PROMPT))],
            "max_tokens": self.draw.randrange(1, 300),
            "temperature": self.draw.choice((0, 1)),
            "seed": self.draw.randrange(1000),
            "ignore_eos": True,
            "stream": leaves_after is not None or self.draw.random() < 0.8,
        }
        request_id = ""
        try:
            async with http.post("/v1/completions", json=body) as reply:
                request_id = reply.headers.get("X-Request-Id", "")
                if reply.status != 200:
                    return _refused(kind, reply.status, await reply.text(), "Retry-After" in reply.headers)
                if not body["stream"]:
                    answer = await reply.json()
                    return Outcome(kind, "finished", request_id, answer["openledger"]["receipt_id"])
                return await _read(kind, reply, request_id, leaves_after)
        except (aiohttp.ClientError, TimeoutError) as error:  # what a killed process does to a connection
            return Outcome(kind, "broken", request_id, code=type(error).__name__)


def _refused(kind: str, status: int, text: str, has_retry_after: bool) -> Outcome:
    try:
        code = json.loads(text)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = f"not ours: {text[:80]}"
    return Outcome(kind, "refused", status=status, code=code, has_retry_after=has_retry_after)


async def _read(
    kind: str, reply: aiohttp.ClientResponse, request_id: str, leaves_after: int | None
) -> Outcome:
    receipt_id, num_events = "", 0
    async for line in reply.content:
        if line.startswith(b"data: [DONE]"):
            return Outcome(kind, "finished", request_id, receipt_id)
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                return Outcome(kind, "broken", request_id, code=event["error"]["code"])
            receipt_id = event.get("openledger", {}).get("receipt_id", receipt_id)
            num_events += 1
            if num_events == leaves_after:
                reply.close()
                return Outcome(kind, "left", request_id)
    return Outcome(kind, "broken", request_id, code="ended without its last event")


def bad_files(target: Deployment) -> list[bytes]:
    """Each is refused for a reason of its own."""
    shapes = linear_shapes(target.base.path)
    good = toy_models.random_adapter(target.base.base_id, shapes, 4, seed=777)
    module, factors = next(iter(good.factors.items()))
    d_out, d_in = shapes[module]
    nan = torch.full_like(factors.a, float("nan"))
    high = 257

    def packed(name: str, a: torch.Tensor, b: torch.Tensor, base_id: bytes = target.base.base_id) -> bytes:
        return pack(AdapterWeights(base_id, {name: Factors(a, b)}))

    return [
        pack(good)[:-100],
        packed(module, nan, factors.b),
        packed(module, factors.a[:, :-1], factors.b),
        packed(module, torch.ones(high, d_in), torch.ones(d_out, high)),
        packed("model.layers.0.no_such_module", factors.a, factors.b),
        packed(module, factors.a, factors.b, base_id=b"\3" * 32),
        pickle.dumps({"a": 1}),
        b"PK\3\4" + bytes(1000),
        b"",
    ]


class Watch:
    """Memory of the engine and the gateway (Pss, MiB), again and again; a new process begins anew."""

    def __init__(self, target: Deployment) -> None:
        self._target = target
        self.samples: dict[str, list[tuple[int, float, float]]] = {title: [] for title in WATCHED}

    def sample(self) -> None:
        for title in WATCHED:
            for process in self._target.processes(title):
                with suppress(psutil.Error):
                    pss = process.memory_full_info().pss / 2**20
                    self.samples[title].append((process.pid, time.monotonic(), pss))

    def growth_mib(self, title: str, since: float) -> float:
        """By how much the median of the last quarter since then exceeds that of the first."""
        taken = self.samples[title]
        sizes = [size for pid, at, size in taken if at >= since and pid == taken[-1][0]]
        quarter = max(1, len(sizes) // 4)
        return statistics.median(sizes[-quarter:]) - statistics.median(sizes[:quarter])


@dataclass(frozen=True, slots=True)
class Books:
    """What was left and what did not match. All but the counts must be zero or empty."""

    num_requests: int
    ends: dict[str, int]
    wrong: list[Outcome]
    left: dict[str, float]  # gauges that should have returned to zero
    num_reserved: int
    lost_receipts: list[str]  # of finished answers
    doubled_receipts: list[str]
    unknown_receipts: list[str]  # of requests that no client sent, or whose answer broke on our side
    growth_mib: dict[str, float]

    def goals(self) -> list[Goal]:
        zero = {
            "wrong_statuses": len(self.wrong),
            "left_in_engine": sum(self.left.values()),
            "left_reserved": self.num_reserved,
            "lost_receipts": len(self.lost_receipts),
            "doubled_receipts": len(self.doubled_receipts),
            "unknown_receipts": len(self.unknown_receipts),
        }
        found = [Goal(name, float(value), 0, is_at_most=True) for name, value in zero.items()]
        grown = {title.strip(":").lower(): grown for title, grown in self.growth_mib.items()}
        return found + [
            Goal(f"{name}_growth_mib", value, MAX_GROWTH_MIB, is_at_most=True)
            for name, value in grown.items()
        ]


def soak(target: Deployment, minutes: float, num_kills: int = 3) -> Books:
    """Load, kills, and the books. Raises: AssertionError where the money does not add up."""
    bad = [target.publish_file(content) for content in bad_files(target)]
    rotten = target.publish_file(b"not what was published", adapter_id=b"\5" * 32)
    hot = [target.publish_random(rank) for rank in (1, 2, 4, 8, 8, 16)]
    models = {"base": ["base"], "hot": hot, "cold": [], "withdrawn": [], "bad": bad, "rotten": [rotten]}
    load, watch = Load(target, random.Random(5), models), Watch(target)
    started = time.monotonic()
    asyncio.run(_run(load, watch, started, 60 * minutes, num_kills))
    _settle(target)
    assert_money_adds_up(target.database)
    return _books(target, load.outcomes, {t: watch.growth_mib(t, started + 30 * minutes) for t in WATCHED})


async def _run(load: Load, watch: Watch, started: float, seconds: float, num_kills: int) -> None:
    """Kills alternate between the engine and the worker that owns it, all in the first third."""
    kills = [started + seconds / 3 * (i + 1) / (num_kills + 1) for i in range(num_kills)]
    titles = ["EngineActor", ":Worker"] * num_kills
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {load.target.key}"}
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(
        load.target.url, connector=connector, headers=headers, timeout=timeout
    ) as http:
        tasks = [asyncio.create_task(load.client(http)) for _ in range(NUM_CLIENTS)]
        tasks.append(asyncio.create_task(load.publisher()))
        while time.monotonic() < started + seconds:
            await asyncio.sleep(min(5.0, seconds / 60))
            await asyncio.to_thread(watch.sample)
            if kills and time.monotonic() > kills[0]:
                kills.pop(0)
                for process in load.target.processes(titles.pop(0)):
                    process.send_signal(signal.SIGKILL)
            died = [task for task in tasks if task.done()]
            if died:
                died[0].result()
        load.is_over = True
        await asyncio.gather(*tasks)


def _settle(target: Deployment, within_s: float = 90) -> None:
    """Wait until nothing is open: answers of clients that left end, orphaned leases run out."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(left_open(target).values()) and not _num_reserved(target):
            return
        time.sleep(0.5)


def left_open(target: Deployment) -> dict[str, float]:
    gauges = target.gauges()
    engine = {name.removeprefix("openledger_engine_"): value for name, value in gauges.items()}
    return {
        "running": engine["running"],
        "waiting": engine["waiting"],
        "leases": engine["leases"],
        "blocks": engine["blocks"] - 1 - engine["free_blocks"],  # one is never given out
        "open_answers": gauges["openledger_open_answers"],
    }


def _num_reserved(target: Deployment) -> int:
    with reading(target.database) as session:
        return len(session.scalars(select(ChargeRow.request_id).where(ChargeRow.state == "reserved")).all())


def _books(target: Deployment, outcomes: Sequence[Outcome], growth_mib: dict[str, float]) -> Books:
    with reading(target.database) as session:
        receipts = dict(session.execute(select(ReceiptRow.receipt_id, ReceiptRow.request_id)).all())  # type: ignore[arg-type]
        captured = set(session.scalars(select(ChargeRow.request_id).where(ChargeRow.state == "captured")))
    assert set(receipts.values()) == captured, "charges and receipts differ"
    finished = [outcome for outcome in outcomes if outcome.end == "finished"]
    seen = Counter(outcome.receipt_id for outcome in finished)
    may_have_one = {outcome.request_id for outcome in outcomes if outcome.end in ("finished", "left")}
    return Books(
        num_requests=len(outcomes),
        ends=dict(
            Counter(
                f"{outcome.kind} {outcome.end} {outcome.status or ''} {outcome.code}" for outcome in outcomes
            )
        ),
        wrong=[outcome for outcome in outcomes if outcome.is_wrong],
        left=left_open(target),
        num_reserved=_num_reserved(target),
        lost_receipts=[o.request_id for o in finished if receipts.get(o.receipt_id) != o.request_id],
        doubled_receipts=[receipt_id for receipt_id, times in seen.items() if times > 1],
        unknown_receipts=sorted(set(receipts.values()) - may_have_one),
        growth_mib={title: round(grown, 1) for title, grown in growth_mib.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and so is all that was started
    with TemporaryDirectory() as folder, deployed(Path(folder)) as target:
        books = soak(target, given.minutes)
    for end, num in sorted(books.ends.items()):
        print(f"{num:7} {end}")
    print(f"{books.num_requests:7} requests in {given.minutes:g} minutes; left: {books.left}")
    for outcome in books.wrong[:10]:
        print(f"wrong: {outcome}")
    for goal in books.goals():
        print(goal)
    if given.out:
        kept = {"minutes": given.minutes, "ends": books.ends, "goals": [str(goal) for goal in books.goals()]}
        given.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
