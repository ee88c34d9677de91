"""Sockets that are listened at for people and programs."""

from __future__ import annotations

import socket

from crablb.errors import KernelError, unbound
from crablb.model import Address, host_port

__all__ = ["bind", "listen"]


def bind(what: str, address: Address, port: int) -> socket.socket:
    """A socket for ``what`` to listen at.  Raises :class:`KernelError`."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(address), port))
    except OSError as error:
        sock.close()
        raise _refused(what, address, port, error) from None
    return sock


def listen(sock: socket.socket, what: str, address: Address, port: int, backlog: int) -> None:
    """Have what :func:`bind` has made take connections.  Raises :class:`KernelError`."""
    try:
        sock.listen(backlog)
    except OSError as error:
        raise _refused(what, address, port, error) from None


def _refused(what: str, address: Address, port: int, error: OSError) -> KernelError:
    return KernelError(f"cannot serve {what} at {host_port(address, port)}: {unbound(error, port)}")
