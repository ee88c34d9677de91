"""Network cards instead of veths: several queues, and drivers that have a zero-copy mode (igb, Linux 6.14; virtio,
whose mode is left alone before 7.3).  Run by kernels.py, which puts pairs of them on wires."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from crablb.api import types
from crablb.api.client import Client, discover
from crablb.dataplane.statistics import WORKER_COUNTERS, XDP_COUNTERS
from crablb.kernel.bpf import Map
from crablb.kernel.xsk import XskSocket
from crablb.lab import VIP4, VIP6, Lab
from crablb.lab.demo import crablb
from tests.helpers.namespaces import inside, unique
from tests.helpers.peers import strangers
from tests.helpers.processes import exchange, until
from tests.helpers.world import RELEASE, World, status

VIP = {4: str(VIP4), 6: str(VIP6)}
#: SYNs that come one by one, of which none may be lost; and how many of them may be under way: fewer than any queue on
#: it has room for.  Who waits for them has the other processor, so that these are some 2,000 a second.
FEW, AHEAD = 10_000, 192
#: SYNs of the flood that each card gets: they come as fast as they can be sent.
SYNS = int(os.environ.get("CRABLB_SYNS", "100000"))
#: Of which so many are different: to write one takes longer than to send it.
DIFFERENT = 50_000
#: The XDP program's counters of what it hands to sockets.
HANDED = ("syn", "other", "icmp", "handler", "vip")
#: Counters of the kernel's: there was no room in front of a worker.
NO_ROOM = ("xsk_rx_dropped", "xsk_rx_full")
CPUS = 2


class Kind(NamedTuple):
    pair: int  # of kernels.py
    zero_copy: bool
    queues: int  # how many it is tried with
    spare: bool = False  # the driver takes a queue more a CPU for what XDP programs send

    @property
    def macs(self) -> tuple[str, str]:
        """The load balancer's card, and the one at the other end of its wire."""
        return f"52:54:00:00:00:{self.pair}0", f"52:54:00:00:00:{self.pair}1"

    def served(self, queues: int) -> int:
        """How many of these there are while there is an XDP program."""
        return queues + CPUS if self.spare else queues


VIRTIO = Kind(0, RELEASE >= (7, 3), 2)
SPARE = Kind(1, RELEASE >= (7, 3), 2, spare=True)
IGB = Kind(2, RELEASE >= (6, 14), 4)


def name_of(mac: str) -> str:
    """Of a card that no lab has (any more); empty if one has it."""
    told = subprocess.run(["ip", "-j", "link"], check=True, capture_output=True, text=True).stdout
    return next((str(link["ifname"]) for link in json.loads(told) if link.get("address") == mac), "")


def plug(lab: Lab, kind: Kind) -> None:
    """The cable between load balancer and switch is one between two cards."""
    lab.lb.ip("link del eth0")
    for node, mac, name in ((lab.lb, kind.macs[0], "eth0"), (lab.middle, kind.macs[1], "lb")):
        until(lambda mac=mac: name_of(mac))  # it comes back a while after its last lab is gone
        subprocess.run(["ip", "link", "set", "dev", name_of(mac), "netns", node.netns, "name", name], check=True)
    lab.middle.ip("link set lb master br0", "link set lb up")
    lab.lb.ip("link set eth0 up", f"addr add {lab.lb.ip4}/24 dev eth0", f"addr add {lab.lb.ip6}/64 dev eth0 nodad")
    for node, name in ((lab.lb, "eth0"), (lab.middle, "lb")):
        until(lambda node=node, name=name: "LOWER_UP" in node.run("ip", "link", "show", "dev", name).stdout)


