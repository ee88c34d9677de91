"""sd_notify(3): tell the service manager how we are, by the datagram socket that it named in NOTIFY_SOCKET."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable

import structlog

__all__ = ["Watchdog", "asked", "notify", "status"]

log = structlog.get_logger()

#: Seconds that a service manager may leave a word unread.
PATIENCE = 1.0
#: What passes, and seconds before each try: a service manager waits in vain for a word that is lost.
PASSING = {errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EINTR}
AGAIN = (0.0, 0.01, 0.1)
#: How often within the service manager's patience we say that we live.
OFTEN = 4


def asked() -> bool:
    """Whether a service manager wants to be told."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(state: str) -> bool:
    """Send ``state`` ("READY=1", "STOPPING=1", ...; several by lines).  False if nobody asked, or it cannot be."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return False
    for pause in AGAIN:
        time.sleep(pause)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(PATIENCE)
                sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
            return True
        except OSError as error:
            if error.errno not in PASSING:
                break
    return False


def status(text: str) -> bool:
    """Say in a line what ``systemctl status`` is to show."""
    return notify(f"STATUS={' '.join(text.split())}")


def _expected() -> float:
    """Seconds without a word after which the service manager takes us for hung; 0: it does not ask.

    WATCHDOG_PID is not looked at: it names the process that was started, which a takeover has replaced.
    """
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isascii() and text.isdigit() and os.environ.get("NOTIFY_SOCKET") else 0.0


class Watchdog:
    """Says that we live, if all threads do."""

    def __init__(self, late: Callable[[], list[str]], say: Callable[[], object] = lambda: notify("WATCHDOG=1")) -> None:
        """``late`` names the threads that have not shown life since it named none."""
        self._late, self._say = late, say
        self._missed = 0
        #: Seconds between two :meth:`look`; None: nobody asks.
        self.interval = _expected() / OFTEN or None

    def look(self) -> None:
        if not (late := self._late()):
            self._missed = 0
            self._say()
            return
        self._missed += 1
        if self._missed == OFTEN - 1:  # before, they may merely sleep, or have no time
            log.error("threads have hung; the service manager ends and restarts this process", threads=late)
