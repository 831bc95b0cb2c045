"""Text of a growing answer: shows what is certain, holds back half characters and possible stop strings."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]
REPLACEMENT = "\ufffd"  # what a decoder makes of the first bytes of a longer character


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown now. After ``is_stopped`` there is no more: a stop string began where it
    ends.

    ``num_begun`` tokens, the next that had not begun to show, begin in this piece; a token that adds no text
    waits for one that does."""

    text: str
    is_stopped: bool = False
    num_begun: int = 0


class TextStream:
    """Decodes incrementally: only the tokens since the last certain character are decoded again.

    The text of all pieces is the decoded answer up to, and without, the first stop string."""

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text has left the decoder …
        self._context = 0  # … and where the window begins that decodes the next: spaces depend on it
        self._held = ""
        self._begins: deque[int] = deque()  # places of the tokens that have not been shown
        self._num_decoded = 0
        self._num_released = 0

    @property
    def offset(self) -> int:
        """Where in the answer's text the next token begins."""
        return self._num_decoded

    def push(self, token_id: int) -> Piece:
        self._ids.append(token_id)
        self._begins.append(self._num_decoded)
        return self._release(self._new_text(is_last=False), is_last=False)

    def finish(self) -> Piece:
        """What was held back, at the end of the answer."""
        return self._release(self._new_text(is_last=True), is_last=True)

    def _new_text(self, is_last: bool) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        after = self._decode(self._ids[self._context :])
        if not is_last and after.endswith(REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        self._num_decoded += len(after) - len(before)
        return after[len(before) :]

    def _release(self, text: str, is_last: bool) -> Piece:
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            return self._piece(min(found), is_stopped=True)
        return self._piece(len(self._held) - (0 if is_last else self._open_suffix()))

    def _piece(self, size: int, is_stopped: bool = False) -> Piece:
        text, self._held = self._held[:size], self._held[size:]
        self._num_released += size
        num_begun = 0
        while self._begins and self._begins[0] < self._num_released:
            self._begins.popleft()
            num_begun += 1
        return Piece(text, is_stopped, num_begun)

    def _open_suffix(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
