"""What a packet of a known fallback flow costs in the XDP program, and what flows cost in memory.

Beside a program which only writes MAC addresses (mac.bpf.c), on the same packets in the same run:

- cold: by BPF_PROG_TEST_RUN, one packet of a random flow at a time, as the kernel measures it.  Between two runs Python
  uses the caches, so every packet is a cold start; the harness (MAC only) is in the figures.
- live: packets per second over a veth, the program alone on one core, a source (live.bpf.c) on another.

Medians of ROUNDS rounds, with minimum and maximum.  Needs root.

    bypass.py [FLOWS ...]
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import time
from ipaddress import IPv4Address
from pathlib import Path

import numpy as np
from crablb._native import lib

from crablb import flowmap
from crablb.kernel import bpf
from crablb.model import Vip

ROUNDS = 5
PACKETS = 4000  # a round, cold
SECONDS = 1.0  # a round, live
VIP = Vip(IPv4Address("10.0.0.100"), 80)
BACKEND = IPv4Address("10.0.0.11")
SEED = bytes(16)


def compiled(name: str) -> bpf.Object:
    here = Path(__file__).parent
    target = here / "build" / f"{name}.bpf.o"
    target.parent.mkdir(exist_ok=True)
    triplet = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    command = [
        "clang",
        "-target",
        "bpf",
        "-O2",
        "-g",
        f"-I/usr/include/{triplet}",
        "-c",
        str(here / "tools" / f"{name}.bpf.c"),
    ]
    subprocess.run([*command, "-I", str(here / "../bpf"), "-o", str(target)], check=True)
    return bpf.Object(target)


def client(i: int) -> tuple[bytes, int]:
    """Address and port of the i-th flow's client."""
    return (0x0B000000 + (i >> 14)).to_bytes(4, "big"), 1024 + (i & 16383)


def packet(i: int) -> bytes:
    """An ACK of the i-th flow; nobody on this way looks at its checksum."""
    address, port = client(i)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0x4000, 64, 6, 0) + address + VIP.address.packed
    tcp = struct.pack("!HHIIBBHHH", port, VIP.port, 1, 1, 0x50, 0x10, 500, 0x1234, 0)
    return bytes(12) + b"\x08\x00" + ip + tcp + bytes(6)


def fill(table: flowmap.FlowTable, count: int, tunnel: bool) -> list[int]:
    """Flows 0 to ``count`` - 1; returns those that found room, and were not pushed out by later ones."""
    flags = lib.CRAB_FLOW_TUNNEL if tunnel else 0
    hashes = [
        flowmap.flow_hash(SEED, IPv4Address(a), port, VIP.address, VIP.port) for a, port in map(client, range(count))
    ]
    for hash_ in hashes:
        table.add(hash_, 0, 0, flags=flags)
    there = np.isin(np.array(hashes, np.uint64), table.flows()["hash"])
    return np.flatnonzero(there).tolist()


def run(program: bpf.Program, picks: list[int]) -> float:
    """Median nanoseconds of one run."""
    times = []
    for i in picks:
        done = program.test_run(packet(i))
        assert done.retval == 3, f"{program.name} did not answer XDP_TX"
        times.append(done.duration_ns)
    return statistics.median(times)


def memory(flows: bpf.Map) -> int:
    info = Path(f"/proc/self/fdinfo/{flows.fd}").read_text()
    match = re.search(r"memlock:\s+(\d+)", info)
    return int(match[1]) if match else 0


def loaded(count: int, tunnel: bool, ifindex: int) -> tuple[bpf.Object, list[int]]:
    """The load balancer's program with ``count`` flows, and the numbers of those that found room."""
    buckets = flowmap.buckets_for(count)
    program = bpf.Object(bpf.object_path("lb"), max_entries={"flows": buckets})
    program.map("services").update(VIP.key(), 0)
    program.map("hashing").update(0, flowmap.hashing(SEED, buckets))
    path = flowmap.path(BACKEND, bytes(12), 1500, IPv4Address("10.0.0.2"), ifindex, tx=True, redirect=False)
    program.map("paths").update(0, path)
    return program, fill(flowmap.FlowTable(program.map("flows")), count, tunnel)


