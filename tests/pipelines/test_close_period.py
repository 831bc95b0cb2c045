import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from sqlalchemy import delete, func, select, update

from attribution.errors import Corrupted, Rejected
from attribution.fixed_point import fraction_bits, to_fixed_point
from attribution.gradients import Example
from attribution.hashing import sha256
from attribution.index import Index
from attribution.influence import direction, integer_credits
from attribution.payload import decode_period, encode_period
from attribution.payout import Role
from attribution.sketch import make_sketch
from attribution.types import ZERO_ID, Adapter, Blend, BlendPart
from cluster.adapters import load_adapter
from cluster.database import reading, writing
from cluster.indexes import stored_index
from cluster.ledger import FEES, balance, imbalance
from cluster.models import linear_shapes, load_base
from cluster.tables import AdapterRow, PayoutRow, PeriodRow, TranscriptRow
from pipelines.adapter_close import ReplaySum, credits_of, replay_adapter
from pipelines.answer_sums import ANSWERS_PER_CHUNK, Chunk, decode_sum, store_sums
from pipelines.close_period import ClosedPeriod, CloseSpec, SumAnswers, close_period, forget
from pipelines.course import Course
from pipelines.readiness import SMALL
from pipelines.trajectory import TrainingSpec
from tests.attributed import World, index, pay_for, payers, publish_another, publish_trained, settle
from tests.cluster.money import NOW
from tests.toy_trainings import Dying, this_process

PLATFORM, HOST, POOL = (bytes([n]) * 32 for n in (0xA, 0xB, 0xC))
SPEC = CloseSpec(
    run_id="close-1",
    chain_id=31337,
    distributor="dd" * 20,
    platform=PLATFORM.hex(),
    host=HOST.hex(),
    pool=POOL.hex(),
)
QUESTIONS = (("What is old?", "mercury"), ("Name a metal.", "iron"), ("Which one shines?", "gold and silver"))


def plainly(world: World) -> SumAnswers:
    model = load_base(world.base_path, torch.float32)
    return lambda index, chunks: void(store_sums(model, index, world.ground.storage, chunks))


def void(_: object) -> None: ...


def close(world: World, sum_answers: SumAnswers | None = None, now: int = NOW) -> ClosedPeriod:
    return close_period(world.ground, SPEC, sum_answers or plainly(world), in_this_process(world), now)


def in_this_process(world: World, calls: int = 10**6) -> ReplaySum:
    """Replays without a cluster, killed after so many steps."""

    def open_workers(_: TrainingSpec, course: Course) -> Dying:
        return Dying(this_process(world.base_path, course), calls)

    return lambda ready, total: replay_adapter(world.ground, ready, total, open_workers)


def fees_and_entries(world: World) -> tuple[int, int, dict[str, int]]:
    """Gwei paid out by rows, gwei left in the ledger's fees, and postings that do not sum to zero."""
    with reading(world.ground.engine) as session:
        paid = int(session.scalar(select(func.sum(PayoutRow.amount_gwei))) or 0)
        return paid, balance(session, FEES), imbalance(session)


def test_every_fee_is_paid_out_once_and_the_root_follows_from_the_payload(world: World) -> None:
    index(world)
    accounts = payers(world, 2)
    for turn, (question, answer) in enumerate(QUESTIONS):
        pay_for(world, accounts[turn % 2], question, answer, fee_gwei=1000 + turn)
    settle(world)
    closed = close(world)
    assert fees_and_entries(world) == (3003, 0, {})
    stored = world.ground.storage.get(f"blobs/{closed.payload_hash.hex()}")
    payload = decode_period(stored)
    assert payload == closed.payload and payload.payouts() == closed.payouts
    with reading(world.ground.engine) as session:
        row = session.get_one(PeriodRow, 1)
        assert (row.state, row.first_batch, row.last_batch) == ("closed", 1, 1)
        assert (row.root, row.total_gwei) == (payload.tree().root.hex(), 3003)
        lines = {
            (one.contributor_id, one.role): one.amount_gwei for one in session.scalars(select(PayoutRow))
        }
    expected = {
        (line.contributor_id.hex(), str(line.role)): line.amount_gwei
        for p in closed.payouts
        for line in p.lines
    }
    assert lines == expected
    firsts = {entry.group.contributor_id for entry in world.manifest.entries}
    assert {c.contributor_id for c in payload.adapters[0].credits} <= firsts


