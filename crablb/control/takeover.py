"""How one load balancer takes over from another one that serves: the conversation of the two processes.

By a UNIX socket (SEQPACKET), ``/run/crablb/netns-<cookie>-lb-<interface>.takeover``, which whoever serves listens at.
A message is [kind, value] as MessagePack, in as many packets as it needs; descriptors come with them (SCM_RIGHTS).

=================  =====================================================================
successor says     predecessor says, and does
=================  =====================================================================
hello              nothing changes any more (``hold``); offer: what the engine offers, and the doors' sockets
take               its workers stop (``give``); given
more               (that one works on packets now) rest: what is not urgent
served             it ends, and leaves all to the other (``left``)
failed             it serves on (``resume``)
=================  =====================================================================

After "served" the predecessor may say "reload", until it ends: it was told to, and may not see the other process, to
send it a signal.

With "take" comes the descriptor of the map that the successor registers the sockets in: one that dies leaves them
registered there, and they would keep the map for as long as they live.  (Versions before do not send it.)

"refused", with the reason, may come instead of any answer.  If the successor goes, is too slow, or says what it should
not, the predecessor serves on.  If the predecessor goes before "given", the successor starts as after its death.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import glob
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec
import structlog

from crablb.errors import CrablbError, KernelError, why
from crablb.kernel import pins
from crablb.version import VERSION

__all__ = ["Giver", "Host", "Offer", "Predecessor", "connect"]

log = structlog.get_logger()

PROTOCOL = 1
#: Bytes and descriptors of a packet (SCM_MAX_FD is 253), bytes of a message at most.
PIECE, RIGHTS, MOST = 32 << 10, 200, 64 << 20
#: Bytes of what a successor says, and with which words descriptors come.
MOST_SAID, GIVES = 64 << 10, ("take",)
#: Seconds that the successor waits for an answer; it is the control side's, and so has to come in a tenth of one.
ANSWER = 10.0
#: Seconds for a successor: to say hello; from the offer until it takes, and after that until all of it is there; until
#: it works on packets, which wait.
HELLO, START, SERVE = 5.0, 30.0, 5.0
#: Seconds for the end of a process that was killed.
END = 5.0
#: Those who wait to be heard.
BACKLOG = 4


class Gone(KernelError):
    """The other one has ended the conversation."""


class Refusal(Exception):
    """The successor does not come to serve, has let go of what it had, and says why."""


class Hello(msgspec.Struct, frozen=True):
    """Who wants to take over."""

    protocol: int
    version: str = ""
    pid: int = 0
    interfaces: tuple[str, ...] = ()


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What is known before anything stops."""

    version: str = VERSION
    engine: Any
    fds: int  # of the descriptors, how many are the engine's; they come first
    parts: Any  # what is round the engine


class Giver(Protocol):
    """All that is handed over, as its owner has it: the engine, and what is round it."""

    @property
    def interfaces(self) -> Sequence[str]:
        """By their names now."""

    def hold(self) -> None:
        """Nothing changes from now on."""

    def offer(self) -> tuple[Offer, list[int]]:
        """Values, and descriptors, which stay its own.  Raises :class:`CrablbError`."""

    def give(self, fds: list[int]) -> Any:
        """Stop working on packets; what is known of them.  Milliseconds.  ``fds``: what came with "take", the giver's
        from now on.  Raises :class:`CrablbError`."""

    def rest(self) -> Any:
        """What is not urgent, after :meth:`give`."""

    def resume(self) -> None:
        """Go on, after whatever of these; what cannot is told and tried again."""


# ---- messages ----


