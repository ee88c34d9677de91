"""The BPF programs by BPF_PROG_TEST_RUN, and libbpf's binding.

The kernel has no test run for sock_ops and iterators: crab_server, crab_arm and crab_offer are tested end to end.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from crablb import statistics
from crablb.agent.base import counter_names
from crablb.config import parse_vip
from crablb.kernel import bpf, pins
from crablb.kernel.xsk import XskSocket
from crablb.model import mapped

CLIENT = {4: "10.0.0.1", 6: "fd00::1"}
DIP = {4: "10.0.0.11", 6: "fd00::11"}
VIP = {4: "10.0.0.100", 6: "fd00::100"}
OTHER_VIP = {4: "10.0.0.101", 6: "fd00::101"}
OUTSIDE = {4: "203.0.113.9", 6: "2001:db8::9"}
XDP_DROP, XDP_PASS, XDP_REDIRECT = 1, 2, 4
TC_UNSPEC, TC_SHOT, TC_REDIRECT = 0xFFFFFFFF, 2, 7
LWT_OK, LWT_REROUTE = 0, 128


def layer(family: int) -> type[Packet]:
    return IP if family == 4 else IPv6


def ether() -> Packet:
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


# ---- load balancer ----


class Counted:
    """A loaded object whose per-CPU counters are read by name."""

    def __init__(self, loaded: bpf.Object, counters: str, names: list[str]) -> None:
        self.maps, self.programs, self._counters, self._names = loaded.maps, loaded.programs, counters, names

    def counts(self) -> dict[str, int]:
        found = {name: self.maps[self._counters].sum_u64(i) for i, name in enumerate(self._names)}
        return {name: n for name, n in found.items() if n}


@pytest.fixture
def lb(namespace) -> Iterator[Counted]:
    with bpf.Object(bpf.object_path("lb")) as loaded:
        for family in (4, 6):
            loaded.map("services").update(parse_vip(url(VIP[family], 80)).key(), 1)
        yield Counted(loaded, "xdp_counters", list(statistics.XDP_COUNTERS))


def url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def to_vip(family: int, **more: object) -> Packet:
    return layer(family)(src=CLIENT[family], dst=VIP[family]) / TCP(sport=4242, dport=80, **{"flags": "S", **more})


LEFT_ALONE = {
    "arp": (ether() / ARP(pdst=VIP[4]), "pass_not_vip"),
    "other-port": (ether() / IP(src=CLIENT[4], dst=VIP[4]) / TCP(dport=81, flags="S"), "pass_not_vip"),
    "other-address": (ether() / IPv6(src=CLIENT[6], dst=DIP[6]) / TCP(dport=80, flags="S"), "pass_not_vip"),
    "icmp": (ether() / IP(dst=VIP[4]) / ICMP(), "pass_not_vip"),
    "icmpv6": (ether() / IPv6(dst=VIP[6]) / ICMPv6DestUnreach(), "pass_not_vip"),
    "fragment": (ether() / IP(dst=VIP[4], flags="MF", proto=6) / Raw(bytes(64)), "pass_fragment"),
    "last-fragment": (ether() / IP(dst=VIP[4], frag=3, proto=6) / Raw(bytes(64)), "pass_fragment"),
    "fragment6": (ether() / IPv6(dst=VIP[6]) / IPv6ExtHdrFragment() / TCP(dport=80, flags="S"), "pass_fragment"),
    "ip-options": (ether() / IP(dst=VIP[4], options=b"\x01" * 4) / TCP(dport=80, flags="S"), "pass_ip_options"),
    "extension": (ether() / IPv6(dst=VIP[6]) / IPv6ExtHdrHopByHop() / TCP(dport=80, flags="S"), "pass_ip_options"),
    "two-tags": (ether() / Dot1Q() / Dot1Q() / to_vip(4), "pass_not_vip"),
    "cut": (Raw(bytes(ether() / to_vip(4))[:50]), "pass_malformed"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_lb_leaves_alone(lb, name):
    packet, reason = LEFT_ALONE[name]
    frame = bytes(packet)
    run = lb.programs["crab_lb"].test_run(frame)
    assert run.retval == XDP_PASS
    assert run.data == frame
    assert lb.counts() == {reason: 1}


@pytest.mark.parametrize("tagged", [False, True], ids=["plain", "vlan"])
@pytest.mark.parametrize("family", [4, 6])
def test_lb_takes_a_vips_packets(lb, namespace, family, tagged):
    head = ether() / Dot1Q(vlan=7) if tagged else ether()
    syn, ack = bytes(head / to_vip(family)), bytes(head / to_vip(family, flags="A"))
    # Without a daemon: dropped, because the kernel would answer with a RST.
    assert lb.programs["crab_lb"].test_run(syn).retval == XDP_DROP
    assert lb.programs["crab_lb"].test_run(ack).retval == XDP_DROP
    with XskSocket("veth0", load_program=False) as xsk:
        xsk.register(lb.maps["sockets"])
        for frame in (syn, ack):
            run = lb.programs["crab_lb"].test_run(frame)
            assert run.retval == XDP_REDIRECT
            assert run.data == frame
    # A socket that is closed leaves the map by itself.
    assert lb.programs["crab_lb"].test_run(syn).retval == XDP_DROP
    assert lb.counts() == {"syn": 1, "other": 1, "drop_no_socket": 3}


@pytest.mark.parametrize("family", [4, 6])
def test_lb_at_every_length(lb, family):
    frame = bytes(ether() / to_vip(family))
    for length in range(14, len(frame)):
        assert lb.programs["crab_lb"].test_run(frame[:length]).retval == XDP_PASS
    assert lb.counts() == {"pass_malformed": len(frame) - 14}


# ---- client ----


@pytest.fixture
def client(namespace) -> Iterator[Counted]:
    with bpf.Object(bpf.object_path("client")) as loaded:
        for prefix in (ip_network("10.0.0.0/24"), ip_network("fd00::/64")):
            bits = prefix.prefixlen + (96 if prefix.version == 4 else 0)
            loaded.map("client_backends").update(bits.to_bytes(4, "little") + mapped(prefix.network_address), 1)
        yield Counted(loaded, "client_counters", counter_names("crab_client_counter", "CRAB_CLIENT_"))


def ports(local: int, remote: int = 80) -> bytes:
    return struct.pack("!HH", local, remote)


def pend(client: Counted, family: int, *, isn: int = 999, port: int = 4242, form: int = 0) -> bytes:
    """Note a SYN of ours as sent with an offer."""
    key = mapped(ip_address(CLIENT[family])) + ports(port) + struct.pack("!I", isn + 1)
    client.maps["client_pending"].update(key, mapped(ip_address(VIP[family])) + form.to_bytes(4, "little"))
    return key


def redirect(vip: str, experimental: bool = False) -> list[tuple[object, object]]:
    packed = ip_address(vip).packed
    option = (253, b"\x43\x52" + packed) if experimental else (42, packed)
    return [("MSS", 1460), option, ("NOP", None), ("NOP", None)]


def answer(family: int, **more: object) -> Packet:
    """A backend's SYN-ACK to our SYN, as it should be."""
    fields = {"sport": 80, "dport": 4242, "flags": "SA", "seq": 5, "ack": 1000, "options": redirect(VIP[family])}
    return ether() / layer(family)(src=DIP[family], dst=CLIENT[family]) / TCP(**{**fields, **more})


