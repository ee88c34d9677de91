"""Answering for VIPs on one end of a cable; the test is who is at the other end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from ipaddress import ip_address

import pytest
import uvloop
from structlog.testing import capture_logs

from crablb.control import claim
from crablb.control.announce import Announcer, announcement, parse, probe
from crablb.control.claim import Act, State
from crablb.control.supervisor import Supervisor
from crablb.dataplane.events import LinksChanged
from crablb.kernel import rtnetlink
from crablb.kernel.interface import interface_info
from crablb.kernel.netlink import _link
from crablb.kernel.rtnetlink import Netlink
from crablb.lasting import task
from crablb.model import Announce, Backend, Config, Service, Vip

VIP4, VIP6, OTHER4, OTHER6 = map(ip_address, ("10.0.0.100", "fd00::100", "10.0.0.101", "fd00::101"))
STRANGER = b"\0\0\0\0\0\1"  # lower than any that a veth gets
HIGHER = b"\xfe\xff\xff\xff\xff\xff"


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request, monkeypatch):
    monkeypatch.setattr(claim, "PROBE_INTERVAL", 0.02)
    monkeypatch.setattr(claim, "RETRY", (0.05, 0.1))
    return request.param


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


class Segment:
    """The other end."""

    def __init__(self, wire: socket.socket, announcer: Announcer, acts: list[tuple[object, Act]], namespace) -> None:
        self.wire, self.announcer, self.acts, self.namespace = wire, announcer, acts, namespace
        wire.setblocking(False)

    def heard(self) -> list[tuple[object, bool, bytes]]:
        """What was said since the last time: of which address, whether it asked, whose MAC address it named."""
        found = []
        while True:
            try:
                frame, (_, _, kind, *_) = self.wire.recvfrom(2048)
            except BlockingIOError:
                return found
            except OSError:  # its link was down
                continue
            if kind != 4 and (said := parse(frame)):
                found.append((said.address, said.asks, said.mac))

    async def answered(self, vip) -> None:
        """Ask until there is an answer."""
        own = self.announcer.mac
        self.heard()

        def asked() -> bool:
            self.wire.send(question(vip))
            return (vip, False, own) in self.heard()

        await until(asked)

    def link_is(self) -> None:
        """Tell the announcer, as a supervisor does."""
        with Netlink() as netlink:
            message = rtnetlink.link(netlink, socket.if_nametoindex("veth0"))
        link = _link(message, {})[1]
        self.announcer.link_is(link, {link.mac})


def question(vip) -> bytes:
    """By somebody who has an address."""
    if vip.version == 6:
        return probe(vip, HIGHER)
    frame = bytearray(probe(vip, HIGHER))
    frame[28:32] = bytes([10, 0, 0, 1])
    return bytes(frame)


def play(run, namespace, check: Callable[[Segment], Coroutine[None, None, None]], vips=(VIP4, VIP6)) -> list[dict]:
    """What was logged."""

    async def main() -> None:
        acts: list[tuple[object, Act]] = []
        announcer = Announcer("veth0", lambda address, act, _: acts.append((address, act)))
        with namespace.wire() as wire:
            segment = Segment(wire, announcer, acts, namespace)
            announcer.start(vips)
            segment.link_is()
            try:
                await check(segment)
            finally:
                await announcer.close()

    with capture_logs() as said:
        run(main())
    return said


def held(segment: Segment) -> bool:
    return set(segment.announcer.states.values()) == {State.HELD}


def test_answers_after_its_link_was_down(run, namespace):
    async def check(segment: Segment) -> None:
        await until(lambda: held(segment))
        for vip in (VIP4, VIP6):
            await segment.answered(vip)
        for _ in range(2):
            # At once: nobody but the sockets sees it.
            namespace.ip("link", "set", "veth0", "down")
            namespace.ip("link", "set", "veth0", "up")
            await until(lambda: not held(segment))
            for vip in (VIP4, VIP6):
                await segment.answered(vip)
            # For a while: no VIP is held.
            namespace.ip("link", "set", "veth0", "down")
            segment.link_is()
            assert set(segment.announcer.states.values()) == {State.PROBING}
            namespace.ip("link", "set", "veth0", "up")
            segment.heard()
            segment.link_is()
            for vip in (VIP4, VIP6):
                await segment.answered(vip)

    said = [entry["event"] for entry in play(run, namespace, check)]
    assert said.count("a link is up again; VIPs are probed and announced") == 2
    assert said.count("cannot read from the segment") == 1  # the others were too soon after it


def test_a_cable_that_was_pulled(run, namespace):
    """The carrier goes at the other end; however short that was, it is seen by how often there was one."""

    async def check(segment: Segment) -> None:
        await until(lambda: held(segment))
        namespace.ip("link", "set", "veth1", "down")
        namespace.ip("link", "set", "veth1", "up")
        segment.link_is()
        assert not held(segment)
        await until(lambda: held(segment))
        await segment.answered(VIP4)

    play(run, namespace, check)


def test_a_new_mac_address_is_announced(run, namespace, monkeypatch):
    monkeypatch.setattr(claim, "ANNOUNCE_INTERVAL", 0.05)

    async def check(segment: Segment) -> None:
        await until(lambda: held(segment))
        new = bytes.fromhex("020000006666")
        namespace.ip("link", "set", "veth0", "address", new.hex(":"))
        segment.heard()
        segment.link_is()
        found = []
        await until(
            lambda: found.extend(segment.heard()) or min(found.count((v, False, new)) for v in (VIP4, VIP6)) > 1
        )
        assert held(segment)
        await segment.answered(VIP4)

    assert "a new MAC address; VIPs are announced" in {entry["event"] for entry in play(run, namespace, check)}


@pytest.mark.parametrize("vip", [VIP4, VIP6])
def test_a_forged_claim_while_probing(run, namespace, vip):
    async def check(segment: Segment) -> None:
        segment.wire.send(announcement(vip, STRANGER))
        await until(lambda: (vip, Act.IN_USE) in segment.acts)
        await until(lambda: held(segment))
        await segment.answered(vip)

    said = play(run, namespace, check)
    (entry,) = [e for e in said if e["event"].startswith("somebody else")]
    assert (entry["vip"], entry["mac"], entry["log_level"]) == (str(vip), STRANGER.hex(":"), "error")


@pytest.mark.parametrize("vip", [VIP4, VIP6])
def test_a_forged_claim_is_defended_at_once(run, namespace, vip):
    async def check(segment: Segment) -> None:
        await until(lambda: held(segment))
        own, found = segment.announcer.mac, []
        segment.heard()
        for _ in range(5):
            segment.wire.send(announcement(vip, STRANGER))
        await until(lambda: found.extend(segment.heard()) or (vip, False, own) in found)
        assert held(segment)
        await segment.answered(vip)

    said = play(run, namespace, check)
    (entry,) = [e for e in said if e["event"].startswith("somebody else")]
    assert "it is defended" in entry["event"]
    assert (entry["vip"], entry["mac"], entry["claims"]) == (str(vip), STRANGER.hex(":"), 1)


@pytest.mark.parametrize("mac", [STRANGER, HIGHER, None], ids=["lower", "higher", "many"])
def test_a_flood_of_claims(run, namespace, mac):
    """It writes a line or two, and when it ends the VIPs are answered for."""
    befell = []

    async def check(segment: Segment) -> None:
        segment.announcer._on_act = lambda *what: befell.append(what)
        await until(lambda: held(segment))
        befell.clear()
        for i in range(20_000):
            who = mac or b"\2" + i.to_bytes(5, "big")
            segment.wire.send(announcement((VIP4, VIP6)[i % 2], who))
            if i % 64 == 0:
                await asyncio.sleep(0)
        for vip in (VIP4, VIP6):
            await segment.answered(vip)
        await until(lambda: held(segment))

    said = play(run, namespace, check)
    assert 2 <= len(befell) <= 100
    assert 2 <= len([e for e in said if e["event"].startswith("somebody else")]) <= 100


def test_what_is_not_about_vips_stays_in_the_kernel(run, namespace):
    async def check(segment: Segment) -> None:
        taken, take = [], segment.announcer._readers[0]._take
        for reader in segment.announcer._readers:
            reader._take = lambda frame, sender: (taken.append(frame), take(frame, sender))
        await until(lambda: held(segment))
        for _ in range(100):
            for address in (OTHER4, OTHER6):
                segment.wire.send(announcement(address, STRANGER))
                segment.wire.send(question(address))
        for vip in (VIP4, VIP6):
            await segment.answered(vip)
        assert {parse(frame).address for frame in taken} == {VIP4, VIP6}
        # What is followed later passes.
        segment.announcer.follow([OTHER4, OTHER6])
        await until(lambda: held(segment))
        for vip in (OTHER4, OTHER6):
            await segment.answered(vip)

    play(run, namespace, check)


def test_more_vips_than_a_filter_holds(run, namespace):
    vips = [ip_address(0x0A010000 + i) for i in range(1500)]

    async def check(segment: Segment) -> None:
        await until(lambda: held(segment))
        await segment.answered(vips[-1])

    play(run, namespace, check, vips)


def recreated(namespace) -> None:
    namespace.ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
    for name in ("veth0", "veth1"):
        namespace.ip("link", "set", name, "up")


def test_an_interface_that_goes(run, namespace):
    """Its announcer lives on, says nothing and takes what it is told, until it is ended; the one of the interface that
    comes back answers."""

    async def check(segment: Segment) -> None:
        announcer = segment.announcer
        await until(lambda: held(segment))
        namespace.ip("link", "del", "veth0")
        await until(lambda: not announcer.mac)
        announcer.follow([VIP4, OTHER4, OTHER6])
        announcer._take(question(VIP4), (0, 0, 0))
        recreated(namespace)
        assert not announcer.mac and not announcer._task.done()
        assert announcer.states[OTHER4] is State.PROBING
        again = Announcer("veth0")
        with namespace.wire() as wire:
            other = Segment(wire, again, [], namespace)
            again.start([VIP4, VIP6])
            try:
                await until(lambda: held(other))
                await other.answered(VIP4)
                await other.answered(VIP6)
            finally:
                await again.close()

    play(run, namespace, check)


class Engine:
    """What a supervisor's announcing needs of one: two interfaces, which may be gone."""

    def __init__(self, config: Config) -> None:
        self.config, self.task, self.links = config, task, {}
        self.there = ["veth0", "veth1"]
        self.befell: list[str] = []

    @property
    def interfaces(self):
        return [interface_info(name) for name in self.there]

    @property
    def modes(self):
        return dict.fromkeys(self.there, "native")

    def count(self, what: str) -> None:
        self.befell.append(what)


