"""Listeners that are not the plain ones: MPTCP, SYN cookies, SO_REUSEPORT.  By nginx and curl."""

from __future__ import annotations

import pytest

from crablb.lab import VIP4, VIP6
from crablb.lab.demo import make_big
from tests.stacks.conftest import kernel
from tests.stacks.nginx import PORTS, start_nginx

URL = {4: f"http://{VIP4}", 6: f"http://[{VIP6}]"}
COUNT = 40
CURL = ("curl", "-sS", "-f", "-H", "Connection: close")


@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_mptcp(make_site, topology):
    """By IPv6 an offer has no room beside its option."""
    site = make_site(*PORTS, topology=topology)
    for server in site.lab.servers:
        make_big(start_nginx(site, server, run=("mptcpize", "run")) / "big", 8 << 20)
    back = site.folder / "back"
    for family, fallback in ((4, ""), (6, "no_offer_room")):
        before = multipath(site)
        with site.counted(COUNT + 1, fallback=fallback if site.prepared else ""):
            site.use("mptcpize", "run", *CURL, f"{URL[family]}/who?[1-{COUNT}]")
            site.use("mptcpize", "run", *CURL, "-o", back, f"{URL[family]}/files/big")
        assert back.read_bytes() == (site.folder / "server1/big").read_bytes()
        assert multipath(site) - before == COUNT + 1


def multipath(site) -> int:
    """How many connections servers and clients agreed to have by MPTCP."""
    count = kernel(site.lab.client)["MPTcpExtMPCapableSYNACKRX"]
    assert count == sum(kernel(server)["MPTcpExtMPCapableACKRX"] for server in site.lab.servers)
    return count


@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_syn_cookies(make_site, topology):
    site = make_site(*PORTS, topology=topology)
    for server in site.lab.servers:
        server.set({"net.ipv4.tcp_syncookies": 2})  # always
        make_big(start_nginx(site, server) / "big", 8 << 20)
    back = site.folder / "back"
    for url in URL.values():
        before = cookies(site)
        with site.counted(COUNT + 1):
            site.use(*CURL, f"{url}/who?[1-{COUNT}]")
            site.use(*CURL, "-o", back, f"{url}/files/big")
        assert back.read_bytes() == (site.folder / "server1/big").read_bytes()
        assert cookies(site) - before == COUNT + 1


def cookies(site) -> int:
    """How many connections servers accepted by a cookie."""
    return sum(kernel(server)["TcpExtSyncookiesRecv"] for server in site.lab.servers)


def test_several_listen(make_site):
    """Three processes on each server's port, which the kernel chooses from."""
    site = make_site(*PORTS)
    names = {f"{server.name}-{n}": server for server in site.lab.servers for n in range(3)}
    for name, server in names.items():
        start_nginx(site, server, name, how="reuseport")
    for family, url in URL.items():
        with site.counted(200):
            said = site.use(*CURL, f"{url}/who?[1-200]")
        seen = {(who, on) for who, _, on, _ in map(str.split, said.splitlines())}
        assert seen == {(name, site.accepted_on(server, family)) for name, server in names.items()}
