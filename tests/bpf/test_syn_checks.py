"""Checks by SYNs on one end of a cable; the test is the server at the other end, and whoever is on the way to it."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import pytest
import uvloop
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from crablb.control.health.syn import PORTS, Answer, Sounder
from crablb.errors import KernelError
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Address, Backend, Fallback, OptionForm, Service, Vip
from tests.helpers.namespaces import Pair

#: Against a hang; and where a test waits for silence.
PATIENCE, BRIEF = 30.0, 0.2
LAYER = {4: IP, 6: IPv6}
LB: dict[int, Address] = {4: ip_address("10.0.0.2"), 6: ip_address("fd00::2")}
DIP: dict[int, Address] = {4: ip_address("10.0.0.11"), 6: ip_address("fd00::11")}
VIP = {4: Vip(ip_address("10.0.0.100"), 80), 6: Vip(ip_address("fd00::100"), 80)}
SERVER, OTHER, GATEWAY = (bytes([2, 0, 0, 0, 0, n]) for n in (11, 12, 254))
CRAB = OptionForm.CRAB
ECHO = {4: bytes.fromhex("2a060a0000640101"), 6: bytes.fromhex("2a12fd00") + bytes(13) + bytes.fromhex("01000101")}
NOBODY = "SYN-ACK without the redirect: no agent for tcp://"


class Server:
    """The other end."""

    def __init__(self, sounder: Sounder, wire: socket.socket) -> None:
        self.sounder, self.wire = sounder, wire
        wire.setblocking(False)

    def hop(self, version: int = 4, mac: bytes = SERVER, gateway: Address | None = None) -> NextHop:
        return NextHop(
            HopState.RESOLVED, ifindex=socket.if_nametoindex("veth0"), gateway=gateway, dst_mac=mac,
            src_mac=b"\2\0\0\0\0\2", source=LB[version], mtu=1500,
        )  # fmt: skip

    def redirect(self, version: int = 4, timeout: float = PATIENCE, **more: Any) -> asyncio.Task[Answer]:
        asked = {"hop": self.hop(version), "dip": DIP[version], "vip": VIP[version], "form": CRAB} | more
        return asyncio.ensure_future(self.sounder.redirect(**asked, timeout=timeout))

    def fallback(self, version: int = 4, timeout: float = PATIENCE, **more: Any) -> asyncio.Task[Answer]:
        asked = {"hop": self.hop(version), "dip": DIP[version], "vip": VIP[version], "fallback": Fallback.AUTO} | more
        return asyncio.ensure_future(self.sounder.fallback(**asked, timeout=timeout))

    def frames(self) -> list[Packet]:
        """Of checks that are there, TCP in whatever."""
        found = []
        while True:
            try:
                data, (_, _, kind, *_) = self.wire.recvfrom(4096)
            except BlockingIOError:
                return found
            except OSError:  # its link was down
                continue
            if kind != 4 and TCP in (frame := Ether(data)):  # not sent by the test
                found.append(frame)

    async def heard(self, flags: str = "S", count: int = 1) -> list[Packet]:
        """So many of a kind, and none of another kind among them."""
        found: list[Packet] = []
        async with asyncio.timeout(PATIENCE):
            while len(found) < count:
                found += self.frames()
                await asyncio.sleep(0)
        assert [str(frame[TCP].flags) for frame in found] == [flags] * count
        return found

    async def syn(self) -> Packet:
        return (await self.heard())[0]

    def answer(
        self,
        syn: Packet,
        flags: str = "SA",
        options: bytes = b"",
        *,
        source: object = None,
        sport: int | None = None,
        ack: int | None = None,
        mac: bytes = SERVER,
    ) -> None:
        ip = syn[TCP].underlayer
        tcp = TCP(
            sport=sport or syn[TCP].dport, dport=syn[TCP].sport, flags=flags, seq=7,
            ack=(syn[TCP].seq + 1 if ack is None else ack) & 0xFFFFFFFF, dataofs=5 + len(options) // 4,
        )  # fmt: skip
        self.send(type(ip)(src=str(source or ip.dst), dst=ip.src) / tcp / Raw(options), mac)

    def send(self, packet: Packet, mac: bytes = SERVER) -> None:
        self.wire.send(bytes(Ether(dst="02:00:00:00:00:02", src=mac) / packet))


def with_server(check: Callable[[Server], Coroutine[Any, Any, None]], run: Callable[..., None] = asyncio.run) -> None:
    with Pair.made() as pair, pair.wire() as wire:

        async def main() -> None:
            sounder = Sounder()
            sounder.start()
            try:
                await check(Server(sounder, wire))
            finally:
                sounder.close()

        run(main())


Said = Callable[[Server, Packet], None]


def icmp(kind: int, code: int, by: str) -> Said:
    """An ICMP error that quotes what came."""

    def say(server: Server, syn: Packet) -> None:
        quoted = bytes(syn.payload)
        server.send(IP(src=by, dst=str(LB[4])) / ICMP(type=kind, code=code) / Raw(quoted))

    return say


#: What comes back for a redirected SYN to 10.0.0.11, what is made of it, and whether there is a connection to be ended.
REDIRECT: dict[str, tuple[Said, bool, str, bool]] = {
    "sound": (lambda s, syn: s.answer(syn, options=ECHO[4]), True, "SYN-ACK with the redirect", True),
    "behind other options": (
        lambda s, syn: s.answer(syn, options=b"\2\4\5\xb4\1\1\1\1" + ECHO[4]), True, "SYN-ACK with the redirect", True,
    ),
    "behind the offer": (
        lambda s, syn: s.answer(syn, options=b"\x2a\2\1\1" + ECHO[4]), True, "SYN-ACK with the redirect", True,
    ),
    "no agent": (lambda s, syn: s.answer(syn, options=b"\2\4\5\xb4"), False, NOBODY, True),
    "in another option": (lambda s, syn: s.answer(syn, options=b"\x63\x0a" + ECHO[4] + b"\1\1"), False, NOBODY, True),
    "behind the end": (lambda s, syn: s.answer(syn, options=b"\0\0\0\0" + ECHO[4]), False, NOBODY, True),
    "another form": (
        lambda s, syn: s.answer(syn, options=bytes.fromhex("fd0843520a000064")), False,
        "SYN-ACK with a redirect to 10.0.0.100, which was not in the SYN", True,
    ),
    "another VIP": (
        lambda s, syn: s.answer(syn, options=bytes.fromhex("2a060a0000650101")), False,
        "SYN-ACK with a redirect to 10.0.0.101, which was not in the SYN", True,
    ),
    "another address": (
        lambda s, syn: s.answer(syn, options=ECHO[4], source="10.0.0.99"), False,
        "answers as 10.0.0.99:80, not as 10.0.0.11:80: addresses are translated on the way", True,
    ),
    "another port": (
        lambda s, syn: s.answer(syn, options=ECHO[4], sport=81), False,
        "answers as 10.0.0.11:81, not as 10.0.0.11:80", True,
    ),
    "refused": (lambda s, syn: s.answer(syn, "RA"), False, "refused: nothing listens there on 10.0.0.11:80", False),
    "no route": (icmp(3, 0, "10.0.0.254"), False, "network unreachable, says 10.0.0.254", False),
    "prohibited": (icmp(3, 13, "10.0.0.9"), False, "administratively prohibited, says 10.0.0.9: a firewall", False),
    "too big": (icmp(3, 4, "10.0.0.9"), False, "packet too big, says 10.0.0.9: the way's MTU is too small", False),
    "a circle": (icmp(11, 0, "10.0.0.9"), False, "time exceeded, says 10.0.0.9: packets go in a circle; see", False),
}  # fmt: skip

#: The same of a SYN to the VIP.
FALLBACK: dict[str, tuple[Said, bool, str, bool]] = {
    "sound": (lambda s, syn: s.answer(syn), True, "answers as the VIP", True),
    "by another card": (lambda s, syn: s.answer(syn, mac=b"\2\0\0\0\0\x63"), True, "answers as the VIP", True),
    "as the DIP": (
        lambda s, syn: s.answer(syn, source=DIP[4]), False,
        "answers as 10.0.0.11, not as the VIP: is the VIP on its lo?", True,
    ),
    "as somebody": (lambda s, syn: s.answer(syn, source="10.0.0.77"), False, "answers as 10.0.0.77:80, not as", True),
    "another backend": (
        lambda s, syn: s.answer(syn, mac=OTHER), False,
        "10.0.0.12 answered in its place: it sent the SYN to the VIP back; is the VIP on its lo?", True,
    ),
    "refused": (lambda s, syn: s.answer(syn, "RA"), False, "refused: nothing listens there on 10.0.0.100:80", False),
    "a circle": (icmp(11, 0, "10.0.0.9"), False, "time exceeded, says 10.0.0.9: packets go in a circle; is", False),
}  # fmt: skip


def ended(syn: Packet, rst: Packet) -> None:
    """It goes where the SYN went, and is of that connection."""
    assert (rst.src, rst.dst) == (syn.src, syn.dst)
    for one, other in zip((syn.payload, syn[TCP].underlayer), (rst.payload, rst[TCP].underlayer), strict=True):
        assert (one.src, one.dst) == (other.src, other.dst)
    expected = syn[TCP].sport, syn[TCP].dport, syn[TCP].seq + 1 & 0xFFFFFFFF
    assert (rst[TCP].sport, rst[TCP].dport, rst[TCP].seq) == expected


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_what_comes_back(run):
    async def check(server: Server) -> None:
        for kind, cases in (("redirect", REDIRECT), ("fallback", FALLBACK)):
            await server_knows_the_other(server)
            for name, (say, ok, reason, begun) in cases.items():
                asked = server.redirect() if kind == "redirect" else server.fallback()
                syn = await server.syn()
                say(server, syn)
                answer = await asked
                assert (answer.ok, answer.answered) == (ok, begun and name != "another backend"), (name, answer)
                assert answer.reason.startswith(reason), (name, answer)
                assert answer.echoed == (kind == "redirect" and (ok or name in ("another address", "another port")))
                if begun:
                    ended(syn, (await server.heard("R"))[0])
        assert not server.frames()

    with_server(check, run)


async def server_knows_the_other(server: Server) -> None:
    """That there is a backend 10.0.0.12, by a check of it."""
    asked = server.fallback(hop=server.hop(mac=OTHER), dip=ip_address("10.0.0.12"))
    syn = await server.syn()
    server.answer(syn, mac=OTHER)
    assert (await asked).ok
    await server.heard("R")


@pytest.mark.parametrize("version", [4, 6])
def test_tunnels(version):
    """An error about the packet that wraps the SYN; a backend behind a gateway; the RST goes by the tunnel too."""

    async def check(server: Server) -> None:
        gateway = ip_address("10.0.0.254" if version == 4 else "fd00::fe")
        hop = server.hop(version, GATEWAY, gateway)
        asked = server.fallback(version, hop=hop)
        syn = await server.syn()
        assert syn.dst == "02:00:00:00:00:fe"
        assert (syn.payload.dst, syn[TCP].underlayer.dst) == (str(DIP[version]), str(VIP[version].address))
        server.answer(syn, mac=GATEWAY)
        assert (await asked).ok
        ended(syn, (await server.heard("R"))[0])
        if version == 4:
            asked = server.fallback(version, hop=hop)
            icmp(3, 2, str(DIP[4]))(server, await server.syn())
            assert (await asked).reason.endswith("it does not take IP in IP; its agent does with --dsr")
        asked = server.fallback(version, hop=hop, fallback=Fallback.DSR_L2)
        assert (
            await asked
        ).reason == f"dsr-l2 does not reach it: it is behind {gateway}; use fallback auto or dsr-ipip"

    with_server(check)


def test_forged_answers():
    """By whoever does not see the SYN: he has to know a number, and all others say nothing."""

    async def check(server: Server) -> None:
        asked = server.redirect()
        syn = await server.syn()
        numbers = random.Random(7)
        wrong = [0, 1, syn[TCP].seq, syn[TCP].seq + 2, syn[TCP].seq + 1 + (1 << 24)]
        wrong += [numbers.getrandbits(32) for _ in range(200)]
        for ack in wrong:
            for flags in ("SA", "RA"):
                server.answer(syn, flags, ECHO[4], ack=ack)
        server.answer(syn, "R", ack=syn[TCP].seq + 1)  # without ACK: it is of no connection
        server.answer(syn, "S", ECHO[4])
        server.answer(syn, "A", ECHO[4])
        quoted = bytearray(bytes(syn.payload))
        quoted[27] ^= 1  # of the sequence number
        server.send(IP(src="10.0.0.9", dst="10.0.0.2") / ICMP(type=3, code=1) / Raw(bytes(quoted)))
        server.answer(syn, options=ECHO[4])
        assert (await asked).ok
        ended(syn, (await server.heard("R"))[0])

    with_server(check)


def test_an_earlier_connection():
    """A server that has not forgotten one says so, by what it acknowledges; that is ended, and tells nothing of it."""

    async def check(server: Server) -> None:
        first, found = None, {}
        for _ in range(PORTS + 1):
            asked = server.redirect()
            syn = await server.syn()
            first = first or syn
            assert found.setdefault(syn[TCP].seq >> 24, syn) is syn
            last = syn
            if syn is not first and syn[TCP].sport == first[TCP].sport:
                server.answer(syn, "A", ack=first[TCP].seq + 1)
                answer = await asked
                assert answer.ok is None
                assert "still has an earlier check's connection" in answer.reason
                ended(first, (await server.heard("R"))[0])
            else:
                server.answer(syn, options=ECHO[4])
                assert (await asked).ok
                await server.heard("R")
        assert last[TCP].sport == first[TCP].sport
        assert len({syn[TCP].sport for syn in found.values()}) == PORTS
        # So far apart that it is no part of the earlier one's window.
        assert (last[TCP].seq - first[TCP].seq) % (1 << 32) >= 1 << 24

    with_server(check)


def test_nothing_comes_back():
    """Then what the server may have begun is ended all the same, and a later answer is nobody's."""

    async def check(server: Server) -> None:
        begun = time.monotonic()
        asked = server.redirect(timeout=BRIEF)
        syn = await server.syn()
        answer = await asked
        assert (answer.ok, answer.answered) == (False, False)
        # Event loops' timers may run out a millisecond early.
        assert BRIEF / 2 < answer.seconds <= time.monotonic() - begun
        assert answer.reason.startswith("no answer from 10.0.0.11:80: ")
        ended(syn, (await server.heard("R"))[0])
        again = server.redirect()
        server.answer(syn, options=ECHO[4])
        later = await server.syn()
        server.answer(later, "RA")
        assert (await again).reason.startswith("refused")

    with_server(check)


