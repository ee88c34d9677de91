"""What a load balancer shows to whoever looks: metrics for Prometheus, and a status page.  It changes nothing.

What it is made with (starlette, uvicorn, prometheus_client) is imported when the first packet can have been served,
by a thread.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

import structlog

from crablb import lasting
from crablb.control.estate import Door, Heir
from crablb.control.metrics.facts import Gatherer
from crablb.control.ports import bind, listen
from crablb.errors import KernelError, why
from crablb.model import Config, host_port

if TYPE_CHECKING:
    from crablb.control.admin.server import Listener

__all__ = ["Metrics"]

log = structlog.get_logger()

#: Connections that wait to be taken.
BACKLOG = 64


class Metrics:
    """Metrics and the status page at ``metrics_listen``, if there is one.

    Raises :class:`KernelError` at once if that cannot be bound.
    """

    def __init__(self, gatherer: Gatherer, config: Config, heir: Heir | None = None) -> None:
        """``heir``: what there is of another process, in whose place this one serves."""
        self._gatherer, self._address = gatherer, config.metrics_listen
        self._socket: socket.socket | None = None
        if self._address:
            given = heir.door("metrics", host_port(*self._address)) if heir else None
            self._socket = given or bind("metrics", *self._address)
        self._starting: asyncio.Task[None] | None = None
        self._listener: Listener | None = None
        self._hindered = ""  # why they are not served now

    def start(self) -> None:
        """From now on whoever connects is answered, as soon as what is needed for it has been imported."""
        if self._socket:
            try:
                self._listen()
            except KernelError as error:
                self._unserved(error)
            self._starting = asyncio.create_task(self._start())

    def _listen(self) -> socket.socket:
        assert self._address
        self._socket = self._socket or bind("metrics", *self._address)
        listen(self._socket, "metrics", *self._address, BACKLOG)
        return self._socket

    async def _start(self) -> None:
        """Until they are served: what hinders may pass."""
        pauses = lasting.Pauses()
        while True:
            try:
                sock = self._socket or self._listen()
                for name in ("admin.server", "metrics.app"):
                    await asyncio.to_thread(import_module, f"crablb.control.{name}")
                from crablb.control.admin import server
                from crablb.control.metrics.app import make

                self._listener = await server.listen(make(self._gatherer), sock)
            except Exception as error:
                self._unserved(error)
            else:
                assert self._address
                self._hindered = ""
                log.info("metrics are served", at=f"http://{host_port(*self._address)}/")
                return
            await asyncio.sleep(pauses.after(0))

    def _unserved(self, error: Exception) -> None:
        """Whatever it is, packets are served on."""
        told = why(error)
        if str(told) != self._hindered:
            self._hindered = str(told)
            log.error("metrics are not served", **told)
        self.abandon()

    def offer(self) -> dict[Door, int]:
        """The socket that is listened at."""
        if not (self._socket and self._address):
            return {}
        return {Door("metrics", host_port(*self._address)): self._socket.fileno()}

    async def leave(self) -> None:
        """Another process listens there: answer who has asked already, and leave the rest to it."""
        if self._listener:
            await self._listener.leave()
        await self.close()

    async def close(self) -> None:
        """Idempotent."""
        if self._starting:
            self._starting.cancel()
            with suppress(asyncio.CancelledError):
                await self._starting
        if self._listener:
            await self._listener.close()
            self._listener = None
        self.abandon()

    def abandon(self) -> None:
        """Leave no socket behind, where there is no event loop any more to :meth:`close` in."""
        if self._socket:
            self._socket.close()
            self._socket = None
