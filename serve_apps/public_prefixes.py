"""Published prefixes as a gateway knows them: how much of a prompt is public."""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from attribution.types import ZERO_ID
from cluster.prefixes import load_prefix, num_common
from cluster.storage import Storage

MAX_KNOWN = 1_000


class PublicPrefixes:
    """Those read last; what an id stands for never changes. Any thread may ask."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._lock = Lock()

    def num_public(self, storage: Storage, prefix_id: bytes, prompt_ids: Sequence[int]) -> int:
        """How many tokens of a prompt are those of the prefix that its adapter was published with, if any.

        Raises:
            Corrupted: ``prefix_hash``.
        """
        if prefix_id == ZERO_ID:
            return 0
        with self._lock:
            known = self._known.get(prefix_id)
        if known is None:
            known = load_prefix(storage, prefix_id)
        with self._lock:
            self._known[prefix_id] = known
            self._known.move_to_end(prefix_id)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return num_common(known, prompt_ids)
