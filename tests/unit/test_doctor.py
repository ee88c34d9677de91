"""What the doctor makes of what it reads: every finding, from plain values."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from ipaddress import ip_address

import msgspec
import pytest

from crablb.api import types
from crablb.doctor import backends, daemon, filters, interfaces, machine, multipath, plan, served, shown, vips
from crablb.doctor.examine import Look, examine
from crablb.doctor.finding import MOST, Finding, Severity, fault, few, note, ok, warning
from crablb.doctor.interfaces import BASIC, Port, Programs
from crablb.doctor.vips import Told
from crablb.errors import ConfigError
from crablb.kernel import capabilities, pins
from crablb.kernel.ethtool import ON, Feature
from crablb.kernel.interface import Interface
from crablb.kernel.netlink import HopState, NextHop
from crablb.kernel.rtnetlink import Listener
from crablb.model import Announce, Backend, Bypass, Closed, Config, Fallback, Service, State, Vip, XdpMode
from tests.helpers.processes import ROOT

NOTE, WARNING, FAULT = Severity.NOTE, Severity.WARNING, Severity.FAULT


def told(findings) -> dict[str, Severity]:
    """What is worth reading of them: by id, how bad it is."""
    return {one.id: one.severity for one in findings if one.severity is not Severity.OK}


# ---- the machine ----

KERNEL = machine.Kernel("6.8.0-31-generic", True, True, True, 1, 0, "none")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (KERNEL, {}),
        (replace(KERNEL, release="5.15.0"), {"kernel-old": FAULT}),
        (replace(KERNEL, release="5.19"), {"kernel-old": WARNING}),
        (replace(KERNEL, release="6.1.0-18-amd64"), {"kernel-features": NOTE}),
        (replace(KERNEL, release="10.0"), {}),
        (replace(KERNEL, release="of my own"), {"kernel-old": FAULT}),
        (replace(KERNEL, xdp_sockets=False), {"af-xdp": FAULT}),
        (replace(KERNEL, btf=False), {"btf": NOTE}),
        (replace(KERNEL, jit=0), {"jit": WARNING}),
        (replace(KERNEL, jit=None, statistics=None), {}),
        (replace(KERNEL, statistics=1), {"bpf-statistics": NOTE}),
        (replace(KERNEL, lockdown="confidentiality"), {"lockdown": NOTE}),
        (replace(KERNEL, lockdown="integrity"), {}),
    ],
)
def test_kernels(found, expected):
    assert told(machine.kernel(found)) == expected


@pytest.mark.parametrize(("release", "missing"), [("6.1.0-18-amd64", True), ("6.3.0", True), ("6.4.1", False)])
def test_a_kernel_without_takeovers(release, missing):
    (finding,) = machine.kernel(replace(KERNEL, release=release))
    assert ("no takeovers" in finding.what, "an upgrade is a restart" in finding.why) == (missing, missing)


LIMITS = machine.Limits(None, None, None, None)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (LIMITS, {}),
        (replace(LIMITS, files=63), {"limit-files": FAULT}),
        (replace(LIMITS, files=64), {"limit-files": WARNING}),
        (replace(LIMITS, files=1024), {}),
        (replace(LIMITS, locked=65536), {"limit-memlock": FAULT}),
        (replace(LIMITS, locked=1 << 30), {}),
        (replace(LIMITS, addresses=1 << 30), {"limit-addresses": WARNING}),
        (replace(LIMITS, available=50 << 20), {"memory": WARNING}),
        (replace(LIMITS, available=4 << 30), {}),
    ],
)
def test_limits(found, expected):
    assert told(machine.limits(found)) == expected


def test_rights():
    assert told(machine.rights(machine.Rights(0, (), ""))) == {}
    (lacking,) = machine.rights(machine.Rights(1000, ("CAP_BPF", "CAP_NET_RAW"), ""))
    assert (lacking.id, lacking.severity) == ("rights", FAULT)
    assert lacking.what == "user 1000 lacks CAP_BPF, CAP_NET_RAW"
    assert "AmbientCapabilities=CAP_NET_ADMIN" in lacking.remedy
    (namespaced,) = machine.rights(machine.Rights(0, (), "this is a user namespace"))
    assert (namespaced.severity, namespaced.why) == (FAULT, "this is a user namespace")


def test_who_is_not_to_serve_is_no_fault(monkeypatch):
    """A member of admin_group has none of the capabilities; who has some is perhaps a unit's user that lacks one."""
    users = ((0, ("CAP_BPF",), True), (1001, ("CAP_BPF",), True), (1001, capabilities.SERVE, False))
    for user, lacking, serves in users:
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        monkeypatch.setattr(capabilities, "lacking", lambda wanted, lacking=lacking: list(lacking))
        assert machine.serves() is serves
        (look,) = (one for one in plan._machine([]) if one.what == "rights")
        assert {one.id: one.severity for one in look.findings()} == {"rights": FAULT if serves else NOTE}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert told(machine.place(machine.read_place(pins.RUN))) == {}
    found = [*machine.bpffs((False, False)), *machine.limits(machine.Limits(100, 1 << 20, None, 1 << 20))]
    whole = {"bpffs": FAULT, "limit-files": WARNING, "limit-memlock": FAULT, "memory": WARNING}
    assert told(machine.of_process(found, True)) == whole
    assert told(machine.of_process(found, False)) == dict.fromkeys(whole, NOTE) | {"memory": WARNING}


def test_the_bpf_file_system():
    assert told(machine.bpffs((True, False))) == {}
    assert told(machine.bpffs((False, True))) == {"bpffs": NOTE}
    assert told(machine.bpffs((False, False))) == {"bpffs": FAULT}