def test_an_announcer_that_cannot_be_started(run, namespace, monkeypatch):
    """It is tried again, and the other interface's does not wait for it; what it had opened is closed."""
    config = Config(("veth0", "veth1"), (Service(Vip(VIP4, 80), (Backend(OTHER4),)),), announce=Announce.ARP)
    start, fails, opened = Announcer.start, {"veth0", "veth1"}, []

    def refused(announcer: Announcer, addresses, *more) -> None:
        opened.append(announcer)
        start(announcer, addresses, *more)
        if announcer.interface in fails:
            raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(Announcer, "start", refused)

    async def main() -> None:
        supervisor = Supervisor(config, bytes(16))
        supervisor.engine = engine = Engine(config)
        supervisor._announcing = True
        try:
            supervisor._tell(LinksChanged({}))
            assert len(opened) == 2 and not supervisor._announcers
            await until(lambda: not any(one._sockets for one in opened))
            fails.discard("veth1")
            supervisor._tell(LinksChanged({}))
            assert [name for name, _ in supervisor._announcers] == ["veth1"]
            fails.clear()
            supervisor._tell(LinksChanged({}))
            assert {name for name, _ in supervisor._announcers} == {"veth0", "veth1"}
            kept = dict(supervisor._announcers)
            supervisor._tell(LinksChanged({}))
            assert supervisor._announcers == kept
            # Both are gone, and come back under their names.
            namespace.ip("link", "del", "veth0")
            engine.there = []
            supervisor._tell(LinksChanged({}))
            assert not supervisor._announcers
            await until(lambda: not any(one._sockets for one in kept.values()))
            recreated(namespace)
            engine.there = ["veth0", "veth1"]
            supervisor._tell(LinksChanged({}))
            assert not supervisor._announcers.keys() & kept.keys() and len(supervisor._announcers) == 2
        finally:
            for announcer in opened:
                await announcer.close()

    with capture_logs() as said:
        run(main())
    reasons = [one["reason"] for one in said if one["event"] == "VIPs are not announced"]
    cannot = "cannot announce VIPs on {}: Cannot allocate memory"
    assert reasons == [f"{cannot.format('veth0')}; {cannot.format('veth1')}", cannot.format("veth0")]


@pytest.mark.parametrize("mac", [bytes(6), b"\xff" * 6, b"\1\0\x5e\0\0\1"])
def test_claims_of_nobody(mac):
    assert parse(announcement(VIP4, mac)) is None
