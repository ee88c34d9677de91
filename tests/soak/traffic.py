"""Both ends of a soak's connections: ``python -m tests.soak.traffic serve NAME PORT ...``, ``... ask SECONDS WORKERS
WAY ...`` inside nodes."""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.helpers.mptcp import Connection, accept, listener

#: Between two connections of a worker, and between two requests of a connection that lasts.
PAUSE, BETWEEN = 0.5, 1.0
SIZES = (10, 3000, 60000)


def serve(name: str, *ports: str) -> None:
    """On each of these ports, by MPTCP or TCP, as clients ask."""
    for sock in [listener(int(port)) for port in ports]:
        threading.Thread(target=accept, args=(sock, name), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


@dataclass
class Told:
    """What became of connections of one way."""

    made: int = 0
    requests: int = 0
    multipath: int = 0
    longest_connect: float = 0
    longest_request: float = 0
    failed: list[str] = field(default_factory=list)
    servers: Counter[str] = field(default_factory=Counter)


class Asking:
    """A client that connects again and again: some connections for one request, some for seconds."""

    def __init__(self, way: str, number: int, longest: float, end: threading.Event) -> None:
        self.way = way
        self._host, self._port, self._protocol = way.split(",")
        self._longest, self._end = longest, end
        self._random = random.Random(f"{way} {number}")
        self.told = Told()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._random.uniform(0, 2 * PAUSE)):
            begun, step = time.monotonic(), "connecting"
            try:
                connection = Connection(self._host, int(self._port), self._protocol)
                told = self.told
                told.longest_connect = max(told.longest_connect, time.monotonic() - begun)
                told.made += 1
                told.servers[connection.server] += 1
                step = f"talking to {connection.server}"
                self._talk(connection)
                step = f"ending with {connection.server}"
                connection.close()
            except (OSError, EOFError, AssertionError) as error:
                after, at = time.monotonic() - begun, time.strftime("%H:%M:%S")
                self.told.failed.append(f"{at}, after {after:.2f} s, {step}: {type(error).__name__}: {error}")
                self._end.wait(1)  # it may be a server that is gone

    def _talk(self, connection: Connection) -> None:
        until = time.monotonic()
        if self._random.random() < 0.25:
            until += self._random.uniform(0, self._longest)
        first = True
        while first or (time.monotonic() < until and not self._end.is_set()):
            begun = time.monotonic()
            size = self._random.choice(SIZES)
            assert connection.up(size) and connection.down(size), connection.wrong
            connection.ping()
            self.told.longest_request = max(self.told.longest_request, time.monotonic() - begun)
            self.told.requests += 1
            first = False
            if time.monotonic() < until:
                self._end.wait(BETWEEN)
        if self._protocol == "mptcp":
            self.told.multipath += connection.about()["mptcp"]


def ask(longest: str, workers: str, *ways: str) -> None:
    """So many workers a way, whose connections last so long at most; for each line of standard input all that has
    become of them so far, by way, as JSON.  At its end they end theirs, and the last is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who pressed Ctrl-C is told what became of them
    end = threading.Event()
    asking = [Asking(way, n, float(longest), end) for way in ways for n in range(int(workers))]

    def tell() -> None:
        told: dict[str, Told] = {way: Told() for way in ways}
        for one in asking:
            all_, own = told[one.way], one.told
            all_.made += own.made
            all_.requests += own.requests
            all_.multipath += own.multipath
            all_.longest_connect = max(all_.longest_connect, own.longest_connect)
            all_.longest_request = max(all_.longest_request, own.longest_request)
            all_.failed += own.failed
            all_.servers += own.servers
        print(json.dumps({way: vars(one) for way, one in told.items()}), flush=True)

    print("ready", flush=True)
    for _ in sys.stdin:
        tell()
    end.set()
    for one in asking:
        one.thread.join()
    tell()


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
