"""An interface that is served, or is to be: its driver, queues, offloads, MTU, and other programs on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from crablb._native import lib
from crablb.dataplane.attachment import VLAN_OFFLOADS
from crablb.doctor.finding import Finding, fault, note, ok, warning
from crablb.errors import KernelError
from crablb.kernel import bpf, ethtool, pins, rtnetlink, virtio
from crablb.kernel.ethtool import OFF, Feature
from crablb.kernel.interface import Interface, interface_info, interfaces_above
from crablb.kernel.rtnetlink import LINK, Netlink
from crablb.model import Config, XdpMode

__all__ = ["Port", "judge", "read"]

# NETDEV_XDP_ACT_*, linux/netdev.h
BASIC, REDIRECTS, ZERO_COPY, SEVERAL_BUFFERS = 1, 2, 8, 32
IFF_LOWER_UP = 0x10000
#: Kinds of interface that have no XDP program of their own in their driver, or whose native one is no use.
GENERIC = ("bond", "bridge", "team", "vlan")
PAGE_ROOM = 3818  # bytes of an IP packet that fit into a frame of 4096
#: What makes packets that are too long of several short ones.
JOINING = ("rx-gro", "rx-gro-hw", "rx-lro")


@dataclass(frozen=True, slots=True)
class Programs:
    """What others have put on an interface."""

    xdp: int = 0  # a program's id
    xdp_name: str = ""
    filters: tuple[str, ...] = ()  # kinds of tc filters at ingress, "tcx" among them


@dataclass(frozen=True, slots=True)
class Port:
    """An interface; ``info`` None: there is none of the name, of which ``missing`` tells."""

    name: str
    info: Interface | None
    missing: str = ""
    owner: int | None = None  # process that serves it
    carrier: bool = True
    driver: str = ""
    features: int | None = None  # NETDEV_XDP_ACT_*; None: the kernel does not say
    offloads: Mapping[str, Feature] = field(default_factory=dict)
    mode: str = ""  # of the load balancer's program that is there
    others: Programs = Programs()
    above: Mapping[str, int] = field(default_factory=dict)  # interfaces that lie on it -> XDP programs there
    ports: Mapping[str, Programs] = field(default_factory=dict)  # of a bridge or bond
    joining: tuple[str, ...] = ()  # this and its ports, as far as they join packets (GRO, LRO)
    cpus: int = 1  # that the process may run on
    several_buffers: bool = True  # AF_XDP sockets of this kernel take packets in several

    @property
    def native(self) -> bool | None:
        """Whether the program is, or would be, in the driver; None: who knows."""
        if self.mode:
            return self.mode == "native"
        if self.info and self.info.kind in GENERIC:
            return False
        return None if self.features is None else bool(self.features & BASIC)


# ---- read ----


def _programs(index: int, ours: int = 0) -> Programs:
    xdp, _ = bpf.xdp_program(index)
    with Netlink() as netlink:
        kinds = rtnetlink.filters(netlink, index)
    if bpf.tcx_programs(index):
        kinds.append("tcx")
    if xdp == ours:
        return Programs(filters=tuple(kinds))
    return Programs(xdp, bpf.program_name(xdp), tuple(kinds))


def _ours(name: str) -> int:
    """The id of the program of the load balancer that is or was there; 0: none."""
    folder = pins.folders().get(f"lb-{name}")
    if not folder:
        return 0
    try:
        with bpf.Link.from_pin(folder / "link") as link:
            return link.program_id
    except bpf.BpfError:
        return 0


def read(name: str) -> Port:
    owner = pins.held().get(f"lb-{name}")
    try:
        info = interface_info(name)
    except KernelError as error:
        return Port(name, None, str(error), owner)
    with Netlink() as netlink:
        links = {link.fields(LINK)[2]: link for link in rtnetlink.links(netlink)}
    names = {i: rtnetlink.text(link.attributes(LINK).get(rtnetlink.IFLA_IFNAME)) for i, link in links.items()}
    masters = {i: rtnetlink.number(link.attributes(LINK).get(rtnetlink.IFLA_MASTER)) for i, link in links.items()}
    members = [i for i, master in masters.items() if master == info.index]
    offloads = {each: ethtool.features(names[each]) for each in (info.index, *members)}
    ours = _ours(name)
    attached, mode = bpf.xdp_program(info.index)
    return Port(
        name,
        info,
        owner=owner,
        carrier=info.index in links and bool(links[info.index].fields(LINK)[3] & IFF_LOWER_UP),
        driver=ethtool.driver(name),
        features=rtnetlink.xdp_features().get(info.index),
        offloads=offloads[info.index],
        mode=mode if attached and attached == ours else "",
        others=_programs(info.index, ours),
        above={one: bpf.xdp_program(index)[0] for one, index in interfaces_above(info.index).items()},
        ports={names[i]: _programs(i, _ours(names[i])) for i in members},
        joining=tuple(
            names[i] for i, found in offloads.items() if any(found.get(name, OFF).active for name in JOINING)
        ),
        cpus=len(os.sched_getaffinity(0)),
        several_buffers=bool(lib.crab_xsk_knows_frags()),
    )


# ---- judge ----


def judge(port: Port, config: Config | None, far: bool | None) -> Iterator[Finding]:
    """``far``: fallback packets go by tunnels or out by another interface; None: not known."""
    if not port.info:
        yield from _missing(port)
        return
    wanted = config.xdp_mode if config else XdpMode.AUTO
    if wanted is XdpMode.GENERIC and not port.mode:
        port = replace(port, mode="generic")  # as it will be
    yield from _state(port)
    yield from _others(port)
    yield from _mode(port, wanted)
    yield from _queues(port, config.queues if config else None)
    yield from _mtu(port)
    yield from _offloads(port, far)


def _missing(port: Port) -> Iterator[Finding]:
    if port.owner is not None:
        yield fault(
            "interface-missing",
            f"interface {port.name} is gone",
            f"{pins.told(port.owner)} serves it again when it is back",
            "ip link; bring it back, or load its driver anew",
        )
    else:
        yield fault(
            "interface-missing",
            port.missing,
            "clients' packets come in by it",
            "name another one: --iface IF (ip link)",
        )


def _state(port: Port) -> Iterator[Finding]:
    assert port.info
    if not port.info.up:
        yield fault(
            "interface-down",
            f"{port.name} is down",
            "nothing comes in, and crablb serve does not start",
            f"ip link set {port.name} up",
        )
    elif not port.carrier:
        yield fault(
            "interface-carrier",
            f"{port.name} has no link",
            "nothing comes in, and backends behind it are unusable",
            "look at the cable, or at the other end: it may be down",
        )


def _others(port: Port) -> Iterator[Finding]:
    name = port.name
    if port.others.xdp:
        yield fault(
            "xdp-other",
            f"{name} has another XDP program: {_program(port.others)}",
            "there is room for one; crablb serve is refused",
            f"ip link set {name} xdp off, or if that is refused, as of a link: bpftool link detach",
        )
    for one, program in port.above.items():
        if program:
            yield fault(
                "xdp-above",
                f"{one}, which lies on {name}, has an XDP program (id {program})",
                "the kernel takes none below it",
                f"ip link set {one} xdp off, or start what is below first",
            )
    for one, programs in port.ports.items():
        if programs.xdp:
            yield warning(
                "xdp-port",
                f"{one}, a port of {name}, has an XDP program: {_program(programs)}",
                "it sees packets first, and may keep the VIPs'",
                f"ip link set {one} xdp off, if it is not meant",
            )
        if programs.filters:
            yield warning(
                "tc-port",
                f"{one}, a port of {name}, has tc programs or filters ({', '.join(programs.filters)})",
                "they see packets first, and may keep the VIPs'",
                f"tc filter show dev {one} ingress; bpftool net",
            )
    if port.others.filters:
        yield note(
            "tc",
            f"{name} has tc programs or filters ({', '.join(port.others.filters)})",
            "XDP is in front of them: they do not see the VIPs' packets",
        )


def _program(programs: Programs) -> str:
    return f"{programs.xdp_name} (id {programs.xdp})" if programs.xdp_name else f"id {programs.xdp}"


def _mode(port: Port, wanted: XdpMode) -> Iterator[Finding]:
    assert port.info
    kind, driver = port.info.kind, port.driver or port.info.kind or "its driver"
    if port.native is None:
        yield note(
            "xdp-mode-unknown",
            f"whether {driver} runs XDP programs is not told before Linux 6.3",
            "crablb serve says in its log which mode it got",
        )
    elif port.native:
        is_or_will_be = "is" if port.mode else "will be"
        yield ok("xdp-mode", f"the XDP program {is_or_will_be} in the driver ({driver}): native mode")
        loses = driver == virtio.DRIVER and virtio.takes_no_room()
        if not kind and port.features is not None and (loses or not port.features & ZERO_COPY):
            yield note(
                "copy-mode",
                f"{driver} loses packets in zero-copy mode before Linux 7.3"
                if loses and port.features & ZERO_COPY
                else f"{driver} has no zero-copy mode",
                "frames are copied for AF_XDP: some 1 million packets a second and core, of SYNs and unknown flows",
            )
    elif wanted is XdpMode.NATIVE:
        yield fault(
            "xdp-native",
            f"xdp_mode = 'native', and {driver} has none",
            "crablb serve is refused",
            "leave xdp_mode at auto" + (f", or serve the ports of {port.name}" if kind in GENERIC else ""),
        )
    else:
        why = "a third of the speed of native mode, or less: the kernel makes a packet of each frame first"
        if wanted is XdpMode.GENERIC:
            yield note("xdp-generic", "generic mode, as xdp_mode = 'generic' asks for it", why)
        elif kind == "vlan":
            yield note("xdp-generic", "generic mode, as a VLAN has no other", why)
        elif kind in GENERIC:
            yield note(
                "xdp-generic",
                f"generic mode, as a {kind} has no other",
                why,
                f"serve its ports: {' '.join(f'--iface {one}' for one in port.ports) or '--iface PORT'}",
            )
        elif port.mode and port.features is not None and port.features & BASIC:
            yield note(
                "xdp-generic",
                f"generic mode, though {driver} runs XDP programs",
                why + "; native mode was refused, for the MTU, LRO or the number of queues perhaps",
                "restart crablb serve with xdp_mode = 'native' to read why",
            )
        else:
            yield note("xdp-generic", f"generic mode, as {driver} runs no XDP programs", why)


def _queues(port: Port, wanted: int | None) -> Iterator[Finding]:
    assert port.info
    queues, most = port.info.rx_queues, port.info.max_queues
    threads = min(queues, wanted or queues)
    if threads > port.cpus:
        yield note(
            "queues-cpus",
            f"{queues} queues, {port.cpus} CPUs",
            "workers share CPUs, and wait for each other",
            f"ethtool -L {port.name} combined {port.cpus}",
        )
    elif queues < min(most, port.cpus):
        yield note(
            "queues-few",
            f"{queues} of {most} queues are in use, and there are {port.cpus} CPUs",
            "one queue is one CPU's work",
            f"ethtool -L {port.name} combined {min(most, port.cpus)}",
        )
    if port.driver == virtio.DRIVER and not port.mode and virtio.overruns(queues, most, count := virtio.cpus()):
        yield fault(
            "queues-virtio",
            f"{queues} queues, {count} CPUs: the kernel panics when an XDP program sends by so many of virtio_net",
            "crablb serve is refused",
            f"ethtool -L {port.name} combined {count}",
        )
    if wanted and wanted > queues:
        yield note("queues-wanted", f"queues = {wanted}, and {port.name} has {queues}", "a queue has one worker")
    if queues > lib.CRAB_MAX_QUEUES:
        yield fault(
            "queues-many",
            f"{queues} queues; there is room for {lib.CRAB_MAX_QUEUES}, of all interfaces together",
            "crablb serve is refused",
            f"ethtool -L {port.name} combined {port.cpus}",
        )


def _mtu(port: Port) -> Iterator[Finding]:
    assert port.info
    if port.info.mtu > PAGE_ROOM and not port.several_buffers:
        yield warning(
            "mtu-long",
            f"MTU {port.info.mtu}, and AF_XDP sockets of this kernel take {PAGE_ROOM} bytes",
            "long packets are dropped, unless they are known flows'",
            f"ip link set {port.name} mtu {PAGE_ROOM}, or Linux 6.6",
        )
    elif (
        port.info.mtu > PAGE_ROOM and port.features is not None and port.native and not port.features & SEVERAL_BUFFERS
    ):
        yield note(
            "mtu-generic",
            f"MTU {port.info.mtu}, and {port.driver or 'its driver'} takes no frames of several buffers",
            "the XDP program may have to be in generic mode, or long packets be dropped (xsk_rx_dropped)",
            f"ip link set {port.name} mtu {PAGE_ROOM}",
        )
    if port.info.mtu < 1280:
        yield warning("mtu-small", f"MTU {port.info.mtu}", "IPv6 needs 1280", f"ip link set {port.name} mtu 1500")
    elif port.info.mtu < 1500:
        yield note(
            "mtu-less",
            f"MTU {port.info.mtu}, less than Ethernet's 1500",
            "what clients or routers of its segment send with a greater one may be lost here; what theirs is cannot be"
            " seen from here",
            f"ip link set {port.name} mtu 1500, or the same MTU on all of the segment",
        )


def _offloads(port: Port, far: bool | None) -> Iterator[Finding]:
    assert port.info
    tags = [each for each in VLAN_OFFLOADS if port.offloads.get(each, OFF).active]
    if any(not port.offloads[each].changeable for each in tags):
        yield note(
            "vlan-offload",
            "rx-vlan-offload cannot be switched off",
            "a VIP's packet that comes with a VLAN tag goes out without: into another VLAN",
            f"serve an interface of the VLAN itself: --iface {port.name}.100",
        )
    elif port.info.kind == "veth":
        yield note(
            "vlan-offload",
            "the other end of a veth leaves VLAN tags beside the frames",
            "a VIP's packet that comes with a VLAN tag goes out without: into another VLAN",
            "ethtool -K PEER txvlan off, at the other end",
        )
    if port.offloads.get("rx-lro", OFF).active and port.native:
        yield warning(
            "lro",
            "LRO is on",
            "drivers refuse native XDP beside it, or switch it off; packets that it made long cannot be forwarded",
            f"ethtool -K {port.name} lro off",
        )
    if port.native is False and (port.joining or port.info.kind == "veth"):
        tell = warning if far else note
        why = (
            "generic mode sees segments that are not cut yet: through tunnels, and out by another interface, they are"
            " taken for too long (too_big), and uploads by the fallback crawl"
        )
        if port.joining:
            off = "; ".join(f"ethtool -K {one} gro off lro off" for one in port.joining)
            yield tell("gro-generic", f"GRO or LRO is on ({', '.join(port.joining)})", why, off)
        if port.info.kind == "veth":
            yield note("tso-generic", "a veth's other end may have TSO", why, "ethtool -K PEER tso off gso off")
