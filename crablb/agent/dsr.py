"""A server's side of direct server return: the VIP on the loopback, and packets for it taken out of tunnels.

See bpf/dsr.bpf.c.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from crablb.agent.base import FILTER, detach_filters, tool
from crablb.errors import KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.counters import counter_names
from crablb.model import Address, Vip, mapped

#: A VIP on the loopback is for receiving only: no answer to ARP for it, and not the sender of ARP requests (the IPv6
#: stack never answers for an address of another interface).  Documentation/networking/ip-sysctl.rst.
SILENT = {"net/ipv4/conf/all/arp_ignore": 1, "net/ipv4/conf/all/arp_announce": 2}
OUTER = 40  # bytes of the larger outer header, IPv6's
HEADERS = {4: 40, 6: 60}  # IP and TCP


def _interfaces(wanted: Sequence[str]) -> dict[str, int]:
    """Names and MTUs of the interfaces named, by default of every Ethernet interface that is up."""
    links = {link["ifname"]: link for link in json.loads(tool("ip", "-j", "link", "show"))}
    for name in wanted:
        if name not in links:
            raise KernelError(f"interface {name} does not exist; there are: {', '.join(links)}")
    names = wanted or [n for n, link in links.items() if link["link_type"] == "ether" and "UP" in link["flags"]]
    if not names:
        raise KernelError("no Ethernet interface is up; bring one up, or name it: --interface eth0")
    return {name: int(links[name]["mtu"]) for name in names}


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
            state["addresses"].append(_prefix(address))
            note(state)
            tool("ip", "addr", "add", _prefix(address), "dev", "lo", *(["nodad"] if address.version == 6 else []))


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
                subprocess.run(["ip", "addr", "del", _prefix(address), "dev", "lo"], capture_output=True, check=False)
                state["addresses"].remove(_prefix(address))
                note(state)


def set_up(vips: Sequence[Vip], wanted: Sequence[str], folder: Path, note: Callable[[dict[str, Any]], None]) -> None:
    """Prepare this network namespace.  ``note(state)`` is told, before each step, what :func:`tear_down` must undo."""
    interfaces = _interfaces(wanted)
    state: dict[str, Any] = {"addresses": [], "sysctls": {}, "interfaces": {}}
    for name, value in SILENT.items():
        path = Path("/proc/sys") / name
        state["sysctls"][name] = path.read_text().strip()
        note(state)
        path.write_text(str(max(value, int(state["sysctls"][name]))))
    _take(dict.fromkeys(v.address for v in vips), state, note)
    with bpf.Object(bpf.object_path("dsr")) as program:
        for address in dict.fromkeys(v.address for v in vips):
            program.map("dsr_vips").update(mapped(address), 1)
        for i, headers in enumerate(HEADERS.values()):
            program.map("dsr_mss").update(i, min(interfaces.values()) - OUTER - headers)
        for name in ("dsr_counters", "dsr_vips"):
            pins.put(program.map(name), folder / name)
        for name in interfaces:
            index = socket.if_nametoindex(name)
            try:
                link = program.program("crab_decap").attach_xdp(index)
            except bpf.BpfBusyError:
                raise KernelError(
                    f"interface {name} has an XDP program already (id {bpf.xdp_program(index)[0]}), and tunnels are"
                    " decapsulated by one; remove it, or name other interfaces: --interface"
                ) from None
            with link:
                pins.put(link, folder / f"decap-{pins.escape(name)}")
            state["interfaces"][name] = False
            note(state)
            _, made = bpf.attach_tc(program.program("crab_clamp"), index, "egress", priority=FILTER, handle=FILTER)
            state["interfaces"][name] = made
            note(state)


def tear_down(state: dict[str, Any], folder: Path) -> None:
    """Undo what :func:`set_up` noted."""
    detach_filters(state.get("interfaces", {}), "egress")
    for pin in folder.glob("decap-*"):
        with bpf.Link.from_pin(pin) as link:
            link.detach()
        pin.unlink()
    (folder / "dsr_counters").unlink(missing_ok=True)
    for host in state.get("addresses", []):
        subprocess.run(["ip", "addr", "del", host, "dev", "lo"], capture_output=True, check=False)
    for name, value in state.get("sysctls", {}).items():
        (Path("/proc/sys") / name).write_text(value)


def counters(folder: Path) -> dict[str, int]:
    names = counter_names("crab_dsr_counter", "CRAB_DSR_")
    with bpf.Map.from_pin(folder / "dsr_counters") as found:
        return {f"dsr_{name}": found.sum_u64(i) for i, name in enumerate(names)}
