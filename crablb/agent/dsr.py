"""A server's side of direct server return: the VIP on the loopback, and packets for it taken out of tunnels.

See bpf/dsr.bpf.c.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from crablb._native import lib
from crablb.agent.base import FILTER, detach_filters, has_clsact, tool
from crablb.errors import KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.counters import counter_names
from crablb.model import Address, Network, Vip, lpm_key, mapped

#: A VIP on the loopback is for receiving only: no answer to ARP for it, and not the sender of ARP requests (the IPv6
#: stack never answers for an address of another interface).  Documentation/networking/ip-sysctl.rst.
SILENT = {"net/ipv4/conf/all/arp_ignore": 1, "net/ipv4/conf/all/arp_announce": 2}
MAPS = ("dsr_vips", "dsr_tunnels", "dsr_macs", "dsr_sources", "dsr_counters")
BEFORE = ("dsr_mss",)  # maps that versions of before had
#: Kinds of links whose frames come in by others, their ports: a program is there before GRO, and in the driver.
MASTERS = {"bridge", "bond", "team", "vrf"}
#: Where tunnels come from, if nobody says.
EVERYWHERE: Sequence[Network] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
#: The programs on each interface, and what they are for.
PARTS = {"crab_clamp": "lowers the MSS", "crab_decap": "decapsulates"}


def _links() -> dict[str, dict[str, Any]]:
    """Every interface that there is."""
    return {link["ifname"]: link for link in json.loads(tool("ip", "-j", "-d", "link", "show"))}


def _is_master(link: Mapping[str, Any]) -> bool:
    return link.get("linkinfo", {}).get("info_kind") in MASTERS


def _ports(links: Mapping[str, dict[str, Any]], name: str) -> list[str]:
    """The interfaces that an interface's frames come in by: itself, or the ports of a bridge or bond."""
    if name not in links or not _is_master(links[name]):
        return [name]
    ports = [port for port, link in links.items() if link.get("master") == name]
    return [each for port in ports for each in _ports(links, port)]


def _below(link: Mapping[str, Any]) -> set[str]:
    """What a link is said to lie on; a tunnel's data has it."""
    return {str(said["link"]) for said in (link, link.get("linkinfo", {}).get("info_data", {})) if "link" in said}


def _height(links: Mapping[str, dict[str, Any]], name: str, above: frozenset[str] = frozenset()) -> int:
    """How many interfaces lie under one.  The kernel takes no XDP program below another, but the other way round."""
    above |= {name}  # a veth is said to lie on its peer
    below = _below(links[name]) | {port for port, link in links.items() if link.get("master") == name}
    return max((1 + _height(links, each, above) for each in below & links.keys() - above), default=0)


def _under(links: Mapping[str, dict[str, Any]], name: str, above: frozenset[str] = frozenset()) -> set[str]:
    """All interfaces under one, as in :func:`_height`."""
    above |= {name}
    ports = {port for port, link in links.items() if link.get("master") == name}
    below = (_below(links[name]) | ports) & links.keys() - above
    return below.union(*(_under(links, each, above) for each in below))


def _macs(links: Mapping[str, dict[str, Any]], name: str) -> bytes:
    """``struct crab_macs``: the MAC addresses that frames to an interface have, its own and its bridge's or bond's."""
    names = [name]
    while (master := links[names[-1]].get("master", "")) in links and master not in names:
        names.append(master)
    macs = [bytes.fromhex(links[each]["address"].replace(":", "")) + bytes(2) for each in names]
    return b"".join((macs + macs[:1] * lib.CRAB_MAX_MACS)[: lib.CRAB_MAX_MACS])