def test_one_at_a_time():
    """Who asks meanwhile gets the same answer; who gives up takes it from nobody."""

    async def check(server: Server) -> None:
        first, second, third = server.redirect(), server.redirect(), server.redirect(timeout=0)
        syn = await server.syn()
        first.cancel()
        fourth = server.redirect()
        await asyncio.sleep(0)
        server.answer(syn, options=ECHO[4])
        answers = [await one for one in (second, third, fourth)]
        assert answers[0].ok
        assert answers[0] is answers[1] is answers[2]
        assert first.cancelled()
        await server.heard("R")
        other = server.fallback()
        server.answer(await server.syn())
        assert (await other).ok

    with_server(check)


@pytest.mark.parametrize("count", [10, 1000])
def test_many_of_one_vip(count):
    """Each backend's answer is its own; no two of them have one port, as long as there are ports."""

    async def check(server: Server) -> None:
        dips = [IPv4Address(int(ip_address("10.1.0.1")) + n) for n in range(count)]
        asked = [server.fallback(dip=dip, hop=server.hop(mac=b"\2\1" + dip.packed)) for dip in dips]
        syns = await server.heard(count=count)
        random.Random(3).shuffle(syns)
        for syn in syns:
            even = int(syn.dst[-2:], 16) % 2 == 0
            server.answer(syn, "SA" if even else "RA", mac=bytes.fromhex(syn.dst.replace(":", "")))
        for dip, answer in zip(dips, await asyncio.gather(*asked), strict=True):
            assert answer.ok == (int(dip) % 2 == 0)
        assert len({(syn[TCP].sport, syn[TCP].seq) for syn in syns}) == count
        if count < PORTS // 4:
            assert len({syn[TCP].sport for syn in syns}) == count

    with_server(check)


