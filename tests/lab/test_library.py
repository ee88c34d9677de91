"""The library: a load balancer inside of this process."""

from __future__ import annotations

import asyncio
import threading
from ipaddress import ip_address

import pytest

from crablb import Backend, ConfigError, Event, KernelError, LoadBalancer, Service, State, Vip
from crablb.api import types
from crablb.api.client import ApiError, Client, NotRunning, discover
from crablb.lab import VIP4
from tests.helpers.namespaces import inside
from tests.helpers.processes import until
from tests.helpers.world import World, status

VIP = Vip(VIP4, 80)
A, B, C = (ip_address(f"10.0.0.1{i}") for i in (1, 2, 3))
SEED = bytes(16)


def served(world: World) -> str:
    return str(world.echo(VIP4, "10")["server"])


def prepared(standing, servers: int = 3) -> World:
    world = standing(servers=servers)
    world.client()
    return world


def test_changes_while_it_runs(standing):
    world = prepared(standing)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def who() -> str:
            return await loop.run_in_executor(None, served, world)

        service = Service(VIP, (Backend(A), Backend(B)), policy="round-robin")
        async with LoadBalancer("eth0", [service], seed=SEED) as lb:
            assert [await who() for _ in range(4)] == ["server1", "server2"] * 2
            lb.add_backend(VIP, Backend(C))
            async with asyncio.timeout(60):
                while "server3" not in {await who() for _ in range(3)}:
                    pass
            lb.drain(VIP, A)
            assert {await who() for _ in range(4)} == {"server2", "server3"}
            lb.set_weight(VIP, B, 0)
            assert {await who() for _ in range(3)} == {"server3"}
            lb.set_state(VIP, A, State.UP)
            lb.remove_backend(VIP, C)
            assert {await who() for _ in range(3)} == {"server1"}
            assert lb.services == (Service(VIP, (Backend(A), Backend(B, 0)), policy="round-robin"),)
            counts = lb.statistics()
            assert counts.workers["redirected"] == counts.queues[0]["redirected"] > 10
            assert counts.loads[VIP][A].assigned > 3
            assert counts.daemon["reloads"] == 5
            # What cannot be changes nothing.
            before = lb.services
            for wrong in (
                lambda: lb.add_backend(VIP, Backend(A)),
                lambda: lb.add_service("tcp://10.0.0.100:80=10.0.0.12"),
                lambda: lb.remove_service(Vip(VIP4, 81)),
                lambda: lb.set_weight(VIP, C, 1),
                lambda: lb.replace_services([Service(VIP, (Backend(A),), policy="none")]),
            ):
                with pytest.raises(ConfigError):
                    wrong()
            assert lb.services == before
            with pytest.raises(KernelError, match="running already"):
                await lb.start()
            other = Vip(VIP4, 81)
            lb.add_service(f"{other}=10.0.0.11")
            lb.remove_service(VIP)
            assert [s.vip for s in lb.services] == [other]
        with pytest.raises(KernelError, match="not running"):
            lb.statistics()
        await lb.close()

    with inside(world.lab.lb.netns):
        asyncio.run(main())
    assert "xdp" not in world.lab.lb.run("ip", "link").stdout


def test_events(standing):
    world = prepared(standing, 2)

    def broken(batch, backends):
        raise RuntimeError("broken")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with LoadBalancer(["eth0"], [Service(VIP, (Backend(A), Backend(B)), policy=broken)], seed=SEED) as lb:
            events = lb.events()

            async def following(kind: str) -> Event:
                async with asyncio.timeout(30):
                    while (event := await anext(events)).kind != kind:
                        pass
                return event

            lb_event = asyncio.create_task(following("changed"))
            await asyncio.sleep(0)  # it listens
            lb.set_weight(VIP, A, 2)
            assert await lb_event == Event("changed")
            assert await loop.run_in_executor(None, served, world) in ("server1", "server2")
            assert await following("policy-failed") == Event("policy-failed", vip=VIP, reason="RuntimeError: broken")
            world.lab.lb.ip("route add unreachable 10.0.0.12/32")
            down = await following("backend-down")
            assert (down.backend, down.reason) == (B, "no route: No route to host")
            world.lab.lb.ip("route del unreachable 10.0.0.12/32")
            assert await following("backend-up") == Event("backend-up", B)
            await events.aclose()

    with inside(world.lab.lb.netns):
        asyncio.run(main())