def test_a_program_that_does_not_load():
    assert told(machine.load("")) == {}
    (refused,) = machine.load("cannot load BPF object lb.bpf.o: Invalid argument")
    assert (refused.id, refused.severity) == ("program-refused", FAULT)
    assert "Invalid argument" in refused.why


def test_clocks():
    assert told(machine.clock(machine.Clock(True, -1000))) == {}
    assert told(machine.clock(machine.Clock(False, 0))) == {"clock": NOTE}
    assert told(machine.clock(machine.Clock(True, 2e9))) == {"clock-wrong": WARNING}
    assert machine.read_clock().behind < 86400


RUN = machine.Place("/run", "/run/crablb", 1 << 30, True, False, True)
STATE = replace(RUN, path="/var/lib", wanted="/var/lib/crablb")


@pytest.mark.parametrize("change", [{"read_only": True}, {"free": 0}, {"files": False}, {"writable": False}])
def test_places(change):
    assert told(machine.place(RUN)) == told(machine.place(STATE)) == {}
    assert told(machine.place(replace(RUN, **change))) == {"run-folder": FAULT}
    assert told(machine.place(replace(STATE, **change))) == {"state-folder": WARNING}


def test_a_place_that_is_not_there_yet(tmp_path):
    found = machine.read_place(tmp_path / "run" / "crablb")
    assert (found.path, found.wanted) == (str(tmp_path), str(tmp_path / "run" / "crablb"))
    assert not (tmp_path / "run").exists()


def test_the_seed(tmp_path, monkeypatch):
    path = tmp_path / "seed"
    monkeypatch.setattr(machine.seed, "PATH", path)
    assert machine.read_seed() == ""
    path.write_text("00" * 16 + "\n")
    path.chmod(0o600)
    assert machine.read_seed() == ""
    path.chmod(0o622)
    assert "others can" in machine.read_seed()
    path.chmod(0o600)
    path.write_text("short")
    wrong = machine.read_seed()
    assert told(machine.seeded(wrong)) == {"seed": WARNING}
    assert not list(machine.seeded(""))


def test_proc_and_neighbours():
    assert told(machine.proc((True, True))) == {}
    assert told(machine.proc((True, False))) == {"proc": NOTE}
    assert told(machine.proc((False, False))) == {"proc": FAULT}
    assert told(machine.neighbours(("ipv4", 1000, 1024))) == {"neighbour-table": WARNING}
    assert told(machine.neighbours(("ipv4", 1000, 4096))) == {}
    assert told(machine.neighbours(("ipv6", 1000, None))) == {}  # another namespace's to know


# ---- interfaces ----

ETH0 = Interface("eth0", 2, b"\2\0\0\0\0\2", 1500, True, 2, 2, "")
CARD = Port("eth0", ETH0, driver="ice", features=127, cpus=2)
VIRTIO = replace(CARD, driver="virtio_net")
VETH = replace(CARD, info=replace(ETH0, kind="veth"), driver="veth", features=BASIC)


def of(kind: str, **more) -> Port:
    return replace(CARD, info=replace(ETH0, kind=kind), driver=kind, features=0, **more)


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        (CARD, {}),
        (Port("eth7", None, "interface eth7 does not exist; there are: lo"), {"interface-missing": FAULT}),
        (Port("eth7", None, "interface eth7 does not exist", 4711), {"interface-missing": FAULT}),
        (replace(CARD, info=replace(ETH0, up=False), carrier=False), {"interface-down": FAULT}),
        (replace(CARD, carrier=False), {"interface-carrier": FAULT}),
        # other programs
        (replace(CARD, others=Programs(17, "cil_from_netdev")), {"xdp-other": FAULT}),
        (replace(CARD, above={"br0": 17, "eth0.100": 0}), {"xdp-above": FAULT}),
        (replace(CARD, others=Programs(filters=("bpf", "tcx"))), {"tc": NOTE}),
        (of("bridge", ports={"p0": Programs(17)}), {"xdp-generic": NOTE, "xdp-port": WARNING}),
        (of("bond", ports={"p0": Programs(filters=("flower",))}), {"xdp-generic": NOTE, "tc-port": WARNING}),
        # mode
        (replace(CARD, features=BASIC), {"copy-mode": NOTE}),
        (replace(CARD, features=None), {"xdp-mode-unknown": NOTE}),
        (replace(CARD, features=0), {"xdp-generic": NOTE}),
        (replace(CARD, mode="generic"), {"xdp-generic": NOTE}),
        (of("vlan"), {"xdp-generic": NOTE}),
        (VETH, {"vlan-offload": NOTE}),
        # queues
        (replace(CARD, info=replace(ETH0, rx_queues=8, max_queues=8)), {"queues-cpus": NOTE}),
        (replace(CARD, info=replace(ETH0, rx_queues=1, max_queues=8)), {"queues-few": NOTE}),
        (replace(CARD, info=replace(ETH0, rx_queues=300), cpus=512), {"queues-many": FAULT}),
        (replace(VIRTIO, info=replace(ETH0, rx_queues=4, max_queues=4)), {"queues-cpus": NOTE, "queues-virtio": FAULT}),
        (replace(VIRTIO, info=replace(ETH0, rx_queues=4, max_queues=4), mode="native"), {"queues-cpus": NOTE}),
        (replace(VIRTIO, info=replace(ETH0, max_queues=4)), {}),
        # MTU
        (replace(CARD, info=replace(ETH0, mtu=9000)), {}),
        (replace(CARD, info=replace(ETH0, mtu=9000), features=BASIC | 8), {"mtu-generic": NOTE}),
        (replace(CARD, info=replace(ETH0, mtu=9000), several_buffers=False), {"mtu-long": WARNING}),
        (replace(CARD, info=replace(ETH0, mtu=1279)), {"mtu-small": WARNING}),
        # offloads
        (replace(CARD, offloads={"rx-vlan-hw-parse": ON}), {}),
        (replace(CARD, offloads={"rx-vlan-hw-parse": Feature(True, False)}), {"vlan-offload": NOTE}),
        (replace(CARD, offloads={"rx-lro": ON}), {"lro": WARNING}),
        (of("bridge", joining=("br0", "p0")), {"xdp-generic": NOTE, "gro-generic": NOTE}),
        (replace(VETH, mode="generic"), {"xdp-generic": NOTE, "vlan-offload": NOTE, "tso-generic": NOTE}),
    ],
)
def test_interfaces(port, expected, monkeypatch):
    monkeypatch.setattr(interfaces.virtio, "cpus", lambda: 2)
    monkeypatch.setattr(interfaces.virtio, "takes_no_room", lambda: False)
    assert told(interfaces.judge(port, None, None)) == expected


