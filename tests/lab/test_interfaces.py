"""Interfaces that change while they are served: queues, MTU, offloads, name; gone, and there again."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections import Counter
from ipaddress import ip_address

import pytest
from crablb._native import lib
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from crablb import LoadBalancer
from crablb.config import config_from_args
from crablb.dataplane import engine, queues
from crablb.dataplane.events import Event, Swept
from crablb.errors import ConfigError
from crablb.kernel.netlink import HopState
from crablb.kernel.xsk import XskSocket
from crablb.lab import VIP4, VIP6, Lab
from crablb.lab.demo import crablb, services
from tests.helpers import processes
from tests.helpers.cables import cable, two_networks
from tests.helpers.namespaces import inside
from tests.helpers.processes import answer, exchange, until
from tests.helpers.world import World, command, status
from tests.lab.test_engine import until as until_async
from tests.lab.test_macs import send

pytestmark = pytest.mark.long

VIP = {4: str(VIP4), 6: str(VIP6)}
CHANGED = "an interface has changed, and is served so"
GONE = "an interface is gone; it is served again when there is one of its name, and others meanwhile"


def logged(world: World, event: str) -> list[dict[str, str]]:
    return processes.logged(world.folder / "serve.log", event)


def number_queues(lab: Lab, count: int) -> None:
    """Of both ends of the load balancer's link, the receiver's first."""
    for node, interface in ((lab.lb, "eth0"), (lab.middle, "lb")):
        node.run("ethtool", "-L", interface, "rx", str(count), "tx", str(count))


def wide(lab: Lab, count: int = 4) -> None:
    """The load balancer's link can have so many queues, and has one."""
    lab.lb.ip("link del eth0")
    plug(lab, f"numrxqueues {count} numtxqueues {count}")
    for node, interface in ((lab.lb, "eth0"), (lab.middle, "lb")):
        node.run("ethtool", "-L", interface, "rx", "1", "tx", "1")


def plug(lab: Lab, how: str = "") -> None:
    """A link between the load balancer and the switch."""
    lab.middle.ip(f"link add eth0 netns {lab.lb.netns} {how} type veth peer name lb {how}", "link set lb master br0 up")
    lab.middle.run("ethtool", "-K", "lb", "gro", "on")
    lab.lb.ip("link set eth0 up", f"addr add {lab.lb.ip4}/24 dev eth0", f"addr add {lab.lb.ip6}/64 dev eth0 nodad")
    lab.client.ip("neigh flush all")  # it has another MAC address


def spread(world: World, count: int) -> None:
    """New connections come in by so many queues, all are redirected at once, and all workers had some."""
    before = status(world.lab)
    child = world.python(world.lab.client, "hold_names", VIP[4], "80", "80")
    assert Counter(answer(child).split()) == {"server1": 80}
    child.terminate()
    child.wait()
    now = status(world.lab)
    old = [queue["redirected"] for queue in before["workers"]] + [0] * count
    new = [queue["redirected"] - was for queue, was in zip(now["workers"], old, strict=False)]
    assert sum(new) == 80
    assert len(new) == count and min(new) > 0
    assert now["total"]["retransmitted_syn"] == before["total"]["retransmitted_syn"]
    assert now["xdp"]["drop_no_socket"] == 0


def test_more_queues_while_serving(make_world):
    world = make_world()
    lab = world.lab
    wide(lab)
    world.servers()
    world.client()
    world.serve()
    spread(world, 1)
    for count in (2, 4):
        number_queues(lab, count)
        until(lambda n=count: status(lab)["queues"] == [f"eth0/{i}" for i in range(n)])
        until(lambda n=count: f"{n} queues, MTU 1500" in [entry["now"] for entry in logged(world, CHANGED)])
        until(lambda: world.echo(VIP[4])["intact"])  # its link was down for a moment
        spread(world, count)


def test_fewer_cpus_than_queues(make_world):
    """No queue is left alone."""
    world = make_world()
    wide(world.lab)
    number_queues(world.lab, 3)
    world.servers()
    world.client()
    child = world.serve("--queues", "1")
    spread(world, 3)
    child.terminate()
    assert child.wait() == 0


