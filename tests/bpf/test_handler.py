"""Handlers: the XDP program's part, and frames out by another interface."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext
from ipaddress import ip_address

import numpy as np
import pytest
from crablb._native import ffi, lib
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

from crablb import Frames, LoadBalancer, Match, Service
from crablb.config import parse_backend, parse_vip
from crablb.dataplane import statistics
from crablb.kernel import bpf
from crablb.kernel.xsk import XskSocket
from tests.helpers.frames import ether
from tests.helpers.namespaces import Pair
from tests.helpers.native import compiled
from tests.helpers.processes import until
from tests.helpers.programs import several_buffers

SEED = bytes(16)

XDP_PASS, XDP_REDIRECT = 2, 4


def test_the_xdp_program_and_the_hot_loop_agree(namespace):
    """On which frames are a handler's; each in its own way finds the first match."""
    wanted = [
        {"protocol": 17, "port": 53},
        {"ethertype": 0x0806},
        {"address": ip_address("fd00::100"), "protocol": 58},
        {"protocol": 6, "port": 80, "address": ip_address("10.0.0.7")},
    ]
    matches = compiled(wanted)
    to = {4: IP(dst="10.0.0.7"), 6: IPv6(dst="fd00::100")}
    sample = {
        "dns": ether() / to[4] / UDP(dport=53),
        "dns6": ether() / to[6] / UDP(dport=53),
        "tagged": ether() / Dot1AD() / Dot1Q() / to[4] / UDP(dport=53),
        "options": ether() / IP(options=b"\x01" * 4) / UDP(dport=53),
        "fragment": ether() / IP(frag=1, proto=17) / Raw(b"\x00\x35\x00\x35" + bytes(40)),
        "other-port": ether() / to[4] / UDP(dport=54),
        "arp": ether() / ARP(),
        "ping6": ether() / to[6] / Raw(bytes(8)),
        "web": ether() / to[4] / TCP(dport=80),
        "elsewhere": ether() / IP(dst="10.0.0.8") / TCP(dport=80),
    }
    sample["ping6"][IPv6].nh = 58
    with bpf.Object(bpf.object_path("lb")) as program, XskSocket("lo", load_program=False, mode="generic") as xsk:
        program.map("handlers").update(0, bytes(ffi.buffer(matches)))
        program.map("interfaces").update(1, (0).to_bytes(4, "little") + (1).to_bytes(4, "little"))
        run = program.program("crab_lb").test_run
        # Without a socket all of it is the kernel's.
        assert {run(bytes(frame)).retval for frame in sample.values()} == {XDP_PASS}
        xsk.register(program.map("sockets"), 0)
        taken = {name for name, frame in sample.items() if run(bytes(frame)).retval == XDP_REDIRECT}
        assert taken == {"dns", "dns6", "tagged", "options", "arp", "ping6", "web"}
        found = {n for n, f in sample.items() if lib.crab_match_find(matches, bytes(f), len(bytes(f))) >= 0}
        assert found == taken
        whole = bytes(sample["tagged"])
        for length in range(14, len(whole)):
            cut = whole[:length]
            assert (run(cut).retval == XDP_REDIRECT) == (lib.crab_match_find(matches, cut, length) >= 0)
            assert (run(cut).retval == XDP_REDIRECT) == (length >= 46)  # addresses, then both ports
        index = statistics.XDP_COUNTERS.index("handler")
        assert program.map("xdp_counters").sum_u64(index) == len(taken) + 2 * (len(whole) - 46)
        program.map("handlers").delete(0)
        assert run(bytes(sample["arp"])).retval == XDP_PASS


def test_out_by_another_interface(namespace: Pair):
    """Without threads: nothing happens but in process_once."""
    namespace.ip("link", "add", "veth2", "type", "veth", "peer", "name", "veth3")
    namespace.ip("link", "set", "veth2", "up")
    namespace.ip("link", "set", "veth3", "up")
    there = socket.if_nametoindex("veth2")
    seen = []

    def forward(frames: Frames) -> np.ndarray:
        seen.append((len(frames), frames.columns(12, 14).tolist(), frames.room.min() >= frames.lengths.max()))
        frames.interfaces[:] = there
        return np.asarray(frames.lengths < 100)

    async def main() -> None:
        async with LoadBalancer("veth0", seed=SEED, threads=False) as lb:
            lb.handle(Match(ethertype=0x88B5), forward)
            near, far = namespace.wire("veth1"), namespace.wire("veth3")
            frames = [bytes([2] * 12) + b"\x88\xb5" + bytes([i]) * (46 + 50 * (i == 1)) for i in range(3)]
            for frame in frames:
                near.send(frame)
            done = 0
            async with asyncio.timeout(60):
                while done < 3:
                    done += lb.process_once(0.1)
                    await asyncio.sleep(0)
            assert [far.recv(2000), far.recv(2000)] == [frames[0], frames[2]]
            counts = lb.statistics().workers
            assert (counts["handler_sent"], counts["handler_kept"]) == (2, 1)
            near.close()
            far.close()

    asyncio.run(main())
    assert sum(n for n, _, _ in seen) == 3
    assert all(kinds == [[0x88, 0xB5]] * n and room for n, kinds, room in seen)


