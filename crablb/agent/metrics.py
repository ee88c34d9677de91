"""An agent's metrics for Prometheus, by HTTP, from threads: few requests at a time, each for a few seconds at most."""

from __future__ import annotations

import http.server
import math
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from crablb import lasting
from crablb.agent.base import Agent
from crablb.errors import KernelError, unbound
from crablb.model import Address, host_port
from crablb.version import VERSION

__all__ = ["METRICS", "Exporter", "render"]

#: Seconds that a request may take, and that a look at the agent is good for: some are long.
PATIENCE, FRESH = 5.0, 5.0
#: Requests at a time.  Who comes when there are so many is sent away.
MOST = 8
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Name (with the ``_total`` of counters), labels, help, values by labels of what ``crablb agent status --json`` says.
Row = tuple[str, tuple[str, ...], str, Callable[[str, dict[str, Any]], Iterator[tuple[tuple[str, ...], float]]]]


def _each(name: str) -> Callable[[str, dict[str, Any]], Iterator[tuple[tuple[str, ...], float]]]:
    """Of each VIP."""
    return lambda _, status: (((vip,), n) for vip, n in status.get(name, {}).items())


def _one(name: str) -> Callable[[str, dict[str, Any]], Iterator[tuple[tuple[str, ...], float]]]:
    return lambda _, status: iter([((), status[name])] if name in status else [])


def _server_redirects(name: str) -> Callable[[str, dict[str, Any]], Iterator[tuple[tuple[str, ...], float]]]:
    return lambda _, status: (((vip,), n[name]) for vip, n in status.get("redirected", {}).items())


def _client_redirects(name: str, *, backends: bool) -> Callable[[str, Any], Iterator[tuple[tuple[str, ...], float]]]:
    """Of each VIP, or of each backend of one."""
    return lambda _, status: (
        ((one["vip"], one["backend"]) if backends else (one["vip"],), one[name])
        for one in status.get("redirects", ())
        if (one["backend"] is not None) is backends
    )


VIP, PATH = ("vip",), ("vip", "backend")
METRICS: tuple[Row, ...] = (
    ("build_info", ("role", "version"), "Always 1; what runs.",
     lambda role, _: iter([((role, VERSION), 1)])),
    ("faults", ("role",), "Things that are wrong; crablb agent status says which.",
     lambda role, status: iter([((role,), len(status["faults"]))])),
    ("events_total", ("role", "event"), "What the agent's programs counted.",
     lambda role, status: (((role, name), n) for name, n in status["counters"].items())),
    ("listening", VIP, "Server: 1: something listens for this VIP.", _each("listening")),
    ("connections", VIP, "Server: open connections.", _each("connections")),
    ("server_redirects_begun_total", VIP, "Server: redirected SYNs answered.", _server_redirects("begun")),
    ("server_redirects_completed_total", VIP, "Server: connections that came of them.", _server_redirects("completed")),
    ("mptcp_connections", ("way",), "Server: open MPTCP connections to VIPs by their way: load_balancer, both, direct.",
     lambda _, status: (((way,), n) for way, n in status.get("mptcp", {}).get("connections", {}).items())),
    ("offering", VIP, "Client: 1: connections offer redirection; 0: not for now, or no more.", _each("offering")),
    ("offers_total", VIP, "Client: offers that were answered, or given up.",
     _client_redirects("offered", backends=False)),
    ("redirects_taken_total", VIP, "Client: redirects that sockets took.", _client_redirects("taken", backends=False)),
    ("redirects_completed_total", PATH, "Client: redirects after which the backend spoke.",
     _client_redirects("completed", backends=True)),
    ("redirects_failed_total", PATH, "Client: redirects to it that came to nothing.",
     _client_redirects("failed", backends=True)),
    ("offers_failed_total", VIP, "Client: offers that came to nothing.", _client_redirects("failed", backends=False)),
    ("flows", (), "Client: redirected connections, also closed ones.", _one("flows")),
    ("flows_limit", (), "Client: as many as there is room for.", _one("room")),
)  # fmt: skip


class _Look(Collector):
    def __init__(self, role: str, status: dict[str, Any] | None) -> None:
        self._role, self._status = role, status

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("crablb_agent_installed", "1: the agent is in the kernel.", labels=("role",))
        up.add_metric((self._role,), int(self._status is not None))
        yield up
        for name, labels, text, of in METRICS if self._status else ():
            family = (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                f"crablb_agent_{name}", text, labels=labels
            )
            for values, number in of(self._role, self._status or {}):
                family.add_metric(values, number)
            if family.samples:  # of the other role's there are none
                yield family


def render(role: str, status: dict[str, Any] | None) -> bytes:
    """``status``: what :meth:`Agent.status` says."""
    registry = CollectorRegistry()
    registry.register(_Look(role, status))
    return generate_latest(registry)


class Exporter:
    """Listens at once.  Raises :class:`KernelError` if that cannot be."""

    def __init__(self, agent: type[Agent], address: Address, port: int) -> None:
        self._agent = agent
        self._text, self._at, self._looking = b"", -math.inf, threading.Lock()
        self._room = threading.Semaphore(MOST)
        self._socket = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((str(address), port))
            self._socket.listen(MOST)
        except OSError as error:
            self._socket.close()
            where = host_port(address, port)
            raise KernelError(f"cannot serve the agent's metrics at {where}: {unbound(error, port)}") from None
        self._socket.setblocking(False)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        self._socket.close()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While in the context, requests are answered."""
        try:
            with lasting.in_thread("metrics", self._serve):
                yield
        finally:
            self.close()

    def _serve(self, stop: int) -> None:
        poll = select.poll()
        poll.register(stop, select.POLLHUP)
        poll.register(self._socket, select.POLLIN)
        while stop not in dict(lasting.wait(poll)):
            try:
                connection, peer = self._socket.accept()
            except (BlockingIOError, ConnectionError):  # whoever it was has gone
                continue
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._answer, args=(connection, peer), daemon=True).start()

    def _answer(self, connection: socket.socket, peer: Any) -> None:
        def give_up() -> None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(PATIENCE, give_up)  # a socket's own time begins anew with each byte
        timer.daemon = True
        timer.start()
        try:
            # When it went, or took too long, nobody is there to be told.
            with connection, suppress(OSError):
                _Handler(connection, peer, self)  # type: ignore[arg-type]
        finally:
            timer.cancel()
            self._room.release()

    def text(self) -> bytes:
        """What the agent's state is, or was a moment ago.  Raises :class:`KernelError`."""
        with self._looking:
            now = time.monotonic()
            if now - self._at >= FRESH:
                self._text, self._at = render(self._agent.role, self._agent.status()), now
            return self._text


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Exporter  # type: ignore[assignment]
    timeout = PATIENCE
    server_version, sys_version = "crablb", ""

    def do_GET(self) -> None:
        # The whole URL, as a proxy is asked, is to be taken as well (RFC 9112, 3.2.2).
        if re.sub("^https?://[^/?]*", "", self.path, flags=re.IGNORECASE).partition("?")[0] != "/metrics":
            self.send_error(404, explain="there is /metrics, and nothing else")
            return
        try:
            text = self.server.text()
        except KernelError as error:
            self.send_error(503, explain=str(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Whoever connects could fill the log."""
