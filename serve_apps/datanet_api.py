"""``/datanets``: a shard is committed to first and shown after. Thin: every rule is in
``cluster.contributions``.

Both calls want an API key; a reveal is also signed by the contributor's wallet, and only that signature
counts. Binary fields travel as hex."""

import asyncio
import time
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session

from attribution.errors import Rejected
from cluster import contributions
from cluster.contributions import Reveal
from cluster.signatures import ShardReveal, datanets_domain
from serve_apps.openai_schema import Body
from serve_apps.services import Caller, Shared

router = APIRouter()
Hex = Annotated[str, Field(pattern=r"^(0x)?[0-9a-f]*$", max_length=400)]


class Commitment(Body):
    wallet: Hex
    commitment: Hex
    label: str = Field(default="", max_length=100)


class RevealQuery(Body):
    """What is sent beside the shard's bytes, which are the body."""

    contributor_id: Hex
    commitment: Hex
    content_sha256: Hex
    num_rows: int = Field(ge=0, lt=2**32, strict=False)  # a query is text
    salt: Hex
    signature: Hex


@dataclass(frozen=True, slots=True)
class Place:
    """Where a commitment stands in the order of all."""

    contributor_id: bytes
    committed_seq: int


@router.post("/datanets/{datanet}/commitments", status_code=201)
async def commit(datanet: str, body: Commitment, shared: Shared, caller: Caller) -> dict[str, Any]:
    wallet, commitment = _bytes(body.wallet, 20, "wallet"), _bytes(body.commitment, 32, "commitment")

    def change(session: Session) -> Place:
        contributor = contributions.register_contributor(session, wallet, body.label or body.wallet)
        now = int(time.time())
        return Place(contributor, contributions.commit(session, datanet, contributor, commitment, now))

    place = await shared.write(change)
    return {"contributor_id": place.contributor_id.hex(), "committed_seq": place.committed_seq}


@router.post("/datanets/{datanet}/shards", status_code=201)
async def reveal(
    datanet: str, query: Annotated[RevealQuery, Query()], request: Request, shared: Shared, caller: Caller
) -> dict[str, Any]:
    claim = ShardReveal(
        datanet,
        _bytes(query.contributor_id, 32, "contributor_id"),
        _bytes(query.commitment, 32, "commitment"),
        _bytes(query.content_sha256, 32, "content_sha256"),
        query.num_rows,
    )
    sent = Reveal(claim, _bytes(query.salt, 32, "salt"), _bytes(query.signature, 65, "signature"))
    data, domain = await request.body(), datanets_domain(shared.chain_id)
    shard = await asyncio.to_thread(
        contributions.reveal, shared.database, shared.storage, sent, data, domain, int(time.time())
    )
    return {
        "shard_id": shard.shard_id.hex(),
        "committed_seq": shard.committed_seq,
        "num_rows": shard.num_rows,
    }


def _bytes(text: str, length: int, field: str) -> bytes:
    digits = text.removeprefix("0x")
    if len(digits) != 2 * length:
        raise Rejected(
            "bad_hex", f"{field}: expected {2 * length} hex digits, given {len(digits)}", field=field
        )
    return bytes.fromhex(digits)
