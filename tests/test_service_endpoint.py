"""The HTTP port: who may read the metrics, over which channel, with which headers."""

from __future__ import annotations

import base64
import http.client
import re
import signal
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from service.config import ServeConfig
from service.endpoint import Endpoint
from service.errors import ServiceError
from service.metrics import Metrics
from tests.conftest import require_tool
from tests.service_support import running_daemon, wait_until


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    openssl = require_tool("openssl", package="openssl")
    crt, key = folder / f"{name}.crt", folder / f"{name}.key"
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run(
        [openssl, "req", "-x509", *curve, "-days", "2", *subject, "-out", crt, "-keyout", key],
        check=True,
        capture_output=True,
    )
    return crt, key


def password(folder: Path, content: str = "prometheus:secret word\n", mode: int = 0o600) -> Path:
    path = folder / "password"
    path.write_text(content)
    path.chmod(mode)
    return path


def get(url: str, *, login: str = "", context: ssl.SSLContext | None = None) -> http.client.HTTPResponse:
    headers = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if login else {}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10, context=context)


def status(url: str, **options: str) -> int:
    try:
        return get(url, **options).status  # type: ignore[arg-type]
    except urllib.error.HTTPError as error:
        return error.code


def config(folder: Path, **changes: Path | str | None) -> ServeConfig:
    return ServeConfig(folder / "spool", folder / "outputs", port=0, **changes)  # type: ignore[arg-type]


def test_answers_name_no_version_and_forbid_caching_sniffing_and_frames(tmp_path: Path) -> None:
    endpoint = Endpoint(config(tmp_path), Metrics().registry)
    try:
        answer = get(f"{endpoint.url}/metrics")
        assert answer.status == 200
        assert answer.headers.get_all("Server") == ["mergecore"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Content-Type"].startswith("text/plain")
        for path in ("/", "/favicon.ico", "/metrics/", "/../etc/passwd", "/%0d%0aX:1", "/<script>"):
            assert status(endpoint.url + path) == 404
        connection = http.client.HTTPConnection(endpoint.url.partition("//")[2], timeout=10)
        connection.request("POST", "/metrics", body="x")
        assert connection.getresponse().status == 405
        connection.close()
    finally:
        endpoint.close()


def test_without_the_password_nothing_is_told(tmp_path: Path) -> None:
    endpoint = Endpoint(config(tmp_path, password_file=password(tmp_path)), Metrics().registry)
    try:
        url = f"{endpoint.url}/metrics"
        assert status(url, login="prometheus:secret word") == 200
        for login in ("", "prometheus:", "prometheus:secret", "root:secret word", "x"):
            assert status(url, login=login) == 401
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(url)
        assert refused.value.headers["WWW-Authenticate"].startswith("Basic realm=")
        assert b"mergecore_" not in refused.value.read()
        for value in ("Basic", "Basic !!!", "Bearer cHJvbWV0aGV1czpzZWNyZXQgd29yZA==", "Basic " + "A" * 9999):
            request = urllib.request.Request(url, headers={"Authorization": value})
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=10)
    finally:
        endpoint.close()


def test_a_daemon_speaks_tls_keeps_its_password_and_takes_new_ones_at_sighup(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path, "server")
    secret = password(tmp_path)
    with running_daemon(tmp_path / "d", certfile=str(crt), keyfile=str(key), password_file=str(secret)) as daemon:
        assert daemon.url.startswith("https://127.0.0.1:")
        url = f"{daemon.url}/metrics"
        trusting = ssl.create_default_context(cafile=str(crt))
        assert b"mergecore_build_info" in get(url, login="prometheus:secret word", context=trusting).read()
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            get(url)
        with pytest.raises((OSError, http.client.HTTPException)):
            get(url.replace("https", "http"))

        # A client that says nothing keeps nobody out.
        host, port = daemon.url.partition("//")[2].split(":")
        with socket.create_connection((host, int(port))):
            assert get(url, login="prometheus:secret word", context=trusting).status == 200

        other, other_key = certificate(tmp_path, "other")
        crt.write_bytes(other.read_bytes())
        key.write_bytes(other_key.read_bytes())
        secret.write_text("prometheus:new\n")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "configuration reloaded" in daemon.log(), "the reload")
        renewed = ssl.create_default_context(cafile=str(other))
        assert get(url, login="prometheus:new", context=renewed).status == 200
        secret.write_text("")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "not reloaded, the old one holds: password_file" in daemon.log(), "the refusal")
        assert get(url, login="prometheus:new", context=renewed).status == 200


def test_with_client_certificates_nobody_else_is_let_in(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path, "server")
    client, client_key = certificate(tmp_path, "client")
    endpoint = Endpoint(config(tmp_path, certfile=crt, keyfile=key, client_cafile=client), Metrics().registry)
    try:
        context = ssl.create_default_context(cafile=str(crt))
        with pytest.raises(OSError):
            get(f"{endpoint.url}/metrics", context=context)
        context.load_cert_chain(client, client_key)
        assert get(f"{endpoint.url}/metrics", context=context).status == 200
    finally:
        endpoint.close()


