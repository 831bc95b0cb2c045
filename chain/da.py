"""Client of an eigenda-proxy: payload bytes in, an opaque commitment out, and back again.

Production and laptop differ in the URL only: ``chain/da_standin.py`` speaks the same wire format. The layer
forgets a blob after weeks and gives another commitment each time it is handed the same bytes, so the caller
archives the payload, journals the commitment before using it, and tells payloads apart by their own hash.

Wire format: Layr-Labs/eigenda ``api/proxy`` at 61019b4e (bodies are raw bytes in both directions)."""

import random
import time
from collections.abc import Callable
from typing import Literal

import httpx

from attribution.errors import Corrupted, Rejected, Unavailable

DaMode = Literal["standard", "optimism_generic"]

MAX_PAYLOAD_BYTES = (
    2**19 - 1
) * 31  # 31 bytes per 32-byte symbol, one symbol of header, 2**19 symbols a blob
LONGEST_PAUSE_S = 10.0


class DaClient:
    """Blocking, thread-safe.

    Args:
        timeout_s: of one request. A dispersal that succeeds may take two minutes and a half.
        patience_s: how long failed requests are repeated before ``Unavailable`` is raised.
    """

    def __init__(
        self, url: str, mode: DaMode = "standard", *, timeout_s: float = 200.0, patience_s: float = 30.0
    ) -> None:
        self._query = {"commitment_mode": "standard"} if mode == "standard" else {}
        self._patience_s = patience_s
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(timeout_s, connect=10.0))

    def put(self, payload: bytes) -> bytes:
        """Disperse. Returns the commitment (hundreds of bytes to a few thousand): opaque, and never the same
        twice.

        Raises:
            Rejected: the proxy will never take this payload, or is not serving this mode.
            Unavailable: down or throttled for longer than ``patience_s``.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise Rejected(
                "da_payload_size", f"{len(payload)} bytes, at most {MAX_PAYLOAD_BYTES}", field="payload"
            )
        headers = {"Content-Type": "application/octet-stream"}
        commitment = self._patiently(
            lambda: self._http.post("/put", params=self._query, content=payload, headers=headers)
        )
        if not commitment:
            raise Corrupted(
                "da_commitment_empty", f"no commitment for {len(payload)} bytes", field="commitment"
            )
        return commitment

    def get(self, commitment: bytes) -> bytes:
        """Payload behind a commitment. The caller compares its hash: the proxy is not trusted.

        Raises:
            Corrupted: the layer says that this certificate must be discarded (HTTP 418).
            Rejected: not a commitment at all.
            Unavailable: down, throttled, or the blob cannot be found (an expired one looks the same).
        """
        return self._patiently(lambda: self._http.get(f"/get/0x{commitment.hex()}", params=self._query))

    def close(self) -> None:
        self._http.close()

    def _patiently(self, send: Callable[[], httpx.Response]) -> bytes:
        deadline = time.monotonic() + self._patience_s
        pause_s = 0.2
        while True:
            try:
                response = send()
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return response.content
                failure = _failure(response)
            wait_s = pause_s * random.uniform(0.5, 1.0)
            if time.monotonic() + wait_s > deadline:
                raise Unavailable(
                    "da_unavailable", f"EigenDA proxy: {failure}", retry_after_s=LONGEST_PAUSE_S
                )
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _failure(response: httpx.Response) -> str:
    """What to say of an answer that may be repeated; the others are raised."""
    said = f"HTTP {response.status_code}: {response.text.strip()[:300]}"
    if response.status_code == 418:
        raise Corrupted("da_certificate", f"certificate must be discarded, {said}", field="commitment")
    if response.status_code == 403:
        raise Rejected("da_mode_disabled", f"EigenDA proxy does not serve this mode, {said}", http_status=403)
    if response.status_code < 500 and response.status_code != 429:
        raise Rejected("da_refused", f"EigenDA proxy refused, {said}")
    return said