#: Seconds in which a busy machine hears 200 SYNs, and for which it stands still then.
HALT = 4.0


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_an_event_loop_that_stands_still(run):
    """As of a machine that is halted: what came in time is read, before it is said that nothing came."""

    async def check(server: Server) -> None:
        asked = [server.redirect(timeout=HALT, vip=Vip(ip_address(f"10.0.1.{n}"), 80)) for n in range(200)]
        for syn in await server.heard(count=len(asked)):
            server.answer(syn, "RA")
        time.sleep(HALT)
        assert {(await one).reason for one in asked} == {"refused: nothing listens there on 10.0.0.11:80"}

    with_server(check, run)


def test_a_flood_to_the_ports():
    """It keeps no check from ending, answered or not."""

    async def check(server: Server) -> None:
        answered, silent = server.redirect(timeout=PATIENCE), server.fallback(timeout=BRIEF)
        syn, _ = await server.heard(count=2)
        rst = IP(src="10.9.9.9", dst="10.0.0.2") / TCP(sport=1, dport=syn[TCP].sport, flags="RA", ack=1)
        forged = bytes(Ether(dst="02:00:00:00:00:02", src=OTHER) / rst)
        sent = 0
        while not silent.done():
            for _ in range(200):
                server.wire.send(forged)
            sent += 200
            await asyncio.sleep(0)
        assert not (await silent).ok
        server.answer(syn, options=ECHO[4])
        assert (await answered).ok
        assert sent > 200

    with_server(check)


