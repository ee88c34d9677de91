"""Handlers: frames of one's own, beside the services."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from crablb._native import ffi, lib
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from crablb import ConfigError, Frames, LoadBalancer, Match, Vip
from crablb.dataplane import handlers
from crablb.kernel.xsk import Umem
from crablb.lab import VIP4
from crablb.selection import custom
from crablb.selection.loads import Balance
from tests.helpers.frames import ether, reference
from tests.helpers.native import Core, compiled

SEED = bytes(16)
VIP = Vip(VIP4, 80)
A = ip_address("10.0.0.11")


def nothing(frames: Frames) -> None:
    return None


# ---- what matches ----

MAPPED = "::ffff:10.0.0.100"
HOSTS = {4: ["10.0.0.1", "10.0.0.100"], 6: ["fd00::1", "fd00::100", MAPPED]}
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
        if host == MAPPED:
            del has["address"]  # it is neither an IPv4 address nor one to be found on the wire
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
    st.sampled_from([None, 80]), st.sampled_from([None, None, *HOSTS[4], *HOSTS[6][:2]]),
).filter(lambda wanted: any(value is not None for value in wanted.values()))  # fmt: skip


def expected(wanted: list[dict[str, Any]], has: dict[str, Any]) -> int:
    for i, fields in enumerate(wanted):
        if all(value is None or has.get(name) == value for name, value in fields.items()):
            return i
    return -1


def unique(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [fields for i, fields in enumerate(wanted) if fields not in wanted[:i]]


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


def test_what_is_no_match():
    with pytest.raises(ConfigError, match=r"'udp' is no Match: write Match\("):
        LoadBalancer("eth0").handle("udp", lambda frames: None)  # type: ignore[arg-type]


def closed(*_: object, **__: object) -> None:
    """As a logger whose stream is closed."""
    raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("failing", ["log", "told"])
def test_a_failure_that_cannot_be_told(monkeypatch, failing):
    """A handler's frames are dropped, and a policy's connections hashed, all the same."""
    told: list[object] = []
    for module in (handlers, custom):
        monkeypatch.setattr(module.log, "error", closed if failing == "log" else told.append, raising=False)
    failed = closed if failing == "told" else lambda *what: told.append(what)
    memory = np.zeros(4 * 2048, np.uint8)
    handled = np.zeros(2, handlers.HANDLED)
    handled["data"], handled["len"] = memory.ctypes.data + np.array([0, 2048]), 60
    mine = handlers.Handlers(failed)
    mine.add(Match(protocol=17), lambda frames: 1 // 0)
    mine.run(handled, Umem(memory, 2048))
    assert handled["verdict"].tolist() == [lib.CRAB_HANDLED_FAILED] * 2
    asked = custom.Custom(failed)
    backends = Balance().backends(VIP, {A: 1})
    asked.publish({5: custom.Asked(VIP, lambda batch, backends: 1 // 0, backends, np.zeros(1, np.uint16))})
    choices = np.zeros(2, custom.CHOICE)
    choices["service"] = 5
    asked.choose(choices)
    assert choices["backend"].tolist() == [lib.CRAB_NO_BACKEND] * 2
    assert bool(told) == (failing == "log")