def test_a_zero_copy_mode_that_loses_packets(monkeypatch):
    monkeypatch.setattr(interfaces.virtio, "takes_no_room", lambda: True)
    (found,) = [one for one in interfaces.judge(VIRTIO, None, None) if one.id == "copy-mode"]
    assert found.what == "virtio_net loses packets in zero-copy mode before Linux 7.3"
    assert "copy-mode" not in told(interfaces.judge(CARD, None, None))


def test_an_mtu_that_is_less_than_the_usual():
    def mtu(value: int) -> dict[str, Severity]:
        port = of("veth")
        assert port.info
        found = interfaces.judge(replace(port, info=replace(port.info, mtu=value)), None, None)
        return {name: severity for name, severity in told(found).items() if name.startswith("mtu-")}

    assert [mtu(value) for value in (1500, 1499, 1280)] == [{}, {"mtu-less": NOTE}, {"mtu-less": NOTE}]
    assert mtu(1279) == {"mtu-small": WARNING}


def test_an_interface_and_its_configuration():
    config = Config(("eth0",), ())
    assert told(interfaces.judge(CARD, replace(config, queues=8), False)) == {"queues-wanted": NOTE}
    eight = replace(CARD, info=replace(ETH0, rx_queues=8, max_queues=8))
    assert told(interfaces.judge(eight, replace(config, queues=2), False)) == {}
    native = replace(config, xdp_mode=XdpMode.NATIVE)
    assert told(interfaces.judge(CARD, native, False)) == {}
    assert told(interfaces.judge(replace(CARD, features=0), native, False)) == {"xdp-native": FAULT}
    generic = replace(config, xdp_mode=XdpMode.GENERIC)
    assert told(interfaces.judge(CARD, generic, False)) == {"xdp-generic": NOTE}
    assert told(interfaces.judge(VETH, generic, False)).keys() == {"xdp-generic", "vlan-offload", "tso-generic"}
    (bond,) = interfaces.judge(of("bond"), native, False)
    assert bond.remedy == "leave xdp_mode at auto, or serve the ports of eth0"
    joining = replace(CARD, features=0, joining=("eth0",))
    assert told(interfaces.judge(joining, config, False))["gro-generic"] is NOTE
    assert told(interfaces.judge(joining, config, True))["gro-generic"] is WARNING


def test_what_an_interface_is_told_to_do():
    (generic,) = (f for f in interfaces.judge(of("bridge", ports={"p0": Programs(), "p1": Programs()}), None, None))
    assert generic.remedy == "serve its ports: --iface p0 --iface p1"
    (gone,) = interfaces.judge(Port("eth7", None, "gone", 4711), None, None)
    assert gone.why == "process 4711 serves it again when it is back"


# ---- VIPs ----

VIP, MAC, ELSE = ip_address("10.0.0.100"), "02:00:00:00:00:0b", "02:00:00:00:00:63"
SERVER = ip_address("10.0.0.11")
NEAR = vips.Place(VIP, segment="eth0")


@pytest.mark.parametrize(
    ("place", "config", "expected"),
    [
        (NEAR, None, {}),
        (replace(NEAR, segment=""), None, {"vip-routed": NOTE}),
        (replace(NEAR, local=True), None, {"vip-local": NOTE}),
        (replace(NEAR, local=True, main=True), None, {"vip-own-address": FAULT}),
        (replace(NEAR, local=True, main=True), Config((), (), allow_own_address=True), {"vip-local": NOTE}),
        (replace(NEAR, local=True), Config((), (), announce=Announce.ARP), {"vip-local": WARNING}),
        (NEAR, Config((), (), announce=Announce.ARP), {}),
        (replace(NEAR, forwards=True), Config((), ()), {}),
        (replace(NEAR, forwards=True), Config((), (), closed=Closed.PASS), {"vip-loop": WARNING}),
        (replace(NEAR, forwards=True, local=True), Config((), (), closed=Closed.PASS), {"vip-local": NOTE}),
    ],
)
def test_addresses(place, config, expected):
    assert told(vips.addresses(place, config, False)) == expected


