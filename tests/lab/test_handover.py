"""Engines that take over from each other, here in one process: connections, flows, frames and counters go on."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import json
import os
import platform
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from crablb.config import config_from_args
from crablb.dataplane import engine as engines
from crablb.dataplane import queues
from crablb.dataplane.engine import Engine
from crablb.dataplane.handover import forms
from crablb.errors import ConfigError, KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.xsk import XskError
from crablb.lab import VIP4, VIP6
from crablb.model import Config
from tests.helpers.namespaces import inside
from tests.helpers.processes import exchange
from tests.helpers.world import World

SEED = bytes(16)
WHAT = [f"tcp://{VIP4}:80=10.0.0.11,10.0.0.12", f"tcp://[{VIP6}]:80=fd00::11,fd00::12"]


class Offered:
    """A predecessor, as another process has it: what is said goes by JSON, descriptors are copies."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        engine.hold()
        values, fds = engine.offer()
        self.values: Any = json.loads(json.dumps(values))
        self.fds = [os.dup(fd) for fd in fds]

    def take(self, fds: Sequence[int] = ()) -> Any:
        return json.loads(json.dumps(self._engine.give([os.dup(fd) for fd in fds])))


class Gone(Offered):
    """One whose process ends when it is to give."""

    def take(self, fds: Sequence[int] = ()) -> Any:
        super().take(fds)
        raise KernelError("it has ended")


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Engine]:
    engine = Engine(config, SEED)
    await engine.start()
    engine.begun()
    try:
        yield engine
    finally:
        await engine.close()


async def exchanged(old: Engine, config: Config) -> Engine:
    new = Engine(config, SEED, predecessor=Offered(old))
    await new.start()
    new.begun()
    await old.leave()
    return new


def conserved(engine: Engine) -> bool:
    """Whether each frame of each socket is in one place."""
    places = [worker.xsk.frames() for worker in engine._queues._workers if worker.xsk]
    return all(p["all"] == sum(n for name, n in p.items() if name != "all") for p in places) and bool(places)


def descriptors() -> int:
    gc.collect()  # maps that are mapped have one more, until that is gone
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    world = make_world("bridge", servers=2)
    world.servers(dsr=True)
    return world


@pytest.mark.parametrize("bypass", ["auto", "off"])
def test_connections_go_on(world: World, bypass: str):
    """From one to the next, three times, each with other backends; by redirection and by fallback."""
    config = config_from_args(["eth0"], WHAT, ack_bypass=bypass)
    fewer = config_from_args(["eth0"], [one.rpartition(",")[0] for one in WHAT], ack_bypass=bypass)
    lb, client = world.lab.lb, world.lab.client

    async def main() -> None:
        held = {
            vip: await asyncio.to_thread(world.python, client, "hold_many", str(vip), "80", "30", ready=True)
            for vip in (VIP4, VIP6)
        }
        engine = old
        numbers = dict(engine._registry.backends)
        before = engine.statistics()
        fds = 0
        for turn, wanted in enumerate((config, fewer, config)):
            engine = await exchanged(engine, wanted)
            for one in held.values():
                assert await asyncio.to_thread(exchange, one, f"turn {turn}") == "30"
            for vip in VIP4, VIP6:
                assert (await asyncio.to_thread(world.echo, vip, "10"))["intact"]
            assert conserved(engine)
            assert pins.owner("lb-eth0") == os.getpid()
            assert {a: n for a, n in engine._registry.backends.items() if a in numbers} == numbers
            now = engine.statistics()
            assert now["total"]["received"] > before["total"]["received"]
            assert now["xdp"]["syn"] > before["xdp"]["syn"]
            before = now
            assert fds in (0, descriptors())
            fds = descriptors()
        await engine.close()

    with inside(lb.netns):

        async def whole() -> None:
            nonlocal old
            old = Engine(config, SEED)
            await old.start()
            old.begun()
            await main()

        old: Engine
        asyncio.run(whole())
        assert pins.owner("lb-eth0") is None
    assert "xdp" not in lb.run("ip", "link", "show", "eth0").stdout
    assert not lb.pins.exists()


