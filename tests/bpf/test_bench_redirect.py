"""The redirect in the kernel alone does what the hot loop does: else the comparison is none."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from bench.context import Context
from bench.redirect import Hop, Redirect
from crablb.model import Vip
from tests.helpers.native import Core
from tests.reference import packets as reference

pytestmark = pytest.mark.xdist_group("bench-redirect")

SEED = bytes(range(16))
VIPS = {4: "10.0.0.100", 6: "fd00::100"}
MAC, OURS = bytes.fromhex("020000000011"), bytes.fromhex("020000000002")
HOSTS = {4: [f"10.0.0.{i}" for i in range(11, 14)], 6: [f"fd00::{i}" for i in range(11, 14)]}
TIMES, SCALE, SACK, MSS, OFFER = ("Timestamp", (1, 0)), ("WScale", 7), ("SAckOK", b""), ("MSS", 1460), (42, b"")
NOP = ("NOP", None)
LISTS: dict[str, list[Any]] = {
    "linux": [MSS, SACK, TIMES, NOP, SCALE, OFFER, NOP, NOP],
    "first": [OFFER, NOP, NOP, MSS, SACK, TIMES, NOP, SCALE],
    "nops-before": [MSS, NOP, NOP, OFFER],
    "between": [MSS, NOP, OFFER, NOP, SACK, NOP, NOP],
    "none": [MSS, SACK, TIMES, NOP, SCALE],
}


def syn(family: int, options: list[Any], port: int) -> bytes:
    ip = IP(src="10.9.0.1", dst=VIPS[4]) if family == 4 else IPv6(src="fd09::1", dst=VIPS[6])
    tcp = TCP(sport=port, dport=80, flags="S", seq=port * 7919, options=options)
    return bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / ip / tcp)


@pytest.fixture(scope="module", params=[4, 6])
def served(request):
    """A family, the redirect of its VIP, and the same for the hot loop."""
    family = request.param
    hops = [Hop(ip_address(host), MAC, OURS) for host in HOSTS[family]]
    vip = Vip(ip_address(VIPS[family]), 80)
    with Redirect(Context("tiny").bpf("redirect"), {vip: hops}, SEED) as redirect:
        table = [int.from_bytes(redirect.object.map("table").lookup(slot) or b"", "little") for slot in range(65537)]
        backends = [reference.Backend(hop.address.packed, MAC, OURS) for hop in hops]
        services = [reference.Service(vip.address.packed, 80, table=table)]
        yield family, redirect, reference.LoadBalancer(services, backends, SEED, False)


@pytest.mark.parametrize("name", LISTS)
def test_as_the_hot_loop(served, name):
    family, redirect, load_balancer = served
    core = Core(load_balancer)
    before = redirect.counts()
    for port in range(1000, 1050):
        frame = syn(family, LISTS[name], port)
        (expected,) = core.handle(frame)
        run = redirect.object.program("redirect").test_run(frame)
        assert run.retval == 3
        assert run.data == expected
    outcome = "fallback" if name == "none" else "redirected"
    assert redirect.counts()[outcome] - before[outcome] == 50
    assert core.counts()[{"fallback": "fallback_no_offer"}.get(outcome, outcome)] == 50


@pytest.mark.parametrize("family", [4, 6])
def test_repeated(namespace, family):
    """A test run of many repeats works on a sound frame each time, from another port."""
    vip = Vip(ip_address(VIPS[family]), 80)
    frame = syn(family, LISTS["linux"], 1)
    with Redirect(
        Context("tiny").bpf("redirect"), {vip: [Hop(ip_address(HOSTS[family][0]), MAC, OURS)]}, SEED
    ) as redirect:
        redirect.test_frame(frame, v6=family == 6)
        for program, redirected in (("renewed", 1000), ("harness", 0)):
            before = redirect.counts()["redirected"]
            run = redirect.object.program(program).test_run(frame, repeat=1000)
            assert run.retval == 3
            assert len(run.data) == len(frame) + (4 if family == 4 else 16)
            assert redirect.counts()["redirected"] - before == redirected
