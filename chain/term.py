"""The settler's hold on its lease: who leads, and that nobody else writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from attribution.errors import Rejected, Unavailable
from cluster import leases
from cluster.database import writing

LEASE = "settler"


class Term:
    """Taken and renewed by ``hold``. ``holder`` names the process; two with one name fence each other too."""

    def __init__(self, rows: Engine, holder: str, lease_s: int, clock: Callable[[], float]) -> None:
        self._rows = rows
        self._holder = holder
        self._lease_s = lease_s
        self._clock = clock
        self._lease: leases.Lease | None = None

    @property
    def is_held(self) -> bool:
        return self._lease is not None

    @property
    def number(self) -> int:
        """What every write carries; of a later holder it is greater."""
        assert self._lease is not None
        return self._lease.term

    @property
    def now(self) -> int:
        return int(self._clock())

    def hold(self) -> list[str]:
        """Renew, or take it if it is free. Says what changed."""
        try:
            with writing(self._rows) as session:
                if self._lease is not None:
                    self._lease = leases.renew(session, self._lease, self._lease_s, self.now)
                    return []
                lease = leases.acquire(session, LEASE, self._holder, self._lease_s, self.now)
        except (Unavailable, Rejected) as refusal:
            self._lease = None
            return [f"does not lead: {refusal.code}: {refusal.message}"]
        self._lease = lease
        return [f"leads with term {lease.term}"]

    def drop(self) -> None:
        """Another has it."""
        self._lease = None

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that commits only while this term is the current one.

        Raises:
            Rejected: ``fenced``.
        """
        with writing(self._rows) as session:
            leases.check(session, LEASE, self.number)
            yield session
