"""Handlers: frames of one's own, beside the services."""

from __future__ import annotations

import asyncio
import socket
import threading
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from crablb._native import ffi, lib
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from crablb import Backend, ConfigError, Event, Frames, LoadBalancer, Match, Service, Vip, statistics
from crablb.handler import Handlers
from crablb.kernel import bpf
from crablb.kernel.xsk import XskSocket
from crablb.lab import VIP4
from tests.conftest import Pair, World, inside
from tests.native import Core
from tests.test_differential import reference

SEED = bytes(16)
VIP = Vip(VIP4, 80)
A = ip_address("10.0.0.11")
XDP_PASS, XDP_REDIRECT = 2, 4


def ether() -> Packet:
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def nothing(frames: Frames) -> None:
    return None


# ---- what matches ----

HOSTS = {4: ["10.0.0.1", "10.0.0.100"], 6: ["fd00::1", "fd00::100"]}
PORTS = {TCP: 6, UDP: 17, SCTP: 132}


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, dict[str, Any]]:
    """A frame, and what it has: the independent word on it."""
    head: Packet = ether()
    for _ in range(draw(st.integers(0, 3))):
        head /= draw(st.sampled_from([Dot1Q, Dot1AD]))()
    tags = bytes(head).__len__() // 4 - 3
    has: dict[str, Any] = {}
    kind = draw(st.sampled_from(["arp", "raw", 4, 6]))
    if kind == "arp":
        body, has["ethertype"] = ARP(), 0x0806
    elif kind == "raw":
        head.lastlayer().type = has["ethertype"] = draw(st.integers(0x9000, 0x9003))
        body = Raw(bytes(40))
    else:
        has["ethertype"] = 0x0800 if kind == 4 else 0x86DD
        host = draw(st.sampled_from(HOSTS[kind]))
        has["address"] = ip_address(host)
        upper = draw(st.sampled_from([TCP, UDP, SCTP, ICMP]))
        port = draw(st.integers(79, 81))
        special = draw(st.sampled_from(["", "", "fragment", "options"]))
        last: Packet = upper(dport=port) if upper in PORTS else ICMP()
        has["protocol"] = PORTS.get(upper, 1)
        if kind == 4:
            body = IP(dst=host, frag=7 if special == "fragment" else 0, proto=has["protocol"])
            if special == "options":
                body.options = b"\x01" * 8
        else:
            body = IPv6(dst=host, nh=has["protocol"])
        if kind == 6 and special == "options":
            body = IPv6(dst=host) / IPv6ExtHdrHopByHop(nh=has["protocol"])
            has["protocol"] = 0
        elif upper in PORTS and (kind == 6 or special != "fragment"):
            has["port"] = port
        body /= last
    if tags > 2:  # the third tag is what the second carries, for us
        has = {"ethertype": head.getlayer(2).type}
    return bytes(head / body), has


matches = st.builds(
    lambda ethertype, protocol, port, address: {
        "ethertype": ethertype, "protocol": protocol, "port": port if protocol in (6, 17, 132) else None,
        "address": address and ip_address(address),
    },
    st.sampled_from([None, None, 0x0800, 0x86DD, 0x0806, 0x8100, 0x9001]), st.sampled_from([None, 0, 1, 6, 17, 132]),
    st.sampled_from([None, 80]), st.sampled_from([None, None, *HOSTS[4], *HOSTS[6]]),
).filter(lambda wanted: any(value is not None for value in wanted.values()))  # fmt: skip


def expected(wanted: list[dict[str, Any]], has: dict[str, Any]) -> int:
    for i, fields in enumerate(wanted):
        if all(value is None or has.get(name) == value for name, value in fields.items()):
            return i
    return -1


