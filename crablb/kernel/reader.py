"""A socket's datagrams in an event loop that survives the socket's errors.

uvloop stops a reader for good once the socket reports an error (ENETDOWN of a packet socket whose link went down,
ENOBUFS of a netlink socket that overran): libuv ends the poll that saw POLLERR.  So the loop does not poll the socket
but an epoll instance that has it, which has no errors of its own (epoll(7)).
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from typing import Any

__all__ = ["Reader"]

#: Datagrams at a time: a flood must not keep the loop from everything else.
BATCH = 64


class Reader:
    """Reads ``sock``, which does not block, in the running event loop until :meth:`close`; the socket stays open.

    ``take`` gets each datagram and its sender; ``lost`` gets the error after which some may be missing: one of the
    socket, or one that ``take`` raised.
    """

    def __init__(
        self,
        sock: socket.socket,
        room: int,
        take: Callable[[bytes, Any], None],
        lost: Callable[[Exception], None],
    ) -> None:
        """``room``: bytes that a datagram may have."""
        self._sock, self._take, self._lost = sock, take, lost
        # Made now: later there may be no memory for one, and what waits would be asked for again and again.
        self._room = memoryview(bytearray(room))
        self._epoll = select.epoll()
        self._epoll.register(sock, select.EPOLLIN)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll, self._read)

    def _read(self) -> None:
        for _ in range(BATCH):
            try:
                size, sender = self._sock.recvfrom_into(self._room)
                self._take(bytes(self._room[:size]), sender)
            except BlockingIOError:
                return
            except Exception as error:
                self._lost(error)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll)
        self._epoll.close()
