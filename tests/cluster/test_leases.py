"""Fencing: terms only grow, one holder at a time, and a holder that slept too long can write nothing."""

import threading
from contextlib import suppress

import pytest
from sqlalchemy import Engine

from attribution.errors import Rejected, Unavailable
from cluster.database import reading, writing
from cluster.leases import Lease, acquire, check, lease_of, release, renew
from tests.cluster.money import NOW


def take(engine: Engine, holder: str, now: int = NOW) -> Lease:
    with writing(engine) as session:
        return acquire(session, "settler", holder, 10, now)


def test_a_second_holder_waits_until_the_lease_ends(engine: Engine) -> None:
    first = take(engine, "a")
    with pytest.raises(Unavailable) as refusal:
        take(engine, "b", NOW + 9)
    assert (refusal.value.code, refusal.value.retry_after_s) == ("lease_held", 1.0)
    assert take(engine, "b", NOW + 10).term == first.term + 1


def test_an_old_term_is_fenced_out_whatever_its_clock_says(engine: Engine) -> None:
    old = take(engine, "a")
    new = take(engine, "b", NOW + 10)
    with writing(engine) as session:
        check(session, "settler", new.term)
        for act in (lambda: check(session, "settler", old.term), lambda: renew(session, old, 10, NOW)):
            with pytest.raises(Rejected) as refusal:
                act()
            assert (refusal.value.code, refusal.value.http_status) == ("fenced", 409)
        release(session, old)  # harmless: it is not the holder any more
        assert lease_of(session, "settler") == new


def test_the_same_holder_taking_again_fences_itself(engine: Engine) -> None:
    """A restarted actor with its old name must not share a term with its own ghost."""
    ghost = take(engine, "a")
    assert take(engine, "a").term == ghost.term + 1
    with writing(engine) as session, pytest.raises(Rejected):
        check(session, "settler", ghost.term)


def test_a_renewed_lease_holds_and_a_released_one_is_free_at_once(engine: Engine) -> None:
    lease = take(engine, "a")
    with writing(engine) as session:
        lease = renew(session, lease, 10, NOW + 9)
    with pytest.raises(Unavailable):
        take(engine, "b", NOW + 18)
    with writing(engine) as session:
        renew(session, lease, 10, NOW + 30)  # it had ended, but nobody came
        release(session, lease)
    assert take(engine, "b", NOW + 31).term == lease.term + 1


def test_a_name_nobody_held_has_term_zero(engine: Engine) -> None:
    with reading(engine) as session:
        assert lease_of(session, "nobody") == Lease("nobody", "", 0, 0)
    with writing(engine) as session, pytest.raises(Rejected):
        check(session, "nobody", 1)


def test_nobody_takes_over_within_a_checked_transaction(engine: Engine) -> None:
    """The check holds the row: the next holder's term begins after this transaction's writes."""
    lease = take(engine, "a")
    order: list[str] = []
    taken = threading.Thread(target=lambda: (take(engine, "b", NOW + 99), order.append("taken over")))
    with writing(engine) as session:
        check(session, "settler", lease.term)
        taken.start()
        taken.join(0.5)
        order.append("still writing")
    taken.join()
    assert order == ["still writing", "taken over"]


def test_of_many_that_start_together_one_holds(engine: Engine) -> None:
    held: list[Lease] = []

    def race(holder: str) -> None:
        with suppress(Unavailable):
            held.append(take(engine, holder))

    racers = [threading.Thread(target=race, args=(str(n),)) for n in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [lease.term for lease in held] == [1]
