"""The meter of SYNs at a cable."""

from __future__ import annotations

import json
import random
import subprocess
import time

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from bench.context import Unavailable
from bench.takeover import Watch
from crablb.lab import Node
from tests.helpers.bench import quiet

pytestmark = pytest.mark.xdist_group("bench-crr")

LATE = 0.005  # seconds, the meter's


class Here(Node):
    """This network namespace."""

    def __init__(self) -> None:
        super().__init__("none", "here")

    def popen(self, *args, **more):
        return subprocess.Popen(args, text=True, **more)


@pytest.fixture
def cable(namespace):
    """The meter at veth1; sockets that send from there, and to there."""
    watch = Watch(quiet(), Here(), "veth1")
    with namespace.wire("veth1") as to_it, namespace.wire("veth0") as from_it:
        yield watch, to_it, from_it
    watch.close()


def syn(port: int, *, sequence: int = 1, v6: bool = False, flags: str = "S", to: str = "") -> Packet:
    ip = IPv6(src="fd00::1", dst=to or "fd00::100") if v6 else IP(src="10.0.0.1", dst=to or "10.0.0.100")
    return Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01") / ip / TCP(sport=port, dport=80, seq=sequence,
                                                                              flags=flags)  # fmt: skip


def counted(said: dict[str, float]) -> tuple[float, float]:
    return said["in"], said["out"]


def test_a_syn_is_known_again_by_its_client(cable):
    """Whatever else of it changes; that which comes back is timed, and that which does not is missing."""
    watch, to_it, from_it = cable
    for v6 in (False, True):
        for port in (1, 2, 3):
            to_it.send(bytes(syn(port, v6=v6)))
    assert counted(watch.ask()) == (6, 0)
    time.sleep(2 * LATE)  # it is this that is measured
    from_it.send(bytes(syn(1, to="10.0.0.11")))
    from_it.send(bytes(syn(2, v6=True, to="fd00::11")))
    said = watch.ask()
    assert counted(said) == (6, 2)
    assert said["late"] == 2
    assert said["longest"] >= 2e6 * LATE
    from_it.send(bytes(syn(3, sequence=2)))  # another connection's
    said = watch.ask()
    assert counted(said) == (6, 3)
    assert said["late"] == said["longest"] == 0


def test_only_syns_count(cable):
    watch, to_it, from_it = cable
    for sock in (to_it, from_it):
        for flags in ("A", "SA", "F", "R", "PA"):
            sock.send(bytes(syn(1, flags=flags)))
            sock.send(bytes(syn(1, v6=True, flags=flags)))
        sock.send(bytes(Ether() / IP(src="10.0.0.1", dst="10.0.0.100") / UDP(sport=2, dport=2) / (b"\x02" * 40)))
        sock.send(bytes(Ether() / IPv6(src="fd00::1", dst="fd00::100") / IPv6ExtHdrDestOpt() / TCP(flags="S")))
    assert counted(watch.ask()) == (0, 0)
    options = IP(src="10.0.0.1", dst="10.0.0.100", options=[b"\x01" * 3 + b"\0"])
    to_it.send(bytes(Ether() / options / TCP(sport=1, seq=5, flags="SEC")))
    assert counted(watch.ask()) == (1, 0)


def test_one_that_is_sent_again_counts_twice(cable):
    """And is as old as its last copy."""
    watch, to_it, from_it = cable
    to_it.send(bytes(syn(1)))
    time.sleep(2 * LATE)
    again = time.monotonic()
    to_it.send(bytes(syn(1)))
    from_it.send(bytes(syn(1)))
    said = watch.ask()
    assert counted(said) == (2, 1)
    assert 0 < said["longest"] <= 1e6 * (time.monotonic() - again)


def test_those_between_two_times(cable):
    """Who was there at some time between, and has come out."""
    watch, to_it, from_it = cable
    before = time.time()
    to_it.send(bytes(syn(1)))
    watch.ask()
    between = time.time()
    time.sleep(2 * LATE)
    from_it.send(bytes(syn(1)))
    to_it.send(bytes(syn(2)))
    watch.ask()
    after = time.time()
    assert watch.ask((between, after))["count"] == 1
    assert 2e6 * LATE <= watch.ask((between, after))["longest"] <= 1e6 * (after - before)
    assert (watch.ask((before - 1, before))["count"], watch.ask((after, after + 1))["count"]) == (0, 0)
    from_it.send(bytes(syn(2)))
    watch.ask()
    assert watch.ask((between, after))["count"] == 2


def test_many_in_any_order(cable):
    """Each finds itself again, however the table has been mixed."""
    watch, to_it, from_it = cable
    frames = [bytes(syn(n % 65536, sequence=n * 2654435761 % 2**32)) for n in range(4000)]
    for frame in frames:
        to_it.send(frame)
    time.sleep(2 * LATE)
    random.Random(1).shuffle(frames)
    for frame in frames[:3000]:
        from_it.send(frame)
    said = watch.ask()
    assert counted(said) == (4000, 3000)
    assert said["late"] == 3000


def test_no_such_interface(namespace):
    with pytest.raises(Unavailable, match="synwatch did not start: synwatch: none: "):
        Watch(quiet(), Here(), "none")


def test_what_it_says(namespace):
    program = str(quiet().make("synwatch"))
    done = subprocess.run([program, "veth1"], input="\n", capture_output=True, text=True, check=True)
    ready, said = done.stdout.splitlines()
    assert ready == "ready"
    assert json.loads(said) == {"in": 0, "out": 0, "missed": 0, "longest": 0, "late": 0}
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "synwatch: usage: synwatch INTERFACE\n")
