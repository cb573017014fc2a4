"""An HTTP proxy in front of one server that delays, refuses, cuts and loses on request, and notes what passes through it.

    with FaultProxy(server.endpoint) as proxy:
        proxy.add(Fault("status", status=503, code="SlowDown", method="GET", times=2))

Faults are used up in order: the first one that fits a request and has times left is the one that befalls it. As a
program, `python -m tests.fault_proxy ENDPOINT PORT LATENCY_SECONDS` only delays.
"""

from __future__ import annotations

import http.client
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

CHUNK = 1 << 18


@dataclass(slots=True)
class Fault:
    """One kind of trouble, for the next `times` requests of this method whose path and query contain `part`."""

    kind: Literal["status", "cut request", "cut reply", "lose reply", "hang"]
    """An error reply that the server never sees; a connection cut after `after` bytes of the request's or the reply's
    body; a reply lost after the server has done what was asked; no reply at all until `hang_seconds` are over."""
    method: str = ""
    part: str = ""
    times: int = 1
    status: int = 500
    code: str = "InternalError"
    after: int = 0
    hang_seconds: float = 60.0


class FaultProxy:
    """A proxy on a free port of 127.0.0.1. `requests` counts the methods seen, `log` holds (method, path)."""

    def __init__(self, endpoint: str, port: int = 0) -> None:
        self._upstream = urlsplit(endpoint).netloc
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._server: ThreadingHTTPServer | None = None
        self.latency = 0.0
        """Seconds added before every request is passed on."""
        self.bytes_per_second = 0.0
        """Limit for the bodies of each connection; 0 is none."""
        self.log: list[tuple[str, str]] = []
        self.bytes_in = 0
        """Bytes of request bodies."""
        self.up(port)
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.down()

    @property
    def requests(self) -> Counter[str]:
        """Method -> how often it was asked for."""
        with self._lock:
            return Counter(method for method, _ in self.log)

    def add(self, *faults: Fault) -> None:
        """Let these happen, after those that were added before."""
        with self._lock:
            self._faults += faults

    def clear(self) -> None:
        """Forget the faults that are left, and what was noted."""
        with self._lock:
            self._faults.clear()
            self.log.clear()
            self.bytes_in = 0

    def up(self, port: int = 0) -> None:
        """Listen again, on the same port as before."""
        if self._server is None:
            port = getattr(self, "_port", port)
            self._server = _Server(("127.0.0.1", port), _handler(self))
            self._port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and cut those that there are."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.cut()

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Note a request, and what is to befall it."""
        with self._lock:
            self.log.append((method, path))
            for fault in self._faults:
                if fault.times > 0 and fault.method in ("", method) and fault.part in path:
                    fault.times -= 1
                    return fault
        return None

    def connect(self) -> http.client.HTTPConnection:
        """A connection to the server."""
        return http.client.HTTPConnection(self._upstream, timeout=120)

    def throttle(self, count: int) -> None:
        """Take as long as these bytes may take."""
        if self.bytes_per_second:
            time.sleep(count / self.bytes_per_second)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, *arguments: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to report."""

    def cut(self) -> None:
        """Close every connection."""
        for request in list(self._open):
            try:
                request.shutdown(2)
            except OSError:
                continue


class _Cut(Exception):
    """The connection ends here."""


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1
        upstream: http.client.HTTPConnection | None = None

        def log_message(self, *_: object) -> None:
            pass

        def handle_expect_100(self) -> bool:
            super().handle_expect_100()
            self.wfile.flush()
            return True

        def serve(self) -> None:
            fault = proxy.fault_for(self.command, self.path)
            try:
                if proxy.latency:
                    time.sleep(proxy.latency)
                self.pass_on(fault)
            except (_Cut, OSError, http.client.HTTPException):
                self.close_connection = True
                if self.upstream is not None:
                    self.upstream.close()
                    self.upstream = None

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

        def pass_on(self, fault: Fault | None) -> None:
            kind = fault.kind if fault else ""
            length = int(self.headers.get("Content-Length") or 0)
            if fault and kind == "hang":
                time.sleep(fault.hang_seconds)
                raise _Cut
            if fault and kind == "status":
                self.drop(length)
                self.refuse(fault)
                return
            if self.upstream is None:
                self.upstream = proxy.connect()
            self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    self.upstream.putheader(name, value)
            self.upstream.endheaders()
            self.send_body(length, fault.after if fault and kind == "cut request" else None)
            reply = self.upstream.getresponse()
            if kind == "lose reply":
                reply.read()
                raise _Cut
            self.send_reply(reply, fault.after if fault and kind == "cut reply" else None)

        def drop(self, length: int) -> None:
            while length > 0 and (chunk := self.rfile.read(min(CHUNK, length))):
                length -= len(chunk)

        def refuse(self, fault: Fault) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>no</Message></Error>".encode()
            self.send_response(fault.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.wfile.flush()

        def send_body(self, length: int, cut: int | None) -> None:
            assert self.upstream is not None
            sent = 0
            while sent < length:
                wanted = min(CHUNK, length - sent) if cut is None else min(CHUNK, length - sent, cut - sent)
                if wanted <= 0:
                    raise _Cut
                chunk = self.rfile.read(wanted)
                if not chunk:
                    raise _Cut
                proxy.throttle(len(chunk))
                self.upstream.send(chunk)
                proxy.bytes_in += len(chunk)
                sent += len(chunk)

        def send_reply(self, reply: http.client.HTTPResponse, cut: int | None) -> None:
            length = reply.getheader("Content-Length")
            whole = reply.read() if length is None and self.command != "HEAD" else None
            self.send_response_only(reply.status, reply.reason)
            for name, value in reply.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length if whole is None and length else str(len(whole or b"")))
            self.end_headers()
            sent = 0
            while chunk := whole if whole is not None and not sent else reply.read(CHUNK):
                chunk = chunk if cut is None else chunk[: cut - sent]
                proxy.throttle(len(chunk))
                self.wfile.write(chunk)
                sent += len(chunk)
                if cut is not None and sent >= cut:
                    self.wfile.flush()
                    raise _Cut
            self.wfile.flush()

    return Handler


def main() -> None:
    """Delay every request, until the process is ended."""
    proxy = FaultProxy(sys.argv[1], int(sys.argv[2]))
    proxy.latency = float(sys.argv[3])
    threading.Event().wait()


if __name__ == "__main__":
    main()