FRAME = bytes([2] * 12) + b"\x88\xb5" + bytes(46)


def syn(port: int) -> bytes:
    tcp = TCP(sport=port, dport=80, flags="S", options=[(42, b""), ("MSS", 1460)])
    return bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src="10.0.0.1", dst="10.0.0.100") / tcp)


@pytest.mark.parametrize("who", ["handler", "policy"])
def test_ctrl_c_comes_out_of_process_once(namespace: Pair, who: str):
    """And whatever else means more than a failure; the frames are counted as dropped, the connections are hashed."""
    namespace.ip("link", "set", "veth0", "address", "02:00:00:00:00:02")
    namespace.ip("address", "add", "10.0.0.2/24", "dev", "veth0")
    namespace.ip("neighbor", "add", "10.0.0.11", "lladdr", "02:00:00:00:00:0b", "dev", "veth0")
    do: list[Callable[[], object]] = []

    def called(*_: object) -> None:
        do.pop()()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass

    def leave() -> None:
        raise SystemExit(3)

    def fail() -> None:
        raise OSError("no")

    def work_again() -> None:
        lb.process_once()

    def choose(choices: np.ndarray, _: object) -> np.ndarray:
        called()
        return np.zeros(len(choices), np.int64)

    service = Service(parse_vip("tcp://10.0.0.100:80"), (parse_backend("10.0.0.11"),), policy=choose)
    with (
        LoadBalancer("veth0", [service] if who == "policy" else [], seed=SEED, threads=False) as lb,
        namespace.wire("veth1") as near,
    ):
        if who == "handler":
            lb.handle(Match(ethertype=0x88B5), called)
        for n, (what, raised) in enumerate(
            ((interrupt, KeyboardInterrupt), (leave, SystemExit), (work_again, None), (fail, None)), 1
        ):
            do.append(what)
            near.send(syn(1000 + n) if who == "policy" else FRAME)

            with pytest.raises(raised) if raised else nullcontext():
                until(lambda: lb.process_once(1.0) and not do)
            assert not do
            counts = lb.statistics().workers
            if who == "handler":
                assert (counts["drop_handler"], counts["handler_kept"]) == (n, 0)
            else:
                assert counts["redirected"] == n
        assert lb.process_once() == 0
        do.append(lambda: None)
        near.send(syn(1000) if who == "policy" else FRAME)
        until(lambda: lb.process_once(1.0) and not do)
        assert not do


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_what_a_thread_cannot_raise_is_a_failure(namespace: Pair, raised: type[BaseException]):
    def handler(frames: Frames) -> None:
        raise raised

    async def main() -> None:
        async with LoadBalancer("veth0", seed=SEED) as lb:
            lb.handle(Match(ethertype=0x88B5), handler)
            events = lb.events()
            with namespace.wire("veth1") as near:
                near.send(FRAME)
                async with asyncio.timeout(60):
                    while (event := await anext(events)).kind != "handler-failed":
                        pass
            assert raised.__name__ in event.reason
            until(lambda: lb.statistics().workers["drop_handler"])  # what it told of, its thread counts afterwards
            assert lb.statistics().workers["drop_handler"] == 1

    asyncio.run(main())


@several_buffers
def test_a_packet_in_several_frames(namespace: Pair):
    """A handler sees it whole, with room to grow, and sends it."""
    for name in ("veth0", "veth1"):
        namespace.ip("link", "set", name, "mtu", "9000")
    seen = []

    def answer(frames: Frames) -> np.ndarray:
        seen.extend(zip(frames.lengths.tolist(), frames.room.tolist(), strict=True))
        for frame in frames:
            frame[0:12] = np.roll(frame[0:12], 6)
        frames.lengths[:] -= 1
        return np.ones(len(frames), np.bool_)

    async def main() -> None:
        async with LoadBalancer("veth0", seed=SEED, threads=False) as lb:
            lb.handle(Match(ethertype=0x88B5), answer)
            with namespace.wire("veth1") as near:
                frames = [bytes([2] * 6 + [4] * 6) + b"\x88\xb5" + bytes([size % 251]) * size for size in (100, 8000)]
                for frame in frames:
                    near.send(frame)
                done = 0
                async with asyncio.timeout(60):
                    while done < 1 + -(-8014 // (4096 - 256)):
                        done += lb.process_once(0.1)
                        await asyncio.sleep(0)
                got = [near.recv(10000) for _ in frames]
                assert got == [frame[6:12] + frame[:6] + frame[12:-1] for frame in frames]

    asyncio.run(main())
    assert [length for length, _ in seen] == [114, 8014]
    assert seen[0][1] <= 4096 - 256
    assert seen[1][1] > 60000