def unique(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [fields for i, fields in enumerate(wanted) if fields not in wanted[:i]]


def compiled(wanted: list[dict[str, Any]]) -> Any:
    handlers = Handlers(lambda match, reason: None)
    for fields in wanted:
        handlers.add(Match(**fields), nothing)
    return handlers.matches()


@given(frames(), st.lists(matches, max_size=4))
def test_matches_as_told(frame, wanted):
    raw, has = frame
    wanted = unique(wanted)
    assert lib.crab_match_find(compiled(wanted), raw, len(raw)) == expected(wanted, has)


@given(frames(), st.data())
def test_what_is_beyond_a_frames_end_is_not_looked_at(frame, data):
    raw, has = frame
    length = data.draw(st.integers(0, len(raw)))
    matches = compiled([has]) if has else compiled([{"protocol": 17}])
    found = {
        lib.crab_match_find(matches, raw[:length] + rest, length) for rest in (raw[length:], bytes(60), b"\xff" * 60)
    }
    assert len(found) == 1


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


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "has to name something"),
        ({"ethertype": 65536}, "ethertype is a number from 0 to 65535, not 65536"),
        ({"protocol": -1}, "protocol is a number from 0 to 255, not -1"),
        ({"port": 53}, "a port needs a protocol that has ports: one of 6, 17"),
        ({"port": 53, "protocol": 1}, "a port needs a protocol"),
        ({"address": "10.0.0.1"}, "address is an IPv4Address or an IPv6Address"),
    ],
)
def test_bad_matches(arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        Match(**arguments)


def test_handlers_are_bounded_and_unique():
    lb = LoadBalancer("eth0")
    for port in range(16):
        lb.handle(Match(protocol=17, port=port), nothing)
    with pytest.raises(ConfigError, match="16 handlers already"):
        lb.handle(Match(protocol=6), nothing)
    lb.unhandle(Match(protocol=17, port=3))
    with pytest.raises(ConfigError, match="there is no handler for protocol 17, port 3"):
        lb.unhandle(Match(protocol=17, port=3))
    with pytest.raises(ConfigError, match="there is a handler for protocol 17, port 4 already"):
        lb.handle(Match(protocol=17, port=4), nothing)


# ---- the hot loop ----


def test_services_come_first():
    """A core with a handler for all of TCP: it gets what no service wants, in the batch's order, and nothing else."""
    core = Core(reference())
    handed: list[bytes] = []

    @ffi.callback("void(void *, struct crab_handled *, uint32_t)")
    def handle(context: Any, frames: Any, n: int) -> None:
        for i in range(n):
            frame = frames[i]
            handed.append(bytes(ffi.buffer(frame.data, frame.len)))
            frame.verdict = i % 3
            frame.data[0] = 0xEE
            frame.len -= 1

    lib.crab_core_handle(core.core, handle, ffi.NULL)
    lib.crab_snapshot_match(core.snapshot, compiled([{"protocol": 6}, {"ethertype": 0x0806}]))
    mine = bytes(ether() / IP(src="10.0.0.1", dst="10.0.0.100") / TCP(sport=9, dport=80, flags="S"))
    other = [bytes(ether() / IP(dst="10.9.9.9") / TCP(dport=port)) for port in (1, 2, 3)]
    stranger = bytes(ether() / IP(dst="10.9.9.9") / UDP(dport=1))
    out = core.handle(other[0], mine, other[1], stranger, other[2])
    assert handed == other
    assert out[0] is None and out[3] is None and out[4] is None
    assert out[2] == b"\xee" + other[1][1:-1]
    assert out[1] is not None and out[1][:1] != b"\xee"
    counts = core.counts()
    wanted = {"handler_kept": 1, "handler_sent": 1, "drop_handler": 1, "drop_not_service": 1}
    assert {name: counts[name] for name in wanted} == wanted


# ---- in a load balancer ----


def turned_round(frames: Frames) -> np.ndarray:
    """Answer UDP over IPv4 with what it says, and a byte more."""
    for i in range(len(frames)):
        frames.lengths[i] += 1
        frame = frames[i]
        frame[0:12] = np.roll(frame[0:12], 6)
        frame[26:34] = np.roll(frame[26:34], 4)
        frame[34:38] = np.roll(frame[34:38], 2)
        frame[-1] = ord("!")
        frame[38:40] = list((len(frame) - 34).to_bytes(2, "big"))
        frame[40:42] = 0  # no checksum
        total = len(frame) - 14
        frame[16:18], frame[24:26] = list(total.to_bytes(2, "big")), 0
        words = frame[14:34].astype(np.uint32)
        total_sum = int((words[0::2] * 256 + words[1::2]).sum())
        while total_sum >> 16:
            total_sum = (total_sum & 0xFFFF) + (total_sum >> 16)
        frame[24:26] = list((~total_sum & 0xFFFF).to_bytes(2, "big"))
    return np.ones(len(frames), bool)


def test_answers_and_failures(make_world):
    world: World = make_world(servers=1)
    world.servers()
    world.client()
    lb_address = str(world.lab.lb.ip4)

    def broken(frames: Frames) -> None:
        raise RuntimeError("broken")

    def nonsense(frames: Frames) -> list[int]:
        return [1] * (len(frames) + 1)

    def too_long(frames: Frames) -> list[bool]:
        frames.lengths[:] = 5000
        return [True] * len(frames)

    with inside(world.lab.client.netns):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(10)
    lb = LoadBalancer("eth0", [Service(VIP, (Backend(A),))], seed=SEED)
    lb.handle(Match(protocol=17, port=7), turned_round)  # before the start
    failures: list[Event] = []
    with inside(world.lab.lb.netns), lb:
        for port, function in ((8, broken), (9, nonsense), (10, too_long), (11, nothing)):
            lb.handle(Match(protocol=17, port=port), function)

        listening = threading.Event()

        async def follow() -> None:
            asyncio.get_running_loop().call_soon(listening.set)
            async for event in lb.events():
                if event.kind == "handler-failed":
                    failures.append(event)
                if len(failures) == 3:
                    return

        assert lb._loop
        following = asyncio.run_coroutine_threadsafe(follow(), lb._loop)
        assert listening.wait(10)
        sock.sendto(b"hello", (lb_address, 7))
        assert sock.recv(100) == b"hello!"
        for port in (8, 9, 10, 11):
            sock.sendto(b"lost", (lb_address, port))
        sock.sendto(b"again", (lb_address, 7))
        assert sock.recv(100) == b"again!"
        # All of these have passed; services and the kernel's traffic (ARP) go on as before.
        assert world.echo(VIP4, "10")["server"] == "server1"
        counts = lb.statistics()
        assert {name: counts.workers[name] for name in ("handler_sent", "handler_kept", "drop_handler")} == {
            "handler_sent": 2, "handler_kept": 1, "drop_handler": 3,
        }  # fmt: skip
        assert counts.xdp["handler"] == 6
        assert counts.workers["redirected"] == 1
        lb.unhandle(Match(protocol=17, port=7))
        # The kernel has it again, and says that nobody listens there.
        sock.connect((lb_address, 7))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
        following.result(10)
        assert lb.statistics().daemon["handler_failed"] == 3
    sock.close()
    assert [event.reason.split(": ", 2)[:2] for event in failures] == [
        ["protocol 17, port 8", "RuntimeError"],
        ["protocol 17, port 9", "ValueError"],
        ["protocol 17, port 10", "ValueError"],
    ]
    assert "not booleans of shape (1,)" in failures[1].reason
    assert "it made a frame of 5000 bytes, not of 14 to " in failures[2].reason


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
            async with asyncio.timeout(10):
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
