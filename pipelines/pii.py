"""Personal data that a pattern can find: a floor, not a promise. Reserved examples are nobody's data.

Numbers are checked, not only matched: cards by Luhn's digit (ISO/IEC 7812-1), IBANs by their remainder
(ISO 13616), addresses by whether the internet routes them."""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    kind: str  # email, card, iban, ip, phone, ssn, secret
    start: int  # character offset


def first_pii(text: str) -> Finding | None:
    """The first finding in the order of ``_PATTERNS``, or none."""
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
            if _CHECKS.get(kind, _always)(match[0]):
                return Finding(kind, match.start())
    return None


def _always(found: str) -> bool:
    return True


def _is_someones_mailbox(found: str) -> bool:
    """RFC 2606 and 6761 reserve names for documentation."""
    domain = found.rsplit("@", 1)[1].lower().rstrip(".")
    reserved = ("example.com", "example.org", "example.net", "example", "invalid", "test", "localhost")
    return not any(domain == name or domain.endswith(f".{name}") for name in reserved)


def _passes_luhn(found: str) -> bool:
    digits = [int(c) for c in found if c.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _passes_iban(found: str) -> bool:
    code = "".join(found.split())
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def _is_routed(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "email": re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    "card": re.compile(
        r"(?<![\w.-])[2-6](?:\d{12,18}|\d{3}(?:[ -]\d{4}){3}|\d{3}[ -]\d{6}[ -]\d{5})(?![\w-]|\.\d)"
    ),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "ip": re.compile(
        r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4})(?![\w:]|\.\d)"
    ),
    "phone": re.compile(
        r"(?<![\w+])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,11}"
        r"|\(\d{3}\) ?\d{3}[ -]\d{4}|\d{3}-\d{3}-\d{4})(?!\w|-\d)"
    ),
    "ssn": re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"),
    "secret": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b"
    ),
}
_CHECKS: Mapping[str, Callable[[str], bool]] = {
    "email": _is_someones_mailbox,
    "card": _passes_luhn,
    "iban": _passes_iban,
    "ip": _is_routed,
}
