"""Metrics and the status page of made-up load balancers, served as the daemon serves them; a browser that looks."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

from crablb.control.admin.server import Listener, listen
from crablb.control.metrics.app import make
from crablb.control.metrics.facts import Facts
from crablb.control.ports import bind


class Made:
    """In place of a :class:`Gatherer`: what ``look`` returns, anew each time."""

    def __init__(self, look: Callable[[], Facts]) -> None:
        self.look = look

    async def facts(self) -> Facts:
        return self.look()


class Shown:
    """An application at a port of the loopback, in a thread of its own, until :meth:`close`."""

    def __init__(self, application: Any, port: int = 0) -> None:
        self._socket = bind("a test", ip_address("127.0.0.1"), port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._listener: Listener
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(application),))
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self, application: Any) -> None:
        listener = await listen(application, self._socket)
        self._ready.set()
        await self._end.wait()
        await listener.close()
        self._socket.close()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (in lower case) and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()


@contextmanager
def showing(look: Callable[[], Facts]) -> Iterator[Shown]:
    """What ``metrics_listen`` serves of such a load balancer."""
    shown = Shown(make(Made(look)))  # type: ignore[arg-type]
    try:
        yield shown
    finally:
        shown.close()
