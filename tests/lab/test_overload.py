"""More SYNs than can be taken, from addresses that are nobody's: honest clients, the API, memory, and afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crablb.lab import VIP4, Lab
from tests.helpers.processes import answer, until
from tests.helpers.world import World, command, status

HONEST = 200
SYNS = 100_000  # at least, while they connect
DIFFERENT = 8192  # of a flood as fast as can be: each frame of the sender's is written, and then only sent
#: Of the kernel: what SYNs wait for, on a server that is to be found at its limit.
COOKIES = {"net.ipv4.tcp_syncookies": 1, "net.ipv4.tcp_max_syn_backlog": 1024, "net.core.somaxconn": 1024}


def two_services(make_world: Callable[..., World]) -> World:
    """Servers of ports 80, which a flood is for, and 81."""
    world = make_world(servers=2, offload=False)
    for server in world.lab.servers:
        server.set(COOKIES)
    world.servers()
    for server in world.lab.servers:
        world.python(server, "serve", server.name, "81", ready=True)
    return world


def configured(world: World, rate: int) -> Path:
    """A configuration of both; the first one takes so many SYNs a second."""
    backends = ", ".join(f'"{server.ip4}"' for server in world.lab.servers)
    path = world.folder / "lb.toml"
    services = "".join(
        f'[[service]]\naddress = "tcp://{VIP4}:{port}"\nbackends = [{backends}]\ncheck = []\nsyn_rate = {limit}\n'
        for port, limit in ((80, rate), (81, 0))
    )
    path.write_text(f'interface = "eth0"\nflows = 4096\npersist = "off"\n{services}')
    return path


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def accounted(lab: Lab) -> bool:
    """Whether each packet that the XDP program handed over was a worker's, or lost in front of it."""
    counts = status(lab)
    handed = sum(counts["xdp"][name] for name in ("syn", "other", "icmp", "vip", "handler"))
    total = counts["total"]
    return bool(handed == total["received"] + total["xsk_rx_dropped"] + total["xsk_rx_full"])


