"""More SYNs than can be taken, from addresses that are nobody's: honest clients, the API, memory, and afterwards."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from crablb.lab import VIP4, Lab
from tests.helpers.processes import answer, until
from tests.helpers.world import World, command, status

HONEST = 200
SYNS = 100_000  # at least, while they connect
#: Of the kernel: what SYNs wait for, on a server that is to be found at its limit.
COOKIES = {"net.ipv4.tcp_syncookies": 1, "net.ipv4.tcp_max_syn_backlog": 1024, "net.core.somaxconn": 1024}


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("rate", [0, 5000], ids=["all", "syn_rate"])
def test_honest_clients_in_a_flood(make_world, rate):
    """99 % need one retransmission at most: of the service that is flooded, or, if that is limited, of another one."""
    world: World = make_world(servers=2, offload=False)
    lab = world.lab
    for server in lab.servers:
        server.set(COOKIES)
    world.servers()
    for port in (81,) if rate else ():
        for server in lab.servers:
            world.python(server, "serve", server.name, str(port), ready=True)
    backends = ", ".join(f'"{s.ip4}"' for s in lab.servers)
    path = world.folder / "lb.toml"
    services = "".join(
        f'[[service]]\naddress = "tcp://{VIP4}:{port}"\nbackends = [{backends}]\ncheck = []\nsyn_rate = {limit}\n'
        for port, limit in ((80, rate), (81, 0))
    )
    path.write_text(f'interface = "eth0"\nflows = 4096\n{services}')
    daemon = world.serve(config=path)
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
    total = status(lab)["total"]
    assert bool(total.get("drop_rate")) == bool(rate)
    assert world.echo(VIP4, "100000")["intact"]
    assert not status(lab)["problems"]


def asked(lab: Lab, count: int = 15) -> float:
    """Seconds in which the API answers: the median."""
    took = []
    for _ in range(count):
        begun = time.monotonic()
        command(lab.lb, "services", "--iface", "eth0", "--json")
        took.append(time.monotonic() - begun)
    return sorted(took)[count // 2]


@pytest.mark.long
def test_many_times_what_a_worker_can_take(make_world):
    """The sender has the worker's CPU but for what is left to it: it works on all the while, and as before afterwards.

    A worker that has a core of its own takes what a sender on another one makes: so it gets a small part of one.  How
    many times, the machine and its other work decide, which the test prints.
    """
    world: World = make_world(servers=2, offload=False)
    lab = world.lab
    for server in lab.servers:
        server.set(COOKIES)
    world.servers()
    backends = ", ".join(f'"{s.ip4}"' for s in lab.servers)
    path = world.folder / "lb.toml"
    service = f'[[service]]\naddress = "tcp://{VIP4}:80"\nbackends = [{backends}]\ncheck = []\n'
    path.write_text(f'interface = "eth0"\nflows = 4096\n{service}')
    daemon = world.serve(config=path)
    before, memory = asked(lab), resident(daemon.pid)  # the API has been imported
    (worker,) = (
        int(task.name)
        for task in Path(f"/proc/{daemon.pid}/task").iterdir()
        if (task / "comm").read_text().startswith("crablb-eth0/")
    )
    cpu = min(os.sched_getaffinity(0))
    os.sched_setaffinity(worker, {cpu})
    os.setpriority(os.PRIO_PROCESS, worker, 19)
    flood = world.python(lab.client, "flood", str(VIP4), lab.lb.mac(), str(10**9), str(SYNS))
    os.sched_setaffinity(flood.pid, {cpu})

    def offered() -> tuple[int, int]:
        """SYNs that came, and of these what the worker has taken."""
        counts = status(lab)
        lost = sum(counts["total"][name] for name in ("xsk_rx_dropped", "xsk_rx_full"))
        return counts["total"]["received"] + lost, counts["total"]["received"]

    until(lambda: offered()[0] > 1000, 300)
    begun = offered()
    during = asked(lab)
    honest = world.python(lab.client, "connects", str(VIP4), "80", "50")
    retransmitted = json.loads(answer(honest))
    until(lambda: offered()[0] > begun[0] + SYNS, 300)
    end = offered()
    flood.kill()
    flood.wait()
    came, taken = end[0] - begun[0], end[1] - begun[1]
    served = sum(n is not None for n in retransmitted)
    print(f"{came} came, {taken} were taken, 1 of {came / taken:.0f}; {served} of 50 honest clients were served")
    print(f"the API after {before:.3f} s, then {during:.3f} s; sent again: {retransmitted}")
    assert came > 2 * taken > 0  # it is no livelock: that would be to throw away alone
    assert during < max(0.1, 4 * before)  # a machine that is busy with other things answers late by itself
    assert resident(daemon.pid) < memory + (8 << 20)
    os.setpriority(os.PRIO_PROCESS, worker, 0)
    assert all(seen["intact"] for seen in world.echoes(VIP4, 20))
    assert not status(lab)["problems"]