@pytest.mark.parametrize(
    ("answers", "told_", "arriving", "expected"),
    [
        ({}, Told.ANNOUNCED, False, {}),
        ({}, Told.PLANNED, False, {}),
        ({}, Told.NOT, True, {}),
        ({}, Told.UNKNOWN, True, {}),
        ({}, Told.NOT, False, {"vip-unanswered": WARNING}),
        ({}, Told.UNKNOWN, False, {"vip-unanswered": NOTE}),
        # Whatever came in before: nobody is there to answer.
        ({}, Told.WITHDRAWN, True, {"vip-unanswered": WARNING}),
        ({}, Told.NOBODY, True, {"vip-unanswered": WARNING}),
        ({}, Told.STOPPED, True, {"vip-unanswered": WARNING}),
        ({MAC: "eth0"}, Told.ANNOUNCED, True, {"vip-at-backend": FAULT}),
        ({ELSE: "eth0"}, Told.NOT, False, {"vip-elsewhere": WARNING}),
        ({ELSE: "eth0"}, Told.NOBODY, False, {"vip-elsewhere": WARNING}),
        ({ELSE: "eth0", MAC: "eth0"}, Told.NOT, False, {"vip-elsewhere": WARNING, "vip-at-backend": FAULT}),
    ],
)
def test_whose_a_vip_is(answers, told_, arriving, expected):
    assert told(vips.whose(NEAR, answers, told_, arriving, {MAC: [SERVER]})) == expected


ARP = Config((), (), announce=Announce.ARP)
RUNS = plan.Subject(("eth0",), ARP, processes=(1,), asked=True)


@pytest.mark.parametrize(
    ("subject", "announced", "expected"),
    [
        (plan.Subject(), [], Told.NOT),
        (plan.Subject(config=Config((), ())), [], Told.NOT),
        (plan.Subject(config=ARP), [], Told.PLANNED),
        (plan.Subject(config=ARP, left=True), [], Told.NOBODY),
        (plan.Subject(left=True), [], Told.NOBODY),
        (plan.Subject(config=Config((), ()), left=True), [], Told.NOT),
        (RUNS, [True], Told.ANNOUNCED),
        (RUNS, [False], Told.WITHDRAWN),
        (RUNS, [False, True], Told.ANNOUNCED),  # two services have the address
        (RUNS, [], Told.UNKNOWN),  # it does not answer
        (replace(RUNS, config=Config((), ())), [True], Told.NOT),
        (replace(RUNS, config=None), [True], Told.UNKNOWN),
        (replace(RUNS, asked=False), [], Told.STOPPED),
    ],
)
def test_whether_a_vip_is_announced(subject, announced, expected):
    services = [
        msgspec.structs.replace(SERVICE, vip=f"tcp://10.0.0.100:{80 + i}", announced=one)
        for i, one in enumerate(announced)
    ]
    elsewhere = msgspec.structs.replace(SERVICE, vip="tcp://10.0.0.101:80", announced=False)
    assert subject.told(VIP, [*services, elsewhere] if services else []) is expected


def test_a_vip_behind_routers_is_not_expected_to_be_answered_for():
    assert not list(vips.whose(replace(NEAR, segment=""), {}, Told.NOT, False, {}))


def test_very_many_vips():
    assert told(vips.many(257)) == {"vips-many": NOTE}
    assert told(vips.many(256)) == {}


def test_a_vip_behind_routers_that_is_reached():
    assert not list(vips.addresses(replace(NEAR, segment=""), None, True))


def test_who_listens():
    web, any4, any6 = Vip(VIP, 80), ip_address("0.0.0.0"), ip_address("::")
    assert vips._takes(Listener(VIP, 80), web, False)
    assert not vips._takes(Listener(VIP, 81), web, False)
    assert not vips._takes(Listener(any4, 80), web, False)
    assert vips._takes(Listener(any4, 80), web, True)
    assert vips._takes(Listener(any6, 80, both=True), web, True)
    assert not vips._takes(Listener(any6, 80), web, True)
    assert told(vips.listening([Listener(VIP, 80)])) == {"vip-listener": WARNING}


# ---- backends ----

UP = NextHop(HopState.RESOLVED, "", 2, None, b"\2\0\0\0\0\x0b", b"\2\0\0\0\0\2", None, 1500, redirect=True)
GATEWAY = ip_address("10.0.0.254")
SILENT = NextHop(HopState.UNRESOLVED, "10.0.0.11 does not answer on eth0", 2)


@pytest.mark.parametrize(
    ("hop", "asked", "expected"),
    [
        (UP, None, {}),
        (SILENT, {MAC}, {}),
        (SILENT, set(), {"backend-silent": FAULT}),
        (SILENT, None, {"backend-silent": FAULT}),
        (replace(SILENT, asking=True), set(), {"backend-silent": FAULT}),
        (replace(SILENT, asking=True), None, {"backend-unasked": NOTE}),
        (NextHop(HopState.NO_ROUTE), None, {"backend-route": FAULT}),
        (NextHop(HopState.NOT_ETHERNET, "wg0 is no Ethernet"), None, {"backend-not-ethernet": FAULT}),
        (NextHop(HopState.NOT_A_HOST, "an address of this machine"), None, {"backend-own": FAULT}),
    ],
)
def test_ways(hop, asked, expected):
    assert told(backends.judge(backends.Way(SERVER, hop, "eth0", asked))) == expected


def test_a_gateway_is_named():
    (silent,) = backends.judge(backends.Way(SERVER, replace(SILENT, gateway=GATEWAY), "eth0", set()))
    assert silent.what.startswith("gateway 10.0.0.254 of backend 10.0.0.11")
    assert silent.remedy.endswith("arping -I eth0 10.0.0.254")


def configured(address=VIP, backend=SERVER, **more) -> Config:
    return Config(("eth0",), (Service(Vip(address, 80), (Backend(backend),), **more),))


