"""One thread that writes for many: what arrives while a transaction commits goes into the next one together.

Sixty-four answers that begin or end at once then cost a few commits and no waiting for a lock, instead of
sixty-four of both. Each work keeps its own all or nothing, by a savepoint: one that is refused leaves the
others of its group as they are."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Engine, exc
from sqlalchemy.orm import Session

from attribution.errors import Unavailable
from cluster.database import writing

T = TypeVar("T")
MAX_GROUP = 64  # works of one transaction: what one that is slow can delay


@dataclass(frozen=True, slots=True)
class _Work:
    change: Callable[[Session], Any]
    outcome: Future[Any]


class GroupCommit:
    """Any thread may submit."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._waiting: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="group-commit", daemon=True)
        self._thread.start()

    def submit(self, change: Callable[[Session], T]) -> Future[T]:
        """The future is done when ``change`` is committed, or has its error and left no trace. ``change``
        meets rows as they are in the database: nothing is remembered from one work to the next.

        Raises (in the future): what ``change`` raises, and what ``writing`` does.
        """
        assert self._thread.is_alive(), "closed"
        outcome: Future[T] = Future()
        self._waiting.put(_Work(change, outcome))
        return outcome

    def close(self) -> None:
        """Return when everything submitted so far is done."""
        self._waiting.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (first := self._waiting.get()) is not None:
            group, is_last = [first], False
            while len(group) < MAX_GROUP and not self._waiting.empty():
                work = self._waiting.get()
                if work is None:
                    is_last = True
                    break
                group.append(work)
            self._write([work for work in group if work.outcome.set_running_or_notify_cancel()])
            if is_last:
                return

    def _write(self, group: Sequence[_Work]) -> None:
        results: list[tuple[_Work, Any]] = []
        try:
            with writing(self._database) as session:
                for work in group:
                    try:
                        with session.begin_nested():
                            result = work.change(session)
                    except (exc.OperationalError, exc.InterfaceError, Unavailable):
                        raise  # of the database, and so of the whole group
                    except Exception as error:  # noqa: BLE001  (whatever it was, it is told to who asked)
                        work.outcome.set_exception(error)
                    else:
                        results.append((work, result))
                    session.expunge_all()
        except BaseException as error:  # noqa: BLE001  (nothing is committed, and everybody must hear of it)
            for work in group:
                if not work.outcome.done():
                    work.outcome.set_exception(error)
        else:
            for work, result in results:
                work.outcome.set_result(result)