def test_in_a_thread_of_its_own(standing):
    world = prepared(standing, 2)
    with inside(world.lab.lb.netns), LoadBalancer("eth0", [f"{VIP}=10.0.0.11"], seed=SEED) as lb:
        assert served(world) == "server1"
        threads = [threading.Thread(target=lb.set_weight, args=(VIP, A, w)) for w in (2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lb.add_backend(VIP, Backend(B))
        lb.drain(VIP, A)
        # A SYN that is lost, as while the way to a new backend is not known yet, is sent anew without an offer.
        until(lambda: served(world) == "server2" and lb.statistics().workers["redirected"] >= 2)
    with inside(world.lab.lb.netns), pytest.raises(KernelError, match="eth7 does not exist"):
        LoadBalancer("eth7", [f"{VIP}=10.0.0.11"], seed=SEED).__enter__()
    assert "crablb-control" not in {thread.name for thread in threading.enumerate()}


def test_it_is_asked_by_others(standing):
    """Their changes are told apart from the program's own, and seen by it; what is the program's is refused them."""
    world = prepared(standing, 2)
    with inside(world.lab.lb.netns):
        described = [f"{VIP}=10.0.0.11,10.0.0.12", f"tcp://{VIP4}:81=10.0.0.11,10.0.0.12"]
        with LoadBalancer("eth0", described, seed=SEED, admin="on") as lb, Client(discover("eth0")) as client:

            def changes() -> int:
                found = client.get("/v1/status", types.Status)
                assert len(client.get("/v1/diff", types.Diff).changes) == found.changes
                return found.changes

            assert status(world.lab)["state"] == "serving"
            lb.set_weight(VIP, A, 2)
            lb.add_service(f"tcp://{VIP4}:82=10.0.0.11")
            assert changes() == 0
            client.patch(f"/v1/services/tcp:{VIP4}:81/backends/10.0.0.11", types.Applied, types.Patch(state="drain"))
            assert changes() == 1
            assert lb.backend(f"tcp://{VIP4}:81", A).state is State.DRAIN
            lb.set_weight(VIP, B, 0)  # of another service: theirs is one still
            assert changes() == 1
            lb.set_weight(f"tcp://{VIP4}:81", B, 3)
            assert changes() == 0
            client.delete(f"/v1/services/tcp:{VIP4}:82", types.Applied)
            assert changes() == 1
            lb.replace_services(described)
            assert changes() == 0
            for path, code in (("/v1/reload", 400), ("/v1/plan", 400), ("/v1/save", 400), ("/v1/takeover", 409)):
                with pytest.raises(ApiError) as raised:
                    client.post(path, types.Applied)
                assert raised.value.code == code, path
            stream = client.events(0)
            assert next(stream).number == 1
        with pytest.raises(NotRunning):
            discover("eth0")
        list(stream)  # it comes to its end
        with LoadBalancer("eth0", described, seed=SEED, admin="on"), Client(discover("eth0")) as client:
            assert client.get("/v1/status", types.Status).changes == 0


def test_without_threads(make_world):
    """Nothing happens but when the program says so."""
    world = make_world()
    world.servers()
    world.client()

    async def main() -> None:
        async with LoadBalancer("eth0", [f"{VIP}=10.0.0.11"], seed=SEED, threads=False) as lb:
            loop = asyncio.get_running_loop()
            echo = loop.run_in_executor(None, served, world)
            frames = 0
            async with asyncio.timeout(30):
                while not echo.done():
                    frames += lb.process_once(0.01)
                    await asyncio.sleep(0)
            assert await echo == "server1"
            assert frames == lb.statistics().workers["received"] >= 1
            assert not any(thread.name.startswith("crablb-eth0/") for thread in threading.enumerate())
            world.lab.lb.ip("link del eth0")
            async with asyncio.timeout(60):
                while not lb.statistics().daemon["interfaces_lost"]:
                    assert lb.process_once(0.01) == 0
                    await asyncio.sleep(0)

    with inside(world.lab.lb.netns):
        asyncio.run(main())
