"""Less memory than a load balancer needs: it is killed, or refuses, and serves again when there is enough; established
connections go on.  Just enough, and others who want it too: nothing happens."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from crablb.errors import KernelError
from crablb.lab import VIP4
from crablb.lab.demo import crablb, start_serve
from tests.helpers.memory import Limit
from tests.helpers.processes import exchange, logged, until
from tests.helpers.world import World, status

#: So much more than there is, and than a configuration of so many services takes; what no start is done with.
LITTLE, SERVICES, NONE = 2 << 20, 400, 16 << 20


def configure(world: World, services: int) -> None:
    """This many services, of which one is used."""
    (server,) = world.lab.servers
    vips = [f"{VIP4}:80", *(f"10.0.{100 + n // 200}.{1 + n % 200}:80" for n in range(services - 1))]
    tables = "".join(f'[[service]]\naddress = "tcp://{vip}"\nbackends = ["{server.ip4}"]\ncheck = []\n' for vip in vips)
    (world.folder / "lb.toml").write_text(f'interface = "eth0"\nflows = 4096\nkeep = 0\n{tables}')


@pytest.mark.long
def test_too_little_memory(make_world):
    world: World = make_world(offload=False)
    world.servers(agents=False)
    path = world.folder / "lb.toml"
    configure(world, 1)
    with Limit.made() as limit:
        daemon = world.serve(config=path, program=limit.of(crablb()))
        held = world.python(world.lab.client, "hold", str(VIP4), "80", ready=True)
        assert exchange(held, "one") == "one"
        limit.set(limit.used() + LITTLE)
        configure(world, SERVICES)
        daemon.send_signal(signal.SIGHUP)
        until(lambda: daemon.poll() is not None)
        assert daemon.wait() == -signal.SIGKILL
        assert exchange(held, "nobody serves") == "nobody serves"
        limit.set(NONE)
        for _ in range(2):  # as a service manager does
            with pytest.raises(KernelError):
                start_serve(world.lab, world.folder, config=path, program=limit.of(crablb()))
            assert exchange(held, "still nobody") == "still nobody"
        limit.set()
        before = len((world.folder / "serve.log").read_text().splitlines())
        daemon = world.serve(config=path, program=limit.of(crablb()))
        lines = (world.folder / "serve.log").read_text().splitlines()[before:]
        assert [line for line in lines if "took over fallback flows" in line]
        assert exchange(held, "served again") == "served again"
        assert world.echo(VIP4, "1000")["intact"]
        assert len(status(world.lab)["services"]) == SERVICES
        held.communicate()
        daemon.terminate()
        assert daemon.wait(60) == 0


FILL = """
import mmap, sys
with open(sys.argv[1], "wb") as file:
    file.truncate(64 << 20)
print("ready", flush=True)
while True:
    with open(sys.argv[1], "rb") as file:
        while file.read(1 << 20):
            pass
"""


@pytest.mark.long
def test_just_enough_memory(make_world):
    """The rest is wanted, again and again, by somebody who reads files."""
    world: World = make_world(offload=False)
    world.servers(agents=False)
    configure(world, 1)
    with Limit.made() as limit:
        daemon = world.serve(config=world.folder / "lb.toml", program=limit.of(crablb()))
        assert status(world.lab)["state"] == "serving"  # the API has been imported
        limit.set(limit.used() + 8 * LITTLE)
        filler = world.program(world.lab.lb, *limit.of([sys.executable, "-c", FILL, str(world.folder / "file")]))
        before = limit.hits()
        until(lambda: limit.hits() > before + 100)
        begun = time.monotonic()
        assert all(seen["intact"] for seen in world.echoes(VIP4, 50))
        print(
            f"50 connections in {time.monotonic() - begun:.2f} s, while the limit was met {limit.hits() - before} times"
        )
        assert filler.poll() is None
        filler.kill()
        filler.wait()
        assert not logged(world.folder / "serve.log", "a background task")
        assert status(world.lab)["state"] == "serving"
        daemon.terminate()
        assert daemon.wait(60) == 0
