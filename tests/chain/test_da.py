"""The EigenDA client and the stand-in, over real HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import rlp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attribution.errors import Corrupted, Rejected, Unavailable
from attribution.hashing import keccak256
from chain.da import MAX_PAYLOAD_BYTES, DaClient, DaMode
from chain.da_blob import certificate, decode_payload, encode_payload
from chain.da_standin import make_server


@dataclass(frozen=True)
class Standin:
    url: str
    folder: Path

    def set(self, **knobs: object) -> None:
        httpx.patch(f"{self.url}/memstore/config", json=knobs).raise_for_status()


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[Standin]:
    server = make_server(folder, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Standin(f"http://127.0.0.1:{server.server_port}", folder)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[Standin]:
    with serving(tmp_path / "da") as running:
        yield running


@pytest.mark.parametrize("mode", ["standard", "optimism_generic"])
def test_what_goes_in_comes_out(standin: Standin, mode: DaMode) -> None:
    """In both modes, for any bytes; the same payload twice gives two commitments, both good."""
    client = DaClient(standin.url, mode)
    for payload in (b"", b"\0\n\xff", bytes(range(256)) * 1000):
        first, second = client.put(payload), client.put(payload)
        assert first != second
        assert client.get(first) == client.get(second) == payload


def test_commitments_are_shaped_like_the_real_ones(standin: Standin) -> None:
    """``03 || RLP`` and ``01 00 03 || RLP``, a V4 certificate of five fields, the blob's length inside."""
    standard = DaClient(standin.url, "standard").put(b"x" * 100)
    generic = DaClient(standin.url, "optimism_generic").put(b"x" * 100)
    assert standard[:1] == b"\x03" and generic[:3] == b"\x01\x00\x03"
    for encoded in (standard[1:], generic[3:]):
        fields = rlp.decode(encoded)
        assert len(fields) == 5 and rlp.encode(fields) == encoded
        assert int.from_bytes(fields[1][0][0][2][3], "big") == 8  # symbols: header + 4, rounded up
    assert (
        len(certificate(bytes(32), num_non_signers=48))
        > len(certificate(bytes(32), num_non_signers=0)) + 3000
    )