def test_more_queues_than_there_is_room_for(make_lab, monkeypatch):
    lab = make_lab("bridge")
    wide(lab)

    class Small:
        """As the hot loop is, with room for two queues."""

        CRAB_MAX_QUEUES = 2

        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

    monkeypatch.setattr(queues, "lib", Small())

    async def main() -> None:
        load_balancer = engine.Engine(config_from_args(["eth0"], [f"tcp://{VIP4}:80=10.0.0.11"]), bytes(16))
        heard: list[object] = []
        load_balancer.listeners.append(heard.append)
        await load_balancer.start()
        try:
            assert load_balancer.queues == 1
            number_queues(lab, 4)
            await until_async(lambda: any(isinstance(n, Event) and n.kind == "interface-unserved" for n in heard))
            (reason,) = {n.reason for n in heard if isinstance(n, Event) and n.kind == "interface-unserved"}
            assert reason == "eth0 has 4 queues, and there was room for 2 at the start; restart crablb serve"
            assert load_balancer.queues == len(load_balancer.statistics()["workers"]) == 2
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_an_upload_and_a_larger_mtu(make_world):
    """Of a client that is not prepared, through user space."""
    world = make_world(offload=False)
    lab = world.lab
    world.servers(dsr=True)
    child = world.serve("--ack-bypass", "off")
    lab.middle.ip("link set br0 mtu 3000")
    for node in (lab.client, lab.lb, *lab.servers):
        lab.middle.ip(f"link set {node.name} mtu 3000")
        node.ip("link set eth0 mtu 3000")
    until(lambda: logged(world, CHANGED))
    packet = IP(src=lab.client.ip4, dst=VIP[4]) / TCP(sport=4000, dport=80, flags="A") / bytes(2960)
    send(lab, bytes(Ether(src=lab.client.mac(), dst=lab.lb.mac()) / packet))
    until(lambda: status(lab)["total"]["fallback_established"] == 1)
    for family in (4, 6):
        assert world.echo(VIP[family], "3000000")["intact"]
    child.terminate()
    assert child.wait() == 0


def gone(lab: Lab, name: str, pid: int) -> bool:
    """What is said where an interface is gone, to people and programs: by the daemon that waits for it."""
    told = lab.lb.run(*crablb("status", "--iface", name, "--json"), check=False)
    said = json.loads(told.stdout)
    shown = lab.lb.run(*crablb("status", "--iface", name), check=False)
    assert (told.returncode, shown.returncode, said["state"], said["pid"]) == (1, 1, "degraded", pid)
    return said["problems"][0] == f"interface {name} is gone" and f"  interface {name} is gone\n" in shown.stdout


@pytest.mark.parametrize("bypass", ["auto", "off"])
def test_one_of_two_goes_and_returns(make_world, bypass):
    """The other one is served meanwhile, and what was connected by this one is still."""
    world = make_world(servers=2, offload=False)
    lab = world.lab
    server, other = two_networks(world)
    what = [f"tcp://{VIP4}:80={server.ip4}", f"tcp://[{VIP6}]:80={server.ip6}"]
    serving = world.serve("--iface", "eth1", "--ack-bypass", bypass, what=what)
    held = world.python(other, "hold_many", VIP[4], "80", "20", ready=True)
    assert exchange(held, "one") == "20"
    for turn in (1, 2):
        lab.lb.ip("link del eth1")
        until(lambda n=turn: status(lab)["daemon"]["interfaces_lost"] == n)
        assert gone(lab, "eth1", serving.pid)
        for family in (4, 6):
            assert world.echo(VIP[family], "100000")["intact"]
        cable(lab.lb, other, 12)
        other.ip(f"route add {VIP4} via 10.9.0.2 dev eth1", f"route add {VIP6} via fd00:9::2 dev eth1")
        until(lambda n=turn: len(logged(world, "an interface is there again, and served")) == n)
        assert exchange(held, f"again {turn}") == "20"
        for family in (4, 6):
            assert world.echo(VIP[family], "100000", node=other)["intact"]
    assert [entry["interface"] for entry in logged(world, GONE)] == ["eth1"] * 2
    assert status(lab)["queues"] == ["eth0/0", "eth1/0"]
    assert all(worker["sent"] for worker in status(lab)["workers"])
    serving.terminate()
    assert serving.wait() == 0
    assert not lab.lb.pins.exists()