def _interfaces(wanted: Sequence[str]) -> list[str]:
    """Where tunnels come in at the interfaces named, by default at every Ethernet interface that is up."""
    links = _links()
    for name in wanted:
        if name not in links:
            raise KernelError(f"interface {name} does not exist; there are: {', '.join(links)}")
        if not _ports(links, name):
            kind = links[name]["linkinfo"]["info_kind"]
            raise KernelError(f"interface {name} is a {kind} without ports, by which nothing comes in; give it one")
    names = wanted or [
        n
        for n, link in links.items()
        if link["link_type"] == "ether" and "UP" in link["flags"] and not _is_master(link)
    ]
    if not names:
        raise KernelError("no Ethernet interface is up; bring one up, or name it: --interface eth0")
    return list(dict.fromkeys(port for name in names for port in _ports(links, name)))


def _present() -> set[str]:
    """The addresses of this network namespace."""
    links = json.loads(tool("ip", "-j", "addr", "show"))
    return {info["local"] for link in links for info in link["addr_info"] if "local" in info}


def _prefix(address: Address) -> str:
    return f"{address}/{address.max_prefixlen}"


def _take(addresses: Iterable[Address], state: dict[str, Any], note: Callable[[dict[str, Any]], None]) -> None:
    """Have these addresses on the loopback, if they are not here."""
    present = _present()
    for address in addresses:
        if str(address) not in present:
            if _prefix(address) not in state["addresses"]:
                state["addresses"].append(_prefix(address))
                note(state)
            tool("ip", "addr", "add", _prefix(address), "dev", "lo", *(["nodad"] if address.version == 6 else []))


def _give(prefix: str) -> None:
    """Have an address on the loopback no more; somebody else may have taken it away."""
    with suppress(KernelError):
        tool("ip", "addr", "del", prefix, "dev", "lo")


def add(
    addresses: Iterable[Address], state: dict[str, Any], folder: Path, note: Callable[[dict[str, Any]], None]
) -> None:
    """Serve more addresses; ``state`` is what was noted before."""
    addresses = list(addresses)
    with bpf.Map.from_pin(folder / "dsr_vips") as served:
        _take(addresses, state, note)
        for address in addresses:
            served.update(mapped(address), 1)


def remove(
    addresses: Iterable[Address], state: dict[str, Any], folder: Path, note: Callable[[dict[str, Any]], None]
) -> None:
    """Serve these addresses no more."""
    with bpf.Map.from_pin(folder / "dsr_vips") as served:
        for address in addresses:
            served.delete(mapped(address))
            if _prefix(address) in state["addresses"]:
                _give(_prefix(address))
                state["addresses"].remove(_prefix(address))
                note(state)


def set_up(
    vips: Sequence[Vip],
    wanted: Sequence[str],
    sources: Sequence[Network],
    folder: Path,
    note: Callable[[dict[str, Any]], None],
    before: Mapping[str, Any] | None = None,
) -> None:
    """Prepare this network namespace.  ``note(state)`` is told, before each step, what :func:`tear_down` must undo.

    ``sources``: where tunnels may come from; none: anywhere.  ``before``: what an agent that was there noted.
    Connections live by it, so nothing of it goes before what is to be in its place is there.
    """
    before = before or {}
    addresses = list(dict.fromkeys(vip.address for vip in vips))
    interfaces = _interfaces(wanted)
    made = before.get("interfaces", {})
    state: dict[str, Any] = {
        "addresses": list(before.get("addresses", ())),
        "sysctls": {name: _sysctl(name).read_text().strip() for name in SILENT} | before.get("sysctls", {}),
        "interfaces": made | {name: made.get(name, False) for name in interfaces},
        "named": list(wanted),
        "sources": [str(prefix) for prefix in sources],
    }
    with bpf.Object(bpf.object_path("dsr")) as program:
        for address in addresses:
            program.map("dsr_vips").update(mapped(address), 1)
        for prefix in sources or EVERYWHERE:
            program.map("dsr_sources").update(lpm_key(prefix), prefix.version)
        for index, macs in _all_macs(interfaces).items():
            program.map("dsr_macs").update(index, macs)
        with suppress(bpf.BpfNotFoundError), bpf.Map.from_pin(folder / "dsr_tunnels") as tunnels:
            for key, value in tunnels.items():
                program.map("dsr_tunnels").update(key, value)
        for name in MAPS:
            pins.put(program.map(name), folder / name)
        for name in BEFORE:
            (folder / name).unlink(missing_ok=True)
        note(state)
        for name in interfaces:
            _exchange(program, folder, name)
    for name in made.keys() - set(interfaces):
        _detach(folder, name, made[name])
        del state["interfaces"][name]
    links, new = _links(), {name for name in interfaces if not _attached(folder, name, "crab_decap")}
    for name in interfaces:
        if new & _under(links, name):  # where it would be in the way; it comes back behind those
            _detach_xdp(folder, name)
    sync(addresses, state, folder, note, mend=True)
    for prefix in set(state["addresses"]) - {_prefix(address) for address in addresses}:
        _give(prefix)
        state["addresses"].remove(prefix)
    note(state)


