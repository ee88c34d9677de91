"""What is said to a server to find out whether it serves: tcp, http, https, tls, agent; and exec, a program that knows.

Each is a conversation of :mod:`.dialogs`.  Of what a server says, whatever that is, 64 KiB are read; a connection ends
by a reset, so that neither side keeps it in TIME_WAIT.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import ssl
import struct
from collections.abc import Generator, Mapping
from contextlib import ExitStack, suppress
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from crablb.control.health.dialogs import Answer, Dialog, Silent
from crablb.model import Address, Check, CheckKind, Vip, host_port

__all__ = ["Target", "ask", "said_by_agent"]

IN, OUT = select.EPOLLIN, select.EPOLLOUT
#: Bytes of a server's answer, and of a program's output, that are read; and of an HTTP answer's head, a TLS handshake.
MOST, HEAD, HANDSHAKE = 1 << 16, 1 << 14, 1 << 17
#: Bytes of an agent's line, and of a program's output, that are looked at.
LINE, OUTPUT = 1024, 4096
#: Characters of what somebody else says that become a part of a reason.
QUOTED = 100
#: Of their weight that agents may give backends more, in percent.
PERCENT = 1000
#: Looks for processes of a session that is killed, at most: a program that forks without end could be faster.
PASSES = 20
TAKEN = "its exit status was taken by somebody else: is SIGCHLD ignored in this process?"
LINGER_NOT = struct.pack("ii", 1, 0)
AT_ONCE = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Waits = Generator[tuple[int, int], None, Any]


class Target:
    """Whom a check concerns, and where it goes.

    ``address`` and ``port``: where it connects to; ``place``: the same, as sockets take it, made once.
    """

    __slots__ = ("address", "backend", "place", "port", "vip")

    def __init__(self, vip: Vip, backend: Address, address: Address, port: int) -> None:
        self.vip, self.backend, self.address, self.port = vip, backend, address, port
        self.place = str(address), port


class _Odd(Exception):
    """What a server said is not what it should say."""


def ask(check: Check, target: Target) -> Dialog:
    """The conversation of a check, which is none by SYNs."""
    match check.kind:
        case CheckKind.TCP:
            return _tcp(target)
        case CheckKind.EXEC:
            return _exec(check, target)
        case CheckKind.AGENT:
            return _connected(_agent, check, target)
        case CheckKind.TLS:
            return _connected(_tls, check, target)
        case CheckKind.HTTP:
            return _connected(_http, check, target)
        case CheckKind.HTTPS:
            return _connected(_https, check, target)
    raise ValueError(f"{check.kind} is none by a conversation")


def quoted(data: bytes | str) -> str:
    """What somebody else said, as a part of a reason: short, and nothing in it that a terminal would obey."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * QUOTED]).split())
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


# ---- connections ----


def _socket(address: Address) -> socket.socket:
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM | AT_ONCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
    return sock


def _connect(sock: socket.socket, target: Target) -> Waits:
    error = sock.connect_ex(target.place)
    if error == 115:  # EINPROGRESS
        yield sock.fileno(), OUT
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def _tcp(target: Target) -> Dialog:
    sock = _socket(target.address)
    try:
        yield from _connect(sock, target)
        return Answer(True, "connected")
    finally:
        sock.close()


class _Plain:
    """A connection's bytes."""

    stage = "connection"  # what is waited for

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def receive(self) -> Waits:
        """Some bytes; none at the end.  To try before there are some is nearly always in vain."""
        while True:
            yield self.sock.fileno(), IN
            with suppress(BlockingIOError):
                return self.sock.recv(MOST)

    def send(self, data: bytes) -> Waits:
        while data:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                yield self.sock.fileno(), OUT


class _Secure:
    """The same inside of TLS."""

    def __init__(self, plain: _Plain, context: ssl.SSLContext, name: str | None) -> None:
        self._plain = plain
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname=name)
        self.sock, self.stage = plain.sock, "TLS handshake"

    def _flush(self) -> Waits:
        if self._out.pending:
            yield from self._plain.send(self._out.read())

    def _more(self) -> Waits:
        yield from self._flush()
        data = yield from self._plain.receive()
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()
        return len(data)

    def handshake(self) -> Waits:
        read = 0
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                read += yield from self._more()
                if read > HANDSHAKE:
                    raise _Odd(f"the TLS handshake is longer than {HANDSHAKE >> 10} KiB") from None
            else:
                return (yield from self._flush())

    def receive(self) -> Waits:
        while True:
            try:
                return self.tls.read(MOST)
            except ssl.SSLWantReadError:
                yield from self._more()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    def send(self, data: bytes) -> Waits:
        self.tls.write(data)
        yield from self._flush()