def test_the_only_one_goes_and_returns(make_world):
    """Its VIPs are announced anew; reloads, and signals, are heard meanwhile."""
    world = make_world()
    lab = world.lab
    world.servers(dsr=True)
    lab.client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    serving = world.serve("--announce", "arp")
    until(lambda: len(logged(world, "announced")) == 2)
    lab.lb.ip("link del eth0")
    until(lambda: logged(world, GONE))
    assert gone(lab, "eth0", serving.pid)
    assert lab.lb.run(*crablb("status"), check=False).returncode == 1  # the only one there is
    plug(lab)
    until(lambda: logged(world, "an interface is there again, and served"))
    until(lambda: len(logged(world, "announced")) == 4)
    for family in (4, 6):
        assert world.echo(VIP[family])["intact"]
    lab.lb.ip("link del eth0")
    until(lambda: len(logged(world, GONE)) == 2)
    serving.terminate()
    assert serving.wait() == 0
    assert not logged(world, "a background task failed; it is begun anew")
    assert not lab.lb.pins.exists()


def test_it_returns_otherwise(make_world):
    """Down and up; moved to another network namespace and back, with the index that it had."""
    world = make_world()
    lab = world.lab
    world.servers()
    world.client()
    world.serve()
    back = "an interface is there again, and served"
    lab.lb.ip("link set eth0 down")
    lab.lb.ip("link set eth0 up")
    lab.lb.ip(f"addr replace {lab.lb.ip6}/64 dev eth0 nodad")
    until(lambda: world.echo(VIP[4])["intact"] and world.echo(VIP[6])["intact"])
    assert not logged(world, GONE)
    for turn in (1, 2):
        lab.lb.ip(f"link set eth0 netns {lab.middle.netns}")
        until(lambda n=turn: len(logged(world, GONE)) == n)
        assert "xdp" not in lab.middle.run("ip", "link", "show", "eth0").stdout
        lab.middle.ip(f"link set eth0 netns {lab.lb.netns}")
        addresses = f"addr add {lab.lb.ip4}/24 dev eth0", f"addr add {lab.lb.ip6}/64 dev eth0 nodad"
        lab.lb.ip("link set eth0 up", *addresses)
        until(lambda n=turn: len(logged(world, back)) == n)
        until(lambda: world.echo(VIP[4])["intact"] and world.echo(VIP[6])["intact"])


def test_it_returns_and_cannot_be_served(make_world, monkeypatch):
    """Another program has its queue, or its XDP hook: told once, and tried again until it is free."""
    world = make_world()
    lab = world.lab
    world.servers()
    world.client()
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.1)

    def counter(lb: LoadBalancer, what: str) -> int:
        return lb.statistics().daemon[what]

    async def main() -> None:
        async with LoadBalancer("eth0", [f"tcp://{VIP4}:80=10.0.0.11"], seed=bytes(16)) as lb:
            for load in (False, True):
                known = counter(lb, "interfaces_unserved")
                lab.lb.ip("link del eth0")
                plug(lab)
                lab.lb.ip("link set eth0 name other")
                with XskSocket("other", load_program=load):
                    lab.lb.ip("link set other name eth0")
                    await until_async(lambda n=known: counter(lb, "interfaces_unserved") > n)
                await until_async(lambda: lb._supervisor.engine.modes == {"eth0": "native"})
                assert counter(lb, "interfaces_unserved") == known + 1
                assert await asyncio.to_thread(lambda: world.echo(VIP[4])["intact"])

    with inside(lab.lb.netns):
        asyncio.run(main())


RENAMED = "an interface has another name, and is served by it; name it so in the configuration"


def test_it_gets_another_name(make_world):
    """It is served by it, found by it, and taken over by it."""
    world = make_world(offload=False)
    lab = world.lab
    world.servers(dsr=True)
    first = world.serve()
    held = world.python(lab.client, "hold_many", VIP[4], "80", "20", ready=True)
    assert exchange(held, "one") == "20"
    lab.lb.ip("link set eth0 name lan0.7")
    until(lambda: logged(world, RENAMED))
    now = json.loads(command(lab.lb, "status", "--iface", "lan0.7", "--json"))
    assert (now["pid"], now["flows"], now["queues"]) == (first.pid, 20, ["lan0.7/0"])
    command(lab.lb, "status", "--iface", "eth0", expected=2)
    # The name is free for another one, and does not make that ours.
    lab.lb.ip("link add eth0 type veth peer name eth9", "link set eth0 up")
    for family in (4, 6):
        assert world.echo(VIP[family])["intact"]
    assert "xdp" not in lab.lb.run("ip", "link", "show", "eth0").stdout
    first.kill()
    first.wait()
    assert exchange(held, "two") == "20"
    what = [part for service in services(lab) for part in ("--service", service)]
    second = lab.lb.popen(*crablb("serve", "--iface", "lan0.7", *what), stderr=subprocess.PIPE)
    events: list[str] = []
    while "serving" not in events:
        events.append(json.loads(second.stderr.readline())["event"])
    assert "took over from a load balancer that had died" in events
    assert exchange(held, "three") == "20"
    second.terminate()
    assert second.wait() == 0
    assert not lab.lb.pins.exists()