class Cards(World):
    """A lab behind a card.  Port 81 is served by server1; what comes to port 80 is for server2, which counts it."""

    def __init__(self, lab: Lab, folder: Path, kind: Kind) -> None:
        super().__init__(lab, folder)
        self.kind = kind
        plug(lab, kind)
        self.servers(dsr=True, port=81, only=lab.servers[:1])
        self._stay = len(self._started)
        taker = lab.servers[1]
        taker.run("nft", "add table ip taken; add chain ip taken c { type filter hook prerouting priority -300; };"
                  " add rule ip taken c tcp dport 80 counter drop")  # fmt: skip
        self.config = folder / "lb.toml"
        self.config.write_text(
            'interface = "eth0"\n'
            + "".join(
                f'[[service]]\naddress = "tcp://{address}"\nfallback = "dsr-l2"\ncheck = []\nbackends = ["{backend}"]\n'
                for address, backend in (
                    (f"{VIP4}:81", lab.servers[0].ip4),
                    (f"[{VIP6}]:81", lab.servers[0].ip6),
                    (f"{VIP4}:80", taker.ip4),
                )
            )
        )

    def rest(self) -> None:
        """End what a test started; the servers stay."""
        stay, self._started = self._started[: self._stay], self._started[self._stay :]
        self.end()
        self._started = stay
        until(lambda: not self.lab.lb.pins.exists())

    def set_queues(self, count: int, *, check: bool = True) -> bool:
        done = self.lab.lb.run("ethtool", "-L", "eth0", "combined", str(count), check=False)
        assert not check or done.returncode == 0 or "unmodified" in done.stderr, done.stderr
        return done.returncode == 0

    def start(self, queues: int) -> subprocess.Popen[str]:
        """``crablb serve``, which tells where its frames are; in the mode, and with the queues, that there are."""
        told = [sys.executable, "-m", "tests.helpers.faulted", str(self.folder / "frames")]
        daemon = self.serve(config=self.config, program=told)
        self.is_served(queues)
        return daemon

    def is_served(self, queues: int) -> None:
        """Also new connections, of both families, which the XDP program forwards once they are known."""
        with inside(self.lab.lb.netns), Client(discover("eth0")) as client:

            def now() -> types.Status:
                return client.get("/v1/status", types.Status)

            until(lambda: now().queues == self.kind.served(queues) and not now().problems)
            assert now().zero_copy == self.kind.zero_copy
        before = status(self.lab)["xdp"].get("flow", 0)
        for family in (4, 6):
            assert self.echo(VIP[family], "100000", port=81)["intact"]
        assert status(self.lab)["xdp"]["flow"] > before + 20

    def frames(self, pid: int) -> list[dict[str, int]]:
        """Where those of each queue are."""
        path = self.folder / "frames"
        path.unlink(missing_ok=True)
        os.kill(pid, signal.SIGRTMIN)
        until(path.exists)
        found: list[dict[str, int]] = json.loads(path.read_text())
        return found

    def is_calm(self, pid: int, queues: int) -> bool:
        """Every frame is free, or with the card to receive into."""
        found = self.frames(pid)
        assert len(found) == self.kind.served(queues)
        return all(one["free"] + one["receiving"] == one["all"] and not one["held"] for one in found)

    def taken(self) -> int:
        """SYNs that have come to server2."""
        told = self.lab.servers[1].run("nft", "-j", "list", "table", "ip", "taken").stdout
        rules = [entry["rule"]["expr"] for entry in json.loads(told)["nftables"] if "rule" in entry]
        return int(next(part["counter"]["packets"] for part in rules[0] if "counter" in part))

    def flood(self, count: int) -> int:
        """So many have come from strangers, sent without waiting for anything; how many were sent for that."""
        syn = XDP_COUNTERS.index("syn")
        length, write = strangers(str(VIP4), self.lab.lb.mac())
        with (
            Map.from_pin(self.lab.lb.pins / "lb-eth0/xdp_counters") as counters,
            inside(self.lab.client.netns),
            XskSocket("eth0", load_program=False) as xsk,
        ):
            end, sent, turn = counters.sum_u64(syn) + count, 0, 0
            while turn % 16 or counters.sum_u64(syn) < end:
                batch = xsk.allocate(64, length)
                if sent < DIFFERENT:
                    write(batch)  # a frame keeps what was written when it is sent
                sent += xsk.send(batch)
                turn += 1
        return sent

    def syns(self, count: int, queues: int) -> None:
        """So many come from strangers, no more at once than there is room for."""
        received = WORKER_COUNTERS.index("received")
        with Map.from_pin(self.lab.lb.pins / "lb-eth0/worker_counters") as counters:

            def come() -> int:
                values = [counters.lookup(queue) or b"" for queue in range(self.kind.served(queues))]
                return sum(int.from_bytes(value[8 * received : 8 * received + 8], sys.byteorder) for value in values)

            length, write = strangers(str(VIP4), self.lab.lb.mac())
            before = come()
            with inside(self.lab.client.netns), XskSocket("eth0", load_program=False) as xsk:
                sent = 0
                while sent < count:
                    batch = xsk.allocate(min(64, count - sent), length)
                    write(batch)
                    sent += xsk.send(batch)
                    until(lambda sent=sent: sent - (come() - before) <= AHEAD)
            until(lambda: come() - before == count)


@pytest.fixture(scope="module", params=[IGB, SPARE, VIRTIO], ids=["igb", "virtio-spare", "virtio"])
def plugged(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cards]:
    for driver in ("virtio_net", "igb"):
        subprocess.run(["modprobe", driver], check=True)
    with Lab.create(unique(), "bridge", 2) as lab:
        made = Cards(lab, tmp_path_factory.mktemp("cards"), request.param)
        yield made
        made.end()


@pytest.fixture
def cards(plugged: Cards) -> Iterator[Cards]:
    yield plugged
    plugged.rest()


