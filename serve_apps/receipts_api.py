"""``/v1/receipts`` and ``/v1/usage``: what an answer was, cost and used, for whoever paid for it."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from attribution.errors import Rejected
from attribution.types import Receipt
from cluster import accounts, charges, receipts
from cluster.receipts import StoredReceipt
from serve_apps import catalog
from serve_apps.openai_schema import Body
from serve_apps.services import Caller, Services, Shared

router = APIRouter()


class Feedback(Body):
    feedback: Literal[-1, 0, 1]


@router.get("/v1/receipts/{receipt_id}")
async def receipt(receipt_id: str, shared: Shared, caller: Caller) -> dict[str, Any]:
    wanted = _id32(receipt_id)

    def query(session: Session) -> dict[str, Any]:
        stored = receipts.receipt_of(session, wanted)
        if stored.account_id != caller.account_id:  # to others it does not exist
            raise Rejected(
                "receipt_not_found", f"no receipt {receipt_id}", field="receipt_id", http_status=404
            )
        return _receipt(session, shared, stored)

    return await shared.read(query)


@router.post("/v1/receipts/{receipt_id}/feedback")
async def feedback(receipt_id: str, body: Feedback, shared: Shared, caller: Caller) -> dict[str, Any]:
    wanted = _id32(receipt_id)
    await shared.write(
        lambda session: receipts.set_feedback(session, wanted, caller.account_id, body.feedback)
    )
    return {"id": receipt_id, "object": "receipt.feedback", "feedback": body.feedback}


@router.get("/v1/receipts")
async def listed(
    shared: Shared,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before_seq: Annotated[int | None, Query(ge=1)] = None,
) -> dict[str, Any]:
    """Newest first; ``before_seq`` continues a listing."""

    def query(session: Session) -> list[dict[str, Any]]:
        found = receipts.receipts_of_account(session, caller.account_id, limit, before_seq)
        return [_summary(session, shared, stored) for stored in found]

    return {"object": "list", "data": await shared.read(query)}


@router.get("/v1/usage")
async def usage(shared: Shared, caller: Caller) -> dict[str, Any]:
    """What the account may spend, has spent, and on which models."""

    def query(session: Session) -> dict[str, Any]:
        account = accounts.account_of(session, caller.account_id)
        return {
            "object": "usage",
            "account_id": account.account_id,
            "payer": f"0x{account.payer.hex()}",
            "budget_gwei": account.budget_gwei,
            "spent_gwei": account.spent_gwei,
            "reserved_gwei": account.reserved_gwei,
            "by_model": [
                {
                    "model": catalog.ref_of(session, shared.base.base_id, line.adapter_id),
                    "num_requests": line.num_receipts,
                    "fee_gwei": line.fee_gwei,
                }
                for line in receipts.usage_of(session, account.account_id)
            ],
        }

    return await shared.read(query)


def _receipt(session: Session, shared: Services, stored: StoredReceipt) -> dict[str, Any]:
    """All that its payer may know, with the opening of the commitment while it is kept."""
    this = stored.receipt
    kept = json.loads(charges.charge_of(session, this.request_id).response_json)
    transcripts = receipts.transcripts_of(session, [this.receipt_id])
    return {
        **_summary(session, shared, stored),
        "canonical": this.canonical().hex(),
        "commitment": {
            "value": this.commitment.hex(),
            "salt": transcripts[0].salt.hex() if transcripts else None,
            "prompt_sha256": kept["prompt_sha256"],
            "response_sha256": kept["answer_sha256"],
            "index_id": kept["index_id"],
        },
        "finish_reasons": kept["finish_reasons"],
        "evidence": {
            "state": stored.evidence_state,
            "result": json.loads(stored.evidence_json) if stored.evidence_json else None,
        },
        "feedback": stored.feedback,
    }


def _summary(session: Session, shared: Services, stored: StoredReceipt) -> dict[str, Any]:
    this: Receipt = stored.receipt
    return {
        "id": this.receipt_id.hex(),
        "object": "receipt",
        "created": stored.created_at,
        "request_id": this.request_id.hex(),
        "payer": f"0x{this.payer.hex()}",
        "payer_seq": this.payer_seq,
        "model": catalog.ref_of(session, this.base_id, this.adapter_id),
        "base_id": this.base_id.hex(),
        "adapter_id": this.adapter_id.hex(),
        "usage": {
            "prompt_tokens": this.prompt_tokens,
            "completion_tokens": this.completion_tokens,
            "total_tokens": this.prompt_tokens + this.completion_tokens,
            "cost_gwei": this.fee_gwei,
        },
        "settlement": {"state": stored.batch_state, "batch_id": stored.batch_id or None},
    }


def _id32(text: str) -> bytes:
    """A receipt id before it touches anything else: 64 hex digits."""
    digits = text.removeprefix("0x")
    if len(digits) != 64 or any(c not in "0123456789abcdef" for c in digits):
        raise Rejected("receipt_id", "expected 64 lower-case hex digits", field="receipt_id")
    return bytes.fromhex(digits)
