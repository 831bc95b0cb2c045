"""``openledger train``, ``eval``, ``deploy``, ``model import``, ``model prefix``, ``chat``: from a spec,
or from a folder that another trainer saved, to an adapter that answers."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from attribution.errors import Rejected, Unavailable
from attribution.types import contributor_id
from cluster import adapters
from cluster.cli import laptop, money
from cluster.cli.screen import console, table
from cluster.config import Settings
from cluster.database import connect, writing
from cluster.storage import open_storage

CHAT_TIMEOUT_S = 300.0


def run_spec(settings: Settings, kind: str, path: Path) -> None:
    """Run one pipeline on a YAML file; the run is named by its content unless the file names it."""
    spec = read_spec(path)
    name = str(spec.pop("run_id", "")) or run_id(kind, spec)
    print_outcome(f"{kind} {name}", money.run_job(settings, kind, spec, name, console.print))


def deploy(settings: Settings, ref: str) -> None:
    with writing(connect(settings.database_url)) as session:
        adapter = adapters.promote(session, ref)
    console.print(f"{adapter.name} is now {adapter.ref}, adapter {adapter.adapter_id.hex()}")


def publish_prefix(settings: Settings, ref: str, system_prompt: Path) -> None:
    """Say in public how chats with an adapter begin, so that every tenant finds that part computed."""
    prefix_id, num_tokens = _stored_prefix(settings, system_prompt)
    with writing(connect(settings.database_url)) as session:
        adapter = adapters.publish_prefix(session, ref, prefix_id)
    console.print(f"{adapter.ref} begins with {num_tokens} public tokens, prefix {prefix_id.hex()}")


def _stored_prefix(settings: Settings, system_prompt: Path) -> tuple[bytes, int]:
    from cluster.models import base_model, load_tokenizer
    from cluster.prefixes import store_prefix, system_prefix

    try:
        text = system_prompt.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected("prefix_unreadable", f"{system_prompt}: {error}", field="prefix") from error
    token_ids = system_prefix(load_tokenizer(base_model(settings).path), text)
    storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
    return store_prefix(storage, token_ids), len(token_ids)


def import_peft(
    settings: Settings,
    folder: Path,
    name: str,
    price_gwei_per_token: int,
    system_prompt: Path | None = None,
) -> None:
    """Publish an adapter that PEFT saved, and how its chats begin; this laptop's model owner owns it."""
    from cluster.models import base_model, linear_shapes
    from cluster.peft_files import read_peft

    adapters.check_name(name)
    base = base_model(settings)
    weights = read_peft(folder, base.base_id, linear_shapes(base.path))
    storage = open_storage(settings.storage_url, s3_endpoint=settings.s3_endpoint)
    adapter_id = adapters.store_adapter(storage, adapters.pack(weights))
    prefix = None if system_prompt is None else _stored_prefix(settings, system_prompt)
    with writing(connect(settings.database_url)) as session:
        adapter = adapters.publish(
            session,
            adapter_id=adapter_id,
            name=name,
            base_id=base.base_id,
            manifest_ids=(),
            owner_id=contributor_id(laptop.own_wallet(settings, "model-owner").address),
            trajectory="",
            price_gwei_per_token=price_gwei_per_token,
            now=int(time.time()),
        )
        if prefix is not None:
            adapters.publish_prefix(session, adapter.ref, prefix[0])
    console.print(f"{adapter.ref} is published, adapter {adapter_id.hex()}")
    console.print(
        "Trained elsewhere, it has no records: what it earns waits until an index says whose it is."
    )


def chat(settings: Settings, model: str, question: str, key_of: str) -> None:
    last: dict[str, Any] = {}
    for piece, event in stream(settings, model, question, key_of):
        console.print(piece, end="")
        last |= event
    console.print()
    receipt_id = last.get("openledger", {}).get("receipt_id", "")
    usage = last.get("usage") or {}
    console.print(f"[dim]receipt {receipt_id}, cost {usage.get('cost_gwei', '?')} gwei[/]")


def stream(
    settings: Settings, model: str, question: str, key_of: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pieces of the answer with the events that brought them, over HTTP and SSE like any client."""
    key = money.api_key(settings, key_of)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 48,
        "temperature": 0,
    }
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{settings.public_url}/v1/chat/completions"
    try:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=CHAT_TIMEOUT_S) as answer:
            if answer.status_code != 200:
                text = answer.read().decode(errors="replace")
                raise Rejected("refused", f"HTTP {answer.status_code}: {text[:300]}")
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise Unavailable("stream_broken", str(event["error"].get("message")))
                choices = event.get("choices") or [{}]
                yield choices[0].get("delta", {}).get("content") or "", event
    except httpx.HTTPError as error:
        raise Unavailable("gateway_unreachable", f"{url}: {error}") from error


def read_spec(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise Rejected("spec_unreadable", f"{path}: {error}", field="spec") from error
    if not isinstance(document, dict):
        raise Rejected("spec_unreadable", f"{path} holds no mapping", field="spec")
    return document


def run_id(kind: str, spec: dict[str, Any]) -> str:
    """Named by its content: the same work is the same run, and is done once."""
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return f"{kind}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


def print_outcome(title: str, outcome: dict[str, Any]) -> None:
    table(
        title,
        ["figure", "value"],
        [(k, json.dumps(v) if isinstance(v, dict | list) else v) for k, v in outcome.items()],
    )