def test_a_configuration_names_it_so(make_lab):
    lab = make_lab("bridge")
    service = f"tcp://{VIP4}:80=10.0.0.11"

    async def main() -> None:
        load_balancer = engine.Engine(config_from_args(["eth0"], [service]), bytes(16))
        await load_balancer.start()
        try:
            lab.lb.ip("link set eth0 name lan0")
            await until_async(lambda: load_balancer.modes == {"lan0": "native"})
            for name in ("lan0", "eth0", "lan0"):  # as it was at the start, or is now
                load_balancer.apply(config_from_args([name], [service]))
            with pytest.raises(ConfigError, match="interfaces cannot be changed while serving"):
                load_balancer.apply(config_from_args(["lan1"], [service]))
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())
    assert not lab.lb.pins.exists()


def test_two_exchange_their_names(make_world):
    world = make_world(offload=False)
    lab = world.lab
    world.servers(dsr=True)
    lab.lb.ip("link add eth1 type veth peer name eth2", "link set eth1 up", "link set eth2 up")
    first = world.serve("--iface", "eth1")
    held = world.python(lab.client, "hold_many", VIP[4], "80", "20", ready=True)
    assert exchange(held, "one") == "20"
    lab.lb.ip("link set eth0 name swap", "link set eth1 name eth0", "link set swap name eth1")
    until(lambda: {entry["interface"] for entry in logged(world, RENAMED)} >= {"eth0", "eth1"})
    until(lambda: status(lab)["queues"] == ["eth1/0", "eth0/0"])
    for family in (4, 6):
        assert world.echo(VIP[family])["intact"]
    first.kill()
    first.wait()
    second = world.serve("--iface", "eth1")
    assert len(logged(world, "took over from a load balancer that had died")) == 2
    assert exchange(held, "two") == "20"
    second.terminate()
    assert second.wait() == 0
    assert "xdp" not in lab.lb.run("ip", "link").stdout
    assert not lab.lb.pins.exists()


def test_the_other_end_takes_no_redirects_any_more(make_lab):
    """GRO is switched off and on there: who sends to the backends changes at once, not at the next sweep."""
    lab = make_lab("bridge")
    backend = ip_address("10.0.0.11")

    async def main() -> None:
        settings = config_from_args(["eth0"], [f"tcp://{VIP4}:80={backend}"])
        load_balancer = engine.Engine(settings, bytes(16))
        heard: list[object] = []
        load_balancer.listeners.append(heard.append)
        await load_balancer.start()
        try:
            await until_async(lambda: load_balancer.reached == {backend})
            for gro, reached in (("off", set()), ("on", {backend}), ("off", set())):
                lab.middle.run("ethtool", "-K", "lb", "gro", gro)
                await until_async(lambda r=reached: load_balancer.reached == r)
            assert not any(isinstance(notice, Swept) for notice in heard)
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_it_goes_while_a_program_works(make_world):
    """The library without threads: frames are worked on by one thread while another one follows the interface."""
    world = make_world()
    lab = world.lab
    world.servers()
    world.client()
    with (
        inside(lab.lb.netns),
        LoadBalancer("eth0", [f"tcp://{VIP4}:80=10.0.0.11"], seed=bytes(16), threads=False) as lb,
    ):
        ended = threading.Event()

        def work() -> None:
            while not ended.is_set():
                lb.process_once(0.01)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for turn in (1, 2, 3):
                assert world.echo(VIP[4])["intact"]
                lab.lb.ip("link del eth0")
                until(lambda n=turn: lb.statistics().daemon["interfaces_lost"] == n)
                plug(lab)
                until(lambda: lb._supervisor.engine.modes == {"eth0": "native"})
                until(lambda: [hop.state for hop in lb._supervisor.engine.hops.values()] == [HopState.RESOLVED])
            assert world.echo(VIP[4])["intact"]
            assert lb.statistics().workers["sent"] >= 4  # counted on, from one socket to the next
        finally:
            ended.set()
            worker.join()
