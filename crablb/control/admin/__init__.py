"""The API: HTTP over :class:`crablb.control.operator.Operator`, on a UNIX socket, and by TLS where it is asked for.

What it is made with (starlette, uvicorn, h11) is imported when the first packet can have been served, by a thread.
"""

from __future__ import annotations

import asyncio
import grp
import os
import socket
import ssl
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

import structlog

from crablb.control.admin import sockets
from crablb.control.metrics.facts import Gatherer
from crablb.control.operator import Operator
from crablb.control.ports import bind
from crablb.dataplane.events import Event
from crablb.errors import ConfigError, Problems
from crablb.model import Config, Switch, host_port
from crablb.values import guarded, read_text

if TYPE_CHECKING:
    from crablb.control.admin.server import Listener

__all__ = ["Admin", "join"]

log = structlog.get_logger()

#: Characters of a token at the least: nobody tries all of so many.
LEAST_TOKEN = 16


class Admin:
    """The API of one load balancer, if its configuration has it ``on``.

    Raises :class:`ConfigError` at once for what is wrong with its settings, :class:`KernelError` if ``admin_listen``
    cannot be bound.
    """

    def __init__(self, operator: Operator, config: Config, gatherer: Gatherer | None = None) -> None:
        """``gatherer``: for the status page, which is served beside it; None: there is none."""
        self._operator, self._gatherer, self._config = operator, gatherer, config
        self._on = config.admin is Switch.ON
        self._tls: ssl.SSLContext | None = None
        self._token = ""
        self._unix: socket.socket | None = None
        self._tcp: socket.socket | None = None
        self._starting: asyncio.Task[None] | None = None
        self._place: sockets.Place | None = None
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
        """From now on whoever connects is answered, as soon as what is needed for it has been imported."""
        if self._on:
            try:
                self._bind()
            except OSError as error:
                self._unserved(error)
            else:
                self._starting = asyncio.create_task(self._start())

    def _bind(self) -> None:
        group = _group(self._config.admin_group) if self._config.admin_group else None
        self._place = sockets.Place(self._config.interfaces, group)
        self._unix = self._place.bind()
        where = [str(path) for path in self._place.show()]
        if self._tcp and self._config.admin_listen:
            self._tcp.listen(sockets.BACKLOG)
            where.append(host_port(*self._config.admin_listen))
        self._operator.listeners.append(self._hear)
        log.info("the API is served", at=where)

    async def _start(self) -> None:
        try:
            for name in ("server", "app"):
                await asyncio.to_thread(import_module, f"{__name__}.{name}")
            await self._serve()
        except Exception as error:
            self._unserved(error)

    async def _serve(self) -> None:
        from crablb.control.admin import app, server

        assert self._unix
        unix = app.make(self._operator, self._gatherer)
        self._listeners.append(await server.listen(unix, self._unix))
        if self._tcp:
            remote = app.make(self._operator, self._gatherer, token=self._token)
            self._listeners.append(await server.listen(remote, self._tcp, tls=self._tls))

    def _unserved(self, error: Exception) -> None:
        """Whatever it is, packets are served on."""
        known = isinstance(error, OSError | MemoryError)
        why = {"reason": f"{getattr(error, 'filename', None) or ''}: {error}".removeprefix(": ")}
        log.error("the API is not served; the load balancer is", **(why if known else {"exc_info": error}))
        self.abandon()

    def _hear(self, event: Event) -> None:
        if event.kind == "interface-renamed" and self._place:
            try:
                self._place.name(event.interface)
            except OSError as error:
                log.warning("the API is asked by the old name", now=event.interface, reason=error.strerror)

    async def close(self) -> None:
        """Idempotent."""
        if self._starting:
            self._starting.cancel()
            with suppress(asyncio.CancelledError):
                await self._starting
            self._starting = None
        self.abandon()
        for listener in self._listeners:
            await listener.close()
        self._listeners.clear()
        self._operator.close()

    def abandon(self) -> None:
        """Leave no socket behind, also where there is no event loop any more to :meth:`close` in.  Idempotent."""
        if self._place:
            self._place.remove()
            self._place = None
        for sock in (self._unix, self._tcp):
            if sock and not self._listeners:  # else they are theirs
                sock.close()
        self._unix = self._tcp = None


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise ConfigError(f"there is no group {name!r}; make it: groupadd --system {name}") from None


def join(config: Config) -> None:
    """Be in the group that the socket is to be given to, while this process may: later it may not give it to others.

    Raises :class:`ConfigError` if there is no such group.
    """
    if config.admin is Switch.ON and config.admin_group:
        group = _group(config.admin_group)
        if group not in os.getgroups():
            with suppress(PermissionError):  # an ordinary user, who is in it or not
                os.setgroups([*os.getgroups(), group])


def _tls(certificate: str, key: str) -> ssl.SSLContext:
    """Raises :class:`ConfigError`."""
    read_text(key)  # which says what is wrong with it better
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
    token = read_text(path).strip()
    guarded(path)
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{path}: a token is {LEAST_TOKEN} printable ASCII characters or more, without spaces; make one:"
            f" (umask 077; openssl rand -hex 32 > {path})"
        )
    return token
