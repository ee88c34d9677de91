"""The ends of the connections that deaths happen around: ``python -m tests.deaths.ends PROGRAM ...`` inside a node.

Whatever a client sends is its connection's own part of an endless text, and comes back; at the end the server says how
many bytes it had.  So a byte that is lost, that comes twice, or to another connection, is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any

#: linux/in.h, linux/tcp.h.  (Not by crablb: these are to start soon.)
IPPROTO_MPTCP, TCP_IS_MPTCP = 262, 43
#: What is sent, over and over: a prime number of bytes, so that it fits nowhere else.
TEXT = random.Random(65521).randbytes(65521)
TWICE = TEXT + TEXT
#: Bytes of one exchange, and seconds between two of a connection.
SIZES = (1, 10, 900, 3000, 20000)
PAUSE = 5.0
#: Seconds after which an exchange, or a connection that is to be made, is given up.
PATIENCE = 120.0
TOTAL_RETRANS = struct.Struct("@100xI")  # of struct tcp_info, linux/tcp.h
#: Of those that are opened or ended at the same time.
TOGETHER = 32


def part(number: int, at: int, size: int) -> bytes:
    """What connection ``number`` sends from its byte ``at`` on."""
    begin = (number * 7919 + at) % len(TEXT)
    return TWICE[begin : begin + size]


# ---- servers ----


class Echo(asyncio.Protocol):
    def __init__(self, name: str) -> None:
        self._name, self._total = name, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        address = transport.get_extra_info("sockname")[0].removeprefix("::ffff:")
        transport.write(f"{self._name} {address}\n".encode())

    def data_received(self, data: bytes) -> None:
        self._total += len(data)
        self._transport.write(data)

    def eof_received(self) -> None:
        self._transport.write(f"{self._total}\n".encode())  # and it is closed


def serve(name: str, *ports: str) -> None:
    """Echo on these ports, by MPTCP where the client speaks it."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for port in ports:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, IPPROTO_MPTCP)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", int(port)))
            await loop.create_server(lambda: Echo(name), sock=sock, backlog=1024)
        print("ready", flush=True)
        await loop.create_future()

    asyncio.run(run())


# ---- clients ----


