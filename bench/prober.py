"""Connect to some addresses again and again, and tell what became of each connection: run in a client's namespace.

``python -m bench.prober RATE TIMEOUT NAME=ADDRESS:PORT ...``: ``RATE`` new connections a second to each, evenly; each
sends 8 bytes and waits for their echo, at most ``TIMEOUT`` seconds in all.  It says ``ready`` when each has answered
once, and at the end of its standard input prints JSON: by name a list of [when it began (CLOCK_MONOTONIC), seconds, ""
or what failed].
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
import time

MESSAGE = b"8 bytes\n"
#: A close by RST: no port waits for a minute.
LINGER = struct.pack("ii", 1, 0)


async def probe(host: str, port: int, timeout: float) -> str:
    """One connection; empty, or what failed."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        step = "connect"
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_connect(sock, (host, port))
                step = "answer"
                await loop.sock_sendall(sock, MESSAGE)
                got = b""
                while len(got) < len(MESSAGE):
                    data = await loop.sock_recv(sock, len(MESSAGE))
                    if not data:
                        return "answer: closed"
                    got += data
        except TimeoutError:
            return f"{step}: timeout"
        except OSError as error:
            return f"{step}: {error.strerror}"
    return "" if got == MESSAGE else "answer: wrong"


async def main(rate: float, timeout: float, targets: dict[str, tuple[str, int]]) -> None:
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in targets}
    waiting: set[asyncio.Task[None]] = set()

    async def one(name: str) -> None:
        began = time.monotonic()
        failed = await probe(*targets[name], timeout)
        found[name].append((began, time.monotonic() - began, failed))

    for host, port in targets.values():
        while await probe(host, port, timeout):
            await asyncio.sleep(0.05)
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    stopped = loop.run_in_executor(None, sys.stdin.readline)
    due = loop.time()
    while not stopped.done():
        for name in targets:
            task = asyncio.create_task(one(name))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        due += 1 / rate
        await asyncio.sleep(max(0.0, due - loop.time()))
    await asyncio.gather(*waiting)
    print(json.dumps(found), flush=True)


def parse(text: str) -> tuple[str, tuple[str, int]]:
    name, _, where = text.partition("=")
    host, _, port = where.rpartition(":")
    return name, (host.strip("[]"), int(port))


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), float(sys.argv[2]), dict(map(parse, sys.argv[3:]))))
