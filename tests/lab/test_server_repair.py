"""What a server agent has put into the kernel and has been lost: told by ``status``, mended by ``repair``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crablb.kernel import bpf, pins
from crablb.lab import VIP4, VIP6, Node
from crablb.lab.demo import VIPS, crablb, start_agent
from tests.helpers.namespaces import inside
from tests.helpers.processes import answer
from tests.helpers.world import World, agent_status, command

ALL = [part for vip in VIPS for part in ("--vip", vip)]


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """A server with all that there is to lose."""
    world = make_world()
    server = world.lab.servers[0]
    world.servers(agents=False)
    server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
    server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0, "net.ipv4.tcp_fastopen": 3})
    server.run(*crablb("agent", "server", *ALL, "--dsr", "--detach"))
    world.serve()
    return world


@contextmanager
def pinned(node: Node, name: str) -> Iterator[bpf.Link]:
    with inside(node.netns), bpf.Link.from_pin(pins.folder("server") / name) as link:
        yield link


def detach(node: Node, name: str) -> None:
    with pinned(node, name) as link:
        link.detach()


def unpin(node: Node, name: str) -> None:
    with inside(node.netns):
        (pins.folder("server") / name).unlink()


def attached(server: Node) -> str:
    return f"the program that answers redirects is not attached to cgroup {server.cgroup}"


#: What is lost: how, and what is told.
LOSSES: dict[str, tuple[Callable[[Node], object], list[str]]] = {
    "answers": (
        lambda server: detach(server, "link"),
        ["the program that answers redirects is not attached to cgroup"],
    ),
    "pin": (lambda server: unpin(server, "link"), ["the program that answers redirects is not attached to cgroup"]),
    "fast-open": (
        lambda server: detach(server, "fast_open"),
        ["servers take Fast Open, and the program that keeps redirected data from them is not attached"],
    ),
    "tunnels": (
        lambda server: detach(server, "decap-eth0"),
        ["the program that decapsulates is not attached to eth0"],
    ),
    "clamp": (
        lambda server: server.run("tc", "filter", "del", "dev", "eth0", "egress"),
        ["the program that lowers the MSS is not attached to eth0"],
    ),
    "qdisc": (
        lambda server: server.run("tc", "qdisc", "del", "dev", "eth0", "clsact"),
        ["the program that lowers the MSS is not attached to eth0"],
    ),
    "addresses": (
        lambda server: server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo"),
        [f"{vip} is no address of this host, and packets to it are dropped" for vip in (VIP4, VIP6)],
    ),
    "sysctls": (
        lambda server: server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 1}),
        [
            "net.ipv4.conf.all.arp_ignore is 0, not 1: ARP tells of VIPs",
            "net.ipv4.conf.all.arp_announce is 1, not 2: ARP tells of VIPs",
        ],
    ),
}


@pytest.mark.long
def test_losses_are_told_and_mended(world: World) -> None:
    """One by one, then at once; in the end it serves both kinds of clients, and leaves nothing when it goes."""
    server = world.lab.servers[0]
    before = agent_status(server)["server"]
    assert before["faults"] == []
    for name, (lose, words) in LOSSES.items():
        lose(server)
        told = agent_status(server, 1)["server"]["faults"]
        assert [fault.removesuffix(f" {server.cgroup}") for fault in told] == words, name
        assert command(server, "agent", "repair", "server") == "".join(f"mended; it was: {fault}\n" for fault in told)
        assert agent_status(server)["server"]["faults"] == []
    for name in LOSSES.keys() - {"pin", "qdisc"}:  # the same once more
        LOSSES[name][0](server)
    told = agent_status(server, 1)["server"]["faults"]
    assert len(told) == 8
    assert command(server, "agent", "repair") == "".join(f"mended; it was: {fault}\n" for fault in told)
    now = agent_status(server)["server"]
    assert (now["faults"], now["dsr"]) == ([], before["dsr"])
    assert world.echo(VIP4, "10")["accepted_on"] == str(VIP4)
    agent = world.client()
    for vip, address in ((VIP4, server.ip4), (VIP6, server.ip6)):
        assert world.echo(vip, "10")["accepted_on"] == address
    assert agent_status(server)["server"]["counters"]["echoed"] == now["counters"]["echoed"] + 2
    agent.terminate()
    assert agent.wait() == 0
    command(server, "agent", "remove", "server")
    assert "xdp" not in server.run("ip", "link").stdout
    assert "clsact" not in server.run("tc", "qdisc").stdout
    assert str(VIP4) not in server.run("ip", "addr").stdout
    arp = "net.ipv4.conf.all.arp_ignore", "net.ipv4.conf.all.arp_announce"
    assert server.run("sysctl", "-n", *arp).stdout == "0\n0\n"


def test_an_interface_that_is_made_anew(world: World) -> None:
    """Its programs went with it; one that was not named and stays away is not missed."""
    server = world.lab.servers[0]
    server.ip("link add extra0 type veth peer name extra1", "link set extra0 up", "link set extra1 up")
    server.run(*crablb("agent", "server", *ALL, "--dsr", "--detach", "--replace"))
    assert set(agent_status(server)["server"]["dsr"]["interfaces"]) == {"eth0", "extra0", "extra1"}
    server.ip("link del extra0")
    assert agent_status(server)["server"]["faults"] == []
    server.ip("link add extra0 type veth peer name other1", "link set extra0 up")
    assert agent_status(server, 1)["server"]["faults"] == [
        "the program that lowers the MSS is not attached to extra0",
        "the program that decapsulates is not attached to extra0",
    ]
    server.run(*crablb("agent", "repair", "server"))
    assert set(agent_status(server)["server"]["dsr"]["interfaces"]) == {"eth0", "extra0"}
    assert "xdp" in server.run("ip", "link", "show", "extra0").stdout


#: Prints what the kernel makes of the server's MSS.
MSS = (sys.executable, "-c", f"import socket; print(socket.create_connection(('{VIP4}', 80)).getsockopt(6, 2))")
STACK = (
    "link add br0 type bridge",
    "link add port0 type veth peer name port1",
    "link set port0 master br0",
    "link add mv0 link eth0 type macvlan mode bridge",
    "link add vx0 type vxlan id 5 dstport 4789 dev mv0",
    "tuntap add tap0 mode tap",
    "link set tap0 mtu 68",
    "link add docker0 type bridge",
    *(f"link set {name} up" for name in ("br0", "port0", "port1", "mv0", "vx0", "tap0", "docker0")),
)


def test_every_interface_of_a_container_host(make_world: Callable[..., World]) -> None:
    """Ports in place of their bridges, what lies below before what lies above; unused ones change no client's MSS."""
    world = make_world(offload=False)
    world.servers(agents=False)
    server = world.lab.servers[0]
    server.ip(*STACK)
    server.run(*crablb("agent", "server", *ALL, "--dsr", "--detach"))
    now = agent_status(server)["server"]
    assert now["faults"] == []
    assert set(now["dsr"]["interfaces"]) == {"eth0", "port0", "port1", "mv0", "vx0", "tap0"}
    world.serve("--fallback", "dsr-ipip")
    assert world.echo(VIP4, "300000")["intact"]
    assert agent_status(server)["server"]["counters"]["dsr_clamped"] == 1
    assert int(world.lab.client.run(*MSS).stdout) == 1500 - 40 - 40 - 12  # less the timestamps
    command(server, "agent", "remove", "server")
    assert "xdp" not in server.run("ip", "link").stdout
    assert "clsact" not in server.run("tc", "qdisc").stdout