def test_who_fails_leaves_all_as_it_was(world: World, monkeypatch: pytest.MonkeyPatch):
    """Before it has taken, while it does, and after it has worked with all of it."""
    config = config_from_args(["eth0"], WHAT)
    other = config_from_args(["eth0"], WHAT, xdp_mode="generic")

    async def fails(engine: Engine, wanted: Config, predecessor: Offered, reason: str, seed: bytes = SEED) -> None:
        new = Engine(wanted, seed, predecessor=predecessor)
        with pytest.raises(KernelError, match=reason):
            await new.start()
        engine.resume()

    async def works(engine: Engine, held: Any) -> None:
        assert await asyncio.to_thread(exchange, held, "on") == "30"
        assert (await asyncio.to_thread(world.echo, VIP4, "10"))["intact"]
        assert conserved(engine)
        assert pins.owner("lb-eth0") == os.getpid()
        assert pins.has_begun("lb-eth0")

    async def main() -> None:
        async with serving(config) as engine:
            held = await asyncio.to_thread(
                world.python, world.lab.client, "hold_many", str(VIP4), "80", "30", ready=True
            )
            engine.hold()
            with pytest.raises(KernelError, match="another process is taking over already"):
                engine.hold()
            with pytest.raises(ConfigError, match="taking over just now; try again"):
                engine.apply(config)
            engine.resume()
            engine.apply(replace(config, keep=1))
            fds = 0
            for turn in range(2):
                await fails(engine, other, Offered(engine), "is native, not generic; restart it")
                await fails(engine, config, Offered(engine), "another seed", b"1" * 16)
                wrong = Offered(engine)
                wrong.values["ports"] = 7
                await fails(engine, config, wrong, "another version's")
                await works(engine, held)
                await fails(engine, config, Gone(engine), "it has ended")
                await works(engine, held)
                # Here it has received and sent by the sockets, which are made anew then.
                new = Engine(config, SEED, predecessor=Offered(engine))
                await new.start()
                assert (await asyncio.to_thread(world.echo, VIP4, "10"))["intact"]
                await new.close()
                engine.resume()
                await works(engine, held)
                if not turn:
                    fds = descriptors()
            assert descriptors() == fds
            # And whoever comes then takes over from it.
            await (await exchanged(engine, config)).close()

    with inside(world.lab.lb.netns):
        asyncio.run(main())
    assert not world.lab.lb.pins.exists()