def _connected(converse: Any, check: Check, target: Target) -> Dialog:
    """Connect, and say what is to be said; what comes of it other than an answer, in words."""
    sock = _socket(target.address)
    channel = _Plain(sock)
    try:
        yield from _connect(sock, target)
        channel.stage = "answer"
        answer: Answer = yield from converse(channel, check, target)
        return answer
    except Silent:
        # An agent that is not there is no sign that its server is not: as with HAProxy, what it said last holds.
        ok = None if check.kind is CheckKind.AGENT else False
        return Answer(ok, f"no {channel.stage} in {check.timeout:g} s")
    except ssl.SSLError as error:
        return Answer(False, f"TLS: {quoted((error.reason or str(error)).lower().replace('_', ' '))}")
    except _Odd as odd:
        return Answer(None if check.kind is CheckKind.AGENT else False, str(odd))
    except OSError as error:
        if check.kind is CheckKind.AGENT:
            return Answer(None, f"the agent cannot be asked: {(error.strerror or repr(error)).lower()}")
        raise
    finally:
        sock.close()


# ---- TLS ----


@lru_cache(64)
def _context(verify: bool, ca_file: str, changed: int) -> ssl.SSLContext:
    """``changed``: when the file was, so that another one is read."""
    context = ssl.create_default_context(cafile=ca_file or None)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _name(check: Check, target: Target) -> str:
    """Whom the certificate is to be for."""
    host = check.host.rsplit(":", 1)[0] if re.search(r"(^[^:]*|\]):[0-9]+$", check.host) else check.host
    return check.sni or host.strip("[]").rstrip(".") or str(target.vip.address)