def test_what_is_in_the_way():
    """Next hops that are none, no address of the VIP's family, services that take the last one away, an end."""

    async def check(server: Server) -> None:
        for state, asking, ok in (
            (HopState.NO_ROUTE, False, None),
            (HopState.NOT_ETHERNET, False, None),
            (HopState.UNRESOLVED, True, None),
            (HopState.UNRESOLVED, False, False),
        ):
            answer = await server.redirect(hop=NextHop(state, "why", asking=asking))
            assert (answer.ok, answer.reason) == (ok, "why")
        answer = await server.redirect(vip=VIP[6])
        assert (answer.ok, answer.reason) == (None, "IPv6 clients cannot be redirected to an IPv4 address")
        answer = await server.fallback(vip=VIP[6])
        assert (answer.ok, answer.reason) == (None, "this host has no IPv6 address to ask from, other than VIPs")
        server.sounder.follow([Service(Vip(LB[4], 443), (Backend(DIP[4]),))])
        answer = await server.redirect()
        assert (answer.ok, answer.reason) == (None, "this host has no IPv4 address to ask from, other than VIPs")
        server.sounder.follow([])
        asked = server.redirect()
        syn = await server.syn()
        server.sounder.follow([])  # it is under way
        unsent = server.redirect(vip=Vip(ip_address("10.0.0.101"), 80))
        await asyncio.sleep(0)
        server.sounder.close()
        assert (await asked) == (await unsent) == Answer(None, "the checks have ended")
        ended(syn, (await server.heard("R"))[0])

    with_server(check)


def ports() -> tuple[int, int]:
    """The first and last that checks take."""

    async def main() -> tuple[int, int]:
        sounder = Sounder()
        sounder.start()
        try:
            taken = [sock.getsockname()[1] for sock in sounder._ports]
        finally:
            sounder.close()
        return taken[0], taken[-1]

    return asyncio.run(main())


def test_which_ports(namespace):
    """The highest that the kernel gives to anybody, that nobody has, nor the administrator keeps."""
    settings = Path("/proc/sys/net/ipv4")
    (settings / "ip_local_port_range").write_text("40000 40255")
    assert ports() == (40192, 40255)
    (settings / "ip_local_reserved_ports").write_text("1-3,40200")
    assert ports() == (40128, 40191)
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(family) as sock:
            sock.bind(("", 40191))
            assert ports() == (40064, 40127)
    (settings / "ip_local_port_range").write_text("40000 40010")
    with pytest.raises(KernelError, match=f"there are no {PORTS} ports together that are free"):
        ports()
