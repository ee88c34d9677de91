"""The API: HTTP over :class:`crablb.control.operator.Operator`, on a UNIX socket, and by TLS where it is asked for.

What it is made with (starlette, uvicorn, h11) is imported when the first packet can have been served, by a thread.
"""

from __future__ import annotations

import asyncio
import grp
import socket
import ssl
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

import structlog

from crablb.control.metrics.facts import Gatherer
from crablb.control.operator import Operator
from crablb.control.ports import bind
from crablb.dataplane.events import Event
from crablb.errors import ConfigError, KernelError, Problems
from crablb.model import Config, Switch, host_port
from crablb.values import guarded, read_text

if TYPE_CHECKING:
    from crablb.control.admin.server import Listener
    from crablb.control.admin.sockets import Place

__all__ = ["Admin"]

log = structlog.get_logger()

#: Characters of a token at the least: nobody tries all of so many.
LEAST_TOKEN = 16


class Admin:
    """The API of one load balancer, if its configuration has it ``on``.

    Raises :class:`ConfigError` at once for what is wrong with its settings, :class:`KernelError` if ``admin_listen``
    cannot be bound.
    """

    def __init__(self, operator: Operator, gatherer: Gatherer, config: Config) -> None:
        """``gatherer``: for the status page, which is served beside it."""
        self._operator, self._gatherer, self._config = operator, gatherer, config
        self._on = config.admin is Switch.ON
        self._tls: ssl.SSLContext | None = None
        self._token = ""
        self._tcp: socket.socket | None = None
        self._starting: asyncio.Task[None] | None = None
        self._place: Place | None = None
        self._listeners: list[Listener] = []
        if self._on:
            self._check()

    def _check(self) -> None:
        config, problems = self._config, Problems()
        if config.admin_group:
            problems.attempt("admin_group", _group, config.admin_group)
        if config.admin_listen:
            needed = {
                "admin_cert": config.admin_cert,
                "admin_key": config.admin_key,
                "admin_token_file": config.admin_token_file,
            }
            for name, value in needed.items():
                if not value:
                    problems.add("", f"{name} is missing; admin_listen needs a certificate, its key and a token")
            if all(needed.values()):
                self._tls = problems.attempt("admin_cert, admin_key", _tls, config.admin_cert, config.admin_key)
                self._token = problems.attempt("admin_token_file", _token, config.admin_token_file) or ""
        problems.finish()
        if config.admin_listen:
            self._tcp = bind("the API", *config.admin_listen)

    def start(self) -> None:
        """Begin to serve it, soon: what is imported for it takes its time."""
        if self._on:
            self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        try:
            await asyncio.to_thread(import_module, f"{__name__}.server")
            await self._listen()
        except Exception as error:  # whatever it is, packets are served on
            known = isinstance(error, OSError | MemoryError | KernelError)
            why = {"reason": f"{getattr(error, 'filename', None) or ''}: {error}".removeprefix(": ")}
            log.error("the API is not served; the load balancer is", **(why if known else {"exc_info": error}))

    async def _listen(self) -> None:
        from crablb.control.admin import app, server, sockets

        unix = app.make(self._operator, self._gatherer)
        group = _group(self._config.admin_group) if self._config.admin_group else None
        self._place = sockets.Place(self._config.interfaces, group)
        sock = self._place.bind()
        self._listeners.append(await server.listen(unix, sock))
        where = [str(path) for path in self._place.show()]
        self._operator.listeners.append(self._hear)
        if self._tcp:
            remote = app.make(self._operator, self._gatherer, token=self._token)
            self._listeners.append(await server.listen(remote, self._tcp, tls=self._tls))
            assert self._config.admin_listen
            where.append(host_port(*self._config.admin_listen))
        log.info("the API is served", at=where)

    def _hear(self, event: Event) -> None:
        if event.kind == "interface-renamed" and self._place:
            try:
                self._place.name(event.interface)
            except OSError as error:
                log.warning("the API is asked by the old name", now=event.interface, reason=error.strerror)

    async def ready(self) -> None:
        """Until it is served, or cannot be."""
        if self._starting:
            await asyncio.shield(self._starting)

    async def close(self) -> None:
        """Idempotent."""
        if self._starting:
            self._starting.cancel()
            with suppress(asyncio.CancelledError):
                await self._starting
        if self._place:
            self._place.remove()
        for listener in self._listeners:
            await listener.close()
        self._listeners.clear()
        if self._tcp:
            self._tcp.close()
            self._tcp = None
        self._operator.close()

    def abandon(self) -> None:
        """Leave no socket behind, where there is no event loop any more to :meth:`close` in."""
        if self._place:
            self._place.remove()
        if self._tcp:
            self._tcp.close()


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise ConfigError(f"there is no group {name!r}; make it: groupadd --system {name}") from None


def _tls(certificate: str, key: str) -> ssl.SSLContext:
    """Raises :class:`ConfigError`."""
    guarded(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{certificate} and {key} are no certificate and its key, without a password, as PEM:"
            f" {error.reason or error}"
        ) from None
    except (OSError, ValueError) as error:  # a NUL in a name, a key with a password
        raise ConfigError(f"{certificate}, {key}: {getattr(error, 'strerror', None) or error}") from None
    return context


def _no_password() -> str:
    """Nobody is there to be asked."""
    raise ValueError("the key has a password; leave one without")


def _token(path: str) -> str:
    """Raises :class:`ConfigError`."""
    guarded(path)
    token = read_text(path).strip()
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{path}: a token is {LEAST_TOKEN} printable ASCII characters or more, without spaces; make one:"
            f" (umask 077; openssl rand -hex 32 > {path})"
        )
    return token
