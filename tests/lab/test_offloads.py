"""What the network card does for the kernel, and an XDP program must see: off while it serves, and on again."""

from __future__ import annotations

import re
import signal
import subprocess

import pytest

from crablb.kernel import ethtool
from crablb.lab import VIP4, Node
from tests.helpers.namespaces import inside
from tests.helpers.processes import until
from tests.helpers.world import World, status

TAGS = {"rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"}
PUSH = """
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

SEC("tc")
int push(struct __sk_buff *skb)
{
    if (skb->protocol == bpf_htons(ETH_P_IP))
        bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), 100);
    return -1;
}

char LICENSE[] SEC("license") = "GPL";
"""


def on(node: Node) -> set[str]:
    with inside(node.netns):
        return {name for name, feature in ethtool.features("eth0").items() if feature.active}


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_vlan_offload_is_off_while_it_serves(make_world, mode):
    world = make_world()
    lb = world.lab.lb
    before = on(lb)
    assert before >= TAGS
    first = world.serve("--xdp-mode", mode)
    assert on(lb) == before - TAGS
    first.kill()
    first.wait()
    second = world.serve("--xdp-mode", mode)
    assert on(lb) == before - TAGS
    second.terminate()
    assert second.wait() == 0
    assert on(lb) == before
    # Who had it off finds it so.
    lb.run("ethtool", "-K", "eth0", "rxvlan", "off")
    third = world.serve("--xdp-mode", mode)
    third.terminate()
    assert third.wait() == 0
    assert on(lb) == before - {"rx-vlan-hw-parse"}


def test_an_interface_that_cannot_be_asked():
    assert ethtool.features("no-such-interface") == {}


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_a_tag_stays_where_it_was(make_world, tmp_path, mode):
    """A client's tagged SYN leaves the load balancer with the tag, where the cable's other end leaves it in the frame;
    that it may not is said at the start."""
    world: World = make_world()
    lab = world.lab
    source, target = tmp_path / "push.bpf.c", tmp_path / "push.bpf.o"
    source.write_text(PUSH)
    triplet = subprocess.run(["gcc", "-print-multiarch"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(
        ["clang", "-target", "bpf", "-O2", "-g", f"-I/usr/include/{triplet}", "-c", source, "-o", target], check=True
    )
    lab.client.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    lab.client.run("tc", "filter", "add", "dev", "eth0", "egress", "bpf", "da", "obj", str(target), "sec", "tc")
    lab.middle.run("ethtool", "-K", "lb", "txvlan", "off")
    child = world.serve("--xdp-mode", mode)
    assert "ethtool -K PEER txvlan off" in (world.folder / "serve.log").read_text()
    capture = world.folder / "lb.pcap"
    with lab.middle.capture(capture, f"ether src {lab.lb.mac()} and (tcp or (vlan and tcp))", "lb"):
        lab.client.run("curl", "-s", "-m", "1", f"http://{VIP4}/", check=False)
        until(lambda: status(lab)["total"]["sent"])
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 0
    shown = lab.lb.run("tcpdump", "-enr", str(capture)).stdout
    assert re.search(r"vlan 100,.* > 10\.0\.0\.100\.80: Flags \[S\]", shown), shown
