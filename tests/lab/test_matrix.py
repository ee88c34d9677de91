"""The main job on machines and networks of many kinds: connections by the fallback, and redirected ones; the load
balancer is killed, both go on, and the next one takes over."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from crablb.kernel import bpf
from crablb.lab import VIP4, VIP6
from tests.helpers.cables import cable
from tests.helpers.namespaces import inside
from tests.helpers.processes import exchange
from tests.helpers.programs import several_buffers
from tests.helpers.world import World
from tests.lab.test_interfaces import number_queues, wide
from tests.lab.test_mtu import set_mtu

pytestmark = pytest.mark.long

#: What others have there: on tc (accept: it ends the chain), on cgroups (it hears of every state), on interfaces.  And,
#: on the switch's port to the load balancer, a VLAN of the TCP packets: what goes has a tag, what comes must have it.
PROGRAMS = """
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

SEC("tc") int accept(struct __sk_buff *skb) { return TC_ACT_OK; }
SEC("xdp") int pass(struct xdp_md *ctx) { return XDP_PASS; }

SEC("sockops") int hear(struct bpf_sock_ops *ctx)
{
    bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
    return 1;
}

static int is_tcp(struct __sk_buff *skb)
{
    __u8 protocol = 0;
    if (skb->protocol == bpf_htons(ETH_P_IP))
        bpf_skb_load_bytes(skb, ETH_HLEN + 9, &protocol, 1);
    else if (skb->protocol == bpf_htons(ETH_P_IPV6))
        bpf_skb_load_bytes(skb, ETH_HLEN + 6, &protocol, 1);
    return protocol == IPPROTO_TCP;
}

SEC("tc") int push(struct __sk_buff *skb)
{
    if (is_tcp(skb))
        bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), 100);
    return TC_ACT_UNSPEC;
}

SEC("tc") int pop(struct __sk_buff *skb)
{
    if (skb->vlan_present && (skb->vlan_tci & 0xfff) == 100)
        return bpf_skb_vlan_pop(skb) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
    return is_tcp(skb) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "GPL";
"""


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("others") / "others.bpf.c"
    source.write_text(PROGRAMS)
    target = source.with_suffix(".o")
    triplet = subprocess.run(["gcc", "-print-multiarch"], check=True, capture_output=True, text=True).stdout.strip()
    flags = ["-target", "bpf", "-O2", "-g", f"-I/usr/include/{triplet}"]
    subprocess.run(["clang", *flags, "-c", source, "-o", target], check=True)
    return target


@dataclass(frozen=True)
class Place:
    topology: str = "bridge"
    offload: bool = True
    mtu: int = 1500
    #: Makes of the world what it is to be before anything of crablb is there; undone at the end.
    make: Callable[[World, Path, ExitStack], object] = lambda *_: None
    serve: tuple[str, ...] = ()
    #: Whether the XDP program forwards known fallback flows by itself: then they go on without a daemon.
    bypass: bool = True


def two_queues(world: World, *_: object) -> None:
    wide(world.lab, 2)
    number_queues(world.lab, 2)


def second_interface(world: World, _: Path, __: ExitStack, *, family: int) -> None:
    """The client comes by it with what it has for the VIP of one family; servers reach it by the segment."""
    lab = world.lab
    cable(lab.lb, lab.client, 12)
    replaced = {4: f"route replace {VIP4}/32 via 10.9.0.2", 6: f"route replace {VIP6}/128 via fd00:9::2"}
    lab.client.ip(replaced[family])
    for server in lab.servers:
        server.ip(f"route add 10.9.0.0/24 via {lab.client.ip4}", f"route add fd00:9::/64 via {lab.client.ip6}")


def tags(world: World, programs: Path, _: ExitStack) -> None:
    """Each TCP packet to and from the load balancer has a VLAN tag, in its frame."""
    switch = world.lab.middle
    switch.run("ethtool", "-K", "lb", "txvlan", "off", "rxvlan", "off")
    with bpf.Object(programs) as loaded, inside(switch.netns):
        index = socket.if_nametoindex("lb")
        for way, name in (("egress", "push"), ("ingress", "pop")):
            bpf.attach_tc(loaded.program(name), index, way, priority=1, handle=1)


def beside_others(world: World, programs: Path, stack: ExitStack) -> None:
    """On every machine programs of others, at each place where crablb has its own or could be in the way."""
    lab = world.lab
    others = stack.enter_context(bpf.Object(programs))
    for node in (lab.client, lab.lb, *lab.servers):
        stack.enter_context(others.program("hear").attach_cgroup_sockops(node.cgroup))
        with inside(node.netns):
            if node not in lab.servers:  # a DSR server's agent wants each interface that is up, and names the program
                node.ip("link add eth9 type veth peer name eth10", "link set eth9 up", "link set eth10 up")
                stack.enter_context(others.program("pass").attach_xdp(socket.if_nametoindex("eth9")))
            index = socket.if_nametoindex("eth0")
            for way in ("ingress", "egress"):
                bpf.attach_tc(others.program("accept"), index, way, priority=1, handle=1)
            with suppress(bpf.BpfError):  # Linux has tcx since 6.6
                stack.enter_context(others.program("accept").attach_tcx(index))


PLACES = {
    "default": Place(),
    "no-offload": Place(offload=False),
    "routed": Place("routed"),
    "generic": Place(offload=False, serve=("--xdp-mode", "generic")),
    "mtu-1280": Place(mtu=1280),
    "mtu-9000": Place("routed", mtu=9000),
    "two-queues": Place(make=two_queues),
    **{
        f"ipv{family}-by-a-second-interface": Place(
            offload=False,
            make=lambda *args, family=family: second_interface(*args, family=family),
            serve=("--iface", "eth1"),
        )
        for family in (4, 6)
    },
    "vlan": Place(make=tags, bypass=False),
    "vlan-generic": Place(offload=False, make=tags, serve=("--xdp-mode", "generic"), bypass=False),
    "beside-others": Place(make=beside_others),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[several_buffers] * (place.mtu > 4000)) for name, place in PLACES.items()]
)
def test_connections(make_world, programs, name):
    place = PLACES[name]
    world = make_world(place.topology, 2, offload=place.offload)
    lab = world.lab
    set_mtu(world, place.mtu)
    with ExitStack() as stack:
        place.make(world, programs, stack)
        world.servers(dsr=True)
        serving = world.serve(*place.serve)

        def hold() -> list[subprocess.Popen[str]]:
            return [world.python(lab.client, "hold_many", str(vip), "80", "2", ready=True) for vip in (VIP4, VIP6)]

        for vip in (VIP4, VIP6):
            seen = world.echo(vip, "300000")
            assert (seen["intact"], seen["accepted_on"]) == (True, str(vip))
        held = hold()
        world.client()
        own = {str(address) for server in lab.servers for address in (server.ip4, server.ip6)}
        for vip in (VIP4, VIP6):
            seen = world.echo(vip, "300000")
            assert seen["intact"]
            assert seen["accepted_on"] in own
        held += hold()
        word = "x" * 10000  # more than a packet holds
        assert [exchange(one, word) for one in held] == ["2"] * 4
        serving.kill()
        serving.wait()
        alone = held if place.bypass else held[2:]
        assert [exchange(one, word) for one in alone] == ["2"] * len(alone)
        world.serve(*place.serve)
        assert [exchange(one, word) for one in held] == ["2"] * 4
