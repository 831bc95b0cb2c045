"""What payers and accounts have left: two conditional updates to take, two to give back.

``spent + reserved`` never passes ``min(deposited - withdrawing, ceiling)`` of a payer nor the budget of an
account, whoever races, because the database compares and changes in one statement. Payers come before
accounts, so that racing requests cannot deadlock."""

from sqlalchemy import BigInteger, Connection, RowMapping, bindparam, select, update

from attribution.errors import Rejected
from cluster.tables import AccountRow, PayerRow, table_of

CEILING_MARGIN_S = 3600
"""A receipt is captured on chain a batch later, when its ceiling must still hold."""
MAX_GWEI = 2**62

# Statements are built once, because building costs several times what running does.
_PAYERS, _ACCOUNTS = table_of(PayerRow), table_of(AccountRow)
_MAX, _FEE = bindparam("the_max", type_=BigInteger), bindparam("the_fee", type_=BigInteger)
_PROMISED = _PAYERS.c.spent_gwei + _PAYERS.c.reserved_gwei + _MAX
_TAKE_FROM_PAYER = (
    update(_PAYERS)
    .where(
        _PAYERS.c.payer == bindparam("the_payer"),
        _PAYERS.c.deposited_gwei - _PAYERS.c.withdrawing_gwei >= _PROMISED,
        _PAYERS.c.ceiling_gwei >= _PROMISED,
        _PAYERS.c.ceiling_expiry >= bindparam("least_expiry"),
    )
    .values(reserved_gwei=_PAYERS.c.reserved_gwei + _MAX)
    .returning(_PAYERS.c.payer)
)
_TAKE_FROM_ACCOUNT = (
    update(_ACCOUNTS)
    .where(
        _ACCOUNTS.c.account_id == bindparam("the_account"),
        _ACCOUNTS.c.spent_gwei + _ACCOUNTS.c.reserved_gwei + _MAX <= _ACCOUNTS.c.budget_gwei,
    )
    .values(reserved_gwei=_ACCOUNTS.c.reserved_gwei + _MAX)
    .returning(_ACCOUNTS.c.account_id)
)
_GIVE_TO_PAYER = (
    update(_PAYERS)
    .where(_PAYERS.c.payer == bindparam("the_payer"))
    .values(
        reserved_gwei=_PAYERS.c.reserved_gwei - _MAX,
        spent_gwei=_PAYERS.c.spent_gwei + _FEE,
        next_seq=_PAYERS.c.next_seq + bindparam("numbers"),
    )
    .returning(_PAYERS.c.next_seq)
)
_GIVE_TO_ACCOUNT = (
    update(_ACCOUNTS)
    .where(_ACCOUNTS.c.account_id == bindparam("the_account"))
    .values(reserved_gwei=_ACCOUNTS.c.reserved_gwei - _MAX, spent_gwei=_ACCOUNTS.c.spent_gwei + _FEE)
)


def take(connection: Connection, account_id: str, payer: str, max_gwei: int, now: int) -> None:
    """The two conditional updates; a refusal may leave the first done, so the caller rolls back.

    Raises:
        Rejected: 402 ``insufficient_credit``, with what is left.
    """
    if max_gwei >= MAX_GWEI:
        raise _no_credit(f"no payer has {max_gwei} gwei")
    amount = {"the_max": max_gwei, "least_expiry": now + CEILING_MARGIN_S}
    if connection.execute(_TAKE_FROM_PAYER, {"the_payer": payer, **amount}).first() is None:
        row = connection.execute(select(_PAYERS).where(_PAYERS.c.payer == payer)).mappings().one()
        raise _no_credit(f"payer 0x{payer}: {_room(row, now)}, the request may cost {max_gwei} gwei")
    which = {"the_account": account_id, "the_max": max_gwei}
    if connection.execute(_TAKE_FROM_ACCOUNT, which).first() is None:
        budget, spent, reserved = connection.execute(
            select(_ACCOUNTS.c.budget_gwei, _ACCOUNTS.c.spent_gwei, _ACCOUNTS.c.reserved_gwei).where(
                _ACCOUNTS.c.account_id == account_id
            )
        ).one()
        left = budget - spent - reserved
        raise _no_credit(f"account {account_id}: {left} gwei left, the request may cost {max_gwei} gwei")


def give_back(
    connection: Connection, account_id: str, payer: str, max_gwei: int, fee_gwei: int | None
) -> int:
    """Undo a reservation, keeping the fee if there is one; returns the payer's sequence number for it."""
    fee, numbers = (0, 0) if fee_gwei is None else (fee_gwei, 1)
    amounts = {"the_max": max_gwei, "the_fee": fee}
    to_payer = {"the_payer": payer, "numbers": numbers, **amounts}
    next_seq: int = connection.execute(_GIVE_TO_PAYER, to_payer).scalar_one()
    connection.execute(_GIVE_TO_ACCOUNT, {"the_account": account_id, **amounts})
    return next_seq - 1


def _room(payer: RowMapping, now: int) -> str:
    if payer["ceiling_expiry"] < now + CEILING_MARGIN_S:
        return f"the ceiling ends at {payer['ceiling_expiry']}, too soon at {now}"
    limit = min(payer["deposited_gwei"] - payer["withdrawing_gwei"], payer["ceiling_gwei"])
    return f"{limit - payer['spent_gwei'] - payer['reserved_gwei']} gwei left of {limit}"


def _no_credit(message: str) -> Rejected:
    return Rejected("insufficient_credit", message, field="max_tokens", http_status=402)
