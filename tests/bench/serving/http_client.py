"""A client of any OpenAI-compatible server: the times at which the pieces of streamed answers arrive."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from tests.bench.serving.rows import Plan, Row, repeated
from tests.bench.serving.workloads import AT_ONCE, Ask, Run, Workload, asks, gaps_ms, row_of, summary


@dataclass(frozen=True, slots=True)
class Server:
    """``models`` are the names of the adapters, the most popular first; ``fields`` go into every body."""

    url: str
    models: Sequence[str]
    key: str = "none"
    fields: dict[str, Any] = field(default_factory=dict)

    def opened(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.url,
            headers={"Authorization": f"Bearer {self.key}"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=1800),
        )

    async def answer(self, http: aiohttp.ClientSession, ask: Ask) -> list[float]:
        """Seconds from sending to each piece of the answer, whose tokens are counted by the server."""
        body = {
            "model": "base" if ask.adapter is None else self.models[ask.adapter],
            "prompt": list(ask.prompt),
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }
        started, times, num_tokens = time.perf_counter(), list[float](), 0
        async with http.post("/v1/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    if event["choices"] and _has_token(event["choices"][0]):
                        times.append(time.perf_counter() - started)
                    num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
        assert num_tokens == ask.max_tokens, f"{num_tokens} tokens of {ask.max_tokens}"
        return times


def _has_token(choice: dict[str, Any]) -> bool:
    """The last token may share its event with the finish reason (vLLM), or come before it (ours)."""
    return bool(choice["text"]) or not choice["finish_reason"]


async def run(server: Server, asked: Sequence[Ask], at_once: int = AT_ONCE) -> Run:
    """Everything at once, but for what is beyond ``at_once``: that follows as answers end."""
    turnstile = asyncio.Semaphore(at_once)
    async with server.opened() as http:

        async def one(ask: Ask) -> list[float]:
            async with turnstile:
                return await server.answer(http, ask)

        started = time.perf_counter()
        answers = await asyncio.gather(*map(one, asked))
        seconds = time.perf_counter() - started
    return summary(answers, sum(ask.max_tokens for ask in asked), seconds)


async def cold_extra_ms(server: Server, asked: Sequence[Ask]) -> list[float]:
    """How much longer the first answer of each request's adapter takes to begin than its second, which has
    another prompt."""
    extra = []
    async with server.opened() as http:
        for ask in asked:
            again = Ask(ask.adapter, ask.prompt[::-1], ask.max_tokens)
            first, second = [(await server.answer(http, one))[0] for one in (ask, again)]
            extra.append(1e3 * (first - second))
    return extra


async def gaps_beside(
    server: Server, streams: Sequence[Ask], newcomers: Sequence[Ask], every_s: float
) -> list[float]:
    """Milliseconds between the pieces of ``streams``, sorted, from when all of them run; meanwhile
    ``newcomers`` come one by one."""
    async with server.opened() as http:

        async def come() -> None:
            for ask in newcomers:
                await asyncio.sleep(every_s)
                await server.answer(http, ask)

        running = asyncio.gather(*(server.answer(http, ask) for ask in streams))
        await asyncio.gather(running, come())
    answers = await running
    all_run = max(times[0] for times in answers)
    return gaps_ms([[at for at in times if at >= all_run] for times in answers])


def row(server: Server, work: Workload, plan: Plan) -> Row:
    """A workload, several times, with prompts of its own in every turn."""
    runs = repeated(lambda turn: asyncio.run(run(server, asks(work, turn))), plan)
    return row_of(runs, work)


def warm_up(server: Server, work: Workload) -> None:
    """Every adapter of ``work`` is loaded and every kernel has run."""
    asyncio.run(run(server, [replace(ask, prompt=ask.prompt[:8], max_tokens=2) for ask in asks(work, -1)]))