def test_how_a_configuration_fits():
    far = replace(UP, gateway=GATEWAY)
    assert told(backends.fits(configured(), {SERVER: UP}, [CARD])) == {}
    l2 = configured(fallback=Fallback.DSR_L2)
    assert told(backends.fits(l2, {SERVER: UP}, [CARD])) == {}
    assert told(backends.fits(l2, {SERVER: far}, [CARD])) == {"backend-behind-gateway": FAULT}
    six = configured(ip_address("fd00::100"))
    found = told(backends.fits(six, {SERVER: replace(far, mtu=1280)}, [CARD]))
    assert found == {"tunnel-narrow": WARNING, "tunnel-mtu": NOTE}
    assert told(backends.fits(six, {SERVER: far}, [CARD])) == {"tunnel-mtu": NOTE}
    assert told(backends.fits(six, {SERVER: replace(far, mtu=1520)}, [CARD])) == {}
    idle = Config(("eth0",), (Service(Vip(VIP, 80), (Backend(SERVER, state=State.DRAIN),)),))
    assert told(backends.fits(idle, {SERVER: UP}, [CARD])) == {"service-idle": WARNING}


def test_fallback_flows_through_user_space():
    deaf = replace(UP, redirect=False, ifindex=1)  # lo, whose name is known
    cards = [replace(VETH, info=replace(VETH.info, index=1))]
    assert told(backends.fits(configured(), {SERVER: deaf}, cards)) == {"bypass": NOTE}
    assert (
        told(backends.fits(configured(), {SERVER: deaf}, [replace(CARD, info=replace(ETH0, index=1))])) == {}
    )  # XDP_TX
    assert told(backends.fits(configured(), {SERVER: deaf}, [replace(cards[0], mode="generic")])) == {}
    for bypass in (Bypass.ON, Bypass.OFF):
        assert told(backends.fits(replace(configured(), ack_bypass=bypass), {SERVER: deaf}, cards)) == {}


def test_very_many_backends():
    addresses = [ip_address(0x0A000000 + i) for i in range(3000)]
    assert backends.some(addresses) == set(addresses[: backends.MOST])
    assert told(backends.many(3000)) == {"backends-many": NOTE}
    assert told(backends.many(2000)) == {}


def test_what_goes_far():
    assert backends.far(None, {}, 2) is None
    assert backends.far(configured(), {SERVER: UP}, 2) is False
    assert backends.far(configured(), {SERVER: UP}, 3) is True
    assert backends.far(configured(), {SERVER: replace(UP, gateway=GATEWAY)}, 2) is True
    assert backends.far(configured(fallback=Fallback.DSR_IPIP), {SERVER: UP}, 2) is True
    assert backends.far(configured(), {}, 2) is False


def test_who_is_on_the_segment():
    asked = backends.Way(SERVER, SILENT, "eth0", {MAC})
    known = backends.Way(ip_address("fd00::11"), UP, "eth0")
    far = backends.Way(ip_address("10.3.0.11"), replace(UP, gateway=GATEWAY), "eth0")
    assert backends.macs([asked, known, far]) == {MAC: [SERVER, ip_address("fd00::11")]}
    hops = backends.answering([asked, known, backends.Way(GATEWAY, SILENT, "eth0", set())])
    assert [hop.state.value for hop in hops.values()] == ["resolved", "resolved", "unresolved"]


def test_tables():
    assert told(backends.tables({SERVER: 254})) == {}
    assert told(backends.tables({SERVER: 100})) == {"backend-table": NOTE}


# ---- filters ----

RULES = [
    {"metainfo": {"version": "1.0.6"}},
    {"table": {"family": "ip", "name": "nat"}},
    {"chain": {"family": "netdev", "table": "edge", "name": "in", "hook": "ingress", "dev": "p0"}},
    {"rule": {"family": "ip", "table": "nat", "chain": "prerouting", "expr": [
        {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "10.0.0.100"}},
        {"dnat": {"addr": "10.0.0.11"}}]}},
    {"rule": {"family": "ip", "table": "filter", "chain": "input", "expr": [
        {"match": {"right": {"prefix": {"addr": "10.0.0.0", "len": 24}}}}, {"drop": None}]}},
    {"rule": {"family": "ip", "table": "filter", "chain": "all", "expr": [
        {"match": {"right": {"prefix": {"addr": "0.0.0.0", "len": 0}}}}, {"drop": None}]}},
    {"set": {"family": "ip6", "table": "t", "name": "vips", "elem": [{"range": ["fd00::1", "fd00::200"]}]}},
    {"rule": {"family": "netdev", "table": "edge", "chain": "in", "expr": [{"match": {"right": "10.0.0.100"}}]}},
]  # fmt: skip
VIP6 = ip_address("fd00::100")


def test_rules_of_nftables():
    found = list(filters.nft_rules(RULES, {VIP, VIP6}))
    assert found == [
        filters.Rule("ip nat prerouting", VIP),
        filters.Rule("ip filter input", VIP),
        filters.Rule("ip6 t vips", VIP6),
        filters.Rule("netdev edge in", VIP, "p0"),
    ]
    assert told(filters.netfilter(found)) == {"netfilter": NOTE, "netfilter-device": WARNING}
    assert not list(filters.nft_rules(RULES, {ip_address("192.0.2.1")}))


@pytest.mark.parametrize("entries", [[{}], [None], ["x"], [{"rule": {}}], [{"rule": {"expr": [{"prefix": None}]}}],
                                     [{"rule": {"expr": {"prefix": {"addr": "x", "len": 33}}}}],
                                     [{"set": {"elem": {"range": ["x"]}}}]])  # fmt: skip
