"""The API: HTTP over :class:`crablb.control.operator.Operator`, on a UNIX socket, and by TLS where it is asked for.

What it is made with (starlette, uvicorn, h11) is imported when the first packet can have been served, by a thread.
"""

from __future__ import annotations

import asyncio
import grp
import os
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from crablb import lasting
from crablb.control import ports
from crablb.control.admin import sockets
from crablb.control.estate import Door, Heir
from crablb.control.metrics.facts import Gatherer
from crablb.control.operator import Operator
from crablb.dataplane.events import Event
from crablb.errors import ConfigError, KernelError, Problems, why
from crablb.kernel import pins
from crablb.model import Config, Switch, host_port
from crablb.values import guarded, read_text

if TYPE_CHECKING:
    from crablb.control.admin.server import Listener

__all__ = ["Admin", "check", "join"]

log = structlog.get_logger()

#: Characters of a token at the least: nobody tries all of so many.
LEAST_TOKEN = 16


class Admin:
    """The API of one load balancer, if its configuration has it ``on``.

    Raises :class:`ConfigError` at once for what is wrong with its settings, :class:`KernelError` if ``admin_listen``
    cannot be bound.
    """

    def __init__(
        self, operator: Operator, config: Config, gatherer: Gatherer | None = None, heir: Heir | None = None
    ) -> None:
        """``gatherer``: for the status page, which is served beside it; None: there is none.  ``heir``: what there is
        of another process, in whose place this one serves."""
        self._operator, self._gatherer, self._config = operator, gatherer, config
        self._heir = heir
        self._on = config.admin is Switch.ON
        self._tls: ssl.SSLContext | None = None
        self._token = ""
        self._unix: socket.socket | None = None
        self._tcp: socket.socket | None = None
        self._starting: asyncio.Task[None] | None = None
        self._place: sockets.Place | None = None
        self._listeners: list[Listener] = []
        self._hindered = ""  # why it is not served now
        if self._on:
            self._check()

    def _check(self) -> None:
        self._tls, self._token = check(self._config)
        if where := self._config.admin_listen:
            given = self._heir.door("admin", host_port(*where)) if self._heir else None
            self._tcp = given or ports.bind("the API", *where)

    def start(self) -> None:
        """From now on whoever connects is answered, as soon as what is needed for it has been imported.

        Raises :class:`KernelError`, and leaves all to the other process, if this one takes over and could not be asked.
        """
        heir, self._heir = self._heir, None
        left = heir.place() if heir else ""
        if not self._on and left:
            sockets.Place(self._config.interfaces, None, Path(left)).remove()
        if self._on:
            try:
                self._show(self._bind(heir, left))
            except (OSError, KernelError) as error:
                if heir:
                    if self._place and self._place.path == Path(left):
                        self._place = None
                    self.abandon()
                    where = f"{error.filename or ''}: {error.strerror}" if isinstance(error, OSError) else error
                    raise KernelError(f"the API could not be served: {where}") from None
                self._unserved(error)
            self._starting = asyncio.create_task(self._start())

    def _bind(self, heir: Heir | None = None, left: str = "") -> list[str]:
        """Where it is from now on; ``left``: the path at which another process listens, whose socket ``heir`` has."""
        group = _group(self._config.admin_group) if self._config.admin_group else None
        listen = self._config.admin_listen
        if listen and not self._tcp:
            self._tcp = ports.bind("the API", *listen)
        given = heir.door("api", left) if heir and os.path.exists(left) else None  # else somebody has removed it
        self._place = sockets.Place(self._config.interfaces, group, Path(left) if given else None)
        if given:
            self._unix = given
            self._place.permit()
        else:
            self._unix = self._place.bind()
        where = [str(path) for path in self._place.show()]
        if self._tcp and listen:
            ports.listen(self._tcp, "the API", *listen, sockets.BACKLOG)
            where.append(host_port(*listen))
        if self._hear not in self._operator.listeners:
            self._operator.listeners.append(self._hear)
        return where

    def _show(self, where: Sequence[str]) -> None:
        """Have people know that it is served."""
        log.info("the API is served", at=where)
        if self._hindered:
            self._hindered = ""
            for name in self._config.interfaces:
                pins.can_be_asked(f"lb-{name}")

    async def _start(self) -> None:
        """Until it is served: what hinders, as no memory or a full disk, passes."""
        pauses = lasting.Pauses()
        while True:
            try:
                anew = [] if self._unix else self._bind()
                for name in ("server", "app"):
                    await asyncio.to_thread(import_module, f"{__name__}.{name}")
                await self._serve()
                if anew:
                    self._show(anew)
                return
            except Exception as error:
                await self._end_listeners()
                self._unserved(error)
            await asyncio.sleep(pauses.after(0))

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
        told = why(error)
        if not self._hindered:
            for name in self._config.interfaces:
                pins.cannot_be_asked(f"lb-{name}")  # for crablb status
        if str(told) != self._hindered:  # once, however often it is tried
            self._hindered = str(told)
            log.error("the API is not served; the load balancer is", **told)
        self.abandon()

    def _hear(self, event: Event) -> None:
        if event.kind == "interface-renamed" and self._place:
            try:
                self._place.name(event.interface)
            except OSError as error:
                log.warning("the API is asked by the old name", now=event.interface, reason=error.strerror)

    def offer(self) -> dict[Door, int]:
        """The sockets that are listened at."""
        found = {}
        if self._unix and self._place:
            found[Door("api", str(self._place.path))] = self._unix.fileno()
        if self._tcp and self._config.admin_listen:
            found[Door("admin", host_port(*self._config.admin_listen))] = self._tcp.fileno()
        return found

    async def leave(self) -> None:
        """Another process listens there: answer who has asked already, and leave the rest to it."""
        await asyncio.gather(*(listener.leave() for listener in self._listeners))
        self._place = None
        await self.close()

    async def close(self) -> None:
        """Idempotent."""
        if self._starting:
            self._starting.cancel()
            with suppress(asyncio.CancelledError):
                await self._starting
            self._starting = None
        self.abandon()
        await self._end_listeners()
        self._operator.close()

    async def _end_listeners(self) -> None:
        for listener in self._listeners:
            await listener.close()
        self._listeners.clear()

    def abandon(self) -> None:
        """Leave no socket behind, also where there is no event loop any more to :meth:`close` in.  Idempotent."""
        if self._place:
            self._place.remove()
            self._place = None
        for sock in (self._unix, self._tcp):
            if sock and not self._listeners:  # else they are theirs
                sock.close()
        self._unix = self._tcp = None


