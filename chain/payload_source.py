"""Where an auditor gets a payload: the DA layer while it remembers, our archive for ever, both compared.

Neither is trusted: the hash in the batch header decides which copy is the payload. The archive is any
directory or bucket that holds ``blobs/<payload_hash>``."""

from collections.abc import Callable
from dataclasses import dataclass

from attribution.errors import Corrupted, Rejected, Unavailable
from attribution.hashing import keccak256
from chain.da import DaClient
from chain.findings import Finding
from cluster.storage import Storage


@dataclass(frozen=True, slots=True)
class Copies:
    """``payload`` has the hash that the chain names; ``altered`` are copies that have another, with where
    they were found. A layer that has forgotten, or is away, is not a finding while the other has the
    payload."""

    payload: bytes | None
    altered: tuple[tuple[str, bytes], ...]
    sources: tuple[str, ...]  # that hold the payload
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class PayloadSource:
    """At least one of the two."""

    da: DaClient | None
    archive: Storage | None

    def fetch(self, subject: str, da_commitment: bytes, payload_hash: bytes) -> Copies:
        places: list[tuple[str, Callable[[], bytes]]] = []
        if self.da is not None:
            da = self.da
            places.append(("da", lambda: da.get(da_commitment)))
        if self.archive is not None:
            archive = self.archive
            places.append(("archive", lambda: archive.get(f"blobs/{payload_hash.hex()}")))
        payload, sources, altered, findings, absent = None, [], [], [], []
        for place, get in places:
            try:
                copy = get()
            except (Unavailable, Rejected, Corrupted) as refusal:
                absent.append(f"{place}: {refusal.message}")
                if isinstance(refusal, Corrupted):
                    findings.append(Finding(f"{place}_certificate", subject, "a payload", refusal.message))
                continue
            if keccak256(copy) == payload_hash:
                payload = copy
                sources.append(place)
            else:
                altered.append((place, copy))
                found = keccak256(copy).hex()
                findings.append(Finding(f"{place}_payload", subject, payload_hash.hex(), found))
        if payload is None and not altered:
            findings.append(Finding("payload_missing", subject, payload_hash.hex(), "; ".join(absent)))
        return Copies(payload, tuple(altered), tuple(sources), tuple(findings))
