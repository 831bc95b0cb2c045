"""The process that holds the settler's key, and the client of its socket.

``python -m chain.signer --socket PATH --key FILE --policy FILE``. One JSON object a line on a Unix socket
that only this user may open: ``{"op": "address"}`` or ``{"op": "sign", ...}``. The key stays in this process:
it is in no answer and in no log. A KMS replaces this process by answering the same two questions."""

import argparse
import contextlib
import json
import os
import secrets
import socket
import socketserver
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from attribution.errors import Corrupted, Refusal, Rejected, Unavailable
from chain.signer_policy import DailyFees, SignerPolicy
from chain.transactions import Call, Fees, Transaction, address_of, parse, tx_hash

MAX_LINE_BYTES = 2**20  # the longest calldata is a certificate and some thousand captures, in hex
IDLE_S = 60.0


class Signer:
    """Key, policy and the day's fees. Thread-safe. The fees are kept in ``<key>.fees``, so that a restart
    does not lift the cap; they are written before the signature is handed out."""

    def __init__(self, key_file: Path, policy: SignerPolicy) -> None:
        self._key = read_key(key_file)
        self._policy = policy
        self._fees_file = key_file.with_name(key_file.name + ".fees")
        self._fees = DailyFees()
        if self._fees_file.exists():
            kept = json.loads(self._fees_file.read_bytes())
            self._fees = DailyFees(kept["day"], {int(nonce): wei for nonce, wei in kept["worst"].items()})
        self._lock = threading.Lock()

    @property
    def address(self) -> bytes:
        return address_of(self._key)

    def sign(self, transaction: Transaction, now_s: float) -> bytes:
        """The raw transaction. ``Rejected`` if the policy does not allow it."""
        self._policy.check(transaction)
        with self._lock:
            self._fees.add(transaction, self._policy.max_daily_fee_wei, now_s)
            kept = {"day": self._fees.day, "worst": self._fees.worst_by_nonce}
            _write_private(self._fees_file, json.dumps(kept).encode())
        return transaction.sign(self._key)


def read_key(path: Path) -> bytes:
    """32 bytes from a hex file that nobody else may read; made on first use."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_private(path, secrets.token_hex(32).encode())
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise Rejected("signer_key_mode", f"{path} may be read by others: chmod 600", field="key")
    try:
        key = bytes.fromhex(path.read_text().strip().removeprefix("0x"))
        address_of(key)
    except ValueError:
        raise Rejected("signer_key", f"{path} holds no private key", field="key") from None
    return key


def _write_private(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


class SignerClient:
    """Asks the signer process. A connection per question: the signer may restart between any two."""

    def __init__(self, socket_path: Path, *, timeout_s: float = 10.0) -> None:
        self._path = socket_path
        self._timeout_s = timeout_s

    def address(self) -> bytes:
        return bytes.fromhex(self._ask({"op": "address"})["address"])

    def sign(self, transaction: Transaction) -> bytes:
        """The raw transaction. ``Rejected`` with the policy's code; ``Corrupted`` if another one comes
        back."""
        asked = {
            "op": "sign",
            "chain_id": transaction.chain_id,
            "nonce": transaction.nonce,
            "gas": transaction.gas,
            "tip_wei": transaction.fees.tip_wei,
            "cap_wei": transaction.fees.cap_wei,
            "to": transaction.call.to.hex(),
            "data": transaction.call.data.hex(),
            "value_wei": transaction.value_wei,
        }
        raw = bytes.fromhex(self._ask(asked)["raw"])
        if parse(raw) != transaction:
            raise Corrupted("signer_answer", f"signer signed another transaction, {tx_hash(raw).hex()}")
        return raw

    def _ask(self, question: Mapping[str, object]) -> dict[str, str]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout_s)
                connection.connect(str(self._path))
                connection.sendall(json.dumps(question).encode() + b"\n")
                line = connection.makefile("rb").readline()
        except OSError as error:
            raise Unavailable("signer_unavailable", f"signer at {self._path}: {error}") from error
        if not line.endswith(b"\n"):
            raise Unavailable("signer_unavailable", f"signer at {self._path} hung up")
        answer: dict[str, str] = json.loads(line)
        if "code" in answer:
            raise Rejected(answer["code"], answer["message"], field=answer["field"], http_status=403)
        return answer


class _Connection(socketserver.StreamRequestHandler):
    signer: Signer
    timeout = IDLE_S

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while line := self.rfile.readline(MAX_LINE_BYTES):
                self.wfile.write(json.dumps(answer(self.signer, line, time.time())).encode() + b"\n")


def answer(signer: Signer, line: bytes, now_s: float) -> dict[str, str]:
    """One question, one answer; a refusal is an answer too."""
    try:
        question = json.loads(line)
        if question["op"] == "address":
            return {"address": signer.address.hex()}
        if question["op"] != "sign":
            raise Rejected("signer_op", f"unknown operation {question['op']!r}", field="op")
        return {"raw": signer.sign(_transaction(question), now_s).hex()}
    except Refusal as error:
        return {"code": error.code, "message": error.message, "field": error.field}
    except (ValueError, KeyError, TypeError) as error:
        return {"code": "signer_question", "message": f"not a question: {error}", "field": ""}


def _transaction(question: Mapping[str, object]) -> Transaction:
    def number(name: str) -> int:
        value = question[name]
        if not isinstance(value, int) or isinstance(value, bool):
            raise Rejected("signer_question", f"{name} is {value!r}, no integer", field=name)
        return value

    return Transaction(
        chain_id=number("chain_id"),
        nonce=number("nonce"),
        gas=number("gas"),
        fees=Fees(number("tip_wei"), number("cap_wei")),
        call=Call(bytes.fromhex(str(question["to"])), bytes.fromhex(str(question["data"]))),
        value_wei=number("value_wei"),
    )


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def make_server(socket_path: Path, signer: Signer) -> socketserver.ThreadingUnixStreamServer:
    """Bound and ready for ``serve_forever``. The path is ours: a socket left by a dead signer is replaced."""
    socket_path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        socket_path.unlink()
    handler = type("BoundConnection", (_Connection,), {"signer": signer})
    mask = os.umask(0o177)
    try:
        return _Server(str(socket_path), handler)
    finally:
        os.umask(mask)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sign the settler's transactions, and nothing else")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True, help="hex file, mode 600; made if it is missing")
    parser.add_argument("--policy", type=Path, required=True, help="JSON, see SignerPolicy")
    options = parser.parse_args()
    try:
        signer = Signer(options.key, SignerPolicy.read(options.policy))
    except Refusal as error:
        raise SystemExit(f"signer: {error.message} ({error.code})") from None
    server = make_server(options.socket, signer)
    print(f"signer of 0x{signer.address.hex()} at {options.socket}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