def check(config: Config) -> tuple[ssl.SSLContext | None, str]:
    """How ``admin_listen`` is encrypted, and its token, if there is one.

    Raises :class:`ConfigError` with every fault of what the API's settings name: a group, files.
    """
    if config.admin is Switch.OFF:
        return None, ""
    problems, tls, token = Problems(), None, ""
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
            tls = problems.attempt("admin_cert, admin_key", _tls, config.admin_cert, config.admin_key)
            token = problems.attempt("admin_token_file", _token, config.admin_token_file) or ""
    problems.finish()
    return tls, token


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise ConfigError(f"there is no group {name!r}; make it: groupadd --system {name}") from None


def join(config: Config, before: str | None = None) -> None:
    """Be in the group that the socket is to be given to, while this process may: later it may not give it to others.

    ``before``: the group of the process that it takes over from, which may have started it; None: of none.  Raises
    :class:`ConfigError` if there is no such group, or it is another one, and this process may not.
    """
    if config.admin is Switch.ON and config.admin_group:
        group = _group(config.admin_group)
        if group not in os.getgroups():
            try:
                os.setgroups([*os.getgroups(), group])
            except PermissionError:  # an ordinary user, who is in it or not
                if before not in (None, config.admin_group) and group != os.getegid():
                    raise ConfigError(
                        f"admin_group: this process may not join {config.admin_group}, as who serves has given up the"
                        " right to, and for those whom it starts; restart instead, with keep in the configuration"
                    ) from None


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