def test_packets_are_served_whatever_cannot_be_as_it_was(world: World, monkeypatch: pytest.MonkeyPatch):
    """A BPF file system that is read-only, a full /run, a socket that cannot be made anew: all is tried again."""
    config = config_from_args(["eth0"], WHAT)
    refused: list[str] = []
    put, claim, bind = pins.put, pins.claim, queues._socket

    def refusing(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **more: Any) -> Any:
            if name in refused:
                raise (
                    XskError("no memory", errno.ENOMEM)
                    if name == "socket"
                    else OSError(errno.EROFS, "Read-only file system")
                )
            return do(*args, **more)

        return refuse

    monkeypatch.setattr(pins, "put", refusing("pin", put))
    monkeypatch.setattr(pins, "claim", refusing("lock", claim))
    monkeypatch.setattr(queues, "_socket", refusing("socket", bind))
    monkeypatch.setattr(engines, "RECLAIM_INTERVAL", 0.05)

    def mine(engine: Engine) -> bool:
        with bpf.Map.from_pin(world.lab.lb.pins / "lb-eth0" / "sockets") as pinned:
            return pinned.id == engine._running.maps["sockets"].id and pins.owner("lb-eth0") == os.getpid()

    async def until(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    async def main() -> None:
        async with serving(config) as engine:
            for what in (["pin", "lock"], ["socket"]):
                new = Engine(config, SEED, predecessor=Offered(engine))
                await new.start()
                assert (await asyncio.to_thread(world.echo, VIP4, "10"))["intact"]  # the sockets are used
                await new.close()
                refused[:] = what
                with capture_logs() as logs:
                    engine.resume()
                    if "socket" not in what:
                        assert (await asyncio.to_thread(world.echo, VIP4, "10"))["intact"]
                        assert not mine(engine)
                        await asyncio.sleep(4 * engines.RECLAIM_INTERVAL)
                        (told,) = [entry for entry in logs if entry["event"].startswith("not all is as it was")]
                        assert "Read-only file system" in told["reason"]
                    else:
                        await until(lambda: [entry for entry in logs if entry["event"].startswith("a socket failed")])
                    engine.apply(replace(config, keep=len(what)))  # it may be changed
                    refused.clear()
                    engine._sweep_soon.set()
                    await until(lambda: mine(engine) and not engine._unclaimed and engine.queues)
                assert (await asyncio.to_thread(world.echo, VIP4, "10"))["intact"]
                assert conserved(engine)
            # The next one takes over from it.
            await (await exchanged(engine, replace(config, keep=1))).close()

    with inside(world.lab.lb.netns):
        asyncio.run(main())


def exists(map_id: int) -> bool:
    """Whether a BPF map is in the kernel."""
    number = {"x86_64": 321, "aarch64": 280}[platform.machine()]
    fd = ctypes.CDLL(None).syscall(number, 14, (ctypes.c_uint32 * 4)(map_id), 16)  # BPF_MAP_GET_FD_BY_ID
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


def test_no_map_is_left(world: World):
    """Sockets keep the maps that they are in, for as long as any process has them."""
    config = config_from_args(["eth0"], WHAT)

    def sockets(engine: Engine) -> int:
        return engine._running.maps["sockets"].id

    async def until_gone(map_id: int) -> None:
        gc.collect()
        async with asyncio.timeout(20):
            while exists(map_id):
                await asyncio.sleep(0.01)

    async def main() -> None:
        async with serving(config) as engine:
            new = Engine(config, SEED, predecessor=Offered(engine))
            await new.start()
            failed = sockets(new)
            await new.close()
            engine.resume()
            await until_gone(failed)
            before = sockets(engine)
            assert exists(before)
            last = await exchanged(engine, config)
            await until_gone(before)
            assert exists(sockets(last))
            assert (await asyncio.to_thread(world.echo, VIP4, "10"))["intact"]
            await last.close()

    with inside(world.lab.lb.netns):
        asyncio.run(main())


def test_of_another_version(world: World, monkeypatch: pytest.MonkeyPatch):
    """Whose memory has another form, and who counts otherwise: flows that the XDP program knows go on all the same."""
    config = config_from_args(["eth0"], WHAT, ack_bypass="on")
    same = forms()

    async def main() -> None:
        async with serving(config) as engine:
            held = await asyncio.to_thread(
                world.python, world.lab.client, "hold_many", str(VIP4), "80", "30", ready=True
            )
            assert await asyncio.to_thread(exchange, held, "one") == "30"
            predecessor = Offered(engine)
            predecessor.values["forms"] = {name: f"not {form}" for name, form in same.items()}
            new = Engine(config, SEED, predecessor=predecessor)
            await new.start()
            new.begun()
            await engine.leave()
            assert new.statistics()["xdp"]["syn"] == 0
            assert await asyncio.to_thread(exchange, held, "two") == "30"
            assert conserved(new)
            await new.close()

    with inside(world.lab.lb.netns):
        asyncio.run(main())


def test_what_is_not_served_cannot_be_taken(world: World):
    config = config_from_args(["eth0"], WHAT)

    async def main() -> None:
        engine = Engine(config, SEED)
        with pytest.raises(KernelError, match="nothing is served yet"):
            engine.hold()
        async with serving(config) as engine:
            await asyncio.to_thread(world.lab.lb.ip, "link del eth0")
            async with asyncio.timeout(20):
                while engine.modes["eth0"]:
                    await asyncio.sleep(0.01)
            with pytest.raises(KernelError, match="eth0 is gone"):
                engine.hold()

    with inside(world.lab.lb.netns):
        asyncio.run(main())


@pytest.mark.parametrize("before", [1, 2])
def test_two_queues(make_world: Callable[..., World], before: int):
    """Each goes on by itself; one that came meanwhile gets its socket afterwards."""
    world = make_world("bridge", servers=2)
    world.servers(dsr=True)
    lab = world.lab

    def queues(count: int) -> None:
        for node, interface in ((lab.lb, "eth0"), (lab.middle, "lb")):
            node.run("ethtool", "-L", interface, "rx", str(count), "tx", str(count))

    queues(before)
    config = config_from_args(["eth0"], WHAT)

    async def main() -> None:
        async with serving(config) as old:
            assert old.queues == before
            predecessor = Offered(old)
            await asyncio.to_thread(queues, 2)
            new = Engine(config, SEED, predecessor=predecessor)
            await new.start()
            new.begun()
            await old.leave()
            async with asyncio.timeout(20):
                while new.queues < 2:
                    await asyncio.sleep(0.01)
            for _ in range(20):
                assert (await asyncio.to_thread(world.echo, VIP4, "10"))["intact"]
            assert conserved(new)
            await new.close()

    with inside(lab.lb.netns):
        asyncio.run(main())
