"""What a packet of a known fallback flow costs in the XDP program, and what flows cost in memory.

By BPF_PROG_TEST_RUN, one packet of a random flow at a time: the kernel's own measure of one run, beside that of a
program which only writes MAC addresses (mac.bpf.c) on the same packets in the same run.  Between two runs Python uses
the caches, so these are figures of a cold start for every packet, with the harness (MAC only) in them.  Medians of
ROUNDS rounds, with minimum and maximum.  Needs root.

    bypass.py [FLOWS ...]
"""

from __future__ import annotations

import re
import statistics
import struct
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import numpy as np
from crablb._native import lib

from crablb import flowmap
from crablb.kernel import bpf
from crablb.model import Vip, mapped

ROUNDS = 5
PACKETS = 4000  # a round
VIP = Vip(ip_address("10.0.0.100"), 80)
BACKEND = ip_address("10.0.0.11")


def mac_program() -> bpf.Object:
    here = Path(__file__).parent
    target = here / "build" / "mac.bpf.o"
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
        here / "mac.bpf.c",
        "-o",
        target,
    ]
    subprocess.run(command, check=True)
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


def fill(flows: bpf.Map, count: int, tunnel: bool) -> None:
    prefix, vip = bytes(10) + b"\xff\xff", mapped(VIP.address)
    entry = mapped(BACKEND) + struct.pack("<IBBBB", flowmap.now(), lib.CRAB_FLOW_OPEN, tunnel, 0, 0)
    for i in range(count):
        address, port = client(i)
        flows.update(prefix + address + vip + struct.pack("!HH", port, VIP.port), entry)


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


def main() -> None:
    random = np.random.default_rng(1)
    print(f"{'ns per packet (median, min - max)':34} {'bypass':>22} {'MAC only':>22} {'memory':>10}")
    with mac_program() as mac:
        for count in [int(n) for n in sys.argv[1:]] or (1_000, 100_000, 1_000_000):
            for tunnel in (False, True):
                with bpf.Object(bpf.object_path("lb"), max_entries={"flows": count}) as loaded:
                    loaded.map("services").update(VIP.key(), 0)
                    # Test runs come in by interface 1, lo.
                    path = flowmap.path(BACKEND, bytes(12), 1500, ip_address("10.0.0.2"), 1, tx=True, redirect=False)
                    loaded.map("paths").update(mapped(BACKEND), path)
                    # An LRU map makes room before it is full; what it threw out must not be measured.
                    fill(loaded.map("flows"), count * 9 // 10, tunnel)
                    there = flowmap.read(loaded.map("flows"))[0]
                    clients = there["client"][:, 12:].copy().view(">u4")[:, 0].astype(np.int64) - 0x0B000000
                    numbers = (clients << 14) + there["cport"].astype(np.int64) - 1024
                    ours, theirs = [], []
                    for _ in range(ROUNDS):
                        picks = random.choice(numbers, PACKETS).tolist()
                        ours.append(run(loaded.program("crab_lb"), picks))
                        theirs.append(run(mac.program("mac"), picks))
                    name = f"{count:,} flows, {'IP in IP' if tunnel else 'by MAC address'}"
                    columns = (f"{statistics.median(t):6.0f} ({min(t):5.0f} - {max(t):5.0f})" for t in (ours, theirs))
                    print(f"{name:34} {'   '.join(columns)} {memory(loaded.map('flows')) / 2**20:6.1f} MiB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
