"""A development stand-in for eigenda-proxy in memstore mode: same paths, bytes and status codes, no EigenDA.

``python -m chain.da_standin --port 3100 --dir DIR``. Blobs are files under ``DIR``, so a restart keeps them
and a test can change a byte of one. Faults are switched on through ``PATCH /memstore/config``; the real
memstore knows neither ``PutReturnsRateLimit`` (429) nor ``ApisEnabled`` (403)."""

import argparse
import json
import re
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from attribution.errors import Rejected
from attribution.hashing import keccak256
from chain.da import MAX_PAYLOAD_BYTES
from chain.da_blob import VERSION_BYTE, certificate, decode_payload, encode_payload

MAX_BODY_BYTES = 16 * 2**20
OP_GENERIC = b"\x01\x00"
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATIONS = ("BlobExpiration", "PutLatency", "GetLatency")


@dataclass(frozen=True, slots=True)
class Knobs:
    """Names are those of the proxy's JSON. Durations are seconds here and Go durations on the wire."""

    MaxBlobSizeBytes: int = MAX_BODY_BYTES
    BlobExpiration: float = 14 * 86400.0  # 0 keeps for ever
    PutLatency: float = 0.0
    GetLatency: float = 0.0
    PutReturnsFailoverError: bool = False
    PutReturnsRateLimit: bool = False
    ApisEnabled: tuple[str, ...] = ("standard", "op-generic", "op-keccak")
    NullableDerivationError: dict[str, object] | None = None  # of blobs put from now on

    def patched(self, patch: dict[str, object]) -> "Knobs":
        unknown = sorted(set(patch) - set(asdict(self)))
        if unknown:
            raise Rejected("unknown_knob", f"unknown fields {unknown}", field=unknown[0])
        changes = dict(patch)
        changes |= {name: duration_s(str(changes[name])) for name in DURATIONS if name in changes}
        error = changes.get("NullableDerivationError")
        if isinstance(error, dict) and error.get("Reset"):
            changes["NullableDerivationError"] = None
        return replace(self, **changes)  # type: ignore[arg-type]

    def to_json(self) -> bytes:
        shown = asdict(self) | {name: f"{getattr(self, name):g}s" for name in DURATIONS}
        return json.dumps(shown).encode() + b"\n"


def duration_s(text: str) -> float:
    """Go's ``time.ParseDuration`` for the forms ``0``, ``1s``, ``1m30s``, ``250ms``."""
    parts: list[tuple[str, str]] = re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", text)
    if text != "0" and (not parts or "".join(number + unit for number, unit in parts) != text):
        raise Rejected("bad_duration", f'time: invalid duration "{text}"')
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