def _all_macs(names: Iterable[str]) -> dict[int, bytes]:
    """By the interfaces' numbers, what program ``crab_decap`` is told of each."""
    links = _links()
    return {socket.if_nametoindex(name): _macs(links, name) for name in names if name in links}


def _exchange(program: bpf.Object, folder: Path, interface: str) -> None:
    """Have these programs in place of those of an agent before, where they are attached."""
    index = socket.if_nametoindex(interface)
    if _attached(folder, interface, "crab_clamp"):
        bpf.attach_tc(program.program("crab_clamp"), index, "egress", priority=FILTER, handle=FILTER)
    if _attached(folder, interface, "crab_decap"):
        with bpf.Link.from_pin(folder / _pin(interface)) as link:
            link.update(program.program("crab_decap"))


def _detach(folder: Path, interface: str, made: bool) -> None:
    """Have no programs there any more."""
    detach_filters({interface: made}, "egress")
    _detach_xdp(folder, interface)


def _detach_xdp(folder: Path, interface: str) -> None:
    with suppress(bpf.BpfNotFoundError), bpf.Link.from_pin(folder / _pin(interface)) as link:
        link.detach()
    (folder / _pin(interface)).unlink(missing_ok=True)


def sync(
    addresses: Iterable[Address],
    state: dict[str, Any],
    folder: Path,
    note: Callable[[dict[str, Any]], None],
    *,
    mend: bool,
) -> list[str]:
    """What is not as it is to be; ``mend``: make it so, as far as that can be.

    Raises :class:`KernelError` if some of it cannot be.
    """
    found = []
    for name, value in SILENT.items():
        now = int(_sysctl(name).read_text())
        if now < value:
            found.append(f"{name.replace('/', '.')} is {now}, not {value}: ARP tells of VIPs")
            if mend:
                _sysctl(name).write_text(str(value))
    present = _present()
    if lost := [address for address in addresses if str(address) not in present]:
        found += [f"{address} is no address of this host, and packets to it are dropped" for address in lost]
        if mend:
            _take(lost, state, note)
    links = _links()
    named = state.get("named", ())
    found += [f"interface {name} does not exist" for name in named if name not in links]
    for name in [name for name in state["interfaces"] if name not in links and name not in named]:
        if mend:  # it was one of all that were up, or a port of one that was named
            (folder / _pin(name)).unlink(missing_ok=True)
            del state["interfaces"][name]
            note(state)
    ports = [port for name in named for port in _ports(links, name)]
    there = [name for name in dict.fromkeys([*state["interfaces"], *ports]) if name in links]
    there.sort(key=lambda name: _height(links, name))
    lacking = [(name, part) for name in there for part in PARTS if not _attached(folder, name, part)]
    found += [f"the program that {PARTS[part]} is not attached to {name}" for name, part in lacking]
    macs = {socket.if_nametoindex(name): _macs(links, name) for name in there}
    others = [
        name
        for name in there
        if (name, "crab_decap") not in lacking
        and _told_macs(folder, name) not in (macs[socket.if_nametoindex(name)], None)
    ]
    found += [f"tunnelled packets to the MAC address that {name} has now are let alone" for name in others]
    if mend and (lacking or others):
        if any((folder / name).exists() for name in BEFORE) or not (folder / "dsr_sources").exists():
            raise KernelError(
                "the server agent here is of an older crablb; install it again: crablb agent server --vip ..."
            )
        _mend(lacking, macs, state, folder, note)
    return found


