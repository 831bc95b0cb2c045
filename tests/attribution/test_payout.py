"""The payout rule: sums are exact, order moves nothing, and dishonesty does not pay."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import Corrupted
from attribution.payout import (
    AdapterClose,
    Beneficiaries,
    Payout,
    Payouts,
    Role,
    Split,
    largest_remainder,
    noise_floor,
    pay,
    share_out,
)
from attribution.types import Credit, Share
from tests.attribution import values

ANN, BOB, EVE = (bytes([i]) * 32 for i in (1, 2, 3))
POOL, HOST, PLATFORM, OWNER = (bytes([i]) * 32 for i in (9, 8, 7, 6))
SPLIT = Split(50_000, 150_000, 100_000, 50_000, 600_000, 50_000)
NOBODY = bytes(32)


def credit(owner: bytes, value: int, n: int = 0) -> Credit:
    return Credit(owner[:31] + bytes([n]), owner, value)


@given(st.lists(st.integers(0, 2**70), min_size=1, max_size=20).filter(any), st.integers(0, 2**62))
def test_largest_remainder_is_exact_and_within_one(weights: list[int], amount: int) -> None:
    parts = largest_remainder(weights, amount)
    assert sum(parts) == amount
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part * sum(weights) - amount * weight) < sum(weights)


@given(values.closes(), values.splits(), values.beneficiaries)
def test_lines_sum_to_the_fee(close: AdapterClose, split: Split, who: Beneficiaries) -> None:
    payouts = pay(close, split, who)
    assert sum(line.amount_gwei for line in payouts.lines) == close.fee_gwei
    assert all(line.amount_gwei > 0 for line in payouts.lines)


@given(st.lists(values.credits, max_size=10), st.integers(0, 2**60), st.randoms(use_true_random=False))
def test_order_of_credits_moves_no_gwei(credits: list[Credit], amount: int, rng: random.Random) -> None:
    shuffled = rng.sample(credits, len(credits))
    assert share_out(shuffled, (), amount) == share_out(credits, (), amount)


def test_net_comes_before_clipping() -> None:
    """Junk that helps one answer by 5 and hurts others by 6 earns nothing, though one credit is positive."""
    shares, pool = share_out([credit(ANN, 10), credit(EVE, 5), credit(EVE, -6, 1)], (), 1_000)
    assert shares == (Share(ANN, 1_000),)
    assert pool == 0


def test_what_is_not_above_the_noise_goes_to_the_pool() -> None:
    shares, pool = share_out([credit(ANN, 100), credit(BOB, 9)], [-10, 3, 10], 1_000)
    assert shares == (Share(ANN, 826),)  # 90 of 109; Bob's 9 and Ann's first 10 are noise
    assert pool == 174


def test_without_any_credit_everything_goes_to_the_pool() -> None:
    assert share_out([], [], 77) == ((), 77)
    assert share_out([credit(ANN, -4)], [], 77) == ((), 77)


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=9), st.integers(0, 1000), st.integers(1, 8))
def test_splitting_gains_less_than_the_own_noise_floor(owned: list[int], floor: int, cut: int) -> None:
    """By setting its weak records apart a contributor wins back what the floor took from it, never more."""
    cut = min(cut, len(owned) - 1)
    two = [credit(BOB if i < cut else EVE, v, i) for i, v in enumerate(owned)]
    reference = credit(ANN, 2**60)  # dwarfs the rest, so gwei are proportional to credit above the floor
    shares, _ = share_out([reference, *two], [floor], 2**60)
    sybil = sum(share.amount_gwei for share in shares if share.contributor_id != ANN)
    assert sybil <= sum(owned) + 2


def test_lines_nobody_stands_behind_go_to_contributors() -> None:
    close = AdapterClose(bytes(32), OWNER, 1_000_000, "test", bytes(32), (credit(ANN, 1),), ())
    payouts = pay(close, SPLIT, Beneficiaries(PLATFORM, HOST, NOBODY, NOBODY, POOL))
    assert Payout(ANN, Role.CONTRIBUTOR, 700_000) in payouts.lines
    staked = pay(close, SPLIT, Beneficiaries(PLATFORM, HOST, EVE, NOBODY, POOL))
    assert Payout(EVE, Role.STAKERS, 50_000) in staked.lines
    assert Payout(ANN, Role.CONTRIBUTOR, 650_000) in staked.lines


def test_noise_floor_is_the_nearest_rank_percentile() -> None:
    assert noise_floor([]) == 0
    assert noise_floor([-5]) == 5
    assert noise_floor(range(1, 101)) == 99
    assert noise_floor(range(1, 41)) == 40


def test_a_split_that_is_not_whole_is_refused() -> None:
    with pytest.raises(Corrupted, match="999999"):
        Split(50_000, 150_000, 100_000, 50_000, 600_000, 49_999)


def test_payouts_that_do_not_sum_are_refused() -> None:
    with pytest.raises(Corrupted, match="pays 5 gwei of 6"):
        Payouts(bytes(32), 6, (Payout(ANN, Role.CONTRIBUTOR, 5),))
