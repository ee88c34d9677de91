"""Where the API's UNIX socket is: ``/run/crablb``, by the interfaces' names.

Interfaces have the same names in many network namespaces, and may get others.  So the socket has a name of its own,
and links lead to it: ``netns-<cookie>-eth0.sock`` for each interface, by which commands that run in that namespace ask,
and ``eth0.sock``, whose load balancer took it first.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from crablb.kernel import pins

__all__ = ["Place"]

log = structlog.get_logger()

#: Connections that wait to be taken.
BACKLOG = 64


def _answers(path: Path) -> bool:
    """Whether somebody listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(str(path))
        except BlockingIOError:  # there are many who wait
            return True
        except OSError:
            return False
    return True


class Place:
    """For who owns the interfaces (:func:`crablb.kernel.pins.own`): what others left at their names is stale."""

    def __init__(self, interfaces: Sequence[str], group: int | None, path: Path | None = None) -> None:
        """``path``: of the socket that another process listened at which this one goes on for."""
        self._namespace = pins.namespace()
        self._interfaces = interfaces
        self._group = group
        self._path = path or pins.RUN / f"{self._namespace}-{interfaces[0]}.{os.getpid()}.api"

    @property
    def path(self) -> Path:
        """Of the socket itself."""
        return self._path

    def bind(self) -> socket.socket:
        """The socket, which listens, and has no name yet that anybody asks by.  Raises ``OSError``."""
        pins.RUN.mkdir(parents=True, exist_ok=True)
        for path in pins.RUN.glob(f"{self._namespace}-{self._interfaces[0]}.*.api"):
            if not _answers(path):
                path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.bind(str(self._path))
            self.permit()
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            self._path.unlink(missing_ok=True)
            raise
        return sock

    def permit(self) -> None:
        """Who may ask.  Raises ``OSError``."""
        os.chmod(self._path, 0o600)
        if self._group is not None:
            try:
                os.chown(self._path, -1, self._group)
                os.chmod(self._path, 0o660)
            except OSError as error:  # not root, and not a member
                log.warning("the API's socket is not the group's", group=self._group, reason=error.strerror)

    def show(self) -> list[Path]:
        """Have it there by its names, which are returned.  Raises ``OSError``."""
        # Of namespaces that are no more; of processes that were killed before a link had its name.
        for path in (*pins.RUN.glob("*.sock"), *pins.RUN.glob("*.sock.*.new")):
            if path.is_symlink() and not path.exists():
                path.unlink(missing_ok=True)
        return [path for name in self._interfaces for path in self.name(name)]

    def name(self, interface: str) -> list[Path]:
        """Have it there by an interface's name.  Raises ``OSError``."""
        own, plain = pins.RUN / f"{self._namespace}-{interface}.sock", pins.RUN / f"{interface}.sock"
        _link(own, self._path)
        if (plain.exists() and not plain.is_symlink()) or (_answers(plain) and not plain.samefile(self._path)):
            log.info("the API's plain name is another's", name=str(plain), instead=str(own))
            return [own]
        _link(plain, self._path)
        return [own, plain]

    def remove(self) -> None:
        """With the names that still lead to it.  Idempotent."""
        with suppress(OSError):
            for path in pins.RUN.glob("*.sock"):
                if path.is_symlink() and os.readlink(path) == self._path.name:
                    path.unlink()
            self._path.unlink()


def _link(path: Path, to: Path) -> None:
    """A link in place of what is there, without a moment between the two.  One that is there needs no room."""
    if path.is_symlink() and os.readlink(path) == to.name:
        return
    with pins.replacing(path, f".{os.getpid()}.new") as new:
        new.symlink_to(to.name)
