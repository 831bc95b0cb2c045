"""What payers may be served against: the escrow's deposits and withdrawals, from the chain into rows.

Deposits count once they are final; what a payer asks back stops counting at once."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from attribution.payload import WEI_PER_GWEI
from chain.events import Deposited, WithdrawalRequested, Withdrawn
from chain.rollup import Rollup, Tag
from cluster.accounts import record_deposit, record_withdrawing


@dataclass(frozen=True, slots=True)
class Seen:
    """What the escrow said since the last look, up to a final block and beyond. Recording it twice changes
    nothing."""

    moved: tuple[Deposited | Withdrawn, ...]  # final
    withdrawing_gwei: Mapping[bytes, int]  # by payer, as of the newest block
    final_block: int

    def record(self, session: Session, now: int) -> list[str]:
        said = []
        for event in self.moved:
            gwei = event.amount_wei // WEI_PER_GWEI * (1 if isinstance(event, Deposited) else -1)
            at = event.at
            if record_deposit(session, event.payer, gwei, at.tx_hash, at.log_index, at.block, now):
                said.append(f"payer {event.payer.hex()} moved {gwei:+} gwei in block {at.block}")
        for payer, gwei in self.withdrawing_gwei.items():
            record_withdrawing(session, payer, gwei)
        return said


class DepositWatch:
    """Reads from where the last final block ended; a new process reads from the beginning."""

    def __init__(self, rollup: Rollup, final_tag: Tag) -> None:
        self._rollup = rollup
        self._final_tag = final_tag
        self._next_block = rollup.addresses.block

    def look(self) -> Seen | None:
        """None if nothing happened. What is not final yet is seen again the next time."""
        final_block = self._rollup.block_number(self._final_tag)
        if final_block < self._rollup.addresses.block:
            return None
        events = list(self._rollup.events(self._next_block))
        moves = [event for event in events if isinstance(event, Deposited | Withdrawn)]
        wishes = [event for event in events if isinstance(event, WithdrawalRequested)]
        if not moves and not wishes:
            self._next_block = max(self._next_block, final_block + 1)
            return None
        payers = sorted({event.payer for event in (*moves, *wishes)})
        return Seen(
            tuple(event for event in moves if event.at.block <= final_block),
            {payer: self._withdrawing_gwei(payer, final_block) for payer in payers},
            final_block,
        )

    def done(self, seen: Seen) -> None:
        self._next_block = max(self._next_block, seen.final_block + 1)

    def _withdrawing_gwei(self, payer: bytes, final_block: int) -> int:
        """Also what has left and is not final: ``record_deposit`` will take it off later."""
        final, newest = self._rollup.payer_state(payer, final_block), self._rollup.payer_state(payer)
        left_wei = max(0, final.deposited_wei - newest.deposited_wei)
        return (newest.withdrawing_wei + left_wei) // WEI_PER_GWEI