def _mend(
    lacking: Sequence[tuple[str, str]],
    macs: Mapping[int, bytes],
    state: dict[str, Any],
    folder: Path,
    note: Callable[[dict[str, Any]], None],
) -> None:
    """Attach the programs that are lacking, of the maps that are pinned, and tell them whose frames to take, by
    interface."""
    refused = []
    with ExitStack() as stack:
        maps = {}
        for name in MAPS:
            with suppress(bpf.BpfNotFoundError):  # versions of before did not pin all of them
                maps[name] = stack.enter_context(bpf.Map.from_pin(folder / name))
        program = stack.enter_context(bpf.Object(bpf.object_path("dsr"), reuse=maps))
        for index, own in macs.items():
            program.map("dsr_macs").update(index, own)
        pins.put(program.map("dsr_macs"), folder / "dsr_macs")
        for name, part in lacking:
            index = socket.if_nametoindex(name)
            if part == "crab_clamp":
                # Before, as somebody may end us between the two.
                state["interfaces"][name] = state["interfaces"].get(name, False) or not has_clsact(name)
                note(state)
                bpf.attach_tc(program.program(part), index, "egress", priority=FILTER, handle=FILTER)
                continue
            try:
                with program.program(part).attach_xdp(index) as link:
                    pins.put(link, folder / _pin(name))
            except bpf.BpfBusyError as error:
                number = bpf.xdp_program(index)[0]
                why = f"interface {name} has an XDP program already (id {number})" if number else str(error)
                if pins.owner(f"lb-{name}") is not None:
                    refused.append(
                        f"{why}, that of the load balancer, which runs here: a server is another machine, or name other"
                        " interfaces: --interface"
                    )
                    continue
                refused.append(
                    f"{why}, and tunnels are decapsulated by one; remove it, or name other interfaces: --interface"
                )
    if refused:
        raise KernelError("\n".join(refused))


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name


def _pin(interface: str) -> str:
    """The name of the pin of an interface's XDP program."""
    return f"decap-{pins.escape(interface)}"


def _attached(folder: Path, interface: str, part: str) -> bool:
    index = socket.if_nametoindex(interface)
    if part == "crab_clamp":
        return bool(bpf.TcFilter(index, "egress", FILTER, FILTER).attached)
    try:
        with bpf.Link.from_pin(folder / _pin(interface)) as link:
            return link.target == index
    except bpf.BpfNotFoundError:
        return False


def _told_macs(folder: Path, interface: str) -> bytes | None:
    """``struct crab_macs`` as the program has it, empty if there is none; None if an agent of before did not pin it."""
    try:
        with bpf.Map.from_pin(folder / "dsr_macs") as macs:
            return macs.lookup(socket.if_nametoindex(interface)) or b""
    except bpf.BpfNotFoundError:
        return None


def tear_down(state: dict[str, Any], folder: Path) -> None:
    """Undo what :func:`set_up` noted."""
    detach_filters(state.get("interfaces", {}), "egress")
    for pin in folder.glob("decap-*"):
        with bpf.Link.from_pin(pin) as link:
            link.detach()
        pin.unlink()
    for name in (*MAPS, *BEFORE):
        (folder / name).unlink(missing_ok=True)
    for prefix in state.get("addresses", []):
        _give(prefix)
    for name, value in state.get("sysctls", {}).items():
        if _sysctl(name).read_text().strip() != value:  # in a container /proc/sys may not be written
            _sysctl(name).write_text(value)


def counters(folder: Path) -> dict[str, int]:
    names = counter_names("crab_dsr_counter", "CRAB_DSR_")
    with bpf.Map.from_pin(folder / "dsr_counters") as found:
        return {f"dsr_{name}": found.sum_u64(i) for i, name in enumerate(names)}