def _is_name(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return True
    return False


def _secured(channel: _Plain, check: Check, target: Target) -> Waits:
    """A :class:`_Secure` whose handshake is done, or why it cannot be tried."""
    name: str | None = _name(check, target)
    try:
        changed = Path(check.ca_file).stat().st_mtime_ns if check.ca_file else 0
        context = _context(check.verify, check.ca_file, changed)
        # Without verification, an address would only be taken for a name that is none.
        secure = _Secure(channel, context, name if check.verify or _is_name(name or "") else None)
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = f"could not be tried: ca_file {check.ca_file}, sni {name}: {quoted(str(error))}"
        return Answer(None, reason, own=True)
    channel.stage = secure.stage
    try:
        yield from secure.handshake()
    except ssl.SSLCertVerificationError as error:
        return Answer(False, f"certificate: {error.verify_message}{_dates(secure.tls, error.verify_code)}")
    channel.stage = "answer"
    return secure


def _dates(tls: ssl.SSLObject, code: int) -> str:
    """When a certificate began or ends, if it is for that that it is refused (X509_V_ERR_CERT_NOT_YET_VALID, 9, and
    _HAS_EXPIRED, 10)."""
    field = {9: "notBefore", 10: "notAfter"}.get(code)
    try:  # public since Python 3.13
        return f", on {tls._sslobj.get_unverified_chain()[0].get_info()[field]}" if field else ""  # type: ignore[attr-defined]
    except (AttributeError, KeyError, IndexError, TypeError):
        return ""


def _tls(channel: _Plain, check: Check, target: Target) -> Dialog:
    secure = yield from _secured(channel, check, target)
    return secure if isinstance(secure, Answer) else Answer(True, f"{secure.tls.version()}")


def _https(channel: _Plain, check: Check, target: Target) -> Dialog:
    secure = yield from _secured(channel, check, target)
    if isinstance(secure, Answer):
        return secure
    answer: Answer = yield from _http(secure, check, target)
    return answer


# ---- HTTP ----

_OTHER = rb"(?:(?!(?i:content-length|transfer-encoding):)[-!#$%&'*+.^_`|~0-9A-Za-z]+:[\t -~]*\r\n)*+"
_BLANK = rb"[\t ]*"
#: A whole head of RFC 9112 of which h11 says the same: of the fields that say how long a body is there is one at most.
_PLAIN = re.compile(
    rb"HTTP/1\.[01] ([2-9][0-9]{2})(?: [\t -~]*)?\r\n"
    + _OTHER
    + rb"(?:(?i:content-length:" + _BLANK + rb"([0-9]{1,20})|transfer-encoding:" + _BLANK + rb"chunked)"
    + _BLANK + rb"\r\n" + _OTHER + rb")?\r\n"
)  # fmt: skip


@lru_cache(4096)
def _request(method: str, path: str, host: str, vip: Vip, usual: int) -> Any:
    """``h11.Request``, which is checked when it is made, and its bytes: backends of a service have the same."""
    import h11  # no daemon without such checks has it

    bare = f"[{vip.address}]" if vip.address.version == 6 else str(vip.address)
    host = host or (bare if vip.port == usual else host_port(vip.address, vip.port))
    headers = [("Host", host), ("User-Agent", "crablb"), ("Accept", "*/*"), ("Connection", "close")]
    request = h11.Request(method=method, target=path, headers=headers)
    connection = h11.Connection(h11.CLIENT)
    return request, (connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b"")


def _http(channel: _Plain | _Secure, check: Check, target: Target) -> Dialog:
    """Most answers come in one piece, and are plain; the others are h11's, which takes three times as long."""
    usual = 443 if check.kind is CheckKind.HTTPS else 80
    request, said = _request(check.method, check.path, check.host, target.vip, usual)
    yield from channel.send(said)
    data = yield from channel.receive()
    if not data:
        return Answer(False, "closed without an answer")
    answer: Answer = _plainly(check, data) or (yield from _by_h11(channel, check, request, data))
    return answer


def _in_range(check: Check, status: int) -> bool:
    return any(low <= status <= high for low, high in check.status)


def _plainly(check: Check, data: bytes) -> Answer | None:
    """What the first bytes of an answer say; None: that is for h11 to find out."""
    head = _PLAIN.match(data)
    if head is None:
        return None
    status = int(head[1])
    if not _in_range(check, status):
        return Answer(False, f"status {status}")
    if not check.body:
        return Answer(True, f"status {status}")
    bare = status in (204, 304) or check.method in ("HEAD", "CONNECT")  # whatever a Content-Length says
    if head[2] and not bare and check.body.encode() in data[head.end() : head.end() + int(head[2])]:
        return Answer(True, f"status {status}, and the body")
    return None


def _by_h11(channel: _Plain | _Secure, check: Check, request: Any, data: bytes) -> Dialog:
    """By h11, which holds a server to the words of RFC 9112.  ``data``: what has come so far."""
    import h11

    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD)
    connection.send(request)
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    wanted, status, body, read = check.body.encode(), 0, bytearray(), len(data)
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                if read > MOST + HEAD:
                    break
                data = yield from channel.receive()
                if not data and not status:
                    return Answer(False, "closed without an answer")
                read += len(data)
                connection.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
                if not _in_range(check, status):
                    return Answer(False, f"status {status}")
                if not wanted:
                    return Answer(True, f"status {status}")
            elif isinstance(event, h11.Data):
                body += event.data[: MOST - len(body)]
                if wanted in body:
                    return Answer(True, f"status {status}, and the body")
                if len(body) >= MOST:
                    break
            elif not isinstance(event, h11.InformationalResponse):
                break
    except h11.RemoteProtocolError as error:
        return Answer(False, f"not HTTP: {quoted(str(error))}" if not status else f"its body: {quoted(str(error))}")
    if not status:
        return Answer(False, f"no status in the first {(MOST + HEAD) >> 10} KiB of the answer")
    return Answer(False, f"status {status}, and {quoted(check.body)!r} is not in the first 64 KiB of its body")


# ---- HAProxy's agent-check ----


def _agent(channel: _Plain, check: Check, target: Target) -> Dialog:
    line = b""
    while b"\n" not in line and len(line) < LINE:
        data = yield from channel.receive()
        if not data:
            break
        line += data
    return said_by_agent(line)


