"""Asks a running load balancer, for commands and programs: HTTP over its UNIX socket, or by TLS."""

from __future__ import annotations

import errno
import glob
import http.client
import os
import select
import socket
import ssl
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from crablb.api import types
from crablb.errors import ConfigError, CrablbError, KernelError

__all__ = ["API", "RUN", "ApiError", "Client", "NotRunning", "UnansweredError", "discover", "forget", "found"]

T = TypeVar("T")

#: The version of the API that this one speaks.
API = 1
RUN = Path("/run/crablb")
#: Seconds that an answer may take.
TIMEOUT = 30.0
#: Bytes of an answer at most: 65,535 backends and their checks have room.
MOST = 256 << 20
SO_NETNS_COOKIE = 71  # asm-generic/socket.h
#: What is posted and changes nothing.
QUESTIONS = ("/v1/explain", "/v1/plan", "/v1/capture", "/v1/trace")


class ApiError(CrablbError):
    """The load balancer refuses, or does not answer as it should."""

    def __init__(self, problems: list[str], code: int = 0) -> None:
        self.problems, self.code = problems, code
        super().__init__("\n".join(problems))


class UnansweredError(ApiError):
    """A change was asked for, and no answer came, or that it failed on the way: it may have been made, or be yet."""

    status = 4


class NotRunning(CrablbError):
    """Nobody is there to ask."""

    status = 3


def _namespace() -> str:
    """How files of this thread's network namespace begin (:func:`crablb.kernel.pins.namespace`)."""
    with socket.socket(socket.AF_UNIX) as sock:
        return f"netns-{int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), 'little')}"


def found() -> dict[str, Path]:
    """The sockets of this network namespace, by interface."""
    prefix = f"{_namespace()}-"
    paths = sorted(RUN.glob(f"{prefix}*.sock"))
    return {path.name.removeprefix(prefix).removesuffix(".sock"): path for path in paths}


def discover(interface: str | None = None) -> Path:
    """The socket of the load balancer on an interface of this network namespace; None: of the only one there is.

    Raises :class:`NotRunning` if there is none, :class:`ConfigError` if there are several.
    """
    there = found()
    if interface is not None:
        if interface in there:
            return there[interface]
        more = f"; there is one on {', '.join(there)}" if there else ""
        raise NotRunning(
            f"no load balancer on {interface} can be asked{more}. Start one: crablb serve --iface {interface} ..."
            ' (it can be asked unless its configuration has admin = "off")'
        )
    if not there:
        raise NotRunning(
            f"no load balancer in this network namespace can be asked: there is no socket in {RUN}. Start one: crablb"
            ' serve --iface IF ... (it can be asked unless its configuration has admin = "off")'
        )
    if len({path.resolve() for path in there.values()}) > 1:
        there = {name: path for name, path in there.items() if _alive(path)} or there
    if len({path.resolve() for path in there.values()}) > 1:
        raise ConfigError(f"there are load balancers on {', '.join(there)}; say which: --iface {next(iter(there))}")
    return next(iter(there.values()))


def _alive(path: Path) -> bool:
    """Whether somebody listens, or it cannot be known."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def forget(interface: str) -> bool:
    """Remove the socket of a load balancer that was killed, by all its names.  Of one that lives it stays.

    Whether there was something.
    """
    gone = False
    named = RUN / f"{_namespace()}-{interface}.sock"
    left_there = set(RUN.glob(f"{_namespace()}-{glob.escape(interface)}.*.api"))
    if named.is_symlink():  # it may be named after another of its interfaces
        left_there.add(named.with_name(os.readlink(named)))
    for left in left_there:
        if not _alive(left):
            links = (*RUN.glob("*.sock"), *RUN.glob("*.sock.*.new"))
            names = [path for path in links if path.is_symlink() and os.readlink(path) == left.name]
            for path in (*names, left):
                gone |= os.path.lexists(path)
                path.unlink(missing_ok=True)
    return gone


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path, self._seconds = path, timeout

    def connect(self) -> None:
        """Raises :class:`TimeoutError` if whoever listens takes no more connections."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # With a timeout of Python's, it would not wait: unix(7) has EAGAIN for a full backlog, and nothing to poll for.
        whole, part = divmod(int(self._seconds * 1_000_000), 1_000_000)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", whole, part))
        try:
            self.sock.connect(str(self._path))
        except BlockingIOError:
            raise TimeoutError from None
        self.sock.settimeout(self._seconds)


