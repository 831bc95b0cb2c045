"""Keys of the people whom one laptop plays: the platform, a model owner, payers. A cluster names addresses
instead.

One hex file per name, mode 0600, below the settings' ``signer_keys_dir``; made on first use, never logged.
"""

import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from eth_account import Account

from attribution.errors import Rejected

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True)
class Wallet:
    """``address`` is 20 bytes; ``key`` is left out of every printed form."""

    name: str
    address: bytes
    key: bytes = field(repr=False)


def wallet(keys_dir: Path, name: str) -> Wallet:
    """Read the key of ``name``, or draw one. Of two processes that draw at once, one key wins for both.

    Raises:
        Rejected: the name is no plain word, others may read the file, or it holds no key.
    """
    if not _NAME.fullmatch(name):
        raise Rejected("wallet_name", f"{name!r} does not match {_NAME.pattern}", field="name")
    path = keys_dir / f"{name}.key"
    keys_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        _create(path, secrets.token_bytes(32).hex())
    if path.stat().st_mode & 0o077:
        raise Rejected("wallet_mode", f"{path} may be read by others: chmod 600", field="name")
    try:
        key = bytes.fromhex(path.read_text().strip().removeprefix("0x"))
        return of_key(name, key)
    except ValueError:
        raise Rejected("wallet_key", f"{path} holds no private key", field="name") from None


def of_key(name: str, key: bytes) -> Wallet:
    return Wallet(name, bytes.fromhex(Account.from_key(key).address[2:]), key)


def _create(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink()