def said_by_agent(line: bytes) -> Answer:
    """What a line of an agent says (HAProxy's configuration manual, ``agent-check``).

    Words are parted by blanks and commas; behind ``#`` is a reason, for people.  ``drain`` and ``maint``: nothing new,
    until ``ready``.  A percentage alone says nothing of health, nor a state of the percentage.
    """
    line = b"".join(line[:LINE].splitlines()[:1])
    ok: bool | None = None
    percent: int | None = None
    drain: bool | None = None
    unknown = []
    words = line.decode("ascii", "replace").partition("#")[0].lower()
    for word in filter(None, re.split(r"[\s,]+", words)):
        if word in ("up", "down", "fail", "stopped"):
            ok = word == "up" and ok is not False
        elif word in ("ready", "drain", "maint"):
            drain = word != "ready"
        elif (match := re.fullmatch(r"(?:weight:)?([0-9]{1,4})%", word)) and int(match[1]) <= PERCENT:
            percent = int(match[1])
        elif not re.fullmatch(r"maxconn:[0-9]+", word):  # of connections that pass us we know nothing
            unknown.append(word)
    reason = quoted(line) or "an empty line"
    if unknown:
        reason = f"{reason} (unknown: {quoted(' '.join(unknown))})"
    return Answer(ok, reason, percent, drain, decisive=ok is not None)


# ---- a program ----


def _exec(check: Check, target: Target) -> Dialog:
    """It is a session of its own, which is killed whole at the end, whatever it started."""
    environment = {
        "CRABLB_VIP": str(target.vip),
        "CRABLB_BACKEND": str(target.backend),
        "CRABLB_PORT": str(target.port),
        "PATH": PATH,
    }
    with ExitStack() as held:
        reads, writes = os.pipe2(os.O_CLOEXEC)
        held.callback(os.close, reads)
        os.set_blocking(reads, False)
        try:
            child = _start(check.command, environment, writes)
        except OSError as error:
            return Answer(None, f"cannot be run: {error.strerror}", own=True)
        finally:
            os.close(writes)
        held.callback(_clear_away, child)
        try:
            pidfd = os.pidfd_open(child.pid)
        except ProcessLookupError:
            return Answer(None, TAKEN)
        held.callback(os.close, pidfd)
        both = held.enter_context(select.epoll())
        both.register(pidfd, IN)
        both.register(reads, IN)
        output, late, ended = bytearray(), False, False
        while not ended:
            try:
                yield both.fileno(), IN
            except Silent:
                late = True
                _kill(child.pid)
            events = dict(both.poll(0))
            ended = pidfd in events
            if reads in events and not _read(reads, output):
                both.unregister(reads)  # its end, or too much: who writes more waits
        return _ended(pidfd, bytes(output[:OUTPUT]), check.timeout if late else None)


def _clear_away(child: Popen[bytes]) -> None:
    _kill(child.pid)  # its number is nobody else's until it is waited for
    child.poll()
    child.returncode = child.returncode or 0  # what does not end at a SIGKILL is the kernel's matter


def _start(command: tuple[str, ...], environment: Mapping[str, str], writes: int) -> Popen[bytes]:
    return Popen(command, stdin=DEVNULL, stdout=writes, stderr=writes, env=environment, cwd="/", start_new_session=True)


def _kill(leader: int) -> None:
    """All of its session, which a shell with job control makes several process groups of.

    That number is nobody else's as long as the leader is not waited for, or another one of its session lives.  Who is
    begun while others are killed is found at the next pass.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    killed = {leader}
    for _ in range(PASSES):
        found = {pid for name in os.listdir("/proc") if name.isdigit() and _session(pid := int(name)) == leader}
        if not (new := found - killed):
            return
        killed |= new
        for pid in new:
            _kill_one(pid, leader)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _kill_one(pid: int, session: int) -> None:
    with ExitStack() as held, suppress(OSError):
        pidfd = os.pidfd_open(pid)
        held.callback(os.close, pidfd)
        if os.getsid(pid) == session:  # the number may have become another one's before
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _read(fd: int, output: bytearray) -> bool:
    """Whether there may be more to read."""
    try:
        data = os.read(fd, MOST)
    except BlockingIOError:
        return True
    output += data
    return bool(data) and len(output) < MOST


def _ended(pidfd: int, output: bytes, late: float | None) -> Answer:
    """What a program that has ended said.  ``late``: it was killed, after so many seconds."""
    said = f": {words}" if (words := quoted(output.strip().split(b"\n")[0])) else ""
    if late is not None:
        return Answer(False, f"did not end in {late:g} s{said}")
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        result = None
    if result is None:
        return Answer(None, TAKEN)
    status = result.si_status
    if result.si_code != os.CLD_EXITED:
        return Answer(False, f"killed by {signal.Signals(status).name}{said}")
    if status == 1:
        return Answer(False, f"exit status 1{said}")
    percent = status - 2 if status else 100
    return Answer(True, f"exit status {status}{said}", percent)
