"""HTTP connections in the daemon's event loop: uvicorn's protocol (h11), bounded in number, time and size.

Not by ``uvicorn.Server``: it takes the process's signals, and turns ten times a second.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import h11
import msgspec
import uvicorn.config
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from crablb import lasting
from crablb.api.types import Problems
from crablb.kernel import pins
from crablb.model import host_port

__all__ = ["Listener", "listen"]

#: Connections at a time to each listener: descriptors are left for the daemon.
CONNECTIONS = 64
#: Bytes of a request's line and headers.
HEAD = 16 << 10
#: Seconds that a request's line and headers may take, that an answer may take to be given and read, and that a
#: connection may be idle.
HEAD_TIME, ANSWER_TIME, IDLE_TIME = 10.0, 70.0, 30.0
#: Seconds that those who have connected have yet to ask, and to be answered, when another process listens.
LEAVE = 2.0
#: And between looks whether they are.
LOOK = 0.01

_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Type: application/json\r\n"
_BUSY_BODY = b'{"problems":["too many connections; close some, or try again later"]}'
BUSY = _BUSY + b"Content-Length: %d\r\n\r\n" % len(_BUSY_BODY) + _BUSY_BODY

#: What uvicorn has to say is told to those who ask, not to the log: whoever connects could fill it.
_nowhere = logging.Logger("crablb-http", logging.CRITICAL + 1)


def _peer(transport: asyncio.BaseTransport) -> str:
    """Who is at the other end, for the log."""
    sock = transport.get_extra_info("socket")
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"uid {uid} ({pins.told(pid)})"
    try:
        host, port = sock.getpeername()[:2]
        return host_port(ip_address(host), port)
    except OSError:
        return "somebody who has gone"


def _refusal(problem: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an answer after which the connection ends."""
    body = msgspec.json.encode(Problems(problems=[problem]))
    length = b"%d" % len(body)
    return [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")], body


class _Protocol(H11Protocol):
    """A connection that does not stay when it does nothing."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.logger, self.access_log = _nowhere, False
        self._watch: asyncio.TimerHandle | None = None
        self._leaving = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self.connections.discard(self)
            transport.write(BUSY)
            transport.close()
            return
        self.app_state = {"peer": _peer(transport), "prolong": self.prolong}
        self.endless = False
        self.within(HEAD_TIME)

    def within(self, seconds: float) -> None:
        """Something has to happen in so many seconds."""
        if self._watch:
            self._watch.cancel()
        self._watch = self.loop.call_later(seconds, self.transport.abort)

    def prolong(self) -> None:
        """What is answered has no end, and the other side reads."""
        self.endless = True
        self.within(ANSWER_TIME)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and not self.cycle.response_complete:
            self.within(ANSWER_TIME)
            if self._leaving:
                self.shutdown()

    def leave(self) -> None:
        """Answer what was asked, or is asked for the first time, and end."""
        self._leaving = True
        if self.endless:
            self.transport.abort()
        elif self.cycle:
            self.shutdown()

    def send_400_response(self, msg: str) -> None:
        """As all that is refused.  The base class answers with text."""
        headers, body = _refusal(f"this is no HTTP request, or its line and headers are longer than {HEAD:,} bytes")
        with suppress(h11.LocalProtocolError):  # in the middle of an answer
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        self.within(IDLE_TIME)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch:
            self._watch.cancel()
        super().connection_lost(exc)


def _bounded(app: ASGIApp) -> ASGIApp:
    """What has come in one piece is as long as h11 was given it: it bounds what is not complete yet."""

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if len(scope["raw_path"]) + len(scope["query_string"]) + fields <= HEAD:
            return await app(scope, receive, send)
        headers, body = _refusal(f"the request's line and headers are longer than {HEAD:,} bytes")
        await send({"type": "http.response.start", "status": 431, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return bounded


class _Handshakes:
    """Takes connections and has them shake hands, so many at a time: a server of asyncio's counts none before its end.

    Whoever comes when there are as many waits in the backlog; each is over after ``HEAD_TIME``.
    """

    def __init__(self, sock: socket.socket, protocol: Callable[[], _Protocol], tls: ssl.SSLContext) -> None:
        self._sock, self._protocol, self._tls = sock, protocol, tls
        self._room = asyncio.Semaphore(CONNECTIONS)
        self._hands: set[asyncio.Task[None]] = set()
        self._task = lasting.task("handshakes", self._accept, lambda: None, lambda reason: None)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(self._sock)
            except BaseException:
                self._room.release()
                raise
            hands = loop.create_task(self._shake(connection))
            self._hands.add(hands)
            hands.add_done_callback(self._hands.discard)

    async def _shake(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            # What is no TLS, who has gone, who says nothing.
            with suppress(OSError, ssl.SSLError):
                await loop.connect_accepted_socket(
                    self._protocol, connection, ssl=self._tls, ssl_handshake_timeout=HEAD_TIME
                )
        finally:
            self._room.release()

    @property
    def shaking(self) -> bool:
        """Whether some have not done so yet."""
        return bool(self._hands)

    def close(self) -> None:
        self.leave()
        for hands in self._hands:
            hands.cancel()

    def leave(self) -> None:
        """Take no more; those who shake hands go on."""
        self._task.cancel()
        self._sock.close()


class Listener:
    """Made by :func:`listen`."""

    def __init__(self, server: asyncio.AbstractServer | _Handshakes, state: ServerState) -> None:
        self._server, self._state = server, state

    async def leave(self) -> None:
        """Take no more connections, and answer those who have asked, or do so soon; at most :data:`LEAVE` seconds."""
        if isinstance(self._server, _Handshakes):
            self._server.leave()
        else:
            self._server.close()
        end = time.monotonic() + LEAVE
        while time.monotonic() < end:
            for connection in list(self._state.connections):
                connection.leave()  # type: ignore[union-attr]
            if not (self._state.connections or (isinstance(self._server, _Handshakes) and self._server.shaking)):
                break
            await asyncio.sleep(LOOK)

    async def close(self) -> None:
        """Take no more connections, and end those there are.  Idempotent."""
        self._server.close()
        for connection in list(self._state.connections):
            if connection.transport:
                connection.transport.abort()
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def listen(app: Any, sock: socket.socket, tls: ssl.SSLContext | None = None) -> Listener:
    """Serve an ASGI application at a bound socket, which is the listener's from now on."""
    config = uvicorn.config.Config(
        _bounded(app),
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEAD,
        timeout_keep_alive=int(IDLE_TIME) - 5,
        backlog=CONNECTIONS,
    )
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()

    def protocol() -> _Protocol:
        return _Protocol(config, state, {}, loop)

    if tls:
        return Listener(_Handshakes(sock, protocol, tls), state)
    if sock.family == socket.AF_UNIX:
        # Python 3.13 would remove its file with it: that is others' business, also another process'.
        more: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        return Listener(await loop.create_unix_server(protocol, sock=sock, backlog=CONNECTIONS, **more), state)
    return Listener(await loop.create_server(protocol, sock=sock, backlog=CONNECTIONS), state)
