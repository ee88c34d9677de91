"""What else on the machine has to do with the VIPs: netfilter's rules, IPVS, sysctls about ways."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crablb.doctor.finding import Finding, note, warning
from crablb.model import Address, Vip

__all__ = [
    "Rule",
    "ipvs",
    "netfilter",
    "pmtu",
    "read_ipvs",
    "read_legacy",
    "read_nft",
    "read_pmtu",
    "read_rp_filter",
    "rp_filter",
]

#: Seconds for a program that lists rules.
SECONDS = 2.0
PROC_NET = Path("/proc/thread-self/net")


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, or a set's element, that names a VIP."""

    where: str  # "ip nat prerouting"
    vip: Address
    device: str = ""  # that a chain of the netdev family sits on: in front of IP


# ---- netfilter ----


def _listed(*command: str) -> str:
    """What a program prints; empty if it is not there.  Raises OSError if it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True, errors="replace")
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} takes more than {SECONDS:g} s") from None
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]}: {str(error.stderr).strip().splitlines()[:1]}") from None
    return done.stdout


def read_nft(vips: Collection[Address]) -> list[Rule]:
    """Rules of nftables, those of iptables-nft among them.  Raises OSError, ValueError."""
    text = _listed("nft", "--json", "list", "ruleset")
    return list(nft_rules(json.loads(text)["nftables"] if text else [], vips))


def nft_rules(entries: Iterable[Any], vips: Collection[Address]) -> Iterator[Rule]:
    """Those of a rule set, as ``nft --json`` lists it, that name a VIP.  Source: libnftables-json(5)."""
    devices: dict[tuple[object, ...], str] = {}
    for entry in entries:
        kind, found = next(iter(entry.items())) if isinstance(entry, dict) and entry else ("", {})
        if kind == "chain" and found.get("hook") in ("ingress", "egress"):
            device = found.get("dev", "")
            names = device if isinstance(device, list) else [device]
            devices[found.get("family"), found.get("table"), found.get("name")] = ", ".join(map(str, names))
        if kind not in ("rule", "set", "map", "element"):
            continue
        place = found.get("chain") or found.get("name") or ""
        device = devices.get((found.get("family"), found.get("table"), place), "") if kind == "rule" else ""
        for vip in sorted(_named(found, vips), key=str):
            yield Rule(f"{found.get('family')} {found.get('table')} {place}", vip, device)


def _named(value: Any, vips: Collection[Address]) -> set[Address]:
    """The VIPs that something names: by themselves, by a prefix of more than eight bits, or by a range."""
    if isinstance(value, str):
        return {vip for vip in vips if str(vip) == value}
    if isinstance(value, list):
        return set().union(*(_named(each, vips) for each in value))
    if not isinstance(value, dict):
        return set()
    prefix, limits = value.get("prefix"), value.get("range")
    with suppress(ValueError, TypeError, AttributeError, KeyError):
        if isinstance(prefix, dict) and int(prefix["len"]) > 8:
            network = ipaddress.ip_network(f"{prefix['addr']}/{prefix['len']}", strict=False)
            return {vip for vip in vips if vip in network}
        if isinstance(limits, list):
            low, high = map(ipaddress.ip_address, limits)
            return {vip for vip in vips if vip.version == low.version and low <= vip <= high}  # type: ignore[operator]
    return set().union(*(_named(each, vips) for each in value.values()))


def read_legacy(vips: Collection[Address]) -> list[Rule]:
    """Rules of iptables before nftables.  Raises OSError."""
    found: list[Rule] = []
    for family, names, program in (("ip", "ip_tables_names", "iptables"), ("ip6", "ip6_tables_names", "ip6tables")):
        with suppress(FileNotFoundError):  # they were never loaded
            if (PROC_NET / names).read_text().strip():
                found += legacy_rules(_listed(f"{program}-legacy-save"), family, vips)
    return found


def legacy_rules(text: str, family: str, vips: Collection[Address]) -> Iterator[Rule]:
    """Those of ``iptables-save`` that name a VIP."""
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith("-A "):
            words = [word.split("/")[0] for word in line.split()]
            yield from (Rule(f"{family} {table} {words[1]}", vip) for vip in vips if str(vip) in words[2:])


def netfilter(rules: Iterable[Rule]) -> Iterator[Finding]:
    for rule in dict.fromkeys(rules):
        if rule.device:
            yield warning(
                "netfilter-device",
                f"netfilter's chain {rule.where} on {rule.device} names {rule.vip}",
                "on a port of a bridge or bond that is served it sees packets first, and may keep the VIP's; on a"
                " served interface itself it sees none of them",
                f"nft list chain {rule.where}",
            )
        else:
            yield note(
                "netfilter",
                f"netfilter's {rule.where} names {rule.vip}",
                "XDP is in front of netfilter: no service's packets pass its rules, be they to filter or to translate",
                f"nft list table {' '.join(rule.where.split()[:2])}",
            )


# ---- IPVS ----


def read_ipvs() -> str:
    try:
        return (PROC_NET / "ip_vs").read_text()
    except FileNotFoundError:  # it was never loaded
        return ""


def ipvs(text: str, vips: Collection[Vip]) -> Iterator[Finding]:
    """``text``: of /proc/net/ip_vs, whose addresses and ports are hexadecimal."""
    for found in re.finditer(r"^TCP +([0-9A-F]{8}|\[[0-9A-Fa-f:]+\]):([0-9A-F]{4}) ", text, re.M):
        digits = found[1]
        address = ipaddress.ip_address(digits[1:-1]) if digits[0] == "[" else ipaddress.IPv4Address(int(digits, 16))
        port = int(found[2], 16)
        if any(vip.address == address and vip.port == port for vip in vips):
            yield warning(
                "ipvs",
                f"IPVS has a service at {address}, port {port}",
                "it gets nothing while crablb serves: XDP is in front of it",
                "ipvsadm -Ln; if keepalived made it, take its virtual_server out of keepalived.conf",
            )


# ---- reverse-path filter ----


def read_rp_filter(interfaces: Collection[str]) -> dict[str, int]:
    """net.ipv4.conf.IF.rp_filter as it counts: the greater of its own and that of all."""

    def value(name: str) -> int:
        return int(Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").read_text())

    everywhere = value("all")
    return {name: max(everywhere, value(name)) for name in interfaces}


def rp_filter(found: dict[str, int], ways: Collection[str]) -> Iterator[Finding]:
    """``ways``: the interfaces that lead to the backends."""
    for name, value in found.items():
        if value == 1 and set(ways) - {name}:
            yield note(
                "rp-filter",
                f"the reverse-path filter of {name} is strict, and backends are behind {', '.join(sorted(ways))}",
                "services do not pass it; health checks' answers and routers' ICMP errors that come in by another way"
                " than the route back are dropped",
                f"sysctl -w net.ipv4.conf.{name}.rp_filter=2",
            )


# ---- path MTU ----


def read_pmtu() -> int:
    """net.ipv4.ip_no_pmtu_disc."""
    return int(Path("/proc/sys/net/ipv4/ip_no_pmtu_disc").read_text())


def pmtu(value: int) -> Iterator[Finding]:
    if value:
        yield warning(
            "pmtu",
            f"the kernel does not learn path MTUs (ip_no_pmtu_disc = {value})",
            "where a router on the way to a backend has a narrower link, long packets through tunnels are lost, and"
            " clients are not told",
            "sysctl -w net.ipv4.ip_no_pmtu_disc=0",
        )
