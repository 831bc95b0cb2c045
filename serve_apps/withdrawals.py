"""How a withdrawal ends the answers under way: gateways look for new ones and tell the workers.

Requests that begin later are refused by ``catalog.resolve``, at once and whatever becomes of this."""

import asyncio
import logging

from attribution.errors import Refusal
from cluster import adapters
from serve_apps.services import Services

log = logging.getLogger(__name__)


async def follow_withdrawals(services: Services, every_s: float = 1.0) -> None:
    """Tell every worker of every withdrawal, old ones too: a worker may be older than this gateway. What is
    new shows in a count and not in a time, so no clock has to agree with another."""
    known: set[bytes] = set()
    while True:
        try:
            if await services.read(adapters.num_withdrawn) > len(known):
                found = set(await services.read(adapters.withdrawn)) - known
                known |= found
                log.info("withdrawn: %s", ", ".join(sorted(each.hex() for each in found)))
                await services.pool.withdraw(found)
            else:
                await services.pool.withdraw()
        except Refusal as refusal:
            log.warning("withdrawals wait: %s", refusal.message)
        await asyncio.sleep(every_s)