def _pieces(kind: str, value: Any, fds: Sequence[int]) -> Iterable[tuple[bytes, list[tuple[int, int, bytes]]]]:
    """Data and ancillary data of each packet; the first byte says whether it is the last."""
    body = memoryview(msgspec.msgpack.encode([kind, value]))
    count = max(1, -(-len(body) // PIECE), -(-len(fds) // RIGHTS))
    for i in range(count):
        rights = fds[i * RIGHTS : (i + 1) * RIGHTS]
        more = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", rights).tobytes())] if rights else []
        yield bytes([i == count - 1]) + body[i * PIECE : (i + 1) * PIECE], more


class _Inbox:
    """Puts a message together.  Raises :class:`KernelError` for what is none."""

    def __init__(self, sock: socket.socket, most: int) -> None:
        self._sock, self._most = sock, most
        self._body, self._fds = bytearray(), array.array("i")

    def read(self) -> tuple[str, Any, list[int]] | None:
        """Take a packet; the message, if it was its last one.  Raises :class:`Gone`, BlockingIOError, TimeoutError."""
        room = socket.CMSG_SPACE(RIGHTS * self._fds.itemsize)
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(PIECE + 1, room, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, TimeoutError):
            raise
        except OSError as error:  # reset: it ended with something unread
            raise Gone(error.strerror or str(error)) from None
        for level, what, rights in ancillary:
            if (level, what) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.frombytes(rights[: len(rights) - len(rights) % self._fds.itemsize])
        if flags & socket.MSG_CTRUNC:
            raise KernelError("not all descriptors came: too few are left; raise the limit: ulimit -n, LimitNOFILE=")
        if not data:
            raise Gone("it has ended")
        self._body += data[1:]
        if flags & socket.MSG_TRUNC or len(self._body) > self._most:
            raise KernelError("what the other process says is too long")
        if not data[0]:
            return None
        try:
            kind, value = msgspec.msgpack.decode(self._body, type=tuple[str, Any])
        except (ValueError, RecursionError):  # msgspec's is one, and what is no UTF-8, too
            raise KernelError("what the other process says is no message of a takeover") from None
        fds, self._fds = self._fds.tolist(), array.array("i")
        self._body = bytearray()
        return kind, value, fds

    def close(self) -> None:
        """Descriptors of a message that was not taken."""
        _close(self._fds)
        self._fds = array.array("i")


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process (0: one that is not seen from here) and user at the other end."""
    pid, uid, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def place(interface: str) -> Path:
    """Where whoever serves an interface of this thread's network namespace listens."""
    return pins.RUN / f"{pins.namespace()}-lb-{interface}.takeover"


def _fresh(path: Path) -> Path:
    """Where what is to be in its place is made."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    _forget_fresh(path)
    return fresh


def _forget_fresh(path: Path) -> None:
    """Remove what others have made to be in its place and then did not put there, as they were killed."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*"):
        if left.name != f"{path.name}.{os.getpid()}":
            _forget(left)


def _forget(path: Path) -> None:
    """Remove a socket at which nobody listens."""
    with contextlib.suppress(KernelError):
        if sock := _reach(path):
            sock.close()
        else:
            path.unlink(missing_ok=True)


def forget(interface: str) -> None:
    """Remove the socket of one that was killed.  Of one that lives it stays."""
    path = place(interface)
    _forget(path)
    _forget_fresh(path)


# ---- the successor ----


def connect(interfaces: Sequence[str]) -> Predecessor | None:
    """Ask whoever serves these interfaces; None: nobody does.

    Raises :class:`KernelError` if he does and cannot be taken over, with the reason and what to do.
    """
    sock = None
    for name in interfaces:
        if sock := _reach(place(name)):
            break
    if sock:
        try:
            return Predecessor(sock, Hello(PROTOCOL, VERSION, os.getpid(), tuple(interfaces)))
        except Gone:
            until_ended(_peer(sock)[0])
            sock.close()
        except BaseException:
            sock.close()
            raise
    for name in interfaces:
        if (pid := pins.owner(f"lb-{name}")) is not None:
            until_ended(pid, END)  # it may be dying just now
            if (pid := pins.owner(f"lb-{name}")) is not None:
                _unheard(name, pid)
    return None


def until_ended(pid: int, seconds: float = ANSWER) -> None:
    """What a process that dies has is closed in some order: its sockets before its locks, perhaps."""
    with contextlib.suppress(OSError):  # it has ended
        pidfd = os.pidfd_open(pid)
        try:
            select.select([pidfd], [], [], seconds)
        finally:
            os.close(pidfd)


def _reach(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        # With a timeout of Python's, it would not wait where there are many: unix(7) has EAGAIN for that.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(ANSWER), 0))
        sock.connect(str(path))
        sock.settimeout(ANSWER)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BlockingIOError:
        sock.close()
        raise KernelError(f"{path}: who serves takes no connection; {_force(pins.ELSEWHERE)}") from None
    except OSError as error:
        sock.close()
        who = ""
        with contextlib.suppress(OSError):
            who = f"; only root and user {path.stat().st_uid}, who serves, may take over"
        raise KernelError(f"{path}: {error.strerror}{who}") from None
    return sock


def _force(pid: int) -> str:
    end = f"end it: kill {pid} (kill -9, if it does not)" if pid else f"end it, {pins.how_to_end(pins.ELSEWHERE)}"
    return f"{end}, and start: crablb serve; fallback connections go on from what a killed one leaves"


def _unheard(name: str, pid: int) -> NoReturn:
    raise KernelError(
        f"{pins.told(pid)} serves {name} and cannot be taken over: it listens at no socket for that ({place(name)}), as"
        " it is of a version before, begins or ends just now, or could not make it; it goes on. Try again, or else"
        f" {_force(pid)}"
    )


class Predecessor:
    """Who serves until now, for its successor: a :class:`crablb.dataplane.handover.Predecessor`, and more.

    Blocks, each time at most :data:`ANSWER` seconds.  Made by :func:`connect`.
    """

    def __init__(self, sock: socket.socket, hello: Hello) -> None:
        self._sock = sock
        self.pid, user = _peer(sock)
        if user not in (0, os.geteuid()):
            raise KernelError(
                f"user {user} serves, and this is user {os.geteuid()}: what another one gives is not taken"
            )
        self._inbox = _Inbox(sock, MOST)
        self.given = False  # what it had is ours
        try:
            offered, fds = self._ask("hello", msgspec.to_builtins(hello), "offer")
        except BaseException:
            self._inbox.close()  # its locks may be among what has come: who has them would be the one who serves
            raise
        try:
            offer = msgspec.convert(offered, Offer)
        except msgspec.ValidationError as error:
            _close(fds)
            raise KernelError(
                f"{self._who} offers what this version does not know ({error}); {_force(self.pid)}"
            ) from None
        self.version, self.values, self.parts = offer.version, offer.engine, offer.parts
        self.fds, self.sockets = fds[: offer.fds], fds[offer.fds :]

    @property
    def _who(self) -> str:
        return f"{pins.told(self.pid)}, which serves,"

    def _ask(self, kind: str, value: Any, expected: str, fds: Sequence[int] = ()) -> tuple[Any, list[int]]:
        """Raises :class:`KernelError`; :class:`Gone` if it has ended."""
        with contextlib.suppress(Gone):  # what it said last, and why, may wait to be read
            self._say(kind, value, fds)
        return self._hear(expected)

    def _say(self, kind: str, value: Any, fds: Sequence[int] = ()) -> None:
        try:
            for data, rights in _pieces(kind, value, fds):
                self._sock.sendmsg([data], rights)
        except TimeoutError:
            self._unanswered()
        except OSError as error:
            raise Gone(error.strerror or str(error)) from None

    def _hear(self, expected: str) -> tuple[Any, list[int]]:
        try:
            while not (message := self._inbox.read()):
                pass
        except TimeoutError:
            self._unanswered()
        kind, value, fds = message
        if kind == expected:
            return value, fds
        _close(fds)
        if kind == "refused":
            raise KernelError(f"{self._who} is not taken over, and goes on: {value}")
        raise KernelError(f"{self._who} says {kind!r} instead of {expected!r}; it goes on")

    def _unanswered(self) -> NoReturn:
        raise KernelError(
            f"{self._who} does not answer within {ANSWER:g} s: it is stopped, or hangs; {_force(self.pid)}"
        )

    def take(self, fds: Sequence[int] = ()) -> Any:
        """Have it stop; what its engine gave.  ``fds``: see :meth:`.handover.Predecessor.take`.

        Raises :class:`Gone` if it has ended: all is as after its death; else :class:`KernelError`."""
        values, _ = self._ask("take", None, "given", fds)
        self.given = True
        return values

    def rest(self) -> Any:
        """What else it had, after :meth:`take`; None: nothing, as it has ended.  Raises :class:`KernelError`."""
        if not self.given:
            return None
        try:
            return self._ask("more", None, "rest")[0]
        except Gone:  # packets are served
            return None

    def served(self) -> None:
        """This one serves: the other one may end.  One that does not hear it ends this one by force, or has ended."""
        with contextlib.suppress(KernelError):
            self._say("served", os.getpid())

    def afterwards(self, reload: Callable[[], None]) -> Coroutine[Any, Any, None]:
        """After :meth:`served`, until the other one has ended, which :meth:`close` need not wait for: what that is told
        yet is for this one."""
        return _afterwards(self._sock.dup(), reload)

    def failed(self, reason: str) -> None:
        """This one does not come to serve, and has let go of all that it had: the other one goes on."""
        with contextlib.suppress(KernelError):
            self._say("failed", reason)

    def close(self) -> None:
        """Idempotent."""
        self._inbox.close()
        _close((*self.fds, *self.sockets))
        self.fds, self.sockets = [], []
        self._sock.close()


async def _afterwards(sock: socket.socket, reload: Callable[[], None]) -> None:
    with sock:
        sock.setblocking(False)
        speaker = _Speaker(sock)
        try:
            while True:
                await speaker.hear("reload")
                reload()
        except (KernelError, Refusal):  # Gone is one
            pass
        finally:
            speaker.close()


# ---- the predecessor ----


class Host:
    """Listens, in the running event loop, for one that takes over.

    ``left`` is done, with its process id here (0: it has none), when one serves in this one's place.
    """

    def __init__(self, giver: Giver, failed: Callable[[str, int], None] = lambda reason, pid: None) -> None:
        """``failed``: told the reason when one that asked does not come to serve, and its process id here."""
        self._giver, self._told = giver, failed
        self.left: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._listener: socket.socket | None = None
        self._paths: set[Path] = set()
        self._prepared: dict[Path, Path] = {}  # by the path that it is to have
        self._inode = 0
        self._accepting: asyncio.Task[None] | None = None
        self._conversations: dict[asyncio.Task[None], socket.socket] = {}
        self._current: asyncio.Task[None] | None = None  # that which hands over
        self._process = 0  # of it
        self._given = False  # it works, or may
        #: Why nobody works on packets; empty: somebody does.
        self.stalled = ""
        self._closing = ""  # why no other one is heard
        self._unwanted, self._why_not = 0, ""  # a process that is not to take over any more, and why
        self._successor: socket.socket | None = None  # who serves in this one's place

    # ---- life ----

    def prepare(self) -> None:
        """Make what :meth:`start` shows, so that there is room for it.  Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            for path in map(place, self._giver.interfaces):
                fresh = _fresh(path)
                if self._prepared:
                    os.link(next(iter(self._prepared.values())), fresh)
                else:
                    sock.bind(str(fresh))
                self._prepared[path] = fresh
            fresh.chmod(0o600)
            sock.listen(BACKLOG)
            self._inode = fresh.stat().st_ino
        except BaseException:
            sock.close()
            self._unlink()
            raise
        self._listener = sock

    def start(self, task: Callable[[str, Callable[[], Any]], asyncio.Task[None]]) -> None:
        """Listen, after :meth:`prepare`.  ``task`` runs what is never done.  Raises OSError."""
        for path in list(self._prepared):
            self._prepared[path].replace(path)
            del self._prepared[path]
            self._paths.add(path)
        self._accepting = task("takeover", self._accept)

    def name(self, interface: str) -> None:
        """Listen by an interface's name as well.  Raises OSError."""
        path = place(interface)
        fresh = _fresh(path)
        os.link(next(iter(self._paths)), fresh)
        fresh.replace(path)
        fresh.unlink(missing_ok=True)  # rename(2) leaves both where they are the same file
        self._paths.add(path)

    def _unlink(self) -> None:
        """The names that are this one's yet."""
        for fresh in self._prepared.values():
            fresh.unlink(missing_ok=True)
        self._prepared.clear()
        for path in self._paths:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == self._inode:
                    path.unlink()
        self._paths.clear()

    async def close(self, why: str = "it ends") -> None:
        """Hear no others.  One to whom everything was given already comes to its end first: look at ``left`` then.
        Idempotent."""
        self._closing = why
        if self._accepting:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None
        for task in list(self._conversations):
            if not (task is self._current and self._given) or self.stalled:
                task.cancel()
        if self._current and self._given and self._process and not self.left.done():
            with contextlib.suppress(OSError):  # what ends this one is meant for whoever serves
                os.kill(self._process, signal.SIGTERM)
        await asyncio.gather(*self._conversations, return_exceptions=True)
        if self._listener:
            self._listener.close()
            self._listener = None
        if self.left.done():  # these are the other one's, who puts his in their place
            self._paths -= {place(name) for name in self._giver.interfaces}
        self._unlink()

    @property
    def busy(self) -> bool:
        """Whether somebody takes over just now, or has."""
        return self._current is not None or self.left.done()

    async def over(self, seconds: float) -> None:
        """Wait until nobody takes over, at most so long."""
        if self._current:
            await asyncio.wait([self._current], timeout=seconds)

    async def give_up(self, process: int, why: str) -> None:
        """Have a process take over no more, which has heard so then.  One to whom everything was given already comes to
        its end, which is soon: look at ``left``."""
        self._unwanted, self._why_not = process, why
        if self._current and self._process == process:
            if not self._given:
                self._current.cancel()
            await asyncio.wait([self._current])

    def pass_on(self, reload: bool) -> None:
        """The last, once this one has ``left``: whether somebody has asked it for a reload."""
        if not self._successor:
            return
        with self._successor:
            if reload:
                with contextlib.suppress(OSError):  # it has ended, or is of a version that does not listen
                    for data, rights in _pieces("reload", None, ()):
                        self._successor.sendmsg([data], rights)
        self._successor = None

    # ---- conversations ----

    async def _accept(self) -> None:
        assert self._listener
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            if len(self._conversations) >= BACKLOG:
                connection.close()
                continue
            task = loop.create_task(self._converse(connection))
            self._conversations[task] = connection
            task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._conversations.pop(task).close()
        if task is self._current:
            self._current = None
        if not task.cancelled() and (error := task.exception()):
            log.error("a takeover failed", **why(error))

    async def _converse(self, sock: socket.socket) -> None:
        speaker = _Speaker(sock)
        pid, uid = _peer(sock)
        try:
            async with asyncio.timeout(HELLO):
                hello = await speaker.hello()
                if reason := self._refusal(hello, uid, pid):
                    log.warning("a takeover is refused", process=pid or pins.told(pid), reason=reason)
                    if not self.busy:
                        self._told(reason, pid)
                    await speaker.say("refused", reason)
                    return
        except (Refusal, KernelError, TimeoutError):
            return  # whoever that was: nothing has changed
        finally:
            speaker.close()
        self._current, self._process, self._given = asyncio.current_task(), pid, False
        await self._hand_over(speaker, hello, pid)

    def _refusal(self, hello: Hello, uid: int, pid: int) -> str:
        """Why this one does not take over; empty: it may."""
        if uid not in (0, os.geteuid()):
            return f"it is of user {uid}, and this one of user {os.geteuid()}"
        if self._closing:
            return self._closing
        if pid and pid == self._unwanted:
            return self._why_not
        if self.busy:
            return "another takeover is on its way; try again when it is over"
        if hello.protocol != PROTOCOL:
            return (
                f"it speaks version {hello.protocol} of the takeover, and this one version {PROTOCOL}; restart instead,"
                " with keep in the configuration so that fallback connections go on"
            )
        mine = self._giver.interfaces
        if sorted(hello.interfaces) != sorted(mine):
            return (
                f"it is to serve {', '.join(hello.interfaces) or 'nothing'}, and this one serves {', '.join(mine)};"
                " other interfaces need a restart"
            )
        if pid and os.getpid() == 1:
            return "process 1 of a container ends that with it: let one in another container take over, or restart"
        return ""

    async def _hand_over(self, speaker: _Speaker, hello: Hello, pid: int) -> None:
        giver, process, held = self._giver, pid or pins.told(pid), False
        watch = _pidfd(pid)
        log.info("a takeover begins", process=process, version=hello.version)
        try:
            giver.hold()
            held = True
            async with asyncio.timeout(START):
                offer, fds = giver.offer()
                await speaker.say("offer", offer, fds)
                fds = await speaker.hear("take")
            self._given = True
            async with asyncio.timeout(SERVE):
                await speaker.say("given", giver.give(fds))
                await speaker.hear("more")
            async with asyncio.timeout(START):
                await speaker.say("rest", giver.rest())
                await speaker.hear("served")
        except BaseException as error:
            reason = self._why(error)
            try:
                await self._part(speaker, watch, error, reason)
            finally:  # whatever else goes wrong
                try:
                    if held:
                        giver.resume()
                finally:
                    log.error("the takeover failed; this one serves on", process=process, reason=reason)
                    self._told(reason, pid)
            if not isinstance(error, CrablbError | Refusal | TimeoutError | OSError | asyncio.CancelledError):
                raise
        else:
            self._successor = speaker.kept()
            if not self.left.done():
                self.left.set_result(pid)
        finally:
            speaker.close()
            if watch is not None:
                os.close(watch)

    async def _part(self, speaker: _Speaker, watch: int | None, error: BaseException, reason: str) -> None:
        """Have the other one know, and have it use nothing any more."""
        if self._given:
            # The sockets are no two processes'.
            if not isinstance(error, Refusal) and not await _end(watch) and not isinstance(error, Gone):
                await self._gone(speaker, reason)
        elif not isinstance(error, Gone | Refusal):
            with contextlib.suppress(KernelError, TimeoutError):
                async with asyncio.timeout(HELLO):
                    await speaker.say("refused", reason)

    async def _gone(self, speaker: _Speaker, reason: str) -> None:
        """Until one that cannot be ended from here has ended, or this one is to end."""
        if self._closing:
            return
        who, how = pins.told(self._process), pins.how_to_end(self._process)
        self.stalled = f"nobody works on packets until {who} has ended, which has the sockets; end it: {how}"
        log.error("nobody works on packets until the new process has ended", remedy=f"end it: {how}", reason=reason)
        try:
            await speaker.gone()
        finally:
            self.stalled = ""

    def _why(self, error: BaseException) -> str:
        if isinstance(error, asyncio.CancelledError):
            return self._closing or self._why_not
        if isinstance(error, TimeoutError):
            return f"the new process is too slow: it said nothing for {SERVE if self._given else START:g} s"
        if isinstance(error, Gone):
            return "the new process has ended before it served"
        return str(error) or type(error).__name__


class _Speaker:
    """The predecessor's end, in its event loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._inbox = _Inbox(sock, MOST_SAID)

    async def say(self, kind: str, value: Any, fds: Sequence[int] = ()) -> None:
        """Raises :class:`Gone`, :class:`KernelError`."""
        for data, rights in _pieces(kind, value, fds):
            while True:
                try:
                    self._sock.sendmsg([data], rights)
                except BlockingIOError:
                    await self._ready(select.EPOLLOUT)
                except OSError as error:
                    if isinstance(error, BrokenPipeError | ConnectionResetError):
                        raise Gone(error.strerror) from None
                    raise KernelError(f"descriptors cannot be handed over: {error.strerror}") from None
                else:
                    break

    async def hello(self) -> Hello:
        """Raises as :meth:`hear`."""
        try:
            return msgspec.convert((await self._hear(["hello"]))[0], Hello)
        except msgspec.ValidationError as error:
            raise KernelError(f"it says hello otherwise: {error}") from None

    async def hear(self, *expected: str) -> list[int]:
        """It says one of these; the descriptors that come with it, the caller's from now on.  Raises :class:`Gone`,
        :class:`Refusal`, :class:`KernelError`."""
        return (await self._hear(expected))[1]

    async def _hear(self, expected: Sequence[str]) -> tuple[Any, list[int]]:
        while True:
            try:
                message = self._inbox.read()
            except BlockingIOError:
                await self._ready(select.EPOLLIN)
                continue
            if message:
                break
        kind, value, fds = message
        if kind not in expected or kind not in GIVES:
            _close(fds)
            fds = []
        if kind == "failed":
            raise Refusal(str(value))
        if kind not in expected:
            raise KernelError(f"it says {kind!r} instead of {' or '.join(expected)}")
        return value, fds

    async def gone(self) -> None:
        """Until the other one has ended the conversation."""
        while True:
            try:
                await self.hear()
            except Gone:
                return
            except (KernelError, Refusal):
                continue

    async def _ready(self, event: int) -> None:
        # By an epoll instance, as in kernel/reader.py.
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        with select.epoll() as epoll:
            epoll.register(self._sock, event)
            loop.add_reader(epoll, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(epoll)

    def kept(self) -> socket.socket:
        """The connection, for longer than the conversation."""
        return self._sock.dup()

    def close(self) -> None:
        self._inbox.close()


def _pidfd(pid: int) -> int | None:
    """None: of a process that is not seen from here, or has ended."""
    try:
        return os.pidfd_open(pid) if pid else None
    except OSError:
        return None


async def _end(watch: int | None) -> bool:
    """End the other process by force, so that it has no socket any more.  False: one that cannot be ended from here."""
    if watch is None:
        return False
    try:
        signal.pidfd_send_signal(watch, signal.SIGKILL)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(watch, ended.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END):
                await ended.wait()
    finally:
        loop.remove_reader(watch)
    return True
