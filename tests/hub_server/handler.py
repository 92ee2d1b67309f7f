"""The sockets' side: reads requests, injects faults, writes answers. What is answered is the routes' business."""

from __future__ import annotations

import contextlib
import io
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import parse_qs, urlsplit

from hub_server.errors import ConnectionDropped, HubError
from hub_server.messages import Call, Reply, Request, Role, json_reply
from hub_server.routing import Router

if TYPE_CHECKING:
    from hub_server.server import HubServer

_PIECE = 1 << 20


class Origin(ThreadingHTTPServer):
    """One of the three origins, on a port of its own."""

    request_queue_size = 128

    def __init__(self, hub: HubServer, role: Role, router: Router, port: int) -> None:
        self.hub, self.role, self.router = hub, role, router
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The origin as clients write it."""
        return f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        """Remember the connection: a client may hold it open for long."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """Forget a connection that ended."""
        self._open.discard(request)
        super().shutdown_request(request)

    def stop(self) -> None:
        """Close the port and every connection, and wait for what is being answered."""
        self.shutdown()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Show a bug of this server; clients that go away are none."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of a body: [start, end)."""

    start: int
    end: int


def wanted_span(header: str | None, size: int) -> _Span | None:
    """Return the part of a body that a header `Range` asks for; None where it asks for all of it."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        return _Span(max(size - int(match[2]), 0), size)
    span = _Span(int(match[1]), min(int(match[2]) + 1, size) if match[2] else size)
    if span.start >= size:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return span


class _Handler(BaseHTTPRequestHandler):
    server: Origin
    protocol_version = "HTTP/1.1"
    server_version = "hub_server"
    disable_nagle_algorithm = True  # an answer goes out in two writes, of which the second would wait for the client

    def log_message(self, *_: object) -> None:
        """Say nothing; requests are listed in `HubServer.requests`."""

    def _answer(self) -> None:
        hub = self.server.hub
        self.record, self.body_read = self._recorded(), False
        fault = self.record.fault
        try:
            if fault is not None and fault.delay:
                hub.stopping.wait(fault.delay)
            if fault is not None:
                self._interrupt()
            reply = self._reply()
            if fault is not None and fault.lost_response:
                raise ConnectionDropped
            self._send(reply)
        except ConnectionDropped:
            self._drop()
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _recorded(self) -> Request:
        record = Request(
            role=self.server.role,
            method=self.command,
            path=self.path,
            range=self.headers.get("Range"),
            token_present="Authorization" in self.headers,
            started=time.time(),
        )
        self.server.hub.arrive(record)
        return record

    def _interrupt(self) -> None:
        """Drop the connection before the request is answered, if that is the fault."""
        fault = self.record.fault
        assert fault is not None
        if fault.refuses:
            raise ConnectionDropped
        if fault.drop_after is not None and self._has_body():
            for _ in self._pieces(limit=fault.drop_after):
                pass
            raise ConnectionDropped

    def _reply(self) -> Reply:
        fault, hub = self.record.fault, self.server.hub
        url = urlsplit(self.path)
        call = Call(
            hub=hub,
            method=self.command,
            path=url.path,
            query={name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()},
            headers=self.headers,
            pieces=self._pieces,
        )
        try:
            if fault is not None and fault.status is not None:
                raise HubError(fault.status, "This fault was ordered", headers=fault.headers)
            if self.server.role == "hub":
                hub.check_rate()
            reply = self.server.router.answer(call)
        except HubError as err:
            headers = {"X-Error-Message": err.message} | ({"X-Error-Code": err.code} if err.code else {})
            reply = json_reply({"error": err.message}, err.status, {**headers, **err.headers})
        if not self.body_read and self._has_body():
            for _ in self._pieces():  # what nobody wanted would be taken for the next request
                pass
        return reply

    def _has_body(self) -> bool:
        return "Transfer-Encoding" in self.headers or int(self.headers.get("Content-Length", 0)) > 0

    def _pieces(self, limit: int | None = None) -> Iterator[bytes]:
        """Yield the body as it arrives, at most `limit` bytes of it."""
        self.body_read = True
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            yield from self._read(int(self.headers.get("Content-Length", 0)), limit)
            return
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield from self._read(size, limit)
            if limit is not None and self.record.received >= limit:
                return
            self.rfile.readline()
        self.rfile.readline()

    def _read(self, size: int, limit: int | None) -> Iterator[bytes]:
        if limit is not None:
            size = min(size, limit - self.record.received)
        while size > 0:
            piece = self.rfile.read(min(size, _PIECE))
            if not piece:
                raise ConnectionDropped  # by the client
            size -= len(piece)
            self.record.received += len(piece)
            yield piece

    def _send(self, reply: Reply) -> None:
        body = reply.body
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        headers: dict[str, str] = {**reply.headers}
        status, span = reply.status, None
        if status == 200 and isinstance(body, Path):
            headers["Accept-Ranges"] = "bytes"
            try:
                span = wanted_span(self.record.range, size)
            except HubError as err:
                status, body, size, headers = err.status, b"", 0, err.headers
        if span is not None:
            status = 206
            headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{size}"
        span = span or _Span(0, size)
        self._send_head(status, headers, span)
        if self.command != "HEAD":
            with body.open("rb") if isinstance(body, Path) else io.BytesIO(body) as file:
                self._send_body(file, span)

    def _send_head(self, status: int, headers: Mapping[str, str], span: _Span) -> None:
        fault = self.record.fault
        if fault is not None and fault.drop_after is not None and self.command == "HEAD":
            raise ConnectionDropped  # it has no body that could be cut
        self.record.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(span.end - span.start)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_body(self, file: BinaryIO, span: _Span) -> None:
        fault = self.record.fault
        corrupt_at = fault.corrupt_at if fault is not None else None
        end = span.end
        if fault is not None and fault.drop_after is not None:
            end = min(end, span.start + fault.drop_after)
        file.seek(span.start)
        for start in range(span.start, end, _PIECE):
            piece = bytearray(file.read(min(_PIECE, end - start)))
            if corrupt_at is not None and start <= corrupt_at < start + len(piece):
                piece[corrupt_at - start] ^= 0xFF
            self.wfile.write(piece)
            self.record.sent += len(piece)
        if end < span.end:
            raise ConnectionDropped

    def _drop(self) -> None:
        """End the connection, with RST if the fault says so."""
        self.close_connection = True
        fault = self.record.fault
        with contextlib.suppress(OSError):
            self.wfile.flush()
            if fault is not None and fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self._finish()

    def _finish(self) -> None:
        """Send FIN. What the client still sends is read first: closing with bytes unread would send RST."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(0.2)
        left = _PIECE
        while left > 0 and (piece := self.connection.recv(1 << 16)):
            left -= len(piece)
