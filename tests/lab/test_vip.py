"""A VIP is an address: what it answers where a machine forwards packets, and what it leaves to others."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from crablb.kernel.checksum import checksum
from crablb.lab import VIP4, VIP6, Node
from tests.helpers.namespaces import inside
from tests.helpers.processes import until
from tests.helpers.world import World, status

pytestmark = pytest.mark.long

VIP = {4: str(VIP4), 6: str(VIP6)}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
FORWARDS = {"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}
IP_FREEBIND, IPV6_FREEBIND = 15, 78  # include/uapi/linux/in.h, in6.h
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def pinged(node: Node, family: int, seconds: float = 5) -> bool:
    proto, kind = (socket.IPPROTO_ICMP, 8) if family == 4 else (socket.IPPROTO_ICMPV6, 128)
    body = struct.pack("!HH", os.getpid() & 0xFFFF, 1) + os.urandom(40)
    with inside(node.netns), socket.socket(FAMILY[family], socket.SOCK_RAW, proto) as sock:
        sock.settimeout(seconds)
        sock.connect((VIP[family], 0))
        # The kernel makes the checksum for IPv6.
        sock.send(bytes([kind, 0]) + checksum(bytes([kind, 0, 0, 0]) + body) + body)
        try:
            while True:
                got = sock.recv(2000)[20 if family == 4 else 0 :]
                if got[0] == (0 if family == 4 else 129) and got[4:] == body:
                    return True
        except TimeoutError:
            return False


def connected(node: Node, family: int, port: int, seconds: float = 5) -> str:
    with inside(node.netns), socket.socket(FAMILY[family]) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect((VIP[family], port))
        except OSError as error:
            return type(error).__name__
        return "connected"


def asked(node: Node, family: int, seconds: float = 5, size: int = 8) -> str:
    """By UDP, at port 53."""
    with inside(node.netns), socket.socket(FAMILY[family], socket.SOCK_DGRAM) as sock:
        sock.settimeout(seconds)
        sock.connect((VIP[family], 53))
        sock.send(bytes(size))
        try:
            return sock.recv(100).decode()
        except OSError as error:
            return type(error).__name__


@contextmanager
def answering(node: Node, family: int, address: str = "", port: int = 53) -> Iterator[None]:
    """A program in the node that answers at a UDP port of an address, which need not be there yet; of any, if empty."""
    with inside(node.netns):
        sock = socket.socket(FAMILY[family], socket.SOCK_DGRAM)
    with sock:
        sock.setsockopt(*((socket.IPPROTO_IP, IP_FREEBIND) if family == 4 else (socket.IPPROTO_IPV6, IPV6_FREEBIND)), 1)
        sock.bind((address, port))
        pid = os.fork()
        if not pid:
            try:
                while True:
                    sock.sendto(b"here", sock.recvfrom(2000)[1])
            finally:
                os._exit(1)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def came(world: World) -> int:
    return world.lab.lb.counters()["rx_packets"]


def counters(world: World) -> dict[str, int]:
    told = status(world.lab)
    return {**told["xdp"], **told["total"]}


@FAMILIES
@pytest.mark.parametrize("how", ["auto", "reset"])
def test_nothing_goes_round(make_world, family, how):
    """Between a load balancer that forwards, and a router: neither pings nor TCP, UDP, fragments to other ports."""
    world = make_world("routed", offload=False)
    world.servers(dsr=True)
    world.lab.lb.set(FORWARDS)
    world.serve("--closed", how)
    client = world.lab.client
    before = came(world)
    assert pinged(client, family)
    assert connected(client, family, 81) == "ConnectionRefusedError"
    assert asked(client, family) == "ConnectionRefusedError"
    seen = counters(world)
    assert (seen["echo"], seen["closed"]) == (1, 2)
    asked(client, family, 0.01, size=3000)  # fragments, which are not answered
    until(lambda: counters(world)["drop_closed"] >= 3)
    assert came(world) - before < 30  # neighbours ask too; one that goes round comes 32 times
    assert world.echo(VIP[family])["intact"]


@FAMILIES
def test_what_is_dropped(make_world, family):
    world = make_world("routed", offload=False)
    world.servers(dsr=True)
    world.lab.lb.set(FORWARDS)
    world.serve("--closed", "drop", "--ping", "false")
    client = world.lab.client
    assert not pinged(client, family, 0.1)
    assert connected(client, family, 81, 0.1) == "TimeoutError"
    assert asked(client, family, 0.1) == "TimeoutError"
    seen = counters(world)
    assert seen["drop_closed"] == seen["vip"] >= 3
    assert seen["echo"] == seen["closed"] == 0
    assert world.echo(VIP[family])["intact"]


@FAMILIES
def test_udp_that_netfilter_serves(make_world, family):
    """By a translation that no socket or route tells of: let be, unless the operator says otherwise."""
    world = make_world("routed", offload=False)
    world.servers(dsr=True)
    world.lab.lb.set(FORWARDS)
    protocol = "ip" if family == 4 else "ip6"
    redirect = f"{protocol} daddr {VIP[family]} udp dport 53 redirect to :5353"
    rules = f"table {protocol} t {{\nchain c {{\ntype nat hook prerouting priority -100\n{redirect}\n}}\n}}\n"
    world.lab.lb.run("nft", "-f", "-", input=rules)
    config = world.folder / "lb.toml"
    address = VIP[family] if family == 4 else f"[{VIP[family]}]"
    backend = world.lab.servers[0].ip4 if family == 4 else world.lab.servers[0].ip6
    text = f'[[service]]\naddress = "tcp://{address}:80"\nbackends = ["{backend}"]\n'
    config.write_text(f'interface = "eth0"\n{text}')
    daemon = world.serve(config=config)
    with answering(world.lab.lb, family, port=5353):
        assert asked(world.lab.client, family) == "here"
        config.write_text(f'interface = "eth0"\nclosed = "reset"\n{text}')
        daemon.send_signal(signal.SIGHUP)
        until(lambda: status(world.lab)["daemon"]["reloads"] == 1)
        assert asked(world.lab.client, family) == "ConnectionRefusedError"


@FAMILIES
def test_a_vip_that_is_an_address_of_this_machine(make_world, family):
    """As keepalived has it: the kernel answers, from when it is there until it is taken away."""
    world = make_world("routed", offload=False)
    world.servers(dsr=True)
    world.lab.lb.set(FORWARDS)
    world.serve("--closed", "reset")
    client, bits = world.lab.client, 32 if family == 4 else 128

    def theirs() -> bool:
        before = counters(world)["echo"]
        return pinged(client, family) and counters(world)["echo"] == before

    assert not theirs()
    with answering(world.lab.lb, family, VIP[family]):
        assert asked(client, family) == "ConnectionRefusedError"
        world.lab.lb.ip(f"addr add {VIP[family]}/{bits} dev eth0{'' if family == 4 else ' nodad'}")
        until(theirs)
        assert asked(client, family) == "here"
        assert connected(client, family, 81) == "ConnectionRefusedError"
        assert world.echo(VIP[family])["intact"]
        world.lab.lb.ip(f"addr del {VIP[family]}/{bits} dev eth0")
        until(lambda: not theirs())
        world.lab.lb.ip(f"route add local {VIP[family]}/{bits} dev lo")
        until(theirs)


@FAMILIES
def test_a_service_that_no_backend_can_take(make_world, family):
    """All drained, or one that does not answer: its clients are told, and served again when it can."""
    world = make_world("routed", offload=False)
    world.servers(dsr=True)
    config = world.folder / "lb.toml"
    address = VIP[family] if family == 4 else f"[{VIP[family]}]"
    server = world.lab.servers[0]
    there = server.ip4 if family == 4 else server.ip6
    nobody = "10.2.0.77" if family == 4 else "fd00:2::77"
    reloads = 0

    def write(backend: str, closed: str = "auto") -> None:
        service = f'[[service]]\naddress = "tcp://{address}:80"\nbackends = [{backend}]\n'
        config.write_text(f'interface = "eth0"\nclosed = "{closed}"\n{service}')

    def reload(backend: str, closed: str = "auto") -> None:
        nonlocal reloads
        write(backend, closed)
        daemon.send_signal(signal.SIGHUP)
        reloads += 1
        until(lambda: status(world.lab)["daemon"]["reloads"] == reloads)

    write(f'"{there}"')
    daemon = world.serve(config=config)
    assert world.echo(VIP[family])["intact"]
    for state in ("drain", "dead"):
        reload(f'{{ address = "{there}", state = "{state}" }}')
        assert connected(world.lab.client, family, 80) == "ConnectionRefusedError"
    assert counters(world)["refused"] == 2
    reload(f'{{ address = "{there}", state = "drain" }}', "drop")
    assert connected(world.lab.client, family, 80, 0.1) == "TimeoutError"
    reload(f'"{nobody}"')
    # Until the kernel has asked in vain, it may yet be found.
    until(lambda: connected(world.lab.client, family, 80, 1) == "ConnectionRefusedError", 20)
    reload(f'"{there}"')
    until(lambda: connected(world.lab.client, family, 80, 1) == "connected")
