"""Published prefixes: their tokens, their bounds, and how an owner sets one."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from attribution.errors import Corrupted, Rejected
from attribution.hashing import sha256
from attribution.types import ZERO_ID
from cluster.adapters import publish, publish_prefix, resolve
from cluster.cli import models
from cluster.config import Settings
from cluster.database import connect, migrate, reading, writing
from cluster.models import base_id, load_base, load_tokenizer, render_prompt
from cluster.prefixes import MAX_PREFIX_TOKENS, load_prefix, num_common, store_prefix, system_prefix
from cluster.storage import Storage, open_storage
from serve_apps import catalog
from tests import toy_models


def test_a_stored_prefix_is_what_was_given_and_is_named_by_it(storage: Storage) -> None:
    tokens = [0, 7, 2**31, 5]
    prefix_id = store_prefix(storage, tokens)
    assert store_prefix(storage, tokens) == prefix_id != store_prefix(storage, tokens[:3])
    assert load_prefix(storage, prefix_id) == tuple(tokens)


def test_an_empty_or_endless_prefix_is_refused_and_a_changed_one_stops(storage: Storage) -> None:
    store_prefix(storage, [1] * MAX_PREFIX_TOKENS)
    for tokens in ([], [1] * (MAX_PREFIX_TOKENS + 1)):
        with pytest.raises(Rejected, match=f"1 to {MAX_PREFIX_TOKENS} tokens"):
            store_prefix(storage, tokens)
    other = sha256(b"other")
    storage.put_if_absent(f"prefixes/{other.hex()}.u32", b"\1\0\0\0")
    with pytest.raises(Corrupted, match="hashes to"):
        load_prefix(storage, other)


def test_common_beginnings_are_counted() -> None:
    assert [num_common([1, 2, 3], each) for each in ([], [1, 2], [1, 2, 3, 4], [1, 9, 3], [2])] == [
        0,
        2,
        3,
        1,
        0,
    ]


def test_a_system_prompt_is_public_up_to_the_users_first_word(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(toy_models.tiny_base(tmp_path / "base"))
    prefix = system_prefix(tokenizer, "You are terse.")
    assert tokenizer.decode(prefix) == ("<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\n")
    chat = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Why?"}]
    assert num_common(prefix, render_prompt(tokenizer, chat)) == len(prefix)


def test_an_imported_adapter_may_come_with_its_prefix(tmp_path: Path) -> None:
    base, saved, text = toy_models.tiny_base(tmp_path / "base"), tmp_path / "saved", tmp_path / "system.txt"
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])
    get_peft_model(load_base(base, torch.float32), config).save_pretrained(saved)
    text.write_text("You are terse.")
    settings = Settings(home=tmp_path / "home", run_dir=tmp_path / "run", base_model=str(base))
    migrate(settings.database_url)
    models.import_peft(settings, saved, "ada/metals", 3, text)
    database = connect(settings.database_url)
    with reading(database) as session:
        prefix_id = catalog.resolve(session, "ada/metals", base_id(base), 1).prefix_id
    tokens = load_prefix(open_storage(settings.storage_url), prefix_id)
    assert list(tokens) == system_prefix(load_tokenizer(base), "You are terse.")
    database.dispose()


def test_an_owner_publishes_a_prefix_and_the_catalog_gives_it(tmp_path: Path) -> None:
    base = toy_models.tiny_base(tmp_path / "base")
    settings = Settings(home=tmp_path / "home", run_dir=tmp_path / "run", base_model=str(base))
    migrate(settings.database_url)
    database = connect(settings.database_url)
    with writing(database) as session:
        publish(
            session,
            adapter_id=sha256(b"adapter"),
            name="ada/metals",
            base_id=base_id(base),
            manifest_ids=(),
            owner_id=sha256(b"owner"),
            trajectory="",
            price_gwei_per_token=1,
            now=1,
        )

    def prefix_id() -> bytes:
        with reading(database) as session:
            return catalog.resolve(session, "ada/metals", base_id(base), 1).prefix_id

    assert prefix_id() == ZERO_ID
    text = tmp_path / "system.txt"
    text.write_text("You are terse.")
    models.publish_prefix(settings, "ada/metals@1", text)
    tokens = load_prefix(open_storage(settings.storage_url), prefix_id())
    assert list(tokens) == system_prefix(load_tokenizer(base), "You are terse.")
    with pytest.raises(Rejected, match="no model"):
        models.publish_prefix(settings, "ada/metals@2", text)
    with pytest.raises(Rejected, match="nowhere") as refused:
        models.publish_prefix(settings, "ada/metals@1", tmp_path / "nowhere")
    assert refused.value.code == "prefix_unreadable"
    with writing(database) as session:
        assert publish_prefix(session, "ada/metals", sha256(b"x")) == resolve(session, "ada/metals")
    database.dispose()
