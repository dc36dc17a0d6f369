"""The HTTP port: metrics for Prometheus, with TLS and a password where configured.

What is served comes from prometheus-client. Its own server is not used: it has no passwords, and one client that is
slow to shake hands would keep all others out.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from service.config import ServeConfig
from service.errors import ServiceError

log = logging.getLogger("mergecore.service")

HEADERS = [
    ("Server", "mergecore"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Referrer-Policy", "no-referrer"),
]
CLIENT_TIMEOUT = 10.0
"""Seconds that a client may keep silent."""
REQUEST_TIMEOUT = 30.0
"""Seconds that a client has for a request and its answer, however busy it seems."""
MAX_CLIENTS = 64

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Endpoint:
    """The open port; `url` tells where it is. Raises ServiceError if it cannot be had as configured."""

    def __init__(self, config: ServeConfig, registry: CollectorRegistry) -> None:
        self._config = config
        self._credentials: bytes | None = None
        self._context = _tls(config)
        self.reload()
        try:
            family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
            kind: type[_Server] = type("Server", (_Server,), {"address_family": family})
            self._server: WSGIServer = make_server(
                config.host, config.port, self._app(make_wsgi_app(registry)), kind, _Handler
            )
        except OSError as error:
            raise ServiceError(
                f"cannot serve metrics on {config.host} port {config.port}: {error.strerror or error}; "
                "choose another address with --host and --port (port 0: any free one)"
            ) from error
        if self._context is not None:  # each connection's own thread shakes hands
            self._server.socket = self._context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        if not (self._context and self._credentials) and not _is_loopback(config.host):
            log.warning("metrics on %s are open to the network: configure certfile and password_file", config.host)
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"{'https' if self._context else 'http'}://{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="endpoint", daemon=True).start()

    def reload(self) -> None:
        """Read certificate and password again: for the next connections. Raises ServiceError."""
        if self._context is not None:
            _load(self._context, self._config)
        if self._config.password_file is not None:
            self._credentials = _credentials(self._config.password_file)

    def close(self) -> None:
        """Close the port."""
        stopper = threading.Thread(target=self._server.shutdown)
        stopper.start()
        address = self._server.server_address[:2]
        with contextlib.suppress(OSError):  # it looks whether to stop every half second, or after a connection
            socket.create_connection((str(address[0]), int(address[1])), timeout=1).close()
        stopper.join()
        self._server.server_close()

    def _app(self, metrics: App) -> App:
        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            def start(status: str, headers: list[tuple[str, str]]) -> Any:
                return start_response(status, [*headers, *HEADERS])

            if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                start("405 Method Not Allowed", [("Allow", "GET, HEAD"), _PLAIN])
                return [b"only GET and HEAD\n"]
            if not self._may(environ.get("HTTP_AUTHORIZATION", "")):
                start("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="mergecore", charset="UTF-8"'), _PLAIN])
                return [b"a user and a password are needed\n"]
            if environ.get("PATH_INFO") == "/metrics":
                answer = metrics({**environ, "REQUEST_METHOD": "GET"}, start)
                return answer if environ["REQUEST_METHOD"] == "GET" else []
            start("404 Not Found", [_PLAIN])
            return [b"metrics are at /metrics\n"]

        return app

    def _may(self, authorization: str) -> bool:
        if self._credentials is None:
            return True
        scheme, _, given = authorization.partition(" ")
        try:
            decoded = base64.b64decode(given.strip(), validate=True)
        except ValueError:
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(decoded, self._credentials)


_PLAIN = ("Content-Type", "text/plain; charset=utf-8")


class _Server(ThreadingMixIn, WSGIServer):
    """A thread per connection, but not more than MAX_CLIENTS: descriptors are the daemon's, too."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._room = threading.BoundedSemaphore(MAX_CLIENTS)
        self._since: dict[socket.socket, float] = {}
        super().__init__(*arguments)

    def service_actions(self) -> None:
        """Twice a second: ends the connections of clients that take too long."""
        latest = time.monotonic() - REQUEST_TIMEOUT
        for request, since in list(self._since.items()):
            if since < latest:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread sees the end

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            self._since[request] = time.monotonic()
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._since.pop(request, None)
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection from %s ended early", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT
    server_version, sys_version = "mergecore", ""
    error_message_format, error_content_type = "%(code)d\n", "text/plain; charset=utf-8"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """For requests that are no HTTP: nothing of them comes back."""
        super().send_error(code)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _tls(config: ServeConfig) -> ssl.SSLContext | None:
    if config.certfile is None:
        if config.keyfile is not None or config.client_cafile is not None:
            raise ServiceError("keyfile and client_cafile have no meaning without certfile")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if config.client_cafile is not None:
        try:
            context.load_verify_locations(config.client_cafile)
        except OSError as error:
            raise ServiceError(f"client_cafile {config.client_cafile}: {error.strerror or error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(context: ssl.SSLContext, config: ServeConfig) -> None:
    assert config.certfile is not None
    try:
        context.load_cert_chain(config.certfile, config.keyfile, password="")  # never ask at the terminal
    except OSError as error:
        files = f"certfile {config.certfile}" + (f", keyfile {config.keyfile}" if config.keyfile else "")
        raise ServiceError(f"{files}: {error.strerror or error}") from error


def _credentials(path: Path) -> bytes:
    """ "user:password" of a file that not everybody can read."""
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ServiceError(f"password_file {path}: {error.strerror}") from error
    if mode & 0o007:
        raise ServiceError(f"password_file {path}: everybody can read or write it; chmod o= {path}")
    lines = content.splitlines()
    user, _, password = lines[0].partition(b":") if lines else (b"", b"", b"")
    if len(lines) != 1 or not user or not password:
        raise ServiceError(f"password_file {path}: expected one line USER:PASSWORD")
    return lines[0]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
