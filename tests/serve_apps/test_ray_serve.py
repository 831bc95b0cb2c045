"""The deployed application: real Ray, real Serve, the toy model, and kill -9 where it hurts."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import psutil
import pytest
from openai import APIError
from sqlalchemy import select

from cluster import head
from cluster.database import reading
from cluster.tables import ReceiptRow
from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.deployment import Deployed, command_of, deployed_at, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ASK = [{"role": "user", "content": "Which one?"}]
LONG = {"model": "toy/a1", "messages": ASK, "max_tokens": 900, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with deployed_at(tmp_path_factory.mktemp("home")) as opened:
        yield opened


def test_the_official_client_streams_and_does_not(deployed: Deployed) -> None:
    create = deployed.client().chat.completions.create
    options = {"model": "toy/a1", "messages": ASK, "max_tokens": 10, "temperature": 0}
    whole = create(**options, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
    stream = create(  # type: ignore[call-overload]
        **options, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.model_extra == {"cost_gwei": 20 * chunks[-1].usage.total_tokens}
    assert httpx.get(f"{deployed.url}/v1/models").status_code == 401
    assert_money_adds_up(deployed.database)


def test_a_client_that_leaves_mid_stream_pays_for_what_was_sent(deployed: Deployed) -> None:
    before = len(deployed.states())
    with httpx.stream(
        "POST",
        f"{deployed.url}/v1/chat/completions",
        json=LONG,
        headers={"Authorization": f"Bearer {deployed.key}"},
        timeout=60,
    ) as reply:
        lines = reply.iter_lines()
        for _ in range(6):
            next(lines)
    wait_until(lambda: deployed.states()[before:] == ["captured"])
    with reading(deployed.database) as session:
        fee = session.scalars(select(ReceiptRow.fee_gwei).order_by(ReceiptRow.created_at.desc())).first()
    assert fee is not None and 0 < fee < 20 * 900
    assert_money_adds_up(deployed.database)


def test_haproxy_stands_in_front_and_nothing_is_open_to_the_network(deployed: Deployed) -> None:
    """Statistics of HAProxy and the replicas' own ports included."""
    own = head.processes(deployed.settings)
    assert any(process.name() == "haproxy" for process in own)
    open_ports = [
        (connection.laddr.ip, connection.laddr.port, process.name(), command_of(process))
        for process in own
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]
    assert open_ports == []


def test_large_bodies_and_a_thousand_connections_come_through(deployed: Deployed) -> None:
    bearer, chat = {"Authorization": f"Bearer {deployed.key}"}, f"{deployed.url}/v1/chat/completions"

    def asked(size: int) -> httpx.Response:
        body = {"model": "toy/a1", "messages": [{"role": "user", "content": "x" * size}]}
        return httpx.post(chat, json=body, headers=bearer, timeout=60)

    assert asked(900_000).json()["error"]["code"] == "context_length_exceeded"
    assert asked(1_100_000).status_code == 413
    host, port = deployed.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
        assert httpx.get(f"{deployed.url}/v1/models", headers=bearer, timeout=60).status_code == 200


def test_killing_the_engine_mid_stream_is_a_clear_error_and_free_and_heals(deployed: Deployed) -> None:
    before = len(deployed.states())
    (engine,) = deployed.pids("EngineActor")  # asked before: 900 tokens of the toy take less than a second
    stream = deployed.client().chat.completions.create(
        model="toy/a1", messages=ASK, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(APIError, match="worker"):
        list(chunks)
    wait_until(lambda: deployed.states()[before:] == ["released"])
    assert_money_adds_up(deployed.database)

    def is_answered() -> bool:
        body = {"model": "toy/a1", "messages": ASK, "max_tokens": 3}
        bearer = {"Authorization": f"Bearer {deployed.key}"}
        reply = httpx.post(f"{deployed.url}/v1/chat/completions", json=body, headers=bearer, timeout=60)
        assert reply.status_code == 200 or reply.headers["Retry-After"]
        return reply.status_code == 200

    wait_until(is_answered)


def test_killing_the_gateway_mid_stream_leaves_no_reservation_and_a_free_engine(deployed: Deployed) -> None:
    before = len(deployed.states())
    (gateway,) = deployed.pids("ServeReplica:openledger:Gateway")
    bearer = {"Authorization": f"Bearer {deployed.key}"}
    url = f"{deployed.url}/v1/chat/completions"
    with (
        pytest.raises(httpx.HTTPError),
        httpx.stream("POST", url, json=LONG, headers=bearer, timeout=60) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        os.kill(gateway, signal.SIGKILL)
        for line in lines:
            assert not line.startswith("data: [DONE]")
        raise httpx.ReadError("the stream ended without its last event")
    wait_until(lambda: deployed.states()[before:] == ["released"])
    wait_until(lambda: httpx.get(f"{deployed.url}/healthz", timeout=20).status_code == 200)
    metrics = httpx.get(f"{deployed.url}/metrics", timeout=20).text
    assert [line.split()[-1] for line in metrics.splitlines() if "engine_running" in line] == ["0"]
    assert_money_adds_up(deployed.database)
    answer = deployed.client().chat.completions.create(model="toy/a1", messages=ASK, max_tokens=3)
    assert json.dumps(answer.model_extra)