class Client:
    """A connection to one load balancer, made when it is needed.  For one thread.

    ``where``: the path of a socket, or ``https://address:port``, which needs the ``token``, and ``ca_file`` if the
    machine does not trust the certificate.  Raises :class:`NotRunning` if nobody listens there, :class:`ApiError` with
    the load balancer's own words for what it refuses, or if what it answers is none of this,
    :class:`UnansweredError` if it is not known what became of a change.
    """

    def __init__(
        self,
        where: Path | str,
        token: str | None = None,
        *,
        ca_file: str | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self._where, self._token, self._timeout = str(where), token, timeout
        self._connection = self._make(ca_file)
        self._kept = False  # whether it was there before what is asked now

    def _make(self, ca_file: str | None) -> http.client.HTTPConnection:
        if "://" not in self._where:
            return _UnixConnection(Path(self._where), self._timeout)
        try:
            url = urlsplit(self._where)
            host, port = url.hostname, url.port
        except ValueError:
            host = port = None
        if not host or url.scheme != "https":
            raise ConfigError(f"{self._where} is neither the path of a socket nor https://ADDRESS:PORT")
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise ConfigError(f"{ca_file}: {error.strerror or error}") from None
        return http.client.HTTPSConnection(host, port or 7172, timeout=self._timeout, context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

    # ---- asking ----

    def get(self, path: str, answer: type[T], **query: object) -> T:
        """``query``: parameters; those that are None are left out."""
        return self.ask("GET", path, answer, query=query)

    def post(self, path: str, answer: type[T], body: object = None) -> T:
        """``body``: a value that becomes JSON; text goes as it is."""
        return self.ask("POST", path, answer, body)

    def patch(self, path: str, answer: type[T], body: object) -> T:
        return self.ask("PATCH", path, answer, body)

    def delete(self, path: str, answer: type[T]) -> T:
        return self.ask("DELETE", path, answer)

    def ask(
        self, method: str, path: str, answer: type[T], body: object = None, query: Mapping[str, object] | None = None
    ) -> T:
        """Any of these."""
        with self._answer(method, path, body, query or {}) as response:
            data = response.read(MOST + 1)
            if response.length and len(data) <= MOST:
                raise http.client.IncompleteRead(data, response.length)
        if len(data) > MOST:
            raise ApiError([f"{self._where}: the answer is longer than {MOST} bytes"])
        try:
            return msgspec.json.decode(data, type=answer)
        except (ValueError, RecursionError) as error:  # msgspec's is one, and what is no UTF-8, too
            raise ApiError(
                [f"{self._where}: what answers is no load balancer of this version: {error} (API {API})"]
            ) from None

    def events(self, since: int | None = None) -> Iterator[types.Event]:
        """Events after a number, and then as they come; None: from now on.  Ends when the load balancer does."""
        for line in self._lines("/v1/events", {"since": since}):
            if line.startswith(b"data: "):
                yield msgspec.json.decode(line[6:], type=types.Event)

    def _lines(self, path: str, query: Mapping[str, object]) -> Iterator[bytes]:
        with self._answer("GET", path, None, query) as response:
            while line := response.readline(1 << 20):
                yield line.rstrip(b"\n")

    def stream(self, method: str, path: str, body: object = None) -> Iterator[bytes]:
        """The bytes of an answer as they come; it ends when the load balancer ends it."""
        with self._answer(method, path, body, {}) as response:
            while chunk := response.read1(1 << 16):
                yield chunk

    @contextmanager
    def _answer(
        self, method: str, path: str, body: object, query: Mapping[str, object]
    ) -> Iterator[http.client.HTTPResponse]:
        given = {name: value for name, value in query.items() if value is not None}
        url = f"{path}?{urlencode(given)}" if given else path
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        data: bytes | None = None
        if isinstance(body, str):
            data, headers["content-type"] = body.encode(), "text/plain"
        elif body is not None:
            data, headers["content-type"] = msgspec.json.encode(body), "application/json"
        changes = method != "GET" and path not in QUESTIONS
        self._connect()
        try:
            response = self._begin(method, url, data, headers, again=not changes)
            if response.status >= 400:
                self._refuse(response, changes)
            yield response
        except (ApiError, NotRunning):
            self.close()
            raise
        except (http.client.HTTPException, OSError) as error:
            self.close()
            why = (
                f"no answer within {self._timeout:g} s (it is stopped, or hangs: crablb doctor)"
                if isinstance(error, TimeoutError)
                else f"the answer broke off: {error or type(error).__name__}"
            )
            if changes:
                raise UnansweredError(
                    [f"{self._where}: {why}; it is not known whether the change was made, or will be: look"]
                ) from None
            raise ApiError([f"{self._where}: {why}"]) from None

    def _begin(
        self, method: str, url: str, data: bytes | None, headers: dict[str, str], *, again: bool
    ) -> http.client.HTTPResponse:
        """``again``: on a connection that is ended before the answer, ask once more on a new one."""
        try:
            self._connection.request(method, url, data, headers)
            return self._connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self.close()
            if not (again and self._kept):
                raise
        self._connect()
        self._connection.request(method, url, data, headers)
        return self._connection.getresponse()

    def _connect(self) -> None:
        """Raises :class:`NotRunning`, and says why it is so.  One that was ended while it was idle is made anew."""
        if self._connection.sock is not None:
            idle = select.poll()
            idle.register(self._connection.sock, select.POLLIN)
            if idle.poll(0):
                self.close()
        self._kept = self._connection.sock is not None
        if self._kept:
            return
        try:
            self._connection.connect()
        except TimeoutError:
            self.close()
            silent = f"no answer within {self._timeout:g} s, and nothing was asked"
            raise ApiError([f"{self._where}: {silent} (it is stopped, or hangs: crablb doctor)"]) from None
        except ssl.SSLError as error:
            self.close()
            raise ApiError(
                [f"{self._where}: {getattr(error, 'verify_message', '') or error.reason or error}"]
            ) from None
        except (OSError, ValueError) as error:
            self.close()
            number = getattr(error, "errno", None)
            if number in (errno.ENOENT, errno.ENOTDIR):
                why = "there is no such socket; is a load balancer running?"
            elif number == errno.ECONNREFUSED:
                why = "nobody listens there any more: the load balancer has ended; start it again: crablb serve ..."
            elif number in (errno.EACCES, errno.EPERM):
                raise KernelError(f"{self._where}: {_forbidden(Path(self._where))}") from None
            else:
                why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise NotRunning(f"{self._where}: {why}") from None

    def _refuse(self, response: http.client.HTTPResponse, changes: bool) -> None:
        data = response.read(1 << 20)
        try:
            problems = msgspec.json.decode(data, type=types.Problems).problems
        except (ValueError, RecursionError):
            problems = [f"{self._where}: {response.status} {response.reason}"]
        if changes and response.status == http.HTTPStatus.INTERNAL_SERVER_ERROR:  # it broke in the middle
            raise UnansweredError([*problems, "it is not known whether the change was made: look"], response.status)
        raise ApiError(problems, response.status)


def _forbidden(path: Path) -> str:
    """Who may, where this user may not."""
    import grp

    try:
        found = os.stat(path)
        group = grp.getgrgid(found.st_gid).gr_name if found.st_mode & 0o060 == 0o060 else ""
    except (OSError, KeyError):
        group = ""
    if group and group != "root":
        return f"only root and members of group {group} may ask: usermod -aG {group} USER, and log in again"
    return 'only root may ask; to have others ask: admin_group = "GROUP" in the configuration'


def of_vip(vip: str) -> str:
    """A VIP as part of a path."""
    return quote(vip, safe="")
