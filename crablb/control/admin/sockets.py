"""Where the API's UNIX socket is: ``/run/crablb``, by the interfaces' names.

Interfaces have the same names in many network namespaces, so the socket is named by the namespace (as locks and pins
are), ``netns-<cookie>-eth0.sock``, and each interface has a link to it by its plain name, ``eth0.sock``, which is whose
load balancer took it first.  Commands ask by the name of the namespace that they run in.
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
    """For who owns the interfaces (:func:`crablb.kernel.pins.own`): what is there by the namespace's name is stale."""

    def __init__(self, interfaces: Sequence[str], group: int | None) -> None:
        namespace = pins.namespace()
        self._paths = [pins.RUN / f"{namespace}-{name}.sock" for name in interfaces]
        self._plain = [pins.RUN / f"{name}.sock" for name in interfaces]
        self._group = group
        self._made: tuple[int, int] | None = None
        #: What clients may take.
        self.names: list[Path] = []

    def bind(self) -> socket.socket:
        """The socket, which nobody sees yet.  Raises ``OSError``."""
        pins.RUN.mkdir(parents=True, exist_ok=True)
        hidden = self._hidden
        hidden.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.bind(str(hidden))
            os.chmod(hidden, 0o600)
            if self._group is not None:
                try:
                    os.chown(hidden, -1, self._group)
                    os.chmod(hidden, 0o660)
                except OSError as error:  # not root, and not a member
                    log.warning("the API's socket is not the group's", group=self._group, reason=error.strerror)
            found = os.stat(hidden)
            self._made = found.st_dev, found.st_ino
        except OSError:
            sock.close()
            hidden.unlink(missing_ok=True)
            raise
        return sock

    @property
    def _hidden(self) -> Path:
        return self._paths[0].with_suffix(".new")

    def show(self) -> None:
        """Have it there by its names; it listens.  Raises ``OSError``."""
        first, *others = self._paths
        self._hidden.replace(first)
        for path in others:
            _link(path, first)
        self.names = list(self._paths)
        for plain in self._plain:
            if plain.is_symlink() or not plain.exists():
                theirs = plain.exists() and plain.resolve() not in self._paths and _answers(plain)
                if not theirs:
                    _link(plain, first)
                    self.names.append(plain)
                    continue
            log.info("the API's plain name is another's", name=str(plain), instead=str(first))

    def remove(self) -> None:
        """Leave what is another one's by now.  Idempotent."""
        first = self._paths[0]
        with suppress(OSError):
            found = os.stat(first)
            if (found.st_dev, found.st_ino) != self._made:
                return
            for path in (*self._plain, *self._paths[1:]):
                if path.is_symlink() and path.resolve() == first:
                    path.unlink()
            first.unlink()
        self._hidden.unlink(missing_ok=True)


def _link(path: Path, to: Path) -> None:
    """A link in place of what is there, without a moment between the two."""
    new = path.with_suffix(".link")
    new.unlink(missing_ok=True)
    new.symlink_to(to.name)
    new.replace(path)