class Connection:
    """One that exchanges bytes until it is told to end."""

    def __init__(self, number: int, kind: str, host: str, port: int, multipath: bool) -> None:
        self.number, self.kind = number, kind
        self.place = host, port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP if multipath else 0)
        self.sock.setblocking(False)
        self.sent = 0
        #: Copies of its SYN after the first when it was marked, and when it stood.
        self.marked = self.copies = 0
        self.stands = False
        self.on, self.server = "", ""
        #: Of the round of exchanges that was done last.
        self.done = 0
        self.ending = False

    def retransmitted(self) -> int:
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TOTAL_RETRANS.size)
        return int(TOTAL_RETRANS.unpack(info)[0])

    async def read(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            more = await asyncio.get_running_loop().sock_recv(self.sock, count - len(got))
            if not more:
                raise EOFError(f"closed after {len(got)} of {count} bytes")
            got += more
        return bytes(got)

    async def open(self) -> None:
        # The event loop's own would resolve the address, and there are no addresses for MPTCP.
        loop, stands = asyncio.get_running_loop(), asyncio.Event()
        if (number := self.sock.connect_ex(self.place)) != errno.EINPROGRESS:
            raise OSError(number, os.strerror(number))
        loop.add_writer(self.sock, stands.set)
        try:
            await stands.wait()
        finally:
            loop.remove_writer(self.sock)
        if number := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(number, os.strerror(number))
        self.copies, self.stands = self.retransmitted(), True
        said = b""
        while not said.endswith(b"\n"):
            said += await self.read(1)
        self.server, self.on = said.decode().split()

    async def exchange(self, size: int) -> None:
        data = part(self.number, self.sent, size)
        sending = asyncio.get_running_loop().sock_sendall(self.sock, data)
        got, _ = await asyncio.gather(self.read(size), sending)
        if got != data:
            at = next(i for i, (one, other) in enumerate(zip(got, data, strict=True)) if one != other)
            raise ValueError(f"byte {self.sent + at} is another one")
        self.sent += size

    async def end(self) -> None:
        """The server has had what was sent, and no more."""
        self.sock.shutdown(socket.SHUT_WR)
        said = b""
        while more := await asyncio.get_running_loop().sock_recv(self.sock, 100):
            said += more
        if said != f"{self.sent}\n".encode():
            raise ValueError(f"the server had {said!r} of {self.sent} bytes")

    def about(self) -> dict[str, Any]:
        multipath = False
        with contextlib.suppress(OSError):
            multipath = bool(self.sock.getsockopt(socket.IPPROTO_TCP, TCP_IS_MPTCP))
        return {
            "kind": self.kind,
            "after": self.copies - self.marked,
            "copies": self.copies,
            "port": self.sock.getsockname()[1],
            "server": self.server,
            "on": self.on,
            "multipath": multipath,
        }


class Clients:
    """All connections of a node."""

    def __init__(self, kinds: dict[str, tuple[str, int, bool]], seed: int) -> None:
        """``kinds``: host, port, and whether by MPTCP."""
        self._kinds, self._random = kinds, random.Random(seed)
        self._numbers = 0
        self._held: dict[str, list[Connection]] = defaultdict(list)
        self._tasks = set[asyncio.Task[None]]()
        self._fresh: list[tuple[Connection, asyncio.Task[None]]] = []
        self._round, self._changed = 0, asyncio.Event()
        self._beaten = asyncio.Condition()
        self.broken: list[str] = []
        self.exchanges = self.ended = 0

    def _made(self, kind: str) -> Connection:
        self._numbers += 1
        return Connection(self._numbers, kind, *self._kinds[kind])

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _break(self, one: Connection, what: str, error: BaseException) -> None:
        port = one.sock.getsockname()[1]
        self.broken.append(
            f"{one.kind} connection {one.number} from port {port} to {one.server} at {one.on}, {what} after"
            f" {one.sent} bytes: {type(error).__name__}: {error}"
        )
        one.sock.close()
        if one in self._held[one.kind]:
            self._held[one.kind].remove(one)

    async def _stand(self, one: Connection) -> None:
        """Open it, and hold it."""
        try:
            async with asyncio.timeout(PATIENCE):
                await one.open()
                await one.exchange(100)
        except (OSError, EOFError, ValueError) as error:
            self._break(one, "opening", error)
            return
        self._held[one.kind].append(one)
        self._task(self._hold(one))

    async def _hold(self, one: Connection) -> None:
        try:
            while not one.ending:
                if one.done == self._round:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._random.uniform(0.5, 1.5) * PAUSE):
                            await self._changed.wait()
                begun = self._round
                async with asyncio.timeout(PATIENCE):
                    await one.exchange(self._random.choice(SIZES))
                self.exchanges += 1
                if one.done != begun:
                    one.done = begun
                    async with self._beaten:
                        self._beaten.notify_all()
        except (OSError, EOFError, ValueError) as error:
            self._break(one, "exchanging", error)
        finally:
            async with self._beaten:
                one.done = 1 << 60  # nobody waits for it
                self._beaten.notify_all()

    # ---- what is asked for ----

    async def open(self, counts: dict[str, int]) -> dict[str, Any]:
        """So many of each kind, and hold them."""
        at_once = asyncio.Semaphore(TOGETHER)

        async def one(kind: str) -> None:
            async with at_once:
                await self._stand(self._made(kind))

        await asyncio.gather(*(one(kind) for kind, count in counts.items() for _ in range(count)))
        return await self.state()

    async def fresh(self, each: int) -> dict[str, Any]:
        """Begin so many of each kind."""
        for kind in self._kinds:
            for _ in range(each):
                one = self._made(kind)
                self._fresh.append((one, self._task(self._stand(one))))
        await asyncio.sleep(0)  # their SYNs are on the way
        return {}

    async def mark(self) -> dict[str, Any]:
        """From now on those that were begun, and do not stand yet, are to be served."""
        for one, task in self._fresh:
            if one.stands:
                one.marked = one.copies
            elif not task.done():
                one.marked = one.retransmitted()
        return {"waiting": sum(not one.stands for one, _ in self._fresh)}

    async def settle(self) -> dict[str, Any]:
        """Wait for those that were begun; they are held in place of as many that are older, which end."""
        fresh, self._fresh = self._fresh, []
        for _, task in fresh:
            await task
        new = [one for one, _ in fresh]
        found = [one.about() for one in new if one.stands]
        old = []
        for kind in self._kinds:
            count = sum(one.kind == kind and one in self._held[kind] for one in new)
            old += [one for one in self._held[kind] if one not in new][:count]
        await self._end(old)
        return {"fresh": found}

    async def _end(self, old: list[Connection]) -> None:
        at_once = asyncio.Semaphore(TOGETHER)

        async def one(ending: Connection) -> None:
            async with at_once:
                ending.ending = True
                while ending.done < 1 << 60:  # an exchange is on its way
                    async with self._beaten:
                        await self._beaten.wait()
                if ending not in self._held[ending.kind]:
                    return
                self._held[ending.kind].remove(ending)
                try:
                    async with asyncio.timeout(PATIENCE):
                        await ending.end()
                    self.ended += 1
                    ending.sock.close()
                except (OSError, EOFError, ValueError) as error:
                    self._break(ending, "ending", error)

        await asyncio.gather(*map(one, old))

    async def beat(self) -> dict[str, Any]:
        """An exchange that begins now, on each that is held."""
        begun = time.monotonic()
        self._round += 1
        held = [one for each in self._held.values() for one in each]
        self._changed.set()
        self._changed = asyncio.Event()
        async with self._beaten:
            await self._beaten.wait_for(lambda: all(one.done >= self._round for one in held))
        return {"held": len(held), "seconds": time.monotonic() - begun}

    async def state(self) -> dict[str, Any]:
        """What there is; what has broken since somebody asked."""
        held = {kind: len(each) for kind, each in self._held.items()}
        direct = {kind: sum(one.on != one.place[0] for one in each) for kind, each in self._held.items()}
        multi = {kind: sum(one.about()["multipath"] for one in each) for kind, each in self._held.items()}
        broken, self.broken = self.broken, []
        return {
            "held": held,
            "redirected": direct,
            "multipath": multi,
            "broken": broken,
            "made": self._numbers,
            "ended": self.ended,
            "exchanges": self.exchanges,
        }

    async def finish(self) -> dict[str, Any]:
        """End all."""
        await self._end([one for each in self._held.values() for one in each])
        return await self.state()


def clients(seed: str, kinds: str) -> None:
    """Do what lines of standard input say, each ``[NAME, ARGUMENT...]``, and answer each by one."""

    async def run() -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        all_of_them = Clients({kind: tuple(how) for kind, how in json.loads(kinds).items()}, int(seed))
        print("ready", flush=True)
        while line := await reader.readline():
            name, *args = json.loads(line)
            print(json.dumps(await getattr(all_of_them, name)(*args)), flush=True)

    asyncio.run(run())


if __name__ == "__main__":
    {"serve": serve, "clients": clients}[sys.argv[1]](*sys.argv[2:])
