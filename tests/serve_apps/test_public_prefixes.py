"""From a published system prompt to blocks that every payer's chats share, over HTTP."""

from cluster.adapters import publish_prefix
from cluster.database import writing
from cluster.prefixes import num_common, store_prefix, system_prefix
from tests.serve_apps.conftest import Gateway

TERSE = "You are terse and know everything about metals, their ores and their alloys."
GREEDY = {"temperature": 0, "max_tokens": 4}


def num_reused(gateway: Gateway, key: str, model: str, system: str) -> int:
    before = gateway.host.engine_load().num_reused
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "And what of lead, then?"}]
    gateway.client(key).chat.completions.create(model=model, messages=messages, **GREEDY)  # type: ignore[call-overload]
    return gateway.host.engine_load().num_reused - before


def test_payers_share_what_was_published_and_nothing_else(gateway: Gateway) -> None:
    prefix = system_prefix(gateway.services.tokenizer, TERSE)
    with writing(gateway.database) as session:
        publish_prefix(session, "toy/a1@1", store_prefix(gateway.toys.storage, prefix))
    first, second = gateway.new_key(), gateway.new_key()
    assert num_reused(gateway, first, "toy/a1", TERSE) == 0
    assert num_reused(gateway, second, "toy/a1", TERSE) == len(prefix) // 16 * 16 > 0
    assert num_reused(gateway, second, "toy/a1", TERSE) > len(prefix)  # its own, too
    changed = TERSE.replace("alloys", "prices")
    num_equal = num_common(prefix, system_prefix(gateway.services.tokenizer, changed))
    third = gateway.new_key()
    assert num_reused(gateway, third, "toy/a1", changed) == num_equal // 16 * 16 < len(prefix) // 16 * 16
    assert num_reused(gateway, first, "toy/a2", TERSE) == 0  # published with another
    assert num_reused(gateway, second, "toy/a2", TERSE) == 0
