"""The engine by itself, in this process."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from ipaddress import ip_address

import pytest
from crablb._native import lib

from crablb import lasting
from crablb.config import config_from_args
from crablb.control import advice
from crablb.control.supervisor import Supervisor
from crablb.dataplane import engine
from crablb.dataplane.events import HopsChanged, Swept
from crablb.dataplane.flows import FlowTable, flow_hash
from crablb.errors import ConfigError
from crablb.model import Bypass, mapped
from tests.helpers.namespaces import inside

FIRST, SECOND = ip_address("10.0.0.11"), ip_address("10.0.0.12")
SEED = bytes(16)


def config(*backends: object, **settings: object):
    return config_from_args(
        ["eth0"], [f"tcp://10.0.0.100:80={','.join(map(str, backends))}"], ack_bypass=Bypass.ON, **settings
    )


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


CLIENT, VIP = ip_address("10.0.0.1"), ip_address("10.0.0.100")


def table(load_balancer: engine.Engine) -> FlowTable:
    assert load_balancer._program and load_balancer._program.flows
    return load_balancer._program.flows


def know(load_balancer: engine.Engine, age: int, port: int = 4242) -> None:
    """A flow to the second backend."""
    hash_ = flow_hash(SEED, CLIENT, port, VIP, 80)
    flows = table(load_balancer)
    flows.places["hash"][flows.places["hash"] == hash_] = 0
    assert flows.add(hash_, load_balancer._registry.backends[SECOND], 0, age=age)


def test_a_removed_backend_stays_while_it_has_flows(make_lab, monkeypatch):
    lab = make_lab("bridge", servers=2)
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.05)

    def managed() -> bool:
        return str(SECOND) in lab.lb.run("sh", "-c", "ip neigh | grep managed").stdout

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST, SECOND), SEED)
        await load_balancer.start()
        try:
            know(load_balancer, age=0)
            first, second = (load_balancer._registry.backends[a] for a in (FIRST, SECOND))

            def path(backend_id: int) -> bytes:
                return load_balancer._program.maps["paths"].lookup(backend_id) or b""

            load_balancer.apply(config(FIRST))
            for _ in range(5):  # sweeps
                await asyncio.sleep(0.06)
            assert managed()
            assert path(second).startswith(mapped(SECOND))
            know(load_balancer, age=lib.CRAB_AGE_OPEN + 1)
            await until(lambda: not managed())
            assert table(load_balancer).count() == 0
            assert not any(path(second))
            assert path(first).startswith(mapped(FIRST))
            # and it may come back
            load_balancer.apply(config(FIRST, SECOND))
            await until(lambda: path(load_balancer._registry.backends[SECOND]).startswith(mapped(SECOND)))
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_tables_that_are_full_are_named(make_lab, monkeypatch):
    lab = make_lab("bridge")
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.05)
    monkeypatch.setattr(advice, "NEARLY_FULL", 0.25)

    async def main() -> None:
        supervisor = Supervisor(config(FIRST, SECOND, flows=256), SEED)
        load_balancer = supervisor.engine
        await supervisor.start()
        try:
            assert not any(load_balancer.statistics()["daemon"].values())
            for port in range(80):
                know(load_balancer, 0, port)
            await until(lambda: load_balancer.statistics()["daemon"]["flows_nearly_full"])
            counters = load_balancer._queues._workers[0].counters
            counters[lib.CRAB_C_FLOWS_FULL] += 3
            await until(lambda: load_balancer.statistics()["daemon"]["cache_full"])
            for _ in range(3):  # sweeps
                await asyncio.sleep(0.06)
            assert load_balancer.statistics()["daemon"]["cache_full"] == 1  # nothing new
        finally:
            await supervisor.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_the_end_waits_for_a_sweep(make_lab):
    """A sweep reads the workers' caches in a thread, which no cancellation stops."""
    lab = make_lab("bridge")
    started, go_on = threading.Event(), threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        load_balancer = engine.Engine(config(FIRST), SEED)
        await load_balancer.start()
        count = load_balancer._count_flows

        def slow(services):
            started.set()
            assert go_on.wait(20)
            return count(services)

        load_balancer._count_flows = slow
        load_balancer._sweep_soon.set()
        assert await loop.run_in_executor(None, started.wait, 20)
        ending = asyncio.create_task(load_balancer.close())
        for _ in range(100):  # as far as it comes
            await asyncio.sleep(0)
        assert load_balancer._queues._workers
        assert not ending.done()
        go_on.set()
        await ending
        assert not load_balancer._queues._workers

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_what_is_fixed_at_the_start(make_lab):
    lab = make_lab("bridge")

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST), SEED)
        await load_balancer.start()
        try:
            with pytest.raises(ConfigError) as caught:
                load_balancer.apply(config(FIRST, table_size=251, flows=64, seed=SEED))
            assert caught.value.problems == [
                "seed cannot be changed while serving; restart crablb serve",
                "table_size cannot be changed while serving; crablb takeover does it",
                "flows cannot be changed while serving; crablb takeover does it",
            ]
            assert load_balancer.config == config(FIRST)
        finally:
            await load_balancer.close()
            await load_balancer.close()  # once more does no harm

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_ids_and_indices_are_given_again(make_lab, monkeypatch):
    """What was removed, and has no flow, does not use up numbers; a service begins to count from zero."""
    lab = make_lab("bridge", servers=2)
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.05)

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST), SEED)
        await load_balancer.start()
        try:
            registry = load_balancer._registry
            counters = load_balancer._program.maps["service_counters"]
            first = config(FIRST)
            for i in range(20):
                (service,) = config_from_args(["eth0"], [f"tcp://10.0.0.100:{1000 + i}=10.0.1.{i}"]).services
                load_balancer.apply(replace(first, services=(*first.services, service)))
                index = registry.services[service.vip]
                assert not any(b"".join(counters.lookup_percpu(index)))
                counters.update(index, b"\1" * 16)  # as if the XDP program had counted
                load_balancer.apply(first)
                await until(lambda gone=service: gone.vip not in registry.services)
                await until(lambda: registry.backends.keys() == {FIRST})
            assert registry.backends[FIRST] == 0
            assert (registry.backends.end, registry.services.end) == (1, 1)
            # A snapshot may hold a number a moment longer; a third is never needed.
            assert registry.backends._fresh <= 3 and registry.services._fresh <= 3
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_the_first_service_comes_later(make_lab):
    """An engine that begins with nothing to serve learns of its first backends like of any other."""
    lab = make_lab("bridge")

    async def main() -> None:
        load_balancer = engine.Engine(replace(config(FIRST), services=()), SEED)
        await load_balancer.start()
        try:
            assert not load_balancer.hops
            load_balancer.apply(config(FIRST))
            await until(lambda: FIRST in load_balancer.hops and load_balancer.hops[FIRST].dst_mac)
            snapshot = load_balancer._queues.snapshot
            assert snapshot and any(slot != lib.CRAB_NO_BACKEND for t in snapshot.tables.values() for slot in t)
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_removed_and_put_back(make_lab, monkeypatch):
    """A backend that comes back at any moment of its forgetting is used again."""
    lab = make_lab("bridge", servers=2)
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.05)

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST, SECOND), SEED)
        await load_balancer.start()
        try:
            for turns in range(60):
                load_balancer.apply(config(FIRST))
                if turns % 2:  # else before it is forgotten, or while it is
                    await until(lambda: SECOND not in load_balancer._registry.backends)
                for _ in range(turns // 2):
                    await asyncio.sleep(0)
                load_balancer.apply(config(FIRST, SECOND))
                await until(lambda: SECOND in load_balancer.hops and load_balancer.hops[SECOND].dst_mac)
                snapshot = load_balancer._queues.snapshot
                (table,) = snapshot.tables.values()
                assert load_balancer._registry.backends[SECOND] in table
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_changes_during_every_sweep(make_lab, monkeypatch):
    """What is removed is forgotten, also where a change falls into every count."""
    lab = make_lab("bridge")
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.01)

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST), SEED)
        await load_balancer.start()
        try:
            count = load_balancer._count_flows
            number = iter(range(2, 60))

            def changing(services):
                address = f"10.0.1.{next(number)}"
                loop.call_soon_threadsafe(lambda: load_balancer.apply(config(FIRST, address)))
                return count(services)

            loop = asyncio.get_running_loop()
            load_balancer._count_flows = changing
            load_balancer._sweep_soon.set()
            await until(lambda: "10.0.1.50" in map(str, load_balancer._registry.backends))
            assert len(load_balancer._registry.backends) < 10
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_a_listener_that_fails_is_its_own_matter(make_lab, monkeypatch):
    lab = make_lab("bridge")
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.05)

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST), SEED)
        heard: list[object] = []

        def broken(notice) -> None:
            raise RuntimeError("broken")

        load_balancer.listeners += [broken, heard.append]
        await load_balancer.start()
        try:
            load_balancer.apply(config(FIRST, SECOND))
            await until(lambda: sum(isinstance(notice, Swept) for notice in heard) > 2)
            assert load_balancer.statistics()["daemon"]["reloads"] == 1
            assert not load_balancer.failure.done()
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