@pytest.mark.parametrize("rate", [0, 5000], ids=["all", "syn_rate"])
def test_honest_clients_in_a_flood(make_world, rate):
    """99 % need one retransmission at most: of the service that is flooded, or, if that is limited, of another one."""
    world = two_services(make_world)
    lab = world.lab
    daemon = world.serve(config=configured(world, rate))
    flood = world.python(lab.client, "flood", str(VIP4), lab.lb.mac(), str(10**9))
    until(lambda: status(lab)["total"]["received"] > 5000)
    before = resident(daemon.pid)  # the API has been imported
    honest = world.python(lab.client, "connects", str(VIP4), "81" if rate else "80", str(HONEST))
    asked = []
    while honest.poll() is None and len(asked) < 50:
        begun = time.monotonic()
        command(lab.lb, "services", "--iface", "eth0", "--json")
        asked.append(time.monotonic() - begun)
    retransmitted = json.loads(answer(honest))
    assert len(retransmitted) == HONEST
    assert sum(n is not None and n <= 1 for n in retransmitted) >= HONEST * 0.99, retransmitted
    until(lambda: status(lab)["total"]["received"] > SYNS)
    assert flood.poll() is None
    flood.kill()
    flood.wait()
    # How long it takes is for the report; that it is answered at all, in a flood, is for this test.
    assert asked
    took = sorted(asked)[len(asked) // 2]
    print(f"{status(lab)['total']['received']} packets, {sum(retransmitted)} sent again, the API after {took:.3f} s")
    assert resident(daemon.pid) < before + (8 << 20)
    assert bool(status(lab)["xdp"]["drop_syn_rate"]) == bool(rate)
    assert world.echo(VIP4, "100000")["intact"]
    until(lambda: accounted(lab))
    assert not status(lab)["problems"]


def asked(lab: Lab, count: int = 15) -> float:
    """Seconds in which the API answers: the median."""
    took = []
    for _ in range(count):
        begun = time.monotonic()
        command(lab.lb, "services", "--iface", "eth0", "--json")
        took.append(time.monotonic() - begun)
    return sorted(took)[count // 2]


def starve(world: World, daemon: subprocess.Popen[str], nice: int = 19) -> tuple[int, subprocess.Popen[str]]:
    """Begin a flood that leaves the worker little of a CPU, with ``nice`` 0 half of it: its thread, and the sender.

    A worker that has a core of its own takes what a sender on another one makes.  How many times what it can take comes
    then, the machine and its other work decide.
    """
    (worker,) = (
        int(task.name)
        for task in Path(f"/proc/{daemon.pid}/task").iterdir()
        if (task / "comm").read_text().startswith("crablb-eth0/")
    )
    cpu = min(os.sched_getaffinity(0))
    os.sched_setaffinity(worker, {cpu})
    os.setpriority(os.PRIO_PROCESS, worker, nice)
    flood = world.python(world.lab.client, "flood", str(VIP4), world.lab.lb.mac(), str(10**9), str(DIFFERENT))
    os.sched_setaffinity(flood.pid, {cpu})
    return worker, flood


def came(lab: Lab) -> tuple[int, int, int]:
    """SYNs that came; of these what the rate left of them for the worker, and what that has taken."""
    counts = status(lab)
    xdp, total = counts["xdp"], counts["total"]
    return xdp["syn"] + xdp["drop_syn_rate"], xdp["syn"], total["received"]


def ended(flood: subprocess.Popen[str]) -> None:
    assert flood.poll() is None
    flood.kill()
    flood.wait()


@pytest.mark.long
def test_many_times_what_a_worker_can_take(make_world):
    """Without a rate the worker works on all the while, and as before afterwards."""
    world = two_services(make_world)
    lab = world.lab
    daemon = world.serve(config=configured(world, 0))
    before, memory = asked(lab), resident(daemon.pid)  # the API has been imported
    worker, flood = starve(world, daemon)
    until(lambda: came(lab)[0] > 1000, 300)
    begun = came(lab)
    during = asked(lab)
    honest = world.python(lab.client, "connects", str(VIP4), "80", "50")
    retransmitted = json.loads(answer(honest))
    until(lambda: came(lab)[0] > begun[0] + SYNS, 300)
    end = came(lab)
    ended(flood)
    offered, taken = end[0] - begun[0], end[2] - begun[2]
    served = sum(n is not None for n in retransmitted)
    print(f"{offered} came, {taken} were taken, 1 of {offered / taken:.0f}; {served} of 50 honest clients were served")
    print(f"the API after {before:.3f} s, then {during:.3f} s; sent again: {retransmitted}")
    assert offered > 2 * taken > 0  # it is no livelock: that would be to throw away alone
    assert during < max(0.1, 4 * before)  # a machine that is busy with other things answers late by itself
    assert resident(daemon.pid) < memory + (8 << 20)
    os.setpriority(os.PRIO_PROCESS, worker, 0)
    assert all(seen["intact"] for seen in world.echoes(VIP4, 20))
    until(lambda: accounted(lab))
    assert not status(lab)["problems"]


@pytest.mark.long
def test_many_times_what_a_worker_can_take_of_another_service(make_world):
    """With a rate the flood stays in front of the rings: clients of the other service do not notice.

    Those of the flooded one are served when it is over.
    """
    rate = 1000
    world = two_services(make_world)
    lab = world.lab
    daemon = world.serve(config=configured(world, rate))
    before, memory = asked(lab), resident(daemon.pid)
    worker, flood = starve(world, daemon, nice=0)  # it is to have the CPU time for what the rate leaves
    until(lambda: came(lab)[0] > 1000, 300)
    at, begun = time.monotonic(), came(lab)
    during = asked(lab)
    honest = world.python(lab.client, "connects", str(VIP4), "81", str(HONEST))
    retransmitted = json.loads(answer(honest))
    until(lambda: came(lab)[0] > begun[0] + SYNS, 300)
    end = came(lab)
    took = time.monotonic() - at
    own = world.python(lab.client, "connects", str(VIP4), "80", "20")
    until(lambda: came(lab)[0] > end[0] + SYNS // 5, 300)  # they have begun in it
    ended(flood)
    late = json.loads(answer(own))
    offered, passed = end[0] - begun[0], end[1] - begun[1]
    lost = {name: n for name, n in status(lab)["total"].items() if name in ("xsk_rx_full", "xsk_rx_dropped")}
    again = sum(n or 0 for n in retransmitted)
    print(f"{offered} came in {took:.1f} s, {passed} were let through, 1 of {offered / passed:.0f}; then lost: {lost}")
    print(f"sent again: {again} by {HONEST} clients of the other service; by 20 of this one {late}")
    print(f"the API after {before:.3f} s, then {during:.3f} s")
    assert sum(n is not None and n <= 1 for n in retransmitted) >= HONEST * 0.99, retransmitted
    # What comes with time, the bucket, and the others' SYNs, sent again or not.
    assert passed <= rate * took + rate // 10 + HONEST + again
    assert None not in late, late
    assert during < max(0.1, 4 * before)
    assert resident(daemon.pid) < memory + (8 << 20)
    os.setpriority(os.PRIO_PROCESS, worker, 0)
    assert all(seen["intact"] for seen in world.echoes(VIP4, 20))
    until(lambda: accounted(lab))
    assert not status(lab)["problems"]


def test_a_rate_through_reloads_and_takeovers(make_world):
    """In a flood: the rate that the configuration says is the one in force, before and after."""
    world = two_services(make_world)
    lab = world.lab
    path = configured(world, 1000)
    daemon = world.serve(config=path)
    flood = world.python(lab.client, "flood", str(VIP4), lab.lb.mac(), str(10**9))

    def holds(rate: int) -> None:
        at, begun = time.monotonic(), came(lab)
        until(lambda: came(lab)[0] > begun[0] + 10 * rate)
        end, took = came(lab), time.monotonic() - at
        print(f"{rate} a second: {end[0] - begun[0]} came in {took:.1f} s, {end[1] - begun[1]} were let through")
        assert 0 < end[1] - begun[1] <= rate * took + max(rate // 10, 16)

    holds(1000)
    configured(world, 200)
    reloads = status(lab)["daemon"]["reloads"]
    daemon.send_signal(signal.SIGHUP)
    until(lambda: status(lab)["daemon"]["reloads"] > reloads)
    holds(200)
    counted = status(lab)["xdp"]["drop_syn_rate"]
    world.serve("--takeover", config=path)
    daemon.wait()
    assert status(lab)["xdp"]["drop_syn_rate"] >= counted
    holds(200)
    assert max(json.loads(answer(world.python(lab.client, "connects", str(VIP4), "81", "50")))) <= 1
    configured(world, 0)
    command(lab.lb, "reload", "--iface", "eth0")
    ended(flood)
    counted = status(lab)["xdp"]["drop_syn_rate"]
    assert all(seen["intact"] for seen in world.echoes(VIP4, 20))
    assert status(lab)["xdp"]["drop_syn_rate"] == counted
    until(lambda: accounted(lab))