def as_from_vip(frame: bytes, family: int) -> bytes:
    """What Scapy makes of the frame with the VIP as its source, all checksums its own."""
    packet = Ether(frame)
    packet[layer(family)].src = VIP[family]
    del packet[TCP].chksum
    if family == 4:
        del packet[IP].chksum
    return bytes(packet)


@pytest.mark.parametrize("form", [0, 1], ids=["crab", "experimental"])
@pytest.mark.parametrize("family", [4, 6])
def test_client_takes_up_a_redirect(client, family, form):
    key = pend(client, family, form=form)
    frame = bytes(answer(family, options=redirect(VIP[family], bool(form))))
    run = client.programs["crab_ingress"].test_run(frame)
    assert run.retval == TC_UNSPEC
    assert run.data == as_from_vip(frame, family)
    assert client.maps["client_pending"].lookup(key) is None
    # from now on both directions are translated
    data = bytes(answer(family, flags="PA", options=[]) / Raw(b"hello"))
    run = client.programs["crab_ingress"].test_run(data)
    assert run.data == as_from_vip(data, family)
    mine = ether() / layer(family)(src=CLIENT[family], dst=VIP[family]) / TCP(sport=4242, dport=80, flags="A") / b"hi"
    run = client.programs["crab_egress"].test_run(bytes(mine))
    assert run.retval == LWT_REROUTE
    expected = mine.copy()
    expected[layer(family)].dst = DIP[family]
    assert run.data[14:] == bytes(expected)[14:]
    assert client.counts() == {"redirected": 1, "packets_in": 2, "packets_out": 1}