@pytest.mark.long
def test_the_ports_of_a_bridge_that_was_named(make_world: Callable[..., World]) -> None:
    """The server's address is the bridge's, as on hosts of virtual machines; a port that joins later is missed."""
    world = make_world(offload=False)
    world.servers(agents=False)
    server = world.lab.servers[0]
    named = ("agent", "server", *ALL, "--dsr", "--interface", "br0", "--detach")
    server.ip(*STACK[:2], "link set br0 up")
    refused = server.run(*crablb(*named), check=False)
    assert (refused.returncode, refused.stderr) == (
        2,
        "crablb: interface br0 is a bridge without ports, by which nothing comes in; give it one\n",
    )
    server.ip(
        f"addr del {server.ip4}/24 dev eth0", "link set eth0 master br0", f"addr add {server.ip4}/24 dev br0",
        f"link set br0 address {server.mac()}",
    )  # fmt: skip
    server.run(*crablb(*named))
    assert set(agent_status(server)["server"]["dsr"]["interfaces"]) == {"eth0"}
    world.serve("--fallback", "dsr-ipip", what=[f"tcp://{VIP4}:80={server.ip4}"])
    assert world.echo(VIP4, "300000")["intact"]
    counters = agent_status(server)["server"]["counters"]
    assert counters["dsr_decapsulated"] > 200
    assert counters["dsr_clamped"] == 1
    server.ip("link set port0 master br0")
    assert agent_status(server, 1)["server"]["faults"] == [
        "the program that lowers the MSS is not attached to port0",
        "the program that decapsulates is not attached to port0",
    ]
    command(server, "agent", "repair")
    assert set(agent_status(server)["server"]["dsr"]["interfaces"]) == {"eth0", "port0"}
    command(server, "agent", "remove", "server")
    assert "xdp" not in server.run("ip", "link").stdout


