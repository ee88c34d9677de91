"""crablb.kernel.rtnetlink: messages taken apart, and the kernel asked."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from crablb.kernel import ethtool, netlink, routing, rtnetlink
from crablb.kernel.netlink import HopState
from crablb.kernel.rtnetlink import LINK, NEIGHBOUR, ROUTE, Netlink, attributes

#: RTM_NEWNEIGH of 10.0.0.11 at 02:00:00:00:01:00 on interface 3, reachable, as the kernel sends it.


def test_what_the_kernel_says(namespace):
    """The same as ip(8)."""
    links = {link["ifname"]: link for link in json.loads(namespace.ip("-j", "-d", "link"))}
    namespace.ip("addr", "add", "10.0.0.2/24", "dev", "veth0")
    namespace.ip("route", "add", "192.0.2.0/24", "via", "10.0.0.9", "mtu", "1400")
    with Netlink() as netlink:
        found = {m.fields(LINK)[2]: m.attributes(LINK) for m in rtnetlink.links(netlink)}
        assert {rtnetlink.text(a[rtnetlink.IFLA_IFNAME]) for a in found.values()} == links.keys()
        one = found[links["veth0"]["ifindex"]]
        assert one[rtnetlink.IFLA_ADDRESS].hex(":") == links["veth0"]["address"]
        assert rtnetlink.number(one[rtnetlink.IFLA_NUM_RX_QUEUES]) == links["veth0"]["num_rx_queues"]
        route = rtnetlink.route(netlink, ip_address("192.0.2.1")).attributes(ROUTE)
        assert rtnetlink.address(route[rtnetlink.RTA_GATEWAY]) == "10.0.0.9"
        assert rtnetlink.address(route[rtnetlink.RTA_PREFSRC]) == "10.0.0.2"
        assert rtnetlink.number(attributes(route[rtnetlink.RTA_METRICS])[rtnetlink.RTAX_MTU]) == 1400
        with pytest.raises(OSError, match="unreachable") as caught:
            rtnetlink.route(netlink, ip_address("198.51.100.1"))
        assert caught.value.errno == errno.ENETUNREACH


def test_neighbours(namespace):
    namespace.ip("addr", "add", "10.0.0.2/24", "dev", "veth0")
    index = socket.if_nametoindex("veth0")
    with Netlink() as netlink:
        rtnetlink.set_neighbour(netlink, index, "10.0.0.11", 0, 1)
        assert "managed" in namespace.ip("neigh")
        lines = [f"neigh add 10.0.0.{i + 20} dev veth0 lladdr 02:00:00:00:00:01" for i in range(200)]
        command = ["ip", "-n", namespace.netns, "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True)  # more than a datagram of them
        there = [m.attributes(NEIGHBOUR)[rtnetlink.NDA_DST] for m in rtnetlink.neighbours(netlink, socket.AF_INET)]
        assert len(there) == len(set(there)) == 201
        rtnetlink.delete_neighbour(netlink, index, "10.0.0.11")
        with pytest.raises(OSError) as caught:
            rtnetlink.delete_neighbour(netlink, index, "10.0.0.11")
        assert caught.value.errno == errno.ENOENT


def test_queues_and_who_tells_of_them(namespace):
    index = socket.if_nametoindex("veth0")
    assert rtnetlink.rx_queues(index) == 1
    assert rtnetlink.rx_queues(socket.if_nametoindex("lo")) is None
    assert rtnetlink.rx_queues(2**31 - 1) is None
    namespace.ip("link", "add", "wide0", "numrxqueues", "4", "type", "veth", "peer", "name", "wide1")
    index = socket.if_nametoindex("wide0")
    with rtnetlink.device_events() as events:
        events.setblocking(True)
        events.settimeout(60)
        for command in (("-L", "wide0", "rx", "3"), ("-K", "wide1", "gro", "on")):
            subprocess.run(["ethtool", *command], check=True)
            assert events.recv(1 << 16)
    assert rtnetlink.rx_queues(index) == 3


def test_a_family_that_is_none(namespace):
    with Netlink(rtnetlink.NETLINK_GENERIC) as netlink, pytest.raises(OSError) as caught:
        netlink.family("nothing")
    assert caught.value.errno == errno.ENOENT


def test_tcp_sockets(namespace):
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        address = listener.getsockname()
        for _ in range(3):
            stack.enter_context(socket.create_connection(address))
        listening = 10  # include/net/tcp_states.h
        assert rtnetlink.tcp_sockets(socket.AF_INET, 1 << listening) == [(listening, address[1], 3)]
        assert rtnetlink.tcp_sockets(socket.AF_INET6, 1 << listening) == []


def test_looks_that_change_nothing(namespace):
    """Next hops, tables, addresses, filters, drivers: as ip(8) and tc(8) have them, and nobody is asked."""
    namespace.ip("addr", "add", "10.0.0.2/24", "dev", "veth0")
    namespace.ip("addr", "add", "10.0.0.3/24", "dev", "veth0")
    namespace.ip("neigh", "add", "10.0.0.11", "lladdr", "02:00:00:00:01:00", "dev", "veth0")
    namespace.ip("rule", "add", "from", "all", "lookup", "100")
    namespace.ip("route", "add", "192.0.2.0/24", "via", "10.0.0.9", "mtu", "1400", "table", "100")
    near, far, none, own = map(ip_address, ("10.0.0.11", "192.0.2.1", "198.51.100.1", "10.0.0.2"))
    index = socket.if_nametoindex("veth0")
    before = namespace.ip("neigh")
    hops = netlink.next_hops([near, far, none, own])
    assert (hops[near].state, hops[near].dst_mac.hex(":")) == (HopState.RESOLVED, "02:00:00:00:01:00")
    assert (hops[far].state, hops[far].gateway) == (HopState.UNRESOLVED, ip_address("10.0.0.9"))
    assert (hops[far].mtu, hops[far].ifindex, hops[far].asking) == (1400, index, True)
    assert (hops[none].state, hops[own].state) == (HopState.NO_ROUTE, HopState.NOT_A_HOST)
    assert namespace.ip("neigh") == before
    with Netlink() as asked:
        assert [routing.table_of(asked, address) for address in (near, far)] == [254, 100]
        assert rtnetlink.own(asked, index) == [own, ip_address("10.0.0.3")]
        assert rtnetlink.filters(asked, index) == []
        subprocess.run(["tc", "qdisc", "add", "dev", "veth0", "clsact"], check=True)
        match = ["u32", "match", "u32", "0", "0", "classid", "1:1"]
        subprocess.run(["tc", "filter", "add", "dev", "veth0", "ingress", "protocol", "ip", *match], check=True)
        assert rtnetlink.filters(asked, index) == ["u32"]
        assert rtnetlink.filters(asked, socket.if_nametoindex("veth1")) == []
    assert (ethtool.driver("veth0"), ethtool.driver("nowhere")) == ("veth", "")


class Stumbling:
    """A netlink socket whose next answers cannot be read at the moment."""

    def __init__(self, sock: socket.socket, times: int) -> None:
        self._sock, self._times = sock, times
        self.send, self.close = sock.send, sock.close

    def recv_into(self, room: bytearray) -> int:
        if self._times:
            self._times -= 1
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return self._sock.recv_into(room)


def test_an_answer_that_is_read_too_late_is_nobody_elses(namespace):
    for n in (3, 4):
        namespace.ip("addr", "add", f"10.{n}.0.1/24", "dev", "veth0")
    with Netlink() as asking:
        asking._sock = Stumbling(asking._sock, 1)  # type: ignore[assignment]
        with pytest.raises(OSError, match="buffer"):
            rtnetlink.route(asking, ip_address("10.3.0.9"))
        for n in (4, 3, 4):
            route = rtnetlink.route(asking, ip_address(f"10.{n}.0.9")).attributes(ROUTE)
            assert rtnetlink.address(route[rtnetlink.RTA_PREFSRC]) == f"10.{n}.0.1"


def test_a_kernel_without_room_for_an_answer_has_a_route_all_the_same(namespace):
    """It is asked again, as no event would tell."""
    namespace.ip("addr", "add", "10.3.0.1/24", "dev", "veth0")
    asked = ip_address("10.3.0.9")
    with Netlink() as asking:
        links = dict(netlink._link(message, {}) for message in rtnetlink.links(asking))
        sock = asking._sock
        asking._sock = Stumbling(sock, 1)  # type: ignore[assignment]
        with pytest.raises(OSError, match="buffer"):
            netlink._route(asking, asked, links, {})
        assert netlink._route(asking, asked, links, {}).state is HopState.RESOLVED