def test_rules_that_nobody_understands(entries):
    assert not list(filters.nft_rules(entries, {VIP}))


def test_rules_of_iptables():
    text = (
        "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 10.0.0.100/32 -p tcp -j DNAT\n-A OUTPUT -d 10.0.0.1\nCOMMIT\n"
    )
    assert list(filters.legacy_rules(text, "ip", {VIP})) == [filters.Rule("ip nat PREROUTING", VIP)]


def test_ipvs():
    text = (
        "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n"
        "TCP  0A000064:0050 wlc \n  -> 0A00000B:0050      Route   1      0          0\n"
        "TCP  [fd00:0000:0000:0000:0000:0000:0000:0100]:01BB wlc \n"
    )
    assert told(filters.ipvs(text, [Vip(VIP, 80)])) == {"ipvs": WARNING}
    assert told(filters.ipvs(text, [Vip(VIP6, 443)])) == {"ipvs": WARNING}
    assert told(filters.ipvs(text, [Vip(VIP, 81), Vip(VIP6, 80)])) == {}
    assert told(filters.ipvs("", [Vip(VIP, 80)])) == {}


def test_the_reverse_path_filter():
    assert told(filters.rp_filter({"eth0": 1}, {"eth1"})) == {"rp-filter": NOTE}
    assert told(filters.rp_filter({"eth0": 1}, {"eth0"})) == {}
    assert told(filters.rp_filter({"eth0": 2}, {"eth1"})) == {}


def test_path_mtus():
    assert told(filters.pmtu(1)) == {"pmtu": WARNING}
    assert told(filters.pmtu(0)) == {}
    assert filters.read_pmtu() in range(4)


# ---- the load balancer ----

PINS = frozenset({*daemon.ESSENTIAL, "program"})
ALIVE = daemon.Daemon("eth0", 4711, "S", 7200, PINS, True, True, served=2, queues=2)
DEAD = replace(ALIVE, pid=None, state="")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (daemon.Daemon("eth0"), {}),
        (ALIVE, {}),
        (replace(ALIVE, state="T"), {"daemon-stopped": FAULT}),
        (replace(ALIVE, attached=False), {"program-detached": FAULT}),
        (replace(ALIVE, there=False, attached=False), {}),  # which is told of the interface
        (replace(ALIVE, served=1), {"queues-unserved": FAULT}),
        (replace(ALIVE, pinned=PINS - {"flows"}), {"pins-missing": WARNING}),
        (DEAD, {"daemon-dead": FAULT}),
        (replace(DEAD, keeper=4712), {"kept": NOTE}),
        (replace(DEAD, locked=False), {"daemon-elsewhere": WARNING}),
        (replace(DEAD, there=False, attached=False), {"daemon-dead": FAULT, "left-interface": WARNING}),
        (replace(ALIVE, offloads="rx-vlan-hw-parse"), {}),
        (replace(DEAD, offloads="rx-vlan-hw-parse"), {"daemon-dead": FAULT}),
        (daemon.Daemon("eth0", offloads="rx-vlan-hw-parse"), {"offloads-left": WARNING}),
    ],
)
def test_load_balancers(found, expected):
    assert told(daemon.judge(found)) == expected


def test_since_when():
    assert [daemon._since(s) for s in (5, 130, 7200, 200_000)] == ["5 s", "2 min", "2 h", "2 d"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (daemon.Log(1, "pipe:[123]", False), {}),
        (daemon.Log(1, "/dev/null", False), {"log-nowhere": NOTE}),
        (daemon.Log(1, "/var/log/crablb", True, 1 << 30), {}),
        (daemon.Log(1, "/var/log/crablb", True, 0), {"log-full": WARNING}),
        (daemon.Log(1, "/var/log/crablb (deleted)", True, 1 << 30), {"log-deleted": WARNING}),
    ],
)
def test_logs(found, expected):
    assert told(daemon.logs(found)) == expected


def test_the_state_file(tmp_path, monkeypatch):
    path = tmp_path / "eth0.state.json"
    monkeypatch.setattr(daemon.state, "place", lambda name: tmp_path / f"{name}.state.json")

    def found() -> dict[str, Severity]:
        return told(daemon.memory(daemon.read_memory("eth0")))

    assert found() == {}
    for text in ("", "{", "[]", "[" * 100_000, '{"version": 99}', "{}"):
        path.write_text(text)
        path.chmod(0o600)
        assert found() == {"state-file": WARNING}, text
    path.write_text('{"version": 1, "changes": {}}')
    assert found() == {}
    path.chmod(0o622)
    assert found() == {"state-file": WARNING}
    path.unlink()
    path.symlink_to("/dev/zero")
    assert found() == {"state-file": WARNING}
    path.unlink()
    (tmp_path / "eth0.state.json.corrupt").touch()
    assert found() == {"state-aside": NOTE}


def test_what_lies_about():
    assert told(daemon.strays([])) == {}
    found = [daemon.Stray("lock", "lb-eth0"), daemon.Stray("socket", "/run/crablb/eth0.sock")]
    assert told(daemon.strays(found)) == {"lock-stale": NOTE, "socket-stale": NOTE}


def counts(**more: int) -> dict[str, dict[str, int]]:
    found = {"xdp": {"syn": 1}, "total": {}, "daemon": {}}
    for name, value in more.items():
        place = next(place for place, meanings in daemon.MEANINGS.items() if name in meanings)
        found[place][name] = value
    return found


