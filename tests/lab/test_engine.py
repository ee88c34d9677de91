"""The engine by itself, in this process."""

from __future__ import annotations

import asyncio
import threading
from ipaddress import ip_address

import pytest
from crablb._native import lib

from crablb import engine, flowmap
from crablb.config import config_from_args
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


def know(load_balancer: engine.Engine, age: int, port: int = 4242) -> None:
    """A flow to the second backend."""
    hash_ = flowmap.flow_hash(SEED, CLIENT, port, VIP, 80)
    assert load_balancer._flows
    load_balancer._flows.places["hash"][load_balancer._flows.places["hash"] == hash_] = 0
    assert load_balancer._flows.add(hash_, load_balancer._ids[SECOND], 0, age=age)


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
            first, second = (load_balancer._ids[a] for a in (FIRST, SECOND))

            def path(backend_id: int) -> bytes:
                return load_balancer._maps["paths"].lookup(backend_id) or b""

            load_balancer.apply(config(FIRST))
            for _ in range(5):  # sweeps
                await asyncio.sleep(0.06)
            assert managed()
            assert path(second).startswith(mapped(SECOND))
            know(load_balancer, age=lib.CRAB_AGE_OPEN + 1)
            await until(lambda: not managed())
            assert load_balancer._flows.count() == 0
            assert not any(path(second))
            assert path(first).startswith(mapped(FIRST))
            # and it may come back
            load_balancer.apply(config(FIRST, SECOND))
            await until(lambda: path(load_balancer._ids[SECOND]).startswith(mapped(SECOND)))
            assert load_balancer._ids[SECOND] > second
        finally:
            await load_balancer.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_tables_that_are_full_are_named(make_lab, monkeypatch):
    lab = make_lab("bridge")
    monkeypatch.setattr(engine, "SWEEP_INTERVAL", 0.05)
    monkeypatch.setattr(engine, "NEARLY_FULL", 0.25)

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST, SECOND, flows=256), SEED)
        await load_balancer.start()
        try:
            assert not any(load_balancer.statistics()["daemon"].values())
            for port in range(80):
                know(load_balancer, 0, port)
            await until(lambda: load_balancer.statistics()["daemon"]["flows_nearly_full"])
            counters = load_balancer._workers[0].counters
            counters[lib.CRAB_C_FLOWS_FULL] += 3
            await until(lambda: load_balancer.statistics()["daemon"]["cache_full"])
            for _ in range(3):  # sweeps
                await asyncio.sleep(0.06)
            assert load_balancer.statistics()["daemon"]["cache_full"] == 1  # nothing new
        finally:
            await load_balancer.close()

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
        assert load_balancer._workers
        assert not ending.done()
        go_on.set()
        await ending
        assert not load_balancer._workers

    with inside(lab.lb.netns):
        asyncio.run(main())


def test_what_is_fixed_at_the_start(make_lab):
    lab = make_lab("bridge")

    async def main() -> None:
        load_balancer = engine.Engine(config(FIRST), SEED)
        await load_balancer.start()
        try:
            with pytest.raises(ConfigError) as caught:
                load_balancer.apply(config(FIRST, table_size=251, flows=64))
            assert caught.value.problems == [
                "table_size cannot be changed while serving; restart crablb serve",
                "flows cannot be changed while serving; restart crablb serve",
            ]
            assert load_balancer.config == config(FIRST)
        finally:
            await load_balancer.close()
            await load_balancer.close()  # once more does no harm

    with inside(lab.lb.netns):
        asyncio.run(main())
