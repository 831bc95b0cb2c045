"""The three refusals, named for what the caller does next.

``Rejected``: tell the sender, do not retry. ``Unavailable``: retry later. ``Corrupted``: stop, a person must
look. Bugs are ``assert``. Libraries' exceptions are translated in the module that imports the library."""


class Refusal(Exception):
    """What all three share: a stable ``code``, the ``field`` it is about, and a sentence with both values."""

    def __init__(self, code: str, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.message, self.field)


class Rejected(Refusal):
    """The sender is at fault. ``http_status`` is 4xx; 402 where credit is missing."""

    def __init__(self, code: str, message: str, *, field: str = "", http_status: int = 400) -> None:
        super().__init__(code, message, field=field)
        self.http_status = http_status

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_rejected, (self.code, self.message, self.field, self.http_status)


class Unavailable(Refusal):
    """Nobody is at fault and nothing is lost: the same call may succeed after ``retry_after_s``."""

    def __init__(self, code: str, message: str, *, field: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(code, message, field=field)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_unavailable, (self.code, self.message, self.field, self.retry_after_s)


class Corrupted(Refusal):
    """Two things that must agree do not. Nothing is repaired silently."""


# Refusals cross process borders (Ray pickles them), which plain keyword-only constructors do not survive.
def _rebuild(kind: type[Refusal], code: str, message: str, field: str) -> Refusal:
    return kind(code, message, field=field)


def _rebuild_rejected(code: str, message: str, field: str, http_status: int) -> Rejected:
    return Rejected(code, message, field=field, http_status=http_status)


def _rebuild_unavailable(code: str, message: str, field: str, retry_after_s: float) -> Unavailable:
    return Unavailable(code, message, field=field, retry_after_s=retry_after_s)
