"""HTTP connections in the daemon's event loop: uvicorn's protocol (h11), bounded in number, time and size.

Not by ``uvicorn.Server``: it takes the process's signals, and turns ten times a second.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from ipaddress import ip_address
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from crablb.model import host_port

__all__ = ["Listener", "listen"]

#: Connections at a time to each listener: descriptors are left for the daemon.
CONNECTIONS = 64
#: Bytes of a request's line and headers.
HEAD = 16 << 10
#: Seconds that a request's line and headers may take, that an answer may take to be given and read, and that a
#: connection may be idle.
HEAD_TIME, ANSWER_TIME, IDLE_TIME = 10.0, 60.0, 30.0

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
        return f"uid {uid} (process {pid})"
    try:
        host, port = sock.getpeername()[:2]
        return host_port(ip_address(host), port)
    except OSError:
        return "somebody who has gone"


class _Protocol(H11Protocol):
    """A connection that does not stay when it does nothing."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.logger, self.access_log = _nowhere, False
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self.connections.discard(self)
            transport.write(BUSY)
            transport.close()
            return
        self.app_state = {"peer": _peer(transport), "prolong": self.prolong}
        self.within(HEAD_TIME)

    def within(self, seconds: float) -> None:
        """Something has to happen in so many seconds."""
        if self._watch:
            self._watch.cancel()
        self._watch = self.loop.call_later(seconds, self.transport.abort)

    def prolong(self) -> None:
        """What is answered is long, and the other side reads."""
        self.within(ANSWER_TIME)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and not self.cycle.response_complete:
            self.within(ANSWER_TIME)

    def on_response_complete(self) -> None:
        self.within(IDLE_TIME)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch:
            self._watch.cancel()
        super().connection_lost(exc)


class Listener:
    """Made by :func:`listen`."""

    def __init__(self, server: asyncio.AbstractServer, state: ServerState) -> None:
        self._server, self._state = server, state

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
        app,
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

    more: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": HEAD_TIME} if tls else {}
    if sock.family == socket.AF_UNIX:
        server: asyncio.AbstractServer = await loop.create_unix_server(protocol, sock=sock, backlog=CONNECTIONS)
    else:
        server = await loop.create_server(protocol, sock=sock, backlog=CONNECTIONS, **more)
    return Listener(server, state)