@pytest.mark.parametrize("failures", [2, lasting.TRIES])
def test_a_task_that_dies_is_begun_anew(make_lab, monkeypatch, failures):
    """A moment without memory costs a sweep; what fails again and again is the engine's end."""
    lab = make_lab("bridge")
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.05)
    monkeypatch.setattr(lasting, "FIRST", 0.01)
    monkeypatch.setattr(lasting, "LONGEST", 0.01)

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST), SEED)
        heard = []
        load_balancer.listeners.append(heard.append)
        await load_balancer.start()
        count, left = load_balancer._count_flows, [None] * failures

        def fail(services):
            if left:
                left.pop()
                raise MemoryError("none left")
            return count(services)

        try:
            await until(lambda: any(isinstance(notice, Swept) for notice in heard))
            load_balancer._count_flows = fail
            if failures == lasting.TRIES:
                async with asyncio.timeout(20):
                    assert await asyncio.shield(load_balancer.failure) == "task sweep failed: MemoryError('none left')"
                return
            await until(lambda: not left)
            swept = len(heard)
            await until(lambda: any(isinstance(notice, Swept) for notice in heard[swept:]))
            assert load_balancer.statistics()["daemon"]["tasks_failed"] == failures
            assert not load_balancer.failure.done()
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_ways_that_cannot_be_published_are_published_later(make_lab, monkeypatch):
    """The follower of next hops goes on, and tells again what it could not tell."""
    lab = make_lab("bridge")
    monkeypatch.setattr(lasting, "FIRST", 0.01)

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST), SEED)
        await load_balancer.start()
        publish, failures = load_balancer._publish, [MemoryError(), MemoryError()]

        def fail():
            if failures:
                raise failures.pop()
            publish()

        load_balancer._publish = fail
        heard = []
        load_balancer.listeners.append(heard.append)
        try:
            lab.lb.ip(f"neigh replace {FIRST} lladdr 02:00:00:00:88:88 nud permanent dev eth0")
            mac = bytes.fromhex("020000008888")
            await until(lambda: any(isinstance(n, HopsChanged) and n.now[FIRST].dst_mac == mac for n in heard))
            assert not failures
            assert load_balancer.statistics()["daemon"]["tasks_failed"] == 2
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())