FORGED = {
    "acknowledgement": ({"ack": 1001}, TC_UNSPEC, None),
    "port": ({"dport": 4243}, TC_UNSPEC, None),
    "other-service-port": ({"sport": 81}, TC_UNSPEC, None),
    "no-option": ({"options": [("MSS", 1460)]}, TC_SHOT, "drop_vip"),
    "other-vip": ({"options": "other"}, TC_SHOT, "drop_vip"),
    "cut-option": ({"options": [(42, b"\x0a\x00"), ("NOP", None), ("NOP", None)]}, TC_SHOT, "drop_vip"),
    "other-form": ({"options": "experimental"}, TC_SHOT, "drop_vip"),
    "behind-eol": ({"options": "eol"}, TC_SHOT, "drop_vip"),
    "source": ({"src": "outside"}, TC_SHOT, "drop_source"),
}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", FORGED)
def test_client_refuses_what_is_forged(client, family, name):
    fields, verdict, reason = FORGED[name]
    fields = dict(fields)
    special = {
        "other": redirect(OTHER_VIP[family]),
        "experimental": redirect(VIP[family], experimental=True),
        "eol": [("EOL", None), ("EOL", None), *redirect(VIP[family])],
    }
    if isinstance(fields.get("options"), str):
        fields["options"] = special[fields["options"]]
    outside = fields.pop("src", None)
    key = pend(client, family)
    packet = answer(family, **fields)
    if outside:
        packet[layer(family)].src = OUTSIDE[family]
    frame = bytes(packet)
    run = client.programs["crab_ingress"].test_run(frame)
    assert run.retval == verdict
    assert run.data == frame
    assert client.counts() == ({reason: 1} if reason else {})
    # and the sound answer still finds its SYN waiting
    assert client.maps["client_pending"].lookup(key) is not None
    assert not list(client.maps["client_out"].keys())
    client.programs["crab_ingress"].test_run(bytes(answer(family)))
    assert client.counts()["redirected"] == 1


@pytest.mark.parametrize("family", [4, 6])
def test_client_second_answer_changes_nothing(client, family):
    pend(client, family)
    client.programs["crab_ingress"].test_run(bytes(answer(family)))
    flows = dict(client.maps["client_out"].items())
    late = answer(family)
    late[layer(family)].src = "10.0.0.12" if family == 4 else "fd00::12"
    frame = bytes(late)
    # It is nobody's packet: the kernel, which knows no such connection, resets it.
    assert client.programs["crab_ingress"].test_run(frame).data == frame
    assert dict(client.maps["client_out"].items()) == flows


@pytest.mark.parametrize("family", [4, 6])
def test_client_closed_port(client, family):
    key = pend(client, family)
    frame = bytes(answer(family, flags="RA", options=[], seq=0))
    assert client.programs["crab_ingress"].test_run(frame).data == as_from_vip(frame, family)
    assert client.maps["client_pending"].lookup(key) is None
    assert client.counts() == {"refused_port": 1}


@pytest.mark.parametrize("family", [4, 6])
def test_client_resets_a_collision(client, namespace, family):
    """A direct connection to the backend has this four-tuple: the SYN-ACK is answered by a RST."""
    Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").write_text("0")
    for host in (CLIENT[family], DIP[family]):
        namespace.ip("addr", "add", host, "dev", "lo", *(["nodad"] if family == 6 else []))
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with socket.create_server((DIP[family], 80), family=kind), socket.socket(kind) as direct:
        direct.bind((CLIENT[family], 4242))
        direct.connect((DIP[family], 80))
        key = pend(client, family)
        frame = answer(family, options=[*redirect(VIP[family]), ("Timestamp", (7, 8)), ("NOP", None), ("NOP", None)])
        run = client.programs["crab_ingress"].test_run(bytes(frame))
        assert run.retval == TC_REDIRECT
        reset = Ether(run.data)
        assert (reset.src, reset.dst) == ("02:00:00:00:00:02", "02:00:00:00:00:01")
        assert (reset[layer(family)].src, reset[layer(family)].dst) == (CLIENT[family], DIP[family])
        assert (reset[TCP].sport, reset[TCP].dport, reset[TCP].flags, reset[TCP].seq) == (4242, 80, "R", 1000)
        assert {option for option, _ in reset[TCP].options} == {"NOP"}
        right = reset.copy()
        del right[TCP].chksum
        assert Ether(bytes(right))[TCP].chksum == reset[TCP].chksum
        assert client.counts() == {"reset_collision": 1}
        assert client.maps["client_pending"].lookup(key) is not None