def test_what_is_wrong_with_certificate_and_password_is_told_at_the_start(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path, "server")
    _, other = certificate(tmp_path, "other")
    absent = tmp_path / "absent"
    cases: list[tuple[dict[str, Path | str | None], str]] = [
        ({"certfile": absent}, "certfile .*absent: No such file"),
        ({"certfile": crt, "keyfile": other}, "certfile .*, keyfile .*mismatch"),
        ({"certfile": crt}, r"certfile .*server\.crt: "),
        ({"keyfile": key}, "no meaning without certfile"),
        ({"certfile": crt, "keyfile": key, "client_cafile": absent}, "client_cafile .*No such file"),
        ({"password_file": absent}, "password_file .*No such file"),
    ]
    for changes, says in cases:
        with pytest.raises(ServiceError, match=re.compile(says, re.IGNORECASE)):
            Endpoint(config(tmp_path, **changes), Metrics().registry)
    for content, mode, says in (
        ("a:b", 0o644, "everybody can read or write it; chmod o="),
        ("ab", 0o600, "expected one line USER:PASSWORD"),
        ("a:b\nc:d\n", 0o600, "expected one line"),
        (":b", 0o640, "expected one line"),
    ):
        with pytest.raises(ServiceError, match=says):
            Endpoint(config(tmp_path, password_file=password(tmp_path, content, mode)), Metrics().registry)


def test_more_clients_than_there_is_room_for_are_turned_away_and_then_let_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.endpoint.MAX_CLIENTS", 2)
    endpoint = Endpoint(config(tmp_path), Metrics().registry)
    host, port = endpoint.url.partition("//")[2].split(":")
    try:
        with socket.create_connection((host, int(port))) as one, socket.create_connection((host, int(port))) as two:
            with socket.create_connection((host, int(port)), timeout=10) as three:
                assert three.recv(1) == b"", "closed at once"
            with pytest.raises(OSError):
                get(f"{endpoint.url}/metrics")
            for client in (one, two):
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
        wait_until(lambda: _answers(f"{endpoint.url}/metrics"), "room again")
    finally:
        endpoint.close()


def _answers(url: str) -> bool:
    try:
        return get(url).status == 200
    except OSError:
        return False


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_an_open_port_on_the_network_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    Endpoint(config(tmp_path, host=host), Metrics().registry).close()
    assert ("open to the network" in caplog.text) is warned


def raw(endpoint: Endpoint, request: bytes) -> bytes:
    """What comes back for these bytes, until the other side closes."""
    host, port = endpoint.url.partition("//")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=30) as one:
        one.sendall(request)
        one.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: one.recv(65536), b""))


def test_only_get_and_head_are_answered(tmp_path: Path) -> None:
    endpoint = Endpoint(config(tmp_path), Metrics().registry)
    try:
        assert b"mergecore_build_info" in raw(endpoint, b"GET /metrics HTTP/1.0\r\n\r\n")
        head = raw(endpoint, b"HEAD /metrics HTTP/1.0\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200 OK")
        assert head.endswith(b"\r\n\r\n")
        for method in (b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"X" * 1000):
            for path in (b"/metrics", b"/other"):
                answer = raw(endpoint, method + b" " + path + b" HTTP/1.0\r\n\r\n")
                assert answer.startswith(b"HTTP/1.0 405 "), answer
    finally:
        endpoint.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"<script>alert(1)</script>\r\n\r\n",
        b"GET <script> HTTP/1.0 SECRET\r\n\r\n",
        b"GET /<script>SECRET HTTP/1.0\r\n\r\n",
        b"GET /SECRET\x1b[31m HTTP/9.9\r\n\r\n",
        b"GET /" + b"SECRET" * 20_000 + b" HTTP/1.0\r\n\r\n",
        b"GET /metrics HTTP/1.0\r\nSECRET: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /metrics HTTP/1.0\r\n" + b"SECRET: x\r\n" * 200 + b"\r\n",
        b"\x16\x03\x01SECRET\r\n\r\n",
    ],
)
def test_a_bad_request_is_refused_without_a_word_of_it_and_without_versions(
    tmp_path: Path, request_bytes: bytes
) -> None:
    endpoint = Endpoint(config(tmp_path), Metrics().registry)
    try:
        answer = raw(endpoint, request_bytes)
        assert re.match(rb"(HTTP/1\.0 )?[45]\d\d\s", answer), answer
        for word in (b"SECRET", b"script", b"\x1b", b"Python", b"WSGI", b"alert"):
            assert word not in answer
    finally:
        endpoint.close()


def test_clients_that_trickle_have_bounded_time_and_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.endpoint.MAX_CLIENTS", 5)
    monkeypatch.setattr("service.endpoint.REQUEST_TIMEOUT", 3.0)
    endpoint = Endpoint(config(tmp_path), Metrics().registry)
    host, port = endpoint.url.partition("//")[2].split(":")
    before = threading.active_count()
    slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(30)]
    try:
        ended: set[int] = set()

        def trickle() -> bool:
            for i, one in enumerate(slow):
                try:
                    one.send(b"G")
                except OSError:
                    ended.add(i)
            assert threading.active_count() <= before + 5
            return len(ended) == len(slow)

        wait_until(trickle, "the end of all slow clients")
        assert get(f"{endpoint.url}/metrics").status == 200
    finally:
        for one in slow:
            one.close()
        endpoint.close()