def cold(counts: list[int]) -> None:
    random = np.random.default_rng(1)
    print(f"{'cold: ns per packet':34} {'bypass':>22} {'MAC only':>22} {'memory':>10}")
    with compiled("mac") as mac:
        for count, tunnel in itertools.product(counts, (False, True)):
            lb, numbers = loaded(count, tunnel, 1)  # test runs come in by interface 1, lo
            with lb:
                ours, theirs = [], []
                for _ in range(ROUNDS):
                    picks = random.choice(numbers, PACKETS).tolist()
                    ours.append(run(lb.program("crab_lb"), picks))
                    theirs.append(run(mac.program("mac"), picks))
                columns = (f"{statistics.median(t):6.0f} ({min(t):5.0f} - {max(t):5.0f})" for t in (ours, theirs))
                memory_ = memory(lb.map("flows")) / 2**20
                print(f"{named(count, tunnel):34} {'   '.join(columns)} {memory_:6.1f} MiB", flush=True)


def named(count: int, tunnel: bool) -> str:
    return f"{count:,} flows, {'IP in IP' if tunnel else 'by MAC address'}"


def packets_per_second(source: bpf.Object, attached: bpf.Program) -> float:
    """What one core forwards: the source on CPU 0, veth0 with the program on CPU 1."""
    near, far = socket.if_nametoindex("veth0"), socket.if_nametoindex("veth1")
    with attached.attach_xdp(near, "native"), source.program("sink").attach_xdp(far, "native"):
        Path("/sys/class/net/veth0/threaded").write_text("1")
        for status in Path("/proc").glob("[0-9]*/comm"):
            if status.read_text().startswith("napi/veth0"):
                os.sched_setaffinity(int(status.parent.name), {1})
        os.sched_setaffinity(0, {0})
        program, start = source.program("source"), source.map("received").sum_u64(0)
        began = time.monotonic()
        while (took := time.monotonic() - began) < SECONDS:
            program.run_live(bytes(60), far, 1 << 18)
        return (source.map("received").sum_u64(0) - start) / took


def live(counts: list[int]) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        print("live: left out, it needs two CPUs")
        return
    print(f"{'live: packets per second, 10^6':34} {'bypass':>22} {'MAC only':>22} {'ratio':>10}")
    subprocess.run(["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"], check=True)
    for name in ("veth0", "veth1"):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    with compiled("mac") as mac, compiled("live") as source:
        for count, tunnel in itertools.product(counts, (False, True)):
            lb, _ = loaded(count, tunnel, socket.if_nametoindex("veth0"))
            with lb:
                source.map("settings").update(0, struct.pack("=I", count))
                ours, theirs = [], []
                for _ in range(ROUNDS):
                    ours.append(packets_per_second(source, lb.program("crab_lb")) / 1e6)
                    theirs.append(packets_per_second(source, mac.program("mac")) / 1e6)
                columns = (f"{statistics.median(t):6.2f} ({min(t):5.2f} - {max(t):5.2f})" for t in (ours, theirs))
                ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
                print(f"{named(count, tunnel):34} {'   '.join(columns)} {ratio:10.2f}", flush=True)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--live"]:
        live([int(n) for n in arguments[1:]])
        return
    counts = [int(n) for n in arguments] or [1_000, 100_000, 1_000_000]
    cold(counts)
    # In a network namespace of its own, whose /sys says what is in it.
    inside = ["unshare", "--net", "--mount", "sh", "-c", 'mount -t sysfs sysfs /sys && exec "$@"', "sh"]
    subprocess.run([*inside, sys.executable, __file__, "--live", *map(str, counts)], check=True)


if __name__ == "__main__":
    main()