@given(st.binary(max_size=400))
def test_decoding_inverts_encoding(payload: bytes) -> None:
    blob = encode_payload(payload)
    assert decode_payload(blob) == payload
    assert (len(blob) // 32).bit_count() == 1 and not any(blob[::32])


@given(st.binary(min_size=1, max_size=100), st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_blob_with_a_changed_byte_never_decodes_to_the_payload(payload: bytes, data: st.DataObject) -> None:
    blob = bytearray(encode_payload(payload))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert decode_payload(bytes(blob)) != payload
    except Rejected as error:
        assert error.code == "da_blob"


def test_the_largest_payload_fits_and_one_byte_more_is_refused(standin: Standin) -> None:
    """By the client before it is sent, and by the server with 400 if it is sent all the same."""
    client = DaClient(standin.url)
    largest = bytes(MAX_PAYLOAD_BYTES)
    assert client.get(client.put(largest)) == largest
    with pytest.raises(Rejected, match="16252898 bytes, at most 16252897") as refused:
        client.put(largest + b"\0")
    assert refused.value.code == "da_payload_size"
    for size in (MAX_PAYLOAD_BYTES + 1, 2**24 + 1):
        assert httpx.post(f"{standin.url}/put", content=bytes(size)).status_code == 400


def test_a_restart_keeps_the_blobs(tmp_path: Path) -> None:
    with serving(tmp_path) as before:
        commitment = DaClient(before.url).put(b"kept")
    with serving(tmp_path) as after:
        assert DaClient(after.url).get(commitment) == b"kept"


@pytest.mark.parametrize("fault", ["PutReturnsFailoverError", "PutReturnsRateLimit"])
def test_a_fault_that_passes_is_waited_out(standin: Standin, fault: str) -> None:
    """503 and 429 are repeated; when they last longer than the patience they become ``Unavailable``."""
    standin.set(**{fault: True})
    with pytest.raises(Unavailable) as failed:
        DaClient(standin.url, patience_s=0.3).put(b"x")
    assert failed.value.code == "da_unavailable" and failed.value.retry_after_s > 0
    timer = threading.Timer(0.3, lambda: standin.set(**{fault: False}))
    timer.start()
    client = DaClient(standin.url, patience_s=10)
    assert client.get(client.put(b"x")) == b"x"


def test_nobody_at_the_address_is_unavailable_until_somebody_is(tmp_path: Path) -> None:
    with serving(tmp_path) as standin:
        commitment, port = DaClient(standin.url).put(b"x"), httpx.URL(standin.url).port
    client = DaClient(standin.url, patience_s=0.3)
    with pytest.raises(Unavailable, match="ConnectError"):
        client.get(commitment)
    assert port is not None
    with serving(tmp_path, port):
        assert client.get(commitment) == b"x"


def test_a_slow_answer_is_waited_for_and_an_endless_one_is_not(standin: Standin) -> None:
    standin.set(PutLatency="300ms")
    assert DaClient(standin.url).put(b"x")
    with pytest.raises(Unavailable, match="Timeout"):
        DaClient(standin.url, timeout_s=0.05, patience_s=0.1).put(b"x")


def test_a_bad_certificate_is_corrupted_at_once(standin: Standin) -> None:
    """418 is never repeated: the certificate must be discarded. Later blobs are good again after a reset."""
    client = DaClient(standin.url, patience_s=60)
    standin.set(NullableDerivationError={"StatusCode": 3, "Msg": "invalid cert", "Reset": False})
    bad = client.put(b"x")
    with pytest.raises(Corrupted, match="invalid cert") as found:
        client.get(bad)
    assert found.value.code == "da_certificate"
    standin.set(NullableDerivationError={"Reset": True})
    assert client.get(client.put(b"x")) == b"x"


def test_a_disabled_mode_is_rejected_at_once(standin: Standin) -> None:
    standin.set(ApisEnabled=["standard"])
    client = DaClient(standin.url, "optimism_generic", patience_s=60)
    with pytest.raises(Rejected) as refused:
        client.put(b"x")
    assert (refused.value.code, refused.value.http_status) == ("da_mode_disabled", 403)


def test_an_expired_blob_is_unavailable(standin: Standin) -> None:
    """A proxy cannot tell forgotten from not yet found, so neither do we."""
    client = DaClient(standin.url, patience_s=0.2)
    commitment = client.put(b"x")
    standin.set(BlobExpiration="1ms")
    with pytest.raises(Unavailable, match="payload not found"):
        client.get(commitment)


@pytest.mark.parametrize("commitment", [b"\x09junk", b"\x04"])
def test_what_is_no_commitment_is_rejected(standin: Standin, commitment: bytes) -> None:
    with pytest.raises(Rejected) as refused:
        DaClient(standin.url, patience_s=60).get(commitment)
    assert refused.value.code == "da_refused"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/config", 200),
        ("GET", "/put", 405),
        ("GET", "/get/0x030", 400),
        ("GET", "/get/0x01", 400),
        ("GET", "/get/0x0200ff", 404),
        ("GET", "/get/", 404),
        ("GET", "/elsewhere", 404),
        ("POST", "/elsewhere", 404),
        ("POST", "/put/0x00" + "00" * 32, 400),
        ("GET", "/get/0x00" + "00" * 32, 400),
        ("PATCH", "/memstore/config", 400),
        ("PATCH", "/elsewhere", 404),
    ],
)
def test_statuses_are_those_of_the_proxy(standin: Standin, method: str, path: str, status: int) -> None:
    assert httpx.request(method, standin.url + path, content=b'{"Unknown": 1}').status_code == status


def test_keccak_mode_stores_under_the_hash(standin: Standin) -> None:
    key = keccak256(b"value").hex()
    assert httpx.post(f"{standin.url}/put/0x00{key}", content=b"value").status_code == 200
    assert httpx.get(f"{standin.url}/get/0x00{key}").content == b"value"


def test_encoded_payloads_can_be_asked_for(standin: Standin) -> None:
    commitment = DaClient(standin.url).put(b"x" * 64)
    url = f"{standin.url}/get/0x{commitment.hex()}?commitment_mode=standard&return_encoded_payload=1"
    assert httpx.get(url).content == encode_payload(b"x" * 64)
