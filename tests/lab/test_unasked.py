"""What commands say of a load balancer that cannot be asked, has lost its interface, or is there already."""

from __future__ import annotations

import json
import signal
import sys

from crablb.lab import VIP4
from crablb.lab.demo import crablb
from tests.helpers.world import World

#: ``crablb`` whose API finds no room for its socket.
NO_ROOM = """
import sys
from crablb.cli import main
from crablb.control.admin import sockets
def bind(self): raise OSError(28, "No space left on device")
sockets.Place.bind = bind
sys.exit(main(sys.argv[1:]))
"""
SERVICE = f"tcp://{VIP4}:80=10.0.0.11"


def run(world: World, *args: str) -> tuple[int, str, str]:
    done = world.lab.lb.run(*crablb(*args), check=False)
    return done.returncode, done.stdout, done.stderr


def test_an_api_that_could_not_be_started(standing):
    """Is not taken for one that is switched off."""
    world = standing()
    world.serve(program=[sys.executable, "-c", NO_ROOM])
    status, out, err = run(world, "status", "--json")
    told = json.loads(out)
    assert (status, told["state"], err) == (1, "degraded", "")
    assert told["problems"] == ["its API could not be started, so it cannot be asked; its log says why"]
    assert world.echo(VIP4)["intact"]
    assert run(world, "backends")[0] == 3
    world.end()
    world.serve("--admin", "off")
    status, out, _ = run(world, "status", "--json")
    assert (status, json.loads(out)["state"]) == (0, "serving")


def test_an_interface_that_is_gone(make_world, tmp_path):
    """The daemon is asked all the same, reads its file anew, and keeps a second one away."""
    world = make_world()
    path = tmp_path / "lb.toml"
    path.write_text(
        f'interface = "eth0"\n[[service]]\naddress = "tcp://{VIP4}:80"\nbackends = ["10.0.0.11"]\ncheck = []\n'
    )
    daemon = world.serve(config=path)
    world.lab.middle.ip("link del lb")
    status, out, _ = run(world, "status", "--json")
    assert (status, json.loads(out)["state"]) == (1, "degraded")
    assert "interface eth0 is gone" in json.loads(out)["problems"][0]
    path.write_text(path.read_text().replace('"10.0.0.11"', '"10.0.0.11", "10.0.0.12"'))
    status, out, err = run(world, "reload")
    assert (status, err) == (0, ""), err
    assert "10.0.0.12" in out
    status, _, err = run(world, "serve", "--iface", "eth0", "--service", SERVICE)
    assert (status, f"is run already by process {daemon.pid}; " in err) == (2, True)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