def test_a_program_above_excludes_one_below(make_world: Callable[..., World], other_xdp_program: Path) -> None:
    world = make_world()
    server = world.lab.servers[0]
    server.ip(*STACK[:3], "link set br0 up", "link set port0 up", f"link set br0 xdp obj {other_xdp_program} sec xdp")
    done = server.run(*crablb("agent", "server", *ALL, "--dsr", "--detach"), check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "crablb: interface port0 takes no XDP program: one above it has one (br0), and tunnels are decapsulated by one;"
        " remove it, or name other interfaces: --interface\n",
    )
    server.run(*crablb("agent", "server", *ALL, "--dsr", "--interface", "eth0", "--detach"))


def test_one_below_comes_up_before_the_agent_is_replaced(make_world: Callable[..., World]) -> None:
    """Programs that are there stay, but for one above what has none yet."""
    world = make_world()
    world.servers(agents=False)
    server = world.lab.servers[0]
    server.ip(
        "link add low0 type veth peer name low1", "link add mv0 link low0 type macvlan mode bridge", "link set mv0 up",
        "link add high0 type veth peer name high1", "link set high0 up",
    )  # fmt: skip
    interfaces = "--interface", "mv0", "--interface", "eth0", "--interface", "high0"
    server.run(*crablb("agent", "server", *ALL, "--dsr", *interfaces, "--detach"))
    with inside(server.netns), bpf.Link.from_pin(pins.folder("server") / "decap-eth0") as link:
        before = link.program_id
        server.run(
            *crablb("agent", "server", *ALL, "--dsr", *interfaces[:4], "--interface", "low0", "--detach", "--replace")
        )
        assert link.program_id not in (0, before)  # the same link
    now = agent_status(server)["server"]
    assert (now["faults"], set(now["dsr"]["interfaces"])) == ([], {"eth0", "mv0", "low0"})
    links = server.run("ip", "link", "show", "high0").stdout
    assert "xdp" not in links
    assert "clsact" not in server.run("tc", "qdisc", "show", "dev", "high0").stdout