@pytest.mark.parametrize("name", ["drop_no_socket", "drop_no_backend", "tasks_failed"])
def test_counters(name):
    assert told(daemon.counters((counts(), counts()))) == {}
    assert told(daemon.counters((counts(**{name: 5}), counts(**{name: 5})))) == {"counter": NOTE}
    assert told(daemon.counters((counts(**{name: 5}), counts(**{name: 7})))) == {"counter-rises": WARNING}
    assert told(daemon.counters((counts(), counts(retransmitted_syn=7)))) == {"counter": NOTE}
    assert told(daemon.counters(None)) == {}
    assert told(daemon.counters((counts(), {"xdp": {}, "total": {}, "daemon": {}}))) == {"no-traffic": NOTE}


def test_no_remedy_refers_to_what_may_not_be_shown():
    """Services, VIPs and backends come behind the counters, and of a dead load balancer none may come at all."""
    meanings = [meaning for found in daemon.MEANINGS.values() for meaning in found.values()]
    assert not [meaning for meaning in meanings if re.search("above|below", meaning.what + meaning.remedy)]


def test_counters_are_those_that_there_are():
    from crablb.dataplane.statistics import DAEMON_COUNTERS, WORKER_COUNTERS, XDP_COUNTERS

    known = {"xdp": XDP_COUNTERS, "total": WORKER_COUNTERS, "daemon": DAEMON_COUNTERS}
    for place, meanings in daemon.MEANINGS.items():
        assert set(meanings) <= set(known[place])
    # Every drop is there, but for packets that are nobody's.
    drops = {name for name in WORKER_COUNTERS if name.startswith("drop_")}
    assert drops - set(daemon.MEANINGS["total"]) == {
        "drop_not_service", "drop_malformed", "drop_flags", "drop_mapped", "drop_closed",
    }  # fmt: skip


# ---- what it says of itself ----

STATUS = types.Status(
    state="serving", problems=[], version=types.Version(version="1", api=1, pid=1, started=0.0), interfaces=[],
    queues=1, zero_copy=False, ack_bypass=True, services=1, backends=1, backends_serving=1, flows=0,
    configuration="/etc/lb.toml", changes=0, counters={},
)  # fmt: skip
SERVICE = types.Service(
    vip="tcp://10.0.0.100:80", mode="negotiated", fallback="auto", policy="maglev", backends=2, serving=2,
    healthy_weight=2, weight=2, panic=False, backups=False, quorum=0, announced=True, flows=0, packets=0, bytes=0,
    changed=False,
)  # fmt: skip
CHECK = types.CheckResult(
    type="tcp", healthy=True, ok=True, reason="", at=0.0, seconds=0.0, streak=9, since=0.0, history="+"
)
BACKEND = types.Backend(
    service=SERVICE.vip, address="10.0.0.11", state="up", serving=True, reason="", healthy=True, weight=1, weight_now=1,
    backup=False, cr=True, cr_reason="", reached="eth0", connections=None, load=None, assigned=0, flows=0, share=0.5,
    checks=[CHECK], since=0.0, changed=False,
)  # fmt: skip
REFUSED = msgspec.structs.replace(CHECK, ok=False, healthy=False, reason="refused")


def says(status: object = None, service: object = None, backend: object = None) -> served.Answers:
    def changed(value, more):
        return msgspec.structs.replace(value, **more or {})

    return served.Answers(changed(STATUS, status), (changed(SERVICE, service),), (changed(BACKEND, backend),))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (says(), {}),
        (says(status={"changes": 2}), {"changes": NOTE}),
        (says(status={"checks_trouble": ["9 checks wait"]}), {"checks-late": WARNING}),
        (replace(says(), installed="2"), {"version": NOTE}),
        (replace(says(), installed="1"), {}),
        (says(service={"serving": 1}), {}),
        (says(service={"serving": 0}), {"service-down": FAULT}),
        (says(service={"panic": True}), {"panic": WARNING}),
        (says(service={"quorum": 2, "announced": False}), {"quorum-lost": FAULT}),
        (says(backend={"healthy": False, "checks": [REFUSED]}), {"backend-unhealthy": WARNING}),
        (says(backend={"checks": [REFUSED]}), {"check-failed": NOTE}),
        (says(backend={"healthy": None, "checks": []}), {}),
        (says(backend={"cr": False, "cr_reason": "redirect: no echo"}), {"backend-fallback": WARNING}),
        (says(backend={"cr": False, "cr_reason": "cr is false"}), {}),
        (served.Answers(), {"api-none": NOTE}),
        (served.Answers(refused="no answer within 3 s", silent=True), {"api-silent": WARNING}),
    ],
)
def test_what_it_says(found, expected):
    assert told(served.judge(found)) == expected


def test_an_unhealthy_backend_is_told_with_its_answer():
    found = says(backend={"healthy": False, "checks": [REFUSED]}, service={"serving": 0})
    whole, backend = (one for one in served.judge(found) if one.severity is not Severity.OK)
    assert whole.what == "tcp://10.0.0.100:80: no backend serves"
    assert backend.what == "tcp://10.0.0.100:80, backend 10.0.0.11 is unhealthy: tcp: refused"


SICK = {"healthy": False, "checks": [REFUSED], "serving": False, "reason": "tcp: refused"}