def grown(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """By how much counters have, those that have."""
    return {name: n - before[name] for name, n in now.items() if n != before[name]}


def test_each_syn_is_sent_on_once(cards: Cards) -> None:
    """By all queues; each is in one counter, and each frame in one place.  Then there come more than there is room for:
    each is sent on, or in one counter of what was dropped, no frame is lost, and afterwards all is as before."""
    queues, served = cards.kind.queues, cards.kind.served(cards.kind.queues)
    cards.set_queues(queues)
    daemon = cards.start(queues)
    before, already = status(cards.lab), cards.taken()
    cards.syns(FEW, queues)
    until(lambda: cards.taken() - already == FEW)
    now = status(cards.lab)
    total = grown(now["total"], before["total"])
    assert total["received"] == total["sent"] == FEW
    assert not [name for name in total if name.startswith(("drop", "xsk"))]
    assert now["xdp"]["drop_no_socket"] == before["xdp"]["drop_no_socket"]
    shares = [w["received"] - b["received"] for w, b in zip(now["workers"], before["workers"], strict=True)]
    assert sum(shares) == FEW and min(shares) > FEW / served / 4  # RSS
    until(lambda: cards.is_calm(daemon.pid, queues))

    before, already, began = now, cards.taken(), time.monotonic()
    sent = cards.flood(SYNS)
    took = time.monotonic() - began

    def counted() -> tuple[int, int, int, dict[str, int]]:
        """What came, what workers had, what they sent; by which reasons the rest was dropped."""
        now = status(cards.lab)
        total = grown(now["total"], before["total"])
        lost = {name: n for name, n in total.items() if name.startswith("drop") or name in NO_ROOM}
        came = sum(now["xdp"][name] - before["xdp"][name] for name in HANDED)
        return came, total["received"], total["sent"], lost

    def is_whole() -> bool:
        came, received, gone, lost = counted()
        full = sum(lost.get(name, 0) for name in NO_ROOM)
        return came == received + full and received == gone + sum(lost.values()) - full

    until(is_whole, 300)
    came, _, gone, lost = counted()
    print(f"\n{sent:,} SYNs sent, {came:,} came to {served} queues, in {took:.0f} s of its time;"
          f" {gone:,} sent on, {cards.taken() - already:,} arrived; dropped: {lost or 'none'}", end=" ")  # fmt: skip
    assert came >= SYNS
    assert 0 < cards.taken() - already <= gone
    until(lambda: cards.is_calm(daemon.pid, queues))
    cards.is_served(queues)


def test_whatever_happens_to_it(cards: Cards) -> None:
    """Connections go on, and new ones are served."""
    lab, queues = cards.lab, 2
    if cards.kind.spare:  # with three programs would send by a queue that is not there, and the kernel panic
        cards.set_queues(3)
        refused = lab.lb.run(*crablb("serve", "--config", str(cards.config)), check=False)
        assert refused.returncode == 2
        assert "ethtool -L eth0 combined 2" in refused.stderr
        assert "xdp" not in lab.lb.run("ip", "link").stdout
    cards.set_queues(queues)
    daemon = cards.start(queues)
    held = cards.python(lab.client, "hold_many", VIP[4], "81", "8", ready=True)
    assert exchange(held, "begun") == "8"

    if cards.kind is IGB:
        assert cards.set_queues(4)
        queues = 4
        assert exchange(held, "four queues") == "8"
        assert not cards.set_queues(2, check=False)  # the kernel takes away none that has a socket
    else:
        for count in (1, 2):  # the driver lets nobody, while there is an XDP program
            assert not cards.set_queues(count, check=False)
            assert exchange(held, f"asked for {count} queues") == "8"
    cards.is_served(queues)

    for _ in range(2):
        lab.lb.ip("link set eth0 down", "link set eth0 up")
        lab.lb.ip(f"addr replace {lab.lb.ip6}/64 dev eth0 nodad")
        assert exchange(held, "down and up") == "8"
        cards.is_served(queues)
    cards.syns(1000, queues)
    until(lambda: cards.is_calm(daemon.pid, queues))

    daemon.kill()
    daemon.wait()
    assert exchange(held, "killed") == "8"
    cards.serve(config=cards.config)
    assert exchange(held, "begun anew") == "8"
    cards.is_served(queues)
    old = status(lab)["pid"]
    lab.lb.run(*crablb("takeover"))
    assert status(lab)["pid"] != old
    assert exchange(held, "taken over") == "8"
    cards.is_served(queues)
    cards.syns(1000, queues)

    os.kill(status(lab)["pid"], signal.SIGTERM)
    until(lambda: not lab.lb.pins.exists())
    assert "xdp" not in lab.lb.run("ip", "link").stdout
    cards.start(queues)
    assert exchange(held, "served again") == "8"
