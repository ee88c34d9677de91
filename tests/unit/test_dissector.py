"""deploy/crablb.lua, by tshark, against the option lists as tests/reference reads them."""

from __future__ import annotations

import ipaddress
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import wrpcap

from tests.helpers.processes import ROOT
from tests.reference.options import EXID, Option, offer, parse, redirect

FOUR, SIX = ipaddress.ip_address("10.0.0.100"), ipaddress.ip_address("fd00::100")
PREFIX = "crablb_crablb_"
LINUX = bytes(TCP(options=[("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]))[20:]


def packet(options: bytes, family: int = 4, flags: str = "S") -> Packet:
    options += b"\1" * (-len(options) % 4)
    ip = IP(src="10.0.0.1", dst="10.0.0.100") if family == 4 else IPv6(src="fd00::1", dst="fd00::100")
    tcp = TCP(sport=40000, dport=80, flags=flags, dataofs=5 + len(options) // 4)
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / ip / tcp / Raw(options)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def dissected(folder: Path, packets: list[Packet]) -> list[dict[str, list[str]]]:
    """Of each packet the dissector's fields."""
    wrpcap(str(folder / "a.pcap"), packets)
    script = f"lua_script:{ROOT / 'deploy/crablb.lua'}"
    done = subprocess.run(
        ["tshark", "-X", script, "-r", str(folder / "a.pcap"), "-T", "ek", "-J", "crablb"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "lua" not in done.stderr.lower(), done.stderr
    found = []
    for line in done.stdout.splitlines():
        told = json.loads(line)
        if "index" in told:
            continue
        layers: dict[str, Any] = told["layers"]
        fields: dict[str, list[str]] = {}
        for branch in listed(layers.get("crablb", [])):
            for name, value in branch.items():
                if name == "_ws_expert":
                    fields |= {key.removeprefix(PREFIX): [] for expert in listed(value) for key in expert}
                else:
                    fields.setdefault(name.removeprefix(PREFIX), []).extend(listed(value))
        found.append(fields)
    assert len(found) == len(packets)
    return found


def expected(options: bytes, flags: str) -> list[tuple[str, str | None]]:
    """By the reference: type and VIP of each option of ours; at the end, of what cannot be read to its end."""
    said = []
    options += b"\1" * (-len(options) % 4)
    read, rest = parse(options)
    for each in read:
        if not each.is_cr:
            continue
        data = (each.data or b"")[0 if each.kind == 42 else 2 :]
        if not data:
            said.append(("1", None))
        elif len(data) in (4, 16):
            said.append(("3" if "A" in flags else "2", str(ipaddress.ip_address(data))))
        else:
            said.append(("0", None))
    if rest[:1] == b"\x2a" or (rest[:1] == b"\xfd" and rest[2:4] == EXID):
        said.append(("0", None))
    return said


CASES = {
    "offer": (LINUX + offer(False).raw, 4, "S"),
    "offer, experimental": (LINUX + offer(True).raw, 6, "S"),
    "redirect": (redirect(FOUR.packed, False).raw + LINUX, 4, "S"),
    "redirect, experimental": (LINUX + redirect(FOUR.packed, True).raw, 4, "S"),
    "redirect, IPv6": (LINUX + redirect(SIX.packed, False).raw, 6, "S"),
    "redirect, IPv6, experimental": (LINUX + redirect(SIX.packed, True).raw, 6, "S"),
    "echo": (LINUX + redirect(FOUR.packed, False).raw, 4, "SA"),
    "echo, IPv6": (LINUX + redirect(SIX.packed, True).raw, 6, "SA"),
    "behind the client's offer": (LINUX + offer(False).raw + redirect(FOUR.packed, False).raw, 4, "S"),
    "none": (LINUX, 4, "S"),
    "another experiment": (LINUX + Option(253, b"\x43\x53").raw, 4, "S"),
    "in another option's data": (Option(30, b"\x2a\x02\x2a\x06").raw, 4, "S"),
    "behind the end": (b"\0" + offer(False).raw, 4, "S"),
    "of five bytes": (Option(42, b"abcde").raw, 4, "S"),
    "experimental, of one byte": (Option(253, EXID + b"a").raw, 4, "S"),
    "past the end": (b"\1\1\x2a\x06", 4, "S"),
    "experimental, past the end": (b"\xfd\x08\x43\x52", 4, "S"),
    "length 0": (b"\x2a\x00\1\1", 4, "S"),
    "length 1": (b"\x2a\x01\1\1", 4, "S"),
    "the last byte alone": (b"\1\1\1\x2a", 4, "S"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    found = dissected(tmp_path_factory.mktemp("dissector"), [packet(*case) for case in CASES.values()])
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_options(cases, name):
    options, _, flags = CASES[name]
    wanted, got = expected(options, flags), cases[name]
    assert got.get("type", []) == [kind for kind, _ in wanted], got
    assert got.get("vip", []) == [vip for _, vip in wanted if vip]
    assert ("malformed" in got) == any(kind == "0" for kind, _ in wanted)
    typed = got.get("vip4", []) + got.get("vip6", [])
    assert typed == [vip for _, vip in wanted if vip]


def test_where_nobody_reads_it(tmp_path):
    raw = offer(False).raw
    answers = dissected(
        tmp_path, [packet(raw, flags="A"), packet(raw, flags="SA"), packet(redirect(FOUR.packed, False).raw, flags="A")]
    )
    assert all("misplaced" in each for each in answers)


def test_tags_and_quotes(tmp_path):
    """Behind a VLAN tag, in a tunnel, and quoted by an ICMP error."""
    inner = packet(LINUX + redirect(FOUR.packed, False).raw)
    tagged = Ether() / Dot1Q(vlan=7) / inner[IP]
    tunnelled = Ether() / IP(src="10.0.0.2", dst="10.0.0.11") / inner[IP]
    error = Ether() / IP(src="10.0.0.9", dst="10.0.0.100") / ICMP(type=3, code=1) / inner[IP]
    for each in dissected(tmp_path, [tagged, tunnelled, error]):
        assert each["type"] == ["2"]
        assert each["vip"] == ["10.0.0.100"]


def test_rubbish_is_never_an_error(tmp_path):
    """Any list: what the reference finds in it, and no Lua error."""
    choose = random.Random(3)
    pieces = [b"\x2a", b"\xfd", b"\x02", b"\x06", b"\x12", b"\x08", b"\x14", EXID, b"\x00", b"\x01", FOUR.packed, LINUX]
    lists = []
    for _ in range(600):
        joined = b"".join(choose.choice([*pieces, choose.randbytes(1)]) for _ in range(choose.randrange(1, 12)))
        lists.append(joined[:40])
    flags = [choose.choice(["S", "SA", "A"]) for _ in lists]
    found = dissected(tmp_path, [packet(o, choose.choice([4, 6]), f) for o, f in zip(lists, flags, strict=True)])
    for options, flag, got in zip(lists, flags, found, strict=True):
        assert got.get("type", []) == [kind for kind, _ in expected(options, flag)], options.hex()


def test_what_one_can_filter_by(tmp_path):
    packets = [packet(*case) for case in CASES.values()]
    wrpcap(str(tmp_path / "a.pcap"), packets)
    script = f"lua_script:{ROOT / 'deploy/crablb.lua'}"

    def count(condition: str) -> int:
        command = ["tshark", "-X", script, "-r", str(tmp_path / "a.pcap"), "-Y", condition]
        return len(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.splitlines())

    said = [expected(options, flags) for options, _, flags in CASES.values()]
    assert count("crablb") == sum(bool(each) for each in said)
    for kind in "0123":
        assert count(f"crablb.type == {kind}") == sum(any(k == kind for k, _ in each) for each in said)
    assert count("crablb.malformed") == count("crablb.type == 0")
    assert count('crablb.vip == "fd00::100"') == sum(any(v == "fd00::100" for _, v in each) for each in said)
    assert count("crablb.vip4 == 10.0.0.0/24") == sum(any(v == "10.0.0.100" for _, v in each) for each in said)
    assert count("crablb.vip6 == fd00::100") == count('crablb.vip == "fd00::100"')