@pytest.mark.parametrize(
    ("backend", "panic", "severity", "follows"),
    [
        ({}, False, WARNING, "it gets no new connections"),
        ({"serving": True}, True, WARNING, "it gets new connections all the same, as health is disregarded (panic)"),
        ({"backup": True}, False, WARNING, "it gets no new connections, and would stand in for no other backend"),
        ({"backup": True}, True, WARNING, "it gets no new connections, and would stand in for no other backend"),
        ({"state": "drain"}, False, NOTE, "it gets no new connections anyway, as its state is drain"),
        ({"state": "drain"}, True, NOTE, "it gets no new connections anyway, as its state is drain"),
        ({"weight": 0}, True, NOTE, "it gets no new connections anyway, as its weight is 0"),
    ],
)
def test_what_comes_of_an_unhealthy_backend(backend, panic, severity, follows):
    """As it is served: health may be disregarded, and it may get nothing anyway."""
    found = served.judge(says(backend=SICK | backend, service={"panic": panic}))
    (one,) = (one for one in found if one.id == "backend-unhealthy")
    assert one.severity is severity
    assert one.why == follows


def test_a_configuration_that_is_told():
    """What this process cannot read, as it is nobody's here, is not looked at."""
    vip = {"address": "tcp://10.0.0.100:80", "policy": "nowhere:choose", "backends": ["10.0.0.11*3"], "panic": 20}
    settings = {"interface": "eth0", "announce": "arp", "report_listen": "10.0.0.2:7171", "service": [vip], "newer": 1}
    config = served.parse(settings)
    assert config.announce is Announce.ARP
    assert config.services == (Service(Vip(VIP, 80), (Backend(SERVER, 3),)),)
    with pytest.raises(ConfigError):
        served.parse({"service": [vip]})


def test_agents():
    assert told(plan._agents({"server": []})) == {}
    assert told(plan._agents({"server": ["its pins are gone"]})) == {"agent": WARNING}


def test_mptcp():
    limited = multipath.Mptcp("the limits", ())
    assert told(multipath.judge(limited, client=True)) == {"mptcp-client": NOTE}
    assert told(multipath.judge(limited, client=False)) == {}
    left = multipath.Mptcp("", ("10.0.0.11", "fd00::11"))
    (found,) = multipath.judge(left, client=True)
    assert (found.id, found.severity) == ("mptcp-left", NOTE)
    assert "10.0.0.11, fd00::11" in found.what


# ---- together ----


def test_what_cannot_be_read_is_a_note():
    """Whatever is raised, and wherever."""

    def raise_(error: Exception):
        def read() -> None:
            raise error

        return read

    def judge(_: object):
        yield ok("kernel", "it")
        raise KeyError("x")

    looks = [
        Look("a", "one", raise_(FileNotFoundError(2, "No such file or directory", "/sys/x")), lambda _: []),
        Look("a", "two", raise_(RuntimeError()), lambda _: []),
        Look("b", "three", lambda: 1, judge),
        Look("b", "four", lambda: 1, lambda _: [ok("kernel", "well")]),
    ]
    found = examine(looks)
    assert [(one.where, one.id) for one in found] == [("a", "unread")] * 2 + [("b", "unread"), ("b", "kernel")]
    assert found[0].what == "cannot look at one: /sys/x: No such file or directory"
    assert found[1].what == "cannot look at two: RuntimeError"


def test_what_hangs_keeps_nobody():
    release = threading.Event()
    begun = time.monotonic()
    found = examine([Look("a", "it", release.wait, lambda _: []), Look("a", "b", tuple, lambda _: [ok("b", "b")])], 0.1)
    release.set()
    assert time.monotonic() - begun < 5
    assert [(one.id, one.what) for one in found] == [
        ("unread", "cannot look at it: it takes more than 0.1 s"),
        ("b", "b"),
    ]


def test_of_very_many_a_few():
    many = [fault("backend-silent", str(i), "", "") for i in range(1000)]
    found = list(few([*many, note("x", "one")]))
    assert len(found) == MOST + 2
    assert found[-1] == Finding("backend-silent", FAULT, "and 980 more like these")


FOUND = [
    replace(ok("kernel", "Linux 6.8"), where="machine"),
    replace(warning("jit", "BPF programs are interpreted", "each packet " + "costs " * 30, "sysctl"), where="machine"),
    replace(fault("xdp-other", "another program: \x1b[31mx\nb", "", "ip link"), where="eth0\x07"),
]


def test_how_it_is_shown():
    lines = list(shown.lines(FOUND, colour=False, width=80))
    assert lines[:3] == ["machine", "  ok       Linux 6.8", "  warning  BPF programs are interpreted [jit]"]
    assert "           > sysctl" in lines
    assert "eth0?" in lines
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    assert shown.summary(FOUND) == "1 fault, 1 warning"
    assert shown.summary(FOUND[:1]) == "nothing found"
    coloured = list(shown.lines(FOUND, colour=True, width=80))
    assert coloured[1] == "  \033[32mok      \033[0m Linux 6.8"
    assert max(len(line) for line in shown.lines(FOUND, colour=False, width=10)) < 40
    json.dumps([one.plain() for one in FOUND])


@pytest.mark.parametrize("module", ["crablb._native", "crablb.kernel._libbpf"])
def test_what_is_compiled_does_not_load(module):
    """As without libbpf: it is told, and by no traceback."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; from crablb.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["id"], finding["severity"]) == ("libraries", "fault")


def test_every_finding_is_explained():
    """In docs/doctor.md; and nothing is that there is not."""
    made: set[str] = set()
    for path in (*(ROOT / "crablb/doctor").glob("*.py"), ROOT / "crablb/cli/doctor.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if node.func.id in ("note", "warning", "fault", "tell") and isinstance(first, ast.Constant):
                    made.add(first.value)
    assert len(made) > 50
    explained = re.findall(
        r"`([a-z-]+)`(?=[^|]*\|[ a-z,]*(?:note|warning|fault))", (ROOT / "docs/doctor.md").read_text(), re.M
    )
    assert len(explained) == len(set(explained))
    assert set(explained) == made | {"run-folder", "state-folder"}
