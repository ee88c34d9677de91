"""Time of a request by policy, on servers of which one is slow.

Four servers answer one request at a time, three in 5 ms, one in 20 ms; each request is a new connection, redirected.
Requests come at random (Poisson), at 250 a second: an equal share is more than the slow server can do.  A request takes
from the moment that it was due to its answer.  Policies are measured in turn, N times; medians of the rounds' p99.
`least-loaded` is not among them: all servers share this machine's CPUs.  Needs root.

    uneven.py [--seconds S] [--rounds N] [--policy NAME ...] [--json FILE] [--plot FILE.svg]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SERVICE_MS = (5, 5, 5, 20)
RATE = 250
POLICIES = ("random", "maglev", "round-robin", "power-of-two", "least-connections")


def serve(milliseconds: str) -> None:
    """One request after the other; the kernel's accept queue is the line."""
    with socket.create_server(("", 80), backlog=4096) as sock:
        print("ready", flush=True)
        while True:
            conn, _ = sock.accept()
            with conn:
                conn.recv(64)
                time.sleep(int(milliseconds) / 1000)  # the work
                conn.sendall(b"done")


async def request(host: str, due: float, times: list[float]) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(due - loop.time())
    reader, writer = await asyncio.open_connection(host, 80)
    writer.write(b"do")
    await reader.read(64)
    times.append((loop.time() - due) * 1000)
    writer.close()


async def load(host: str, seconds: str, seed: str) -> None:
    """Send requests; print their times in milliseconds."""
    numbers, times = random.Random(int(seed)), list[float]()
    due, requests = asyncio.get_running_loop().time() + 0.1, []
    end = due + float(seconds)
    while (due := due + numbers.expovariate(RATE)) < end:
        requests.append(asyncio.create_task(request(host, due, times)))
    await asyncio.gather(*requests)
    print(json.dumps(times))


def measure(args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Times by policy and round."""
    from crablb.lab import VIP4, Lab
    from crablb.lab.demo import crablb, start_agent, start_serve

    this = [sys.executable, str(Path(__file__).resolve())]
    found: dict[str, list[list[float]]] = {policy: [] for policy in args.policy}
    with (
        tempfile.TemporaryDirectory() as temporary,
        Lab.create(f"uneven-{os.getpid()}", "bridge", len(SERVICE_MS)) as lab,
    ):
        folder = Path(temporary)
        master = folder / "master"
        master.write_text(os.urandom(32).hex())
        for server, milliseconds in zip(lab.servers, SERVICE_MS, strict=True):
            child = server.popen(*this, "serve", str(milliseconds), stdout=-1)
            assert child.stdout and child.stdout.readline() == "ready\n"
            key = folder / server.name
            key.write_text(server.run(*crablb("key", "backend", server.ip4, "--master", str(master))).stdout)
            start_agent(server, "server", "--report", lab.lb.ip4, "--report-key", str(key))
        start_agent(lab.client, "client", "--backends", "10.0.0.0/24")
        what = [f"tcp://{VIP4}:80={','.join(s.ip4 for s in lab.servers)}"]
        for number in range(args.rounds):
            for policy in args.policy:
                log = folder / "serve.log"
                log.unlink(missing_ok=True)
                listen = ["--report-listen", lab.lb.ip4, "--report-key", str(master)]
                balancer = start_serve(lab, folder, "--policy", policy, *listen, what=what)
                while log.read_text().count("server reports its load") < len(lab.servers):
                    time.sleep(0.05)
                done = lab.client.run(*this, "load", str(VIP4), str(args.seconds), str(number))
                found[policy].append(sorted(json.loads(done.stdout)))
                balancer.terminate()
                balancer.wait()
    return found


def quantile(times: list[float], q: float) -> float:
    return times[min(len(times) - 1, int(q * len(times)))]


def plot(found: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "crablb"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    names = list(found)[::-1]
    for q, colour in ((0.99, "#c0504d"), (0.5, "#4f81bd")):
        rounds = [[quantile(times, q) for times in found[name]] for name in names]
        middle = [statistics.median(r) for r in rounds]
        spread = [[m - min(r) for m, r in zip(middle, rounds, strict=True)],
                  [max(r) - m for m, r in zip(middle, rounds, strict=True)]]  # fmt: skip
        axes.barh(names, middle, xerr=spread, color=colour, label=f"p{round(q * 100)}", capsize=3)
    axes.set_xscale("log")
    axes.set_xlabel("time of a request, ms (bars: minimum and maximum of the rounds)")
    axes.set_title(f"Four servers ({', '.join(map(str, SERVICE_MS))} ms), {RATE} new connections a second")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    if sys.argv[1:2] == ["load"]:
        asyncio.run(load(*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", action="append", choices=POLICIES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.policy = args.policy or list(POLICIES)
    found: dict[str, Any] = measure(args)
    print(f"{'time of a request, ms':22} {'p50':>8} {'p99':>8} {'p99, min - max':>18} {'requests':>9}")
    for policy, rounds in found.items():
        p50, p99 = ([quantile(times, q) for times in rounds] for q in (0.5, 0.99))
        spread = f"{min(p99):.0f} - {max(p99):.0f}"
        count = sum(map(len, rounds))
        print(f"{policy:22} {statistics.median(p50):8.1f} {statistics.median(p99):8.1f} {spread:>18} {count:9,}")
    if args.json:
        args.json.write_text(json.dumps({"service_ms": SERVICE_MS, "rate": RATE, "times": found}))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