def test_credits_are_the_integers_that_anyone_gets_from_the_published_sum(world: World) -> None:
    """Recomputed here from the answers one by one, and from the published file alone."""
    opened = stored_index(world.ground.storage, index(world))
    account, other = payers(world, 2)
    receipts = [
        pay_for(world, account, *QUESTIONS[0], fee_gwei=700),
        pay_for(world, other, *QUESTIONS[1], fee_gwei=90),
    ]
    settle(world)
    (adapter,) = close(world).payload.adapters
    model, bits = load_base(world.base_path, torch.float32), fraction_bits(790)
    total = torch.zeros(0)
    for (question, answer), receipt in zip(QUESTIONS, receipts, strict=False):
        example = Example(world.ask(question), answer_tokens(world, answer))
        part = to_fixed_point(direction(model, opened.loras, example), bits) * receipt.fee_gwei
        total = part if not len(total) else total + part
    published = world.ground.storage.get(f"gradient_sums/{adapter.gradient_sum_sha256.hex()}")
    assert torch.equal(decode_sum(published), total)
    sketch = make_sketch(len(total), opened.card.sketch_size, opened.card.sketch_seed)
    values = integer_credits(sketch, total, opened.features)
    trained = opened.card.num_trained
    groups = [entry.group.group_id for entry in world.manifest.entries]
    assert {c.group_id: c.value for c in adapter.credits} == dict(zip(groups, values[:trained], strict=True))
    assert list(adapter.controls) == sorted(values[trained:])


def answer_tokens(world: World, answer: str) -> tuple[int, ...]:
    from cluster.models import load_tokenizer

    tokenizer = load_tokenizer(world.base_path)
    return (*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id)


