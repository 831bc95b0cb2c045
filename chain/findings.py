"""What an audit says: the things that do not hold, and the figures that do."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from attribution.payout import Payouts


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not hold. ``code`` is stable; ``expected`` follows from what the chain binds or
    from what precedes, ``found`` is what was there instead."""

    code: str
    subject: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class BatchLine:
    batch_id: int
    num_receipts: int
    fee_gwei: int
    payload_hash: bytes
    tx_hash: bytes
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PeriodLine:
    period_id: int
    first_batch: int
    last_batch: int
    root: bytes
    total_gwei: int
    is_disabled: bool
    payouts: tuple[Payouts, ...]
    methods: tuple[str, ...]  # by which each adapter's credits were made, as the statement says it


@dataclass(frozen=True, slots=True)
class Report:
    """``checked`` counts what was looked at, so that an audit of nothing does not look like a clean one."""

    audit: Literal["arithmetic", "provenance", "influence"]
    checked: Mapping[str, int]
    batches: tuple[BatchLine, ...]
    periods: tuple[PeriodLine, ...]
    findings: tuple[Finding, ...]

    @property
    def is_clean(self) -> bool:
        return not self.findings

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=lambda value: value.hex(), indent=2)

    def to_text(self) -> str:
        lines = [f"{self.audit} audit: " + ", ".join(f"{n} {what}" for what, n in self.checked.items())]
        lines += [_batch_text(batch) for batch in self.batches]
        for period in self.periods:
            lines += _period_text(period)
        for finding in self.findings:
            lines.append(f"FINDING {finding.code}: {finding.subject}")
            lines += [f"    expected {finding.expected}", f"    found    {finding.found}"]
        lines.append("holds" if self.is_clean else f"does not hold: {len(self.findings)} findings")
        return "\n".join(lines)


def _batch_text(batch: BatchLine) -> str:
    sources = "+".join(batch.sources) or "nowhere"
    return (
        f"batch {batch.batch_id:>5}  {batch.num_receipts:>6} receipts  {batch.fee_gwei:>16} gwei  "
        f"payload {batch.payload_hash.hex()[:16]}… from {sources}  tx 0x{batch.tx_hash.hex()}"
    )


def _period_text(period: PeriodLine) -> list[str]:
    disabled = "  DISABLED" if period.is_disabled else ""
    head = (
        f"period {period.period_id}  batches {period.first_batch}-{period.last_batch}  "
        f"root {period.root.hex()}  owed since genesis {period.total_gwei} gwei{disabled}"
    )
    lines = [head]
    for payouts, method in zip(period.payouts, period.methods, strict=True):
        lines.append(f"  adapter {payouts.adapter_id.hex()}  {payouts.fee_gwei} gwei  by {method!r}")
        for line in payouts.lines:
            lines.append(f"    {line.role:<12} {line.contributor_id.hex()}  {line.amount_gwei:>16} gwei")
    return lines