@dataclass(slots=True)
class BlobStore:
    """Encoded blobs by keccak of their certificate, and the switches. ``<key>.error`` marks a blob whose
    certificate must be discarded."""

    folder: Path
    knobs: Knobs = field(default_factory=Knobs)

    def write(self, name: str, data: bytes) -> None:
        partial = self.folder / f".{name}.{threading.get_ident()}"
        partial.write_bytes(data)
        partial.rename(self.folder / name)

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        if not path.is_file():
            return None
        keeps_s = self.knobs.BlobExpiration
        return None if keeps_s and time.time() - path.stat().st_mtime > keeps_s else path.read_bytes()

    def put(self, blob: bytes) -> bytes:
        made = certificate(blob)
        key = keccak256(made).hex()
        if self.knobs.NullableDerivationError is not None:
            self.write(f"{key}.error", json.dumps(self.knobs.NullableDerivationError).encode())
        self.write(key, blob)
        return VERSION_BYTE + made


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: BlobStore

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the proxy's own log is not part of its wire format."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/health":
            self._answer(200)
        elif url.path == "/config":
            self._answer(200, self._config(), "application/json")
        elif url.path == "/memstore/config":
            self._answer(200, self.store.knobs.to_json(), "text/plain; charset=utf-8")
        elif url.path.rstrip("/") == "/put":
            self._answer(405)
        elif match := re.fullmatch(r"/get/(?:0x)?([0-9a-fA-F]+)", url.path):
            self._get(match.group(1), parse_qs(url.query, keep_blank_values=True))
        else:
            self._error(404, "404 page not found")

    def do_POST(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        if body is None:
            self._error(
                400, f"reading at most {MAX_BODY_BYTES} bytes from body: http: request body too large"
            )
        elif match := re.fullmatch(r"/put/(?:0x)?00([0-9a-fA-F]{64})", url.path):
            self._put_keccak(bytes.fromhex(match.group(1)), body)
        elif url.path in ("/put", "/put/"):
            is_standard = url.path == "/put" and parse_qs(url.query).get("commitment_mode") == ["standard"]
            self._put(body, "standard" if is_standard else "op-generic")
        else:
            self._error(404, "404 page not found")

    def do_PATCH(self) -> None:
        body = self._body()
        if urlsplit(self.path).path != "/memstore/config" or body is None:
            return self._error(404, "404 page not found")
        try:
            self.store.knobs = self.store.knobs.patched(json.loads(body))
        except (Rejected, ValueError) as error:
            return self._error(400, str(error))
        self._answer(200, self.store.knobs.to_json(), "text/plain; charset=utf-8")

    def _put(self, payload: bytes, mode: str) -> None:
        knobs = self.store.knobs
        if mode not in knobs.ApisEnabled:
            return self._error(403, f"{mode} API is not enabled")
        if knobs.PutReturnsFailoverError:
            return self._error(503, "post request failed: failover")
        if knobs.PutReturnsRateLimit:
            return self._error(429, "rpc error: code = ResourceExhausted")
        blob = encode_payload(payload)
        if len(blob) > knobs.MaxBlobSizeBytes:
            return self._error(
                400,
                "post request failed: encoded blob is larger than max blob size: "
                f"blob length {len(blob)}, max blob size {knobs.MaxBlobSizeBytes}",
            )
        time.sleep(knobs.PutLatency)
        self._answer(200, (b"" if mode == "standard" else OP_GENERIC) + self.store.put(blob))

    def _put_keccak(self, key: bytes, body: bytes) -> None:
        if keccak256(body) != key:
            return self._error(400, f"keccak256(value) != key: {keccak256(body).hex()} != {key.hex()}")
        self.store.write(f"keccak-{key.hex()}", body)
        self._answer(200)

    def _get(self, text: str, query: dict[str, list[str]]) -> None:
        if len(text) % 2:
            return self._error(400, f"decoding cert from hex string: {text}, error: odd length hex string")
        commitment = bytes.fromhex(text)
        mode = "standard" if query.get("commitment_mode") == ["standard"] else "op-generic"
        if mode == "op-generic":
            if len(commitment) == 33 and commitment[0] == 0:
                return self._get_keccak(commitment[1:])
            if len(commitment) == 1:
                return self._error(400, f"unsupported commitment type {text}")
            if len(commitment) < 3 or commitment[0] != 1:
                return self._error(404, "404 page not found")
            commitment = commitment[2:]
        if mode not in self.store.knobs.ApisEnabled:
            return self._error(403, f"{mode} API is not enabled")
        if commitment[0] > VERSION_BYTE[0]:
            return self._error(400, f"parsing version byte: unsupported version byte {commitment[0]:02x}")
        is_encoded = query.get("return_encoded_payload", ["no"])[0].lower() in ("", "true", "1")
        self._get_blob(keccak256(commitment[1:]).hex(), is_encoded)

    def _get_blob(self, key: str, is_encoded: bool) -> None:
        time.sleep(self.store.knobs.GetLatency)
        blob = self.store.read(key)
        if blob is None:
            return self._error(500, f"get request failed: payload not found for key: {key}")
        discard = self.store.read(f"{key}.error")
        if discard is not None:
            return self._error(418, discard.decode())
        try:
            self._answer(200, blob if is_encoded else decode_payload(blob))
        except Rejected as error:
            self._error(418, json.dumps({"StatusCode": 4, "Msg": error.message}))

    def _get_keccak(self, key: bytes) -> None:
        value = self.store.read(f"keccak-{key.hex()}")
        if value is None:
            return self._error(400, f"key not found: {key.hex()}")
        self._answer(200, value)

    def _config(self) -> bytes:
        return json.dumps(
            {
                "version": "stand-in",
                "chain_id": "",
                "directory_address": "",
                "cert_verifier_address": "",
                "max_payload_size_bytes": MAX_PAYLOAD_BYTES,
                "apis_enabled": self.store.knobs.ApisEnabled,
                "read_only_mode": False,
            }
        ).encode()

    def _body(self) -> bytes | None:
        size = int(self.headers.get("Content-Length") or 0)
        if size > MAX_BODY_BYTES:
            self.close_connection = True
            self.rfile.read(min(size, 4 * MAX_BODY_BYTES))
            return None
        return self.rfile.read(size)

    def _answer(self, status: int, body: bytes = b"", kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, message: str) -> None:
        self._answer(status, message.encode() + b"\n", "text/plain; charset=utf-8")


def make_server(folder: Path, port: int = 0, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Bound and ready for ``serve_forever``; port 0 takes a free one."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = type("BoundHandler", (Handler,), {"store": BlobStore(folder)})
    server = ThreadingHTTPServer((host, port), handler)
    server.daemon_threads = True
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description="EigenDA stand-in for development")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=3100)
    parser.add_argument("--dir", type=Path, required=True)
    options = parser.parse_args()
    server = make_server(options.dir, options.port, options.host)
    print(
        f"EigenDA stand-in at http://{options.host}:{server.server_port}, blobs in {options.dir}", flush=True
    )
    server.serve_forever()


if __name__ == "__main__":
    main()