def test_a_crash_in_the_middle_changes_nothing_and_repeats_nothing(world: World) -> None:
    """Killed after the first chunk: no rows; started again: the same payload as without the crash, and the
    finished chunk is not worked out again."""
    index(world)
    (account,) = payers(world, 1)
    for turn in range(ANSWERS_PER_CHUNK + 3):
        pay_for(world, account, f"Question {turn}?", "iron", fee_gwei=100 + turn)
    settle(world)
    model, storage = load_base(world.base_path, torch.float32), world.ground.storage

    def dies(opened: Index, chunks: Sequence[Chunk]) -> None:
        store_sums(model, opened, storage, chunks[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        close(world, dies)
    assert fees_and_entries(world)[0] == 0
    counted: list[int] = []
    closed = close(world, lambda opened, chunks: counted.append(store_sums(model, opened, storage, chunks)))
    assert counted == [1]
    assert list(storage.list("answer_sums/")) == [], "sums of few answers do not outlive the period"
    by_hand = sum(100 + turn for turn in range(ANSWERS_PER_CHUNK + 3))
    assert closed.payload.adapters[0].fee_gwei == by_hand == fees_and_entries(world)[0]


def test_two_jobs_that_race_close_one_period(world: World) -> None:
    index(world)
    pay_for(world, payers(world, 1)[0], *QUESTIONS[0])
    settle(world)
    plain = plainly(world)

    def overtaken(opened: Index, chunks: Sequence[Chunk]) -> None:
        plain(opened, chunks)
        close(world, plain)
        plain(opened, chunks)

    with pytest.raises(Rejected) as refusal:
        close(world, overtaken)
    assert refusal.value.code == "period_taken"
    assert fees_and_entries(world) == (1000, 0, {})


def test_an_adapter_that_is_not_ready_is_carried_and_paid_once_later(world: World) -> None:
    late = publish_another(world, "toy/late", seed=5)
    index(world)
    (account,) = payers(world, 1)
    pay_for(world, account, *QUESTIONS[0], fee_gwei=10)
    pay_for(world, account, *QUESTIONS[1], fee_gwei=500, adapter_id=late.adapter_id)
    settle(world)
    first = close(world)
    assert first.payload.carried == ((late.adapter_id, 500),)
    assert [one.code for one in first.carried] == ["no_index"]
    assert [one.adapter_id for one in first.payload.adapters] == [world.adapter.adapter_id]
    index(world, late)
    pay_for(world, account, *QUESTIONS[2], fee_gwei=7, adapter_id=late.adapter_id)
    settle(world)
    second = close(world)
    assert second.payload.carried == ()
    assert [(one.adapter_id, one.fee_gwei) for one in second.payload.adapters] == [(late.adapter_id, 507)]
    assert second.payload.total_gwei == 517
    assert fees_and_entries(world) == (517, 0, {})
    assert (second.payload.first_batch, second.payload.last_batch) == (2, 2)


def blend_of(world: World, other: Adapter) -> Blend:
    """Three quarters of the world's adapter and a quarter of another."""
    parts = [BlendPart(world.adapter.adapter_id, 750_000), BlendPart(other.adapter_id, 250_000)]
    return Blend(tuple(sorted(parts, key=lambda part: part.adapter_id)))


def test_a_blends_fee_is_paid_by_weight_and_each_part_when_its_adapter_is_ready(world: World) -> None:
    other = publish_another(world, "toy/other", seed=5)
    index(world)
    (account,) = payers(world, 1)
    blended = pay_for(world, account, *QUESTIONS[0], fee_gwei=1002, blend=blend_of(world, other))
    pay_for(world, account, *QUESTIONS[1], fee_gwei=10)
    settle(world)
    first = close(world)
    assert [(one.adapter_id, one.fee_gwei) for one in first.payload.adapters] == [
        (world.adapter.adapter_id, 761 + (other.adapter_id > world.adapter.adapter_id))
    ]
    assert dict(first.payload.carried) == {other.adapter_id: 1012 - first.payload.adapters[0].fee_gwei}
    with writing(world.ground.engine) as session:
        session.execute(update(PeriodRow).values(state="final"))
    delay = world.ground.settings.chain.activation_delay_s
    assert forget(world.ground, NOW + delay) == 1, "the other adapter's part needs the blended answer"
    index(world, other)
    pay_for(world, account, *QUESTIONS[2], fee_gwei=3, adapter_id=other.adapter_id)
    settle(world)
    second = close(world)
    assert [(one.adapter_id, one.fee_gwei) for one in second.payload.adapters] == [
        (other.adapter_id, first.payload.carried[0][1] + 3)
    ]
    assert fees_and_entries(world) == (1015, 0, {})
    with writing(world.ground.engine) as session:
        session.execute(update(PeriodRow).values(state="final"))
    assert forget(world.ground, NOW + delay) == 2
    with reading(world.ground.engine) as session:
        assert session.get(TranscriptRow, blended.receipt_id.hex()) is None


def test_a_blended_answers_gradient_is_that_of_the_model_that_gave_it(world: World) -> None:
    """Recomputed here with the other adapter's update merged into the base's weights."""
    other = publish_another(world, "toy/other", seed=5)
    opened = stored_index(world.ground.storage, index(world))
    (account,) = payers(world, 1)
    pay_for(world, account, *QUESTIONS[0], fee_gwei=1000, blend=blend_of(world, other))
    settle(world)
    (adapter,) = close(world).payload.adapters
    model, bits = load_base(world.base_path, torch.float32), fraction_bits(750)
    shapes = linear_shapes(world.base_path)
    for name, factors in load_adapter(world.ground.storage, other, shapes).factors.items():
        model.get_submodule(name).weight += 0.25 * factors.b.float() @ factors.a.float()
    own = [
        {name: replace(factors, scale=0.75 * factors.scale) for name, factors in lora.items()}
        for lora in opened.loras
    ]
    example = Example(world.ask(QUESTIONS[0][0]), answer_tokens(world, QUESTIONS[0][1]))
    alone = direction(load_base(world.base_path, torch.float32), opened.loras, example)
    expected = direction(model, own, example)
    total = decode_sum(world.ground.storage.get(f"gradient_sums/{adapter.gradient_sum_sha256.hex()}"))
    found = total.double() / 750 / 2**bits
    assert torch.dist(found, expected.double()) < 1e-4 < torch.dist(found, alone.double())


def test_a_small_period_waits_unless_the_test_setting_says_so_on_the_statement(world: World) -> None:
    index(world)
    pay_for(world, payers(world, 1)[0], *QUESTIONS[0])
    settle(world)
    strict = World(
        type(world.ground)(
            world.ground.settings.model_copy(
                update={"period": world.ground.settings.period.model_copy(update={"allow_small": False})}
            ),
            world.ground.engine,
            world.ground.storage,
        ),
        world.manifest,
        world.adapter,
    )
    waiting = close(strict)
    assert [one.code for one in waiting.carried] == ["too_few"]
    assert "1 requests of 1 payers; privacy asks for 50 of 5" in waiting.carried[0].reason
    assert list(world.ground.storage.list("gradient_sums/")) == []
    pay_for(world, payers(world, 1)[0], *QUESTIONS[1])
    settle(world)
    small = close(world)
    assert small.payload.adapters[0].fee_gwei == 2000
    assert "test setting" in small.payload.adapters[0].method


def test_what_cost_nothing_pays_nobody_and_waits_for_nothing(world: World) -> None:
    pay_for(world, payers(world, 1)[0], *QUESTIONS[0], fee_gwei=0)
    settle(world)
    closed = close(world)
    assert (closed.payload.adapters, closed.payload.carried, closed.payload.total_gwei) == ((), (), 0)


def test_nobody_contributed_to_the_base_model(world: World) -> None:
    pay_for(world, payers(world, 1)[0], *QUESTIONS[0], fee_gwei=1_000_000, adapter_id=ZERO_ID)
    settle(world)
    (payouts,) = close(world).payouts
    assert {(line.contributor_id, line.role) for line in payouts.lines} == {
        (PLATFORM, Role.PLATFORM),
        (HOST, Role.HOST),
        (POOL, Role.OWNER),
        (POOL, Role.POOL),
    }
    assert sum(line.amount_gwei for line in payouts.lines if line.contributor_id == POOL) == 850_000


def test_only_an_unbroken_run_of_final_batches_is_closed(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    with pytest.raises(Rejected) as refusal:
        close(world)
    assert refusal.value.code == "nothing_to_close"
    for state in ("final", "mined", "final"):
        pay_for(world, account, *QUESTIONS[0])
        settle(world, state=state)
    closed = close(world)
    assert (closed.payload.first_batch, closed.payload.last_batch) == (1, 1)
    with pytest.raises(Rejected, match="waits for batch 2"):
        close(world)


def test_a_receipt_without_its_transcript_holds_its_adapter_back(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    pay_for(world, account, *QUESTIONS[0])
    pay_for(world, account, *QUESTIONS[1], keeps_transcript=False)
    settle(world)
    (carried,) = close(world).carried
    assert (carried.code, carried.reason) == ("no_transcript", "1 of 2 transcripts are missing")


def test_an_empty_answer_is_paid_for_and_moves_no_credit(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    pay_for(world, account, *QUESTIONS[0], fee_gwei=1000)
    settle(world)
    alone = close(world).payload.adapters[0]
    pay_for(world, account, *QUESTIONS[0], fee_gwei=1000)
    pay_for(world, account, "Nothing?", "", fee_gwei=24)
    settle(world)
    together = close(world).payload.adapters[0]
    assert together.fee_gwei == 1024
    assert together.credits == alone.credits and together.controls == alone.controls


def test_rewards_are_cumulative_and_order_of_arrival_moves_nothing(world: World) -> None:
    index(world)
    (account,) = payers(world, 1)
    totals: list[int] = []
    for _ in range(2):
        pay_for(world, account, *QUESTIONS[0], fee_gwei=5000)
        settle(world)
        closed = close(world)
        totals.append(closed.payload.total_gwei)
        assert decode_period(encode_period(closed.payload)) == closed.payload
    assert totals == [5000, 10_000]


def test_a_changed_index_pays_nobody(world: World) -> None:
    index_id = index(world)
    pay_for(world, payers(world, 1)[0], *QUESTIONS[0])
    settle(world)
    path = world.ground.storage.fetch(f"indexes/{index_id.hex()}/features.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    world.ground.storage.put(f"indexes/{index_id.hex()}/features.npy", bytes(data))
    with pytest.raises(Corrupted, match=index_id.hex()):
        close(world)
    assert fees_and_entries(world)[0] == 0


def test_transcripts_are_forgotten_only_when_paid_final_and_beyond_challenge(world: World) -> None:
    late = publish_another(world, "toy/late", seed=5)
    index(world)
    (account,) = payers(world, 1)
    paid = pay_for(world, account, *QUESTIONS[0])
    carried = pay_for(world, account, *QUESTIONS[1], adapter_id=late.adapter_id)
    settle(world)
    close(world)
    delay = world.ground.settings.chain.activation_delay_s
    assert forget(world.ground, NOW + delay) == 0, "not final yet"
    with writing(world.ground.engine) as session:
        session.execute(update(PeriodRow).values(state="final"))
    assert forget(world.ground, NOW + delay - 1) == 0, "may still be challenged"
    assert forget(world.ground, NOW + delay) == 1
    with reading(world.ground.engine) as session:
        assert session.get(TranscriptRow, paid.receipt_id.hex()) is None
        assert session.get(TranscriptRow, carried.receipt_id.hex()) is not None


def test_chunk_names_follow_from_everything_that_decides_a_sum() -> None:
    from pipelines.answer_sums import Answer, chunks_of

    answers = [Answer(sha256(bytes([n])), Example((1,), (2,)), 5) for n in range(40)]
    keys = [chunk.key for chunk in chunks_of(b"\1" * 32, 20, answers)]
    assert keys == [chunk.key for chunk in chunks_of(b"\1" * 32, 20, answers[::-1])]
    assert len(keys) == 3 and len(set(keys)) == 3
    dearer = [Answer(one.receipt_id, one.example, 6) for one in answers]
    for other in (
        chunks_of(b"\2" * 32, 20, answers),
        chunks_of(b"\1" * 32, 21, answers),
        chunks_of(b"\1" * 32, 20, dearer),
    ):
        assert not {chunk.key for chunk in other} & set(keys)


def trained_and_asked(
    world: World, fee_gwei: int = 100_000, of_everybody: bool = False, **how: object
) -> Adapter:
    """An adapter that can be replayed, indexed, with paid answers in a final batch: about the two records of
    one contributor, who then stands above the controls, or about everything, and nobody does."""
    adapter = publish_trained(world, "toy/trained", **how)
    index(world, adapter)
    (account,) = payers(world, 1)
    records = [entry.record for entry in world.manifest.entries]
    for record in records:
        if of_everybody or record.contributor_id == records[0].contributor_id:
            question = f"What is {record.subject}?"
            pay_for(world, account, question, record.answer, fee_gwei=fee_gwei, adapter_id=adapter.adapter_id)
    settle(world)
    return adapter


def test_a_training_that_can_be_replayed_is_paid_by_its_replay(world: World) -> None:
    """The credits are those of the published sum, replayed; the statement says what it took and why."""
    trained_and_asked(world)
    closed = close(world)
    (adapter,) = closed.payload.adapters
    assert adapter.method.startswith("metagradient/1 trajectories/")
    assert "states=bitwise seconds=" in adapter.method
    assert "; fees of 200000 gwei, a replay is worth " in adapter.method
    (done,) = world.ground.storage.list("replays/")
    kept = json.loads(world.ground.storage.get(done))
    groups = {e.group.group_id.hex(): e.group.contributor_id for e in world.manifest.entries}
    assert {c.group_id.hex(): c.value for c in adapter.credits} == kept["trained"]
    assert {c.group_id.hex(): c.contributor_id for c in adapter.credits} == groups
    assert list(adapter.controls) == sorted(kept["controls"].values())
    assert len(adapter.controls) == len(world.manifest.controls) > 0
    assert fees_and_entries(world) == (200_000, 0, {})
    assert decode_period(encode_period(closed.payload)) == closed.payload


def test_a_close_killed_in_its_replay_gives_the_period_it_would_have_given(world: World) -> None:
    trained_and_asked(world)
    with pytest.raises(KeyboardInterrupt):
        close_period(world.ground, SPEC, plainly(world), in_this_process(world, calls=9), NOW)
    assert fees_and_entries(world)[0] == 0
    (position,) = world.ground.storage.list("replays/")
    assert position.endswith(".safetensors")
    closed = close(world)
    (done,) = world.ground.storage.list("replays/")
    world.ground.storage.delete(done)
    with writing(world.ground.engine) as session:
        session.execute(delete(PayoutRow))
        session.execute(delete(PeriodRow))
    again = close(world)  # all in one go; posting other entries would be refused
    assert again.payouts == closed.payouts
    assert again.payload.adapters[0].credits == closed.payload.adapters[0].credits


def test_a_training_that_does_not_come_out_again_is_paid_by_the_cheap_method_and_it_says_so(
    world: World,
) -> None:
    adapter = trained_and_asked(world)
    with reading(world.ground.engine) as session:
        trajectory = session.get_one(AdapterRow, adapter.adapter_id.hex()).trajectory
    key = f"{trajectory}/step_4.safetensors"
    tensors = load(world.ground.storage.get(key))
    world.ground.storage.put(key, save({name: 1.01 * tensor for name, tensor in tensors.items()}))
    (closed,) = close(world).payload.adapters
    assert closed.method.startswith("damped-fisher/1 ")
    assert closed.method.endswith("; no replay: replay_deviates; " + SMALL.removeprefix("; "))
    total = decode_sum(world.ground.storage.get(f"gradient_sums/{closed.gradient_sum_sha256.hex()}"))
    with reading(world.ground.engine) as session:
        index_id = session.get_one(AdapterRow, adapter.adapter_id.hex()).index_id
    opened = stored_index(world.ground.storage, bytes.fromhex(str(index_id)))
    assert (closed.credits, closed.controls) == credits_of(opened, [world.manifest], total)


def test_a_replay_in_which_nobody_stands_above_the_controls_pays_nobody(world: World) -> None:
    trained_and_asked(world, of_everybody=True)
    (closed,) = close(world).payload.adapters
    assert closed.method.startswith("damped-fisher/1 ")
    assert "; no replay: nothing_above_noise in " in closed.method


def test_fees_not_worth_a_replay_wait_and_are_paid_by_the_cheap_method_in_the_end(world: World) -> None:
    adapter = trained_and_asked(world, fee_gwei=10, seconds=60.0)
    waiting = close(world)
    assert waiting.payload.carried == ((adapter.adapter_id, 20),)
    assert [one.code for one in waiting.carried] == ["not_worth_a_replay"]
    pay_for(world, payers(world, 1)[0], *QUESTIONS[0], fee_gwei=0)
    settle(world)
    (closed,) = close(world, now=NOW + world.ground.settings.period.max_age_s + 3600).payload.adapters
    assert closed.fee_gwei == 20
    assert closed.method.startswith("damped-fisher/1 ") and "; at maximum age " in closed.method
