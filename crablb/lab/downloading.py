"""A client of the demo: ``python -m crablb.lab.downloading ADDRESS PATH BYTES [mptcp]``, with a stock socket.

It has half a download, says so, waits for a line, and has the rest; then it tells what that was, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from contextlib import suppress

IPPROTO_MPTCP = 262  # socket.IPPROTO_MPTCP, which Python built with old headers has not
#: Seconds without a byte after which a download counts as broken: more than a way takes to be given up for another.
PATIENCE = 5.0


class _Download:
    """A range of a file, by HTTP: what came of it."""

    def __init__(self, sock: socket.socket, host: str, path: str, size: int) -> None:
        self._sock, self._wanted = sock, size
        self._digest = hashlib.sha256()
        self.size, self.longest = 0, 0.0
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nRange: bytes=0-{size - 1}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            more = sock.recv(1 << 16)
            if not more:
                raise ConnectionError(f"connection closed after {head[:80]!r}")
            head += more
        head, _, body = head.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 206 "):
            raise ConnectionError(f"no range of {path}: {head[:80]!r}")
        self._take(body)

    def _take(self, data: bytes) -> None:
        self.size += len(data)
        self._digest.update(data)

    def until(self, size: int) -> None:
        """Have so much of it; the longest time between two bytes of that is noted."""
        self.longest, last = 0.0, time.monotonic()
        while self.size < size:
            data = self._sock.recv(1 << 16)
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now
            if not data:
                raise ConnectionError(f"connection closed after {self.size} bytes")
            self._take(data)

    def told(self) -> dict[str, object]:
        whole = self.size == self._wanted
        return {"digest": self._digest.hexdigest() if whole else None, "pause_ms": round(self.longest * 1000, 1)}


def main(host: str, path: str, size: str, protocol: str = "tcp") -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP if protocol == "mptcp" else 0) as sock:
        sock.settimeout(PATIENCE)
        sock.connect((host, 80))
        download = _Download(sock, host, path, int(size))
        download.until(int(size) // 2)
        print("half", flush=True)
        sys.stdin.readline()
        with suppress(OSError):  # whatever it was, it did not go on
            download.until(int(size))
        print(json.dumps(download.told()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