@pytest.mark.parametrize("family", [4, 6])
def test_client_translates_quoted_packets(client, family):
    pend(client, family)
    client.programs["crab_ingress"].test_run(bytes(answer(family)))
    l3 = layer(family)
    quoted = l3(src=CLIENT[family], dst=DIP[family]) / TCP(sport=4242, dport=80, seq=3)
    error = ICMP(type=3, code=4, nexthopmtu=1400) if family == 4 else ICMPv6PacketTooBig(mtu=1400)
    router = "10.0.0.254" if family == 4 else "fd00::fe"
    run = client.programs["crab_ingress"].test_run(bytes(ether() / l3(src=router, dst=CLIENT[family]) / error / quoted))
    quoted = l3(src=CLIENT[family], dst=VIP[family]) / TCP(sport=4242, dport=80, seq=3, chksum=quoted_checksum(quoted))
    expected = bytes(ether() / l3(src=router, dst=CLIENT[family]) / error / quoted)
    assert run.data == expected
    assert client.counts()["icmp"] == 1


def quoted_checksum(packet: Packet) -> int:
    return int(type(packet)(bytes(packet))[TCP].chksum)


@pytest.mark.parametrize("program", ["crab_ingress", "crab_egress"])
@pytest.mark.parametrize("family", [4, 6])
def test_client_at_every_length(client, family, program):
    """However it is cut, a frame goes on as it came."""
    pend(client, family)
    frame = bytes(answer(family))
    header = 14 + (40 if family == 6 else 20)
    for length in range(header, header + 20):
        run = client.programs[program].test_run(frame[:length])
        assert run.retval in (TC_UNSPEC, LWT_OK)
        assert run.data[14:] == frame[14:length]
    assert client.counts() == {}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=st.binary(max_size=40), family=st.sampled_from([4, 6]))
