"""Explanations: what they foretell is what happens then, and asking changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from crablb._native import lib

from crablb import Backend, ConfigError, LoadBalancer, Service, Vip
from crablb.api.types import Explanation
from crablb.control import explain as words
from crablb.lab import VIP4, VIP6
from crablb.model import Fallback, Mode
from crablb.selection.standing import Standing
from tests.helpers.namespaces import inside
from tests.helpers.world import World

FOUR, SIX = Vip(VIP4, 80), Vip(VIP6, 80)
BACKENDS = tuple(Backend(ip_address(f"10.0.0.1{i}")) for i in (1, 2, 3))
BACKENDS6 = tuple(Backend(ip_address(f"fd00::1{i}")) for i in (1, 2, 3))
SEED = bytes(range(16))


def serving(world: World, services: list[Service], check: Callable[[LoadBalancer], Any], **more: Any) -> None:
    """Run ``check`` in a thread beside a load balancer in the lab."""

    async def main() -> None:
        async with LoadBalancer("eth0", services, seed=SEED, **more) as lb:
            await asyncio.get_running_loop().run_in_executor(None, check, lb)

    with inside(world.lab.lb.netns):
        asyncio.run(main())


def explained(lb: LoadBalancer, client: str, vip: Vip, **more: Any) -> Explanation:
    engine = lb._running.engine
    asyncio.run_coroutine_threadsafe(engine.stage(), lb._loop).result()
    return lb._in_loop(lambda: words.explain(engine, client, str(vip), **more))


def outcome(found: Explanation, what: str) -> str:
    return next(step.outcome for step in found.steps if step.what == what)


def why(found: Explanation, what: str) -> str:
    return next(step.why for step in found.steps if step.what == what)


def test_what_is_foretold_comes_about(standing):
    world = standing(servers=3)
    world.client()
    names = {str(b.address): f"server{i}" for each in (BACKENDS, BACKENDS6) for i, b in enumerate(each, 1)}
    macs = {server.name: bytes.fromhex(server.mac().replace(":", "")) for server in world.lab.servers}
    four = [Service(FOUR, BACKENDS), Service(SIX, BACKENDS6, policy="source-hash")]

    def check(lb: LoadBalancer) -> None:
        before = lb.statistics()
        for vip, client, ports in ((FOUR, "10.0.0.1", range(41000, 41008)), (SIX, "fd00::1", range(41010, 41013))):
            for port in ports:
                source = f"[{client}]:{port}" if vip is SIX else f"{client}:{port}"
                found = explained(lb, source, vip, frame=True)
                assert (found.redirected, outcome(found, "redirect")) == (True, "redirected")
                assert bytes.fromhex(found.frame)[:6] == macs[names[found.backend]]
                seen = world.echo(vip.address, "10", str(port))
                assert (seen["server"], seen["intact"]) == (names[found.backend], True)
        after = lb.statistics()
        # Eleven connections, each of one SYN; of the explanations nothing that serves knows.
        assert after.workers["received"] - before.workers["received"] == 11
        assert after.xdp["syn"] - before.xdp["syn"] == 11

    serving(world, four, check)


def test_a_fallback_flow_is_known(standing):
    world = standing(servers=3)

    def check(lb: LoadBalancer) -> None:
        found = explained(lb, "10.0.0.1:42000", FOUR, offer=False)
        assert (found.redirected, outcome(found, "flow")) == (False, "none is known")
        assert why(found, "redirect") == "the client made no offer"
        assert "TCP 10.0.0.1 -> 10.0.0.100" in outcome(found, "out")
        held = world.python(world.lab.client, "hold", str(VIP4), "80", "42000", ready=True)
        again = explained(lb, "10.0.0.1:42000", FOUR, offer=False)
        assert outcome(again, "flow") == f"{found.backend}, open"
        assert held.poll() is None
        (flow,) = lb._running.engine._running.flows.flows()
        assert not flow["flags"] & lib.CRAB_FLOW_ASK  # as a real SYN would have it asked about

    serving(world, [Service(FOUR, BACKENDS)], check)


def test_why_not(standing):
    world = standing(servers=3)
    never = Service(FOUR, BACKENDS, mode=Mode.NEVER, fallback=Fallback.DSR_IPIP, checks=())
    few = Service(Vip(VIP4, 81), BACKENDS, redirect_clients=(ip_network("192.168.0.0/16"),), checks=())
    plain = Service(Vip(VIP4, 82), tuple(Backend(b.address, cr=False) for b in BACKENDS), checks=())

    def check(lb: LoadBalancer) -> None:
        found = explained(lb, "10.0.0.1:40000", FOUR)
        assert why(found, "redirect") == "the service's mode is never"
        assert "IP in IP" in outcome(found, "out")
        assert "in none of the service's redirect_clients" in why(explained(lb, "10.0.0.1:4", few.vip), "redirect")
        assert "does not take part" in why(explained(lb, "10.0.0.1:4", plain.vip), "redirect")
        closed = explained(lb, "10.0.0.1:4", Vip(VIP4, 83))
        assert (closed.backend, outcome(closed, "service")) == ("", "none")
        # Another backend, as if that one were not healthy; none, and all would serve as if all were.
        first = explained(lb, "10.0.0.1:40000", few.vip)
        other = explained(lb, "10.0.0.1:40000", few.vip, down=[first.backend])
        assert other.backend not in ("", first.backend)
        (health,) = (s for s in other.steps if s.what == "health")
        assert health.outcome == f"{first.backend} takes no new connections"
        assert health.why == "it is taken to be unhealthy"
        panicked = explained(lb, "10.0.0.1:40000", few.vip, down=[str(b.address) for b in BACKENDS])
        assert panicked.backend == first.backend
        assert "disregarded" in {s.outcome for s in panicked.steps if s.what == "health"}
        for wrong, says in (
            (("10.0.0.1", FOUR), "is not ADDRESS:PORT of a client"),
            (("10.0.0.1:0", FOUR), "is not ADDRESS:PORT of a client"),
            (("10.0.0.256:1", FOUR), "is not an IP address"),
            (("0.0.0.0:1", FOUR), "is an unspecified address and cannot be a client"),
            (("[ff02::1]:1", FOUR), "is a multicast address and cannot be a client"),
            (("255.255.255.255:1", FOUR), "is the broadcast address and cannot be a client"),
            (("127.0.0.1:1", FOUR), "is a loopback address and cannot be a client"),
            (("10.0.0.100:1", FOUR), "10.0.0.100 is a VIP"),
            (("[fd00::1]:1", FOUR), "the one is IPv4, the other IPv6"),
        ):
            with pytest.raises(ConfigError, match=says):
                explained(lb, *wrong)
        with pytest.raises(ConfigError, match=r"10.0.0.99 is no backend of tcp://10.0.0.100:80; there are: 10.0.0.11"):
            explained(lb, "10.0.0.1:4", FOUR, down=["10.0.0.99"])

    serving(world, [never, few, plain], check)


def test_policies_are_asked_apart(standing):
    world = standing(servers=3)
    asked = []

    def mine(batch, backends):
        asked.append(len(batch))
        return [1] * len(batch)

    turns = Service(FOUR, BACKENDS, policy="round-robin", checks=())
    own = Service(Vip(VIP4, 81), BACKENDS, policy=mine, checks=())

    def check(lb: LoadBalancer) -> None:
        # Whose turn it is stays so, however often one asks.
        assert {explained(lb, f"10.0.0.1:{port}", FOUR).backend for port in range(40000, 40010)} == {"10.0.0.11"}
        assert all(load.assigned == 0 for load in lb.statistics().loads[FOUR].values())
        found = explained(lb, "10.0.0.1:40000", FOUR)
        assert outcome(found, "policy") == "round-robin chose 10.0.0.11"
        assert "10.0.0.12 (weight 1, 0 connections, load 0)" in why(found, "policy")
        assert outcome(explained(lb, "10.0.0.1:40000", FOUR, offer=False), "policy") == "not asked"
        assert outcome(explained(lb, "10.0.0.1:40000", own.vip), "policy") == "mine chose 10.0.0.12"
        assert asked == [1]

    serving(world, [turns, own], check)


def test_what_health_made_of_it(standing):
    world = standing(servers=3)

    def check(lb: LoadBalancer) -> None:
        engine = lb._running.engine
        first = explained(lb, "10.0.0.1:40000", FOUR).backend
        lb._in_loop(lambda: engine.judge({(FOUR, ip_address(first)): Standing(healthy=False)}))
        assert explained(lb, "10.0.0.1:40000", FOUR).backend != first
        lb._in_loop(lambda: engine.judge({(FOUR, ip_address(first)): Standing(cr=False)}))
        found = explained(lb, "10.0.0.1:40000", FOUR)
        assert (found.backend, found.redirected) == (first, False)

    serving(world, [Service(FOUR, BACKENDS)], check)
