"""Ten thousand connections at once, most of them up to no good, while eight clients go on being answered.

    python -m tests.bench.serving.connections --connections 10000

A quarter each: silent; half a request line; a body that stops in the middle; a stream that nobody reads.
They come from several loopback addresses, stay for a while, then go on as if nothing had been. What they get
must be an answer, a refusal with a status or a closed connection; the eight clients must get to the letter
what they got before, and the gateway must be the same process as before, with nothing left open."""

import argparse
import asyncio
import json
import resource
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp

from tests.bench.serving.deployment import Deployment, deployed
from tests.bench.serving.report import Goal
from tests.bench.serving.soak import left_open

NUM_STREAMS, STREAM_TOKENS = 8, 200
KINDS = ("silent", "half_line", "half_body", "unread")
NUM_ADDRESSES = 8  # a loopback address has some 28,000 ports to call from
ANSWER_WITHIN_S = 180.0
SPARE_FILES = 500


@dataclass(frozen=True, slots=True)
class Seen:
    """``ends`` counts what each kind of connection got: a status, ``closed``, or words for neither."""

    ends: dict[str, dict[str, int]]
    num_streams: int
    num_changed_streams: int
    num_refused_streams: int
    is_same_gateway: bool
    left: dict[str, float]

    def goals(self) -> list[Goal]:
        unclear = sum(
            num for kind, ends in self.ends.items() for end, num in ends.items() if not _is_clear(kind, end)
        )
        zero = {
            "unclear_answers": unclear,
            "changed_streams": self.num_changed_streams,
            "dead_gateways": 1 - self.is_same_gateway,
            "left_open": sum(self.left.values()),
        }
        return [Goal(name, float(value), 0, is_at_most=True) for name, value in zero.items()]


def _is_clear(kind: str, end: str) -> bool:
    """An answer or a refusal; who has not even sent a whole head may be hung up on."""
    if end == "closed":
        return kind in ("silent", "half_line")
    return end == "503" or (end.isdigit() and int(end) < 500)


def storm(target: Deployment, num_connections: int, hold_s: float) -> Seen:
    """Raises: OSError when this process may not open so many files."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(most, max(now, num_connections + SPARE_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    gateways = {process.pid for process in target.processes(":Gateway")}
    ends, texts = asyncio.run(_storm(target, num_connections, hold_s))
    before, *after = texts
    answered = [text for text in after if text is not None]
    deadline = time.monotonic() + 90
    while any(left_open(target).values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return Seen(
        ends=ends,
        num_streams=len(answered),
        num_changed_streams=sum(text != before for text in answered),
        num_refused_streams=len(after) - len(answered),
        is_same_gateway={process.pid for process in target.processes(":Gateway")} == gateways,
        left=left_open(target),
    )


async def _storm(
    target: Deployment, num: int, hold_s: float
) -> tuple[dict[str, dict[str, int]], list[str | None]]:
    """What each kind got, and what the clients read: once before, then all the time."""
    headers = {"Authorization": f"Bearer {target.key}"}
    async with aiohttp.ClientSession(target.url, headers=headers) as http:
        texts: list[str | None] = [await _stream(http)]
        assert texts[0], "no answer even before"
        is_over = asyncio.Event()

        async def client() -> None:
            while not is_over.is_set():
                texts.append(await _stream(http))
                await asyncio.sleep(0.1)

        clients = [asyncio.create_task(client()) for _ in range(NUM_STREAMS)]
        go_on = asyncio.Event()
        calls = [asyncio.create_task(_call(target, number, go_on)) for number in range(num)]
        await asyncio.sleep(hold_s)
        go_on.set()
        ends = await asyncio.gather(*calls)
        is_over.set()
        await asyncio.gather(*clients)
    counted = {kind: dict(Counter(ends[place :: len(KINDS)])) for place, kind in enumerate(KINDS)}
    return counted, texts


async def _stream(http: aiohttp.ClientSession) -> str | None:
    """A whole answer's text; None when it was refused for want of room."""
    body = _body(STREAM_TOKENS)
    async with http.post("/v1/completions", json=body) as reply:
        if reply.status == 503 and "Retry-After" in reply.headers:
            return None
        assert reply.status == 200, await reply.text()
        text, is_whole = "", False
        async for line in reply.content:
            is_whole = is_whole or line.startswith(b"data: [DONE]")
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
        return text if is_whole else f"{text} (cut off)"


def _body(max_tokens: int) -> dict[str, object]:
    greedy = {"temperature": 0, "ignore_eos": True, "stream": True}
    return {"model": "base", "prompt": "Once upon a time", "max_tokens": max_tokens, **greedy}


async def _call(target: Deployment, number: int, go_on: asyncio.Event) -> str:
    """One connection's life: its status, ``closed`` where the server hung up without one, or what failed."""
    kind = KINDS[number % len(KINDS)]
    host, port = target.url.removeprefix("http://").split(":")
    await asyncio.sleep(number / 2000)  # 2,000 a second
    request = json.dumps(_body(50)).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {target.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(request)}\r\nConnection: close\r\n\r\n"
    ).encode()
    ask = b"GET /v1/models HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    first, then = {
        "silent": (b"", ask),
        "half_line": (ask[:30], ask[30:]),
        "half_body": (head + request[:20], request[20:]),
        "unread": (head + request, b""),
    }[kind]
    try:
        from_address = (f"127.0.0.{2 + number % NUM_ADDRESSES}", 0)
        reader, writer = await asyncio.open_connection(host, int(port), local_addr=from_address, limit=4096)
    except OSError as error:
        return f"not connected: {type(error).__name__}"
    try:
        writer.write(first)
        await go_on.wait()
        writer.write(then)
        answer = await asyncio.wait_for(_read_all(reader), ANSWER_WITHIN_S)
    except (ConnectionError, TimeoutError) as error:
        return "closed" if isinstance(error, ConnectionError) else "no answer"
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return _status(answer)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    found = b""
    while piece := await reader.read(4096):
        found += piece
    return found


def _status(answer: bytes) -> str:
    """A streamed answer counts only with its last event."""
    if not answer:
        return "closed"
    status = answer.split(b" ", 2)[1].decode()
    if status == "200" and b"text/event-stream" in answer.lower():
        return "200" if b"data: [DONE]" in answer else "200, broken"
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--hold-s", type=float, default=20)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and so is all that was started
    with TemporaryDirectory() as folder, deployed(Path(folder)) as target:
        seen = storm(target, given.connections, given.hold_s)
    for kind, ends in seen.ends.items():
        print(f"{kind:10} {ends}")
    print(f"{seen.num_streams} streams answered, {seen.num_refused_streams} refused for want of room")
    for goal in seen.goals():
        print(goal)


if __name__ == "__main__":
    main()