def test_an_interface_that_was_named_is_missed(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.servers(agents=False)
    server = world.lab.servers[0]
    server.ip("link add extra0 type veth peer name extra1", "link set extra0 up")
    server.run(*crablb("agent", "server", *ALL, "--dsr", "--interface", "extra0", "--detach"))
    server.ip("link del extra0")
    assert agent_status(server, 1)["server"]["faults"] == ["interface extra0 does not exist"]
    done = server.run(*crablb("agent", "repair"), check=False)
    assert (done.returncode, done.stdout) == (1, "not mended: interface extra0 does not exist\n")


@pytest.mark.long
def test_a_place_that_another_program_has_taken(world: World, other_xdp_program: Path) -> None:
    """What can be mended is; the rest is told."""
    server = world.lab.servers[0]
    for name in ("link", "decap-eth0"):
        detach(server, name)
    server.ip(f"link set eth0 xdp obj {other_xdp_program} sec xdp")
    done = server.run(*crablb("agent", "repair", "server"), check=False)
    assert done.returncode == 1
    mended, left, why = done.stdout.splitlines()
    assert mended == f"mended; it was: {attached(server)}"
    assert left == "not mended: the program that decapsulates is not attached to eth0"
    assert why.startswith("not mended: interface eth0 has an XDP program already")
    server.ip("link set eth0 xdp off")
    assert server.run(*crablb("agent", "repair", "server")).stdout == (
        "mended; it was: the program that decapsulates is not attached to eth0\n"
    )


def test_who_began_to_listen_meanwhile_is_prepared(make_world: Callable[..., World]) -> None:
    """While the program was not attached nobody saw it listen."""
    world = make_world()
    server = world.lab.servers[0]
    start_agent(server, "server")
    detach(server, "link")
    world.servers(agents=False)
    command(server, "agent", "repair")
    world.serve()
    world.client()
    assert world.echo(VIP4, "10")["accepted_on"] == server.ip4


def test_fast_open_that_is_allowed_later(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.servers()
    server = world.lab.servers[0]
    assert agent_status(server)["server"]["faults"] == []
    server.set({"net.ipv4.tcp_fastopen": 3})
    (told,) = agent_status(server, 1)["server"]["faults"]
    assert server.run(*crablb("agent", "repair")).stdout == f"mended; it was: {told}\n"
    with pinned(server, "fast_open") as link:
        assert link.target


def test_pins_that_are_gone(world: World) -> None:
    server = world.lab.servers[0]
    with inside(server.netns):
        shutil.rmtree(pins.folder("server"))
    why = "the server agent's pins are gone; install it again: crablb agent server --vip ..."
    found = agent_status(server, 1)["server"]
    assert (found["faults"], found["counters"]) == ([why], {})
    shown = server.run(*crablb("agent", "status"), check=False)
    assert (shown.returncode, shown.stdout.splitlines()[-1]) == (1, f"  wrong: {why}")
    done = server.run(*crablb("agent", "repair"), check=False)
    assert done.returncode == 1
    assert f"not mended: {why}\n" in done.stdout


def test_there_is_nothing_to_repair(make_world: Callable[..., World]) -> None:
    world = make_world()
    server = world.lab.servers[0]
    start_agent(server, "server")
    for role, which in (([], "agent"), (["client"], "client agent")):
        node = world.lab.client if not role else server
        done = node.run(*crablb("agent", "repair", *role), check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"crablb: there is no {which} in this network namespace")


# ---- who listens ----

LISTEN = """
import socket, sys
socks = []
for text in sys.argv[1:]:
    host, only = text.removesuffix("!"), text.endswith("!")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in host:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    sock.bind((host, 80))
    sock.listen()
    socks.append(sock)
print("ready", flush=True)
sys.stdin.read()
"""

LISTENERS: list[tuple[list[str], list[str]]] = [
    ([], [f"{vip}: nothing listens on port 80" for vip in VIPS]),
    (["0.0.0.0"], [f"{VIPS[1]}: nothing listens on port 80 over IPv6"]),
    (["::"], []),
    (["::!"], [f"{VIPS[0]}: nothing listens on port 80 over IPv4"]),
    (["::!", "0.0.0.0"], []),
    (["10.0.0.11", "fd00::11"], []),
    (["::ffff:10.0.0.11", "fd00::11"], []),
    (
        ["10.0.0.100", "127.0.0.1", "fd00::11"],
        [
            f"{VIPS[0]}: servers listen on 10.0.0.100, 127.0.0.1 only, and redirected connections come to this host's"
            " own address"
        ],
    ),
]


def test_who_listens(make_world: Callable[..., World]) -> None:
    world = make_world()
    server = world.lab.servers[0]
    server.run(*crablb("agent", "server", *ALL, "--detach"))
    for listeners, faults in LISTENERS:
        listening = world.program(server, sys.executable, "-c", LISTEN, *listeners)
        assert answer(listening) == "ready"
        found = agent_status(server, int(bool(faults)))["server"]
        assert found["faults"] == faults
        assert found["listening"] == {vip: not any(fault.startswith(vip) for fault in faults) for vip in VIPS}
        shown = command(server, "agent", "status", expected=int(bool(faults)))
        assert [line for line in shown.splitlines() if "wrong:" in line] == [f"  wrong: {fault}" for fault in faults]
        listening.communicate()