def test_client_any_options(client, options, family):
    """A SYN-ACK is accepted exactly if an independent reader finds the redirect in it."""
    from tests.reference.packets import split

    options += bytes(-len(options) % 4)
    key = pend(client, family)
    packet = answer(family, options=[], dataofs=5 + len(options) // 4) / Raw(options)
    run = client.programs["crab_ingress"].test_run(bytes(packet))
    wanted = b"\x2a" + bytes([2 + len(ip_address(VIP[family]).packed)]) + ip_address(VIP[family]).packed
    first = next((o for o in split(options)[0] if o[:1] == b"\x2a"), b"")
    assert run.retval == (TC_UNSPEC if first == wanted else TC_SHOT)
    client.maps["client_pending"].delete(key)
    for name in ("client_out", "client_in"):
        for flow in list(client.maps[name].keys()):
            client.maps[name].delete(flow)


def test_client_sweep_starts(client):
    assert client.programs["crab_sweep"].test_run().retval == 0


# ---- the binding ----


def test_load_errors_carry_the_verifiers_words(tmp_path):
    source, target = tmp_path / "bad.bpf.c", tmp_path / "bad.bpf.o"
    source.write_text(
        '#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\nSEC("xdp") int reads_past(struct xdp_md *c)\n'
        '{ return *(int *)(long)c->data; }\nchar LICENSE[] SEC("license") = "GPL";\n'
    )
    triplet = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(
        ["clang", "-target", "bpf", "-O2", "-g", f"-I/usr/include/{triplet}", "-c", source, "-o", target], check=True
    )
    with pytest.raises(bpf.BpfLoadError) as caught:
        bpf.Object(target)
    assert "invalid access to packet" in caught.value.log
    assert "bad.bpf.o" in str(caught.value)


def test_object_errors(tmp_path):
    with pytest.raises(bpf.BpfNotFoundError, match=r"nothing\.o"):
        bpf.Object(tmp_path / "nothing.o")
    (tmp_path / "text.o").write_text("this is no object")
    with pytest.raises(bpf.BpfLoadError, match=r"text\.o"):
        bpf.Object(tmp_path / "text.o")
    with bpf.Object(bpf.object_path("xsk")) as loaded:
        with pytest.raises(bpf.BpfNotFoundError, match="has no program nothing; it has crab_xsk"):
            loaded.program("nothing")
        with pytest.raises(bpf.BpfNotFoundError, match="has no map nothing; it has sockets"):
            loaded.map("nothing")


def test_maps_and_pins():
    before = len(os.listdir("/proc/self/fd"))
    folder = bpf.ensure_bpffs() / f"crablb-test-{os.getpid()}"
    try:
        with bpf.Object(bpf.object_path("client"), max_entries={"client_in": 3}) as loaded:
            flows = loaded.map("client_in")
            assert flows.max_entries == 3
            for i in range(3):
                flows.update(bytes([i]) * flows.key_size, bytes(flows.value_size))
            with pytest.raises(bpf.BpfError, match=r"client_in is full \(3 entries\)"):
                flows.update(bytes([9]) * flows.key_size, bytes(flows.value_size))
            with pytest.raises(ValueError, match=f"a key has {flows.key_size} bytes, not 1"):
                flows.update(b"x", bytes(flows.value_size))
            with pytest.raises(ValueError, match=f"a value has {flows.value_size} bytes, not 1"):
                flows.update(bytes(flows.key_size), b"x")
            assert flows.delete(bytes([0]) * flows.key_size)
            assert not flows.delete(bytes([0]) * flows.key_size)
            assert sorted(key[0] for key, _ in flows.items()) == [1, 2]
            flows.pin(folder / "flows")
            with pytest.raises(bpf.BpfBusyError):
                flows.pin(folder / "flows")
        # It outlives its object by its pin.
        with bpf.Map.from_pin(folder / "flows") as again:
            assert sorted(key[0] for key, _ in again.items()) == [1, 2]
            with bpf.Object(bpf.object_path("client"), reuse={"client_in": again}) as other:
                assert other.map("client_in").id == again.id
        with pytest.raises(bpf.BpfNotFoundError, match="other"):
            bpf.Map.from_pin(folder / "other")
    finally:
        pins.remove(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_links(namespace):
    with bpf.Object(bpf.object_path("xsk")) as loaded, bpf.Object(bpf.object_path("lb")) as other:
        program = loaded.program("crab_xsk")
        index = socket.if_nametoindex("veth0")
        assert bpf.xdp_program(index)[0] == 0
        with program.attach_xdp(index) as link:
            assert link.mode == "native"
            assert bpf.xdp_program(index) == (program.id, "native")
            with pytest.raises(bpf.BpfBusyError):
                program.attach_xdp(index)
            link.update(other.program("crab_lb"))
            assert bpf.xdp_program(index)[0] == other.program("crab_lb").id
        assert bpf.xdp_program(index)[0] == 0
        with program.attach_xdp(index, "generic") as link:
            assert bpf.xdp_program(index) == (program.id, "generic")
        with pytest.raises(bpf.BpfError) as caught:
            program.attach_xdp(9999)
        assert caught.value.errno in (errno.ENODEV, errno.EINVAL)


def tc(*args: str) -> str:
    return subprocess.run(["tc", *args], capture_output=True, text=True, check=True).stdout


def prefs() -> set[str]:
    return set(re.findall(r"pref \d+", tc("filter", "show", "dev", "veth0", "ingress")))


def test_tc_filters(namespace):
    index = socket.if_nametoindex("veth0")
    with bpf.Object(bpf.object_path("client")) as loaded:
        program = loaded.program("crab_ingress")
        mine, made = bpf.attach_tc(program, index, priority=7)
        assert made
        _, made = bpf.attach_tc(program, index, priority=8)
        assert not made
        assert {"pref 7", "pref 8"} <= prefs()
        mine.detach()
        mine.detach()  # nothing happens
        assert "pref 8" in prefs() and "pref 7" not in prefs()
        mine.destroy_hook()
        assert "clsact" not in tc("qdisc", "show", "dev", "veth0")
