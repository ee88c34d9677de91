"""Requests that each have a number of their own: servers that write down which they executed, clients that write down
which were acknowledged.  ``python -m tests.helpers.numbered PROGRAM ...`` inside a node.

A request is its number, what is to be done when it is answered, and bytes that follow from the number; the answer is
the same again.  Nobody sends a request a second time, but where it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

PORT = 80
#: Between two connections of one worker, so that something else is done as well.
PAUSE = 0.02
HEAD = struct.Struct("!QI?")
#: Between those that a SYN has room for and those of many segments.
SIZES = (10, 900, 2000, 20000)


def body(number: int, size: int) -> bytes:
    return (number.to_bytes(8) * (size // 8 + 1))[:size]


def request(number: int, last: bool) -> bytes:
    """``last``: the server shall close the connection."""
    size = SIZES[number % len(SIZES)]
    return HEAD.pack(number, size, last) + body(number, size)


# ---- what was found out ----


@dataclass
class Log:
    """What happened to requests."""

    #: By whom, and for what address and port, each was executed.
    executed: dict[int, list[str]] = field(default_factory=dict)
    acknowledged: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Log:
        """All that servers and clients have written."""
        log = cls()
        for path in folder.glob("*.executed"):
            for line in path.read_text().splitlines():
                number, what, peer = line.split()
                log.executed.setdefault(int(number), []).append(f"{path.stem} for {peer}")
                if what != "whole":
                    log.broken.append(line)
        for path in folder.glob("*.asked"):
            for line in path.read_text().splitlines():
                number, what = line.split()
                if what == "acknowledged":
                    log.acknowledged.add(int(number))
                else:
                    log.failed[int(number)] = what
        return log

    def hold(self) -> None:
        """What must hold, whatever happened."""
        twice = {number: where for number, where in self.executed.items() if len(where) > 1}
        assert not twice, f"executed twice, of {len(self.executed)}: {twice}"
        missing = sorted(self.acknowledged - self.executed.keys())
        assert not missing, f"acknowledged, and not executed: {missing[:20]} of {len(self.acknowledged)}"
        assert not self.broken, f"not as it was sent: {self.broken[:20]}"


# ---- programs ----


def _append(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def serve(log: str) -> None:
    """Execute requests: write each down when it is there to its last byte, then answer."""
    written = _append(log)

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port, *_ = writer.get_extra_info("peername")
        try:
            last = False
            while not last:
                head = await reader.readexactly(HEAD.size)
                number, size, last = HEAD.unpack(head)
                got = await reader.readexactly(size)
                what = "whole" if got == body(number, size) else "broken"
                os.write(written, f"{number} {what} {host}:{port}\n".encode())
                writer.write(head + got)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        sock = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 1024)
        async with await asyncio.start_server(one, sock=sock) as server:
            print("ready", flush=True)
            await server.serve_forever()

    asyncio.run(run())


class Client:
    """Asks, and writes down what came of it."""

    def __init__(self, log: str, patience: str) -> None:
        """``patience``: so many seconds it waits for a connection, or an answer."""
        self.written, self.patience = _append(log), float(patience)
        self.acknowledged = 0
        self.changed = asyncio.Condition()

    async def _open(self, sock: socket.socket, host: str, fast: bool, data: bytes) -> None:
        """Connect, and send what is to be sent first."""
        loop = asyncio.get_running_loop()
        if fast:
            with contextlib.suppress(BlockingIOError):  # there is no cookie yet: the SYN asks for one
                data = data[sock.sendto(data, socket.MSG_FASTOPEN, (host, PORT)) :]
        else:
            await loop.sock_connect(sock, (host, PORT))
        # A connection that does not stand yet has no room.
        await loop.sock_sendall(sock, data)

    async def connection(self, host: str, how: str, numbers: list[int], local_port: int = 0) -> bool:
        """One connection, and these requests by it, one after the other.  Did all go well?  ``how``: ``plain``,
        ``fastopen``: the first one in the SYN, ``again``: each request twice."""
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        asked = numbers[0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                if local_port:
                    sock.bind(("", local_port))
                for asked in numbers:
                    # Who closes first keeps the connection's addresses and ports for a while: both do in turn.
                    data = request(asked, last=asked == numbers[-1] and bool(asked & 4))
                    async with asyncio.timeout(self.patience):
                        if asked == numbers[0]:
                            await self._open(sock, host, how == "fastopen", data)
                        else:
                            await loop.sock_sendall(sock, data)
                        got = b""
                        while len(got) < len(data):
                            more = await loop.sock_recv(sock, 1 << 16)
                            if not more:
                                raise EOFError
                            got += more
                    await self._tell(asked, "acknowledged" if got == data else "broken")
                    if how == "again":
                        await self.connection(host, "plain", [asked])
            except (OSError, EOFError) as error:
                await self._tell(asked, type(error).__name__)
                return False
        return True

    async def _tell(self, number: int, what: str) -> None:
        os.write(self.written, f"{number} {what}\n".encode())
        async with self.changed:
            self.acknowledged += what == "acknowledged"
            self.changed.notify_all()

    async def until(self, count: int, seconds: float) -> None:
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(lambda: self.acknowledged >= count)


def ask(log: str, patience: str, how: str, ports: str, first: str, *hosts: str) -> None:
    """Connections that all begin at once, to every host one from each of the ``ports`` (``FROM-TO``), each for one
    request; their numbers follow ``first``.  On return each has come to its end."""
    low, high = (int(port) for port in ports.split("-"))
    numbers = itertools.count(int(first))

    async def run() -> None:
        client = Client(log, patience)
        ways = itertools.product(range(low, high + 1), hosts)
        await asyncio.gather(*(client.connection(host, how, [next(numbers)], port) for port, host in ways))

    asyncio.run(run())
    print("done", flush=True)


def traffic(log: str, patience: str, first: str, workers: str, *ways: str) -> None:
    """Connections one after the other by each of the workers, some for one request and some for many, until told
    ``end``.  A way is ``HOST=HOW``; workers take them in turn.  For a number on standard input: say it again when so
    many more requests were acknowledged."""
    numbers = itertools.count(int(first))

    async def work(client: Client, worker: int) -> None:
        host, how = ways[worker % len(ways)].split("=")
        while True:
            wanted = (1, 3, 50)[worker // len(ways) % 3]
            await client.connection(host, how, [next(numbers) for _ in range(wanted)])
            await asyncio.sleep(PAUSE)

    async def lines() -> asyncio.StreamReader:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return reader

    async def run() -> None:
        client = Client(log, patience)
        tasks = [asyncio.create_task(work(client, i)) for i in range(int(workers))]
        told = await lines()
        while (line := (await told.readline()).decode().strip()) not in ("", "end"):
            before = client.acknowledged
            try:
                await client.until(before + int(line), 60 + int(line) / 20)
                print(line, flush=True)
            except TimeoutError:
                print(f"no more than {client.acknowledged - before} were acknowledged", flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        print("ended", flush=True)

    asyncio.run(run())


def _main(program: str, *args: str) -> None:
    {"serve": serve, "ask": ask, "traffic": traffic}[program](*args)


if __name__ == "__main__":
    _main(*sys.argv[1:])
