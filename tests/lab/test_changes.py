"""Changes at run time outlive what befalls the daemon; plan, reload, diff, save and watch tell what they do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crablb.api import types
from crablb.api.client import Client, NotRunning, discover
from crablb.control import state
from tests.helpers.namespaces import inside
from tests.helpers.processes import until
from tests.helpers.world import World, command, status

VIP = "tcp://10.0.0.100:80"
FILE = """# the shop
interface = "eth0"
{more}
[[service]]
address = "tcp://10.0.0.100:80"
check = []
backends = [
  "10.0.0.11",   # rack 1
  "10.0.0.12*{weight}",   # rack 2
]
"""


@pytest.fixture
def world(make_world):
    return make_world(servers=2)


def config(world: World, weight: int = 1, more: str = "") -> Path:
    path = world.folder / "lb.toml"
    path.write_text(FILE.format(weight=weight, more=more))
    return path


def serve(world: World, path: Path) -> subprocess.Popen[str]:
    """On return it can be asked: that comes a moment after it serves."""
    daemon = world.serve(config=path)

    def answers() -> bool:
        try:
            with inside(world.lab.lb.netns):
                return bool(Client(discover("eth0")).get("/v1/version", types.Version).pid == daemon.pid)
        except NotRunning:
            return False

    until(answers)
    return daemon


def said(world: World, *args: str, expected: int = 0) -> Any:
    return json.loads(command(world.lab.lb, *args, "--json", expected=expected))


def backend(world: World, address: str = "10.0.0.12") -> tuple[int, str, bool]:
    (found,) = [b for b in said(world, "backends", VIP) if b["address"] == address]
    return found["weight"], found["state"], found["changed"]


def log(world: World) -> str:
    return (world.folder / "serve.log").read_text()


@pytest.mark.long
def test_changes_outlive_whatever_ends_the_daemon(world):
    path = config(world)
    daemon = serve(world, path)
    command(world.lab.lb, "weight", "10.0.0.12", "7")
    command(world.lab.lb, "drain", "10.0.0.11")
    daemon.kill()
    daemon.wait()
    # It is as it was.
    daemon = serve(world, path)
    assert backend(world) == (7, "up", True)
    assert backend(world, "10.0.0.11") == (1, "drain", True)
    assert "changes at run time hold on" in log(world)
    # And after a reload; what the file says otherwise since holds, of that very field.
    config(world, weight=5)
    assert said(world, "reload")["services"][0]["backends_changed"] == ["10.0.0.12: weight 7 -> 5"]
    assert backend(world) == (5, "up", False)
    assert backend(world, "10.0.0.11") == (1, "drain", True)
    assert "the configuration says 10.0.0.12*5" in log(world) or "the configuration says 5 by now" in log(world)
    # After a stop, a takeover, and one whose file has changed while nobody read it.
    daemon.terminate()
    daemon.wait()
    daemon = serve(world, path)
    assert backend(world, "10.0.0.11")[1] == "drain"
    command(world.lab.lb, "weight", "10.0.0.12", "9")
    daemon.kill()
    daemon.wait()
    config(world, weight=3)
    daemon = serve(world, path)
    assert backend(world) == (3, "up", False)
    assert backend(world, "10.0.0.11")[1] == "drain"
    # Given up.
    assert said(world, "diff", expected=1)["changes"] == [f"{VIP} 10.0.0.11: state up -> drain"]
    command(world.lab.lb, "reload", "--discard")
    assert said(world, "diff")["changes"] == []
    assert backend(world, "10.0.0.11") == (1, "up", False)
    # Without persist they are gone.
    daemon.terminate()
    daemon.wait()
    path = config(world, more='persist = "off"')
    daemon = serve(world, path)
    command(world.lab.lb, "weight", "10.0.0.12", "9")
    assert "persist is off" in said(world, "diff", expected=1)["unsaved"]
    daemon.kill()
    daemon.wait()
    serve(world, path)
    assert backend(world)[0] == 1


def test_plan_reload_and_save(world):
    path = config(world)
    daemon = serve(world, path)
    lb = world.lab.lb
    assert command(lb, "plan") == "nothing to do: it is so already\n"
    other = world.folder / "other.toml"
    text = FILE.format(weight=3, more="queues = 1\nping = false") + '[[service]]\naddress = "tcp://10.0.0.101:80"\n'
    other.write_text(text + 'backends = ["10.0.0.13"]\n')
    planned = said(world, "plan", str(other), expected=1)
    assert [s["change"] for s in planned["services"]] == ["changed", "added"]
    changed, added = planned["services"]
    assert changed["backends_changed"] == ["10.0.0.12: weight 1 -> 3"]
    assert 0.2 < changed["moved"] < 0.3  # from a half to three quarters
    assert added["backends_added"] == ["10.0.0.13"]
    assert (planned["settings"], planned["restart"]) == (
        ["ping: true -> false"],
        ["queues: the default -> 1 (crablb takeover does it)"],
    )
    told = command(lb, "plan", str(other), expected=1)
    assert "a reload refuses this:\n  queues: the default -> 1 (crablb takeover does it)\n" in told
    assert status(world.lab)["daemon"]["reloads"] == 0

    # Refused whole, and every fault told.
    path.write_text(other.read_text())
    refused = _fails(world, "reload")
    assert "queues cannot be changed while serving" in refused
    path.write_text("= nothing")
    assert "Invalid statement" in _fails(world, "reload")
    assert "Invalid statement" in _fails(world, "plan")
    # A fault is the file's that has it.
    other.write_text('[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["x"]\n')
    place = f"{other}: service 1 (line 1): backends[0]: 'x' is not an IP address"
    assert place in _fails(world, "plan", str(other))
    assert place in _fails(world, "explain", "10.0.0.1:4 -> 10.0.0.100:80", "--config", str(other))
    config(world)
    assert command(lb, "reload") == "nothing to do: it is so already\n"

    # Signals do the same, and say it in the log.
    config(world, weight=2)
    daemon.send_signal(signal.SIGHUP)
    until(lambda: "10.0.0.12: weight 1 -> 2" in log(world))

    # Into the file: comments stay, and what was there is kept.
    command(lb, "weight", "10.0.0.12", "4")
    before = path.read_text()
    assert command(lb, "save") == f"{VIP} 10.0.0.12: weight 2 -> 4\n"
    assert path.read_text() == FILE.format(weight=4, more="")
    assert path.with_name("lb.toml.bak").read_text() == before
    assert said(world, "diff")["changes"] == []
    assert command(lb, "save") == "nothing to do: it is so already\n"
    # Byte by byte, with the line ends that it has.
    path.write_bytes(FILE.format(weight=4, more="").replace("\n", "\r\n").encode())
    command(lb, "reload")
    command(lb, "weight", "10.0.0.12", "6")
    kept = path.read_bytes()
    command(lb, "save")
    assert path.with_name("lb.toml.bak").read_bytes() == kept
    assert path.read_bytes() == kept.replace(b"12*4", b"12*6")
    # One that somebody has edited meanwhile is not written over.
    command(lb, "weight", "10.0.0.12", "5")
    config(world, weight=8)
    assert "has been changed since it was read" in _fails(world, "save")
    assert path.read_text() == FILE.format(weight=8, more="")


def _fails(world: World, *args: str) -> str:
    """What a command complains of whose exit status is 2."""
    with inside(world.lab.lb.netns):
        done = subprocess.run(
            [sys.executable, "-m", "crablb", *args], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2, done
    return done.stderr


def test_the_file_is_watched(world):
    """Written, exchanged as editors do, by a link as Kubernetes does; a faulty one is told once."""
    real = world.folder / "1"
    real.mkdir()
    for name in ("..data", "lb.toml"):
        (world.folder / name).symlink_to({"..data": "1", "lb.toml": "..data/lb.toml"}[name])
    path = world.folder / "lb.toml"

    def text(weight: int) -> str:
        return FILE.format(weight=weight, more="watch = true")

    path.write_text(text(1))
    serve(world, path)

    def weight(wanted: int) -> None:
        until(lambda: backend(world)[0] == wanted)

    path.write_text(text(2))
    weight(2)
    (world.folder / "1" / "new").write_text(text(3))
    (world.folder / "1" / "new").replace(world.folder / "1" / "lb.toml")
    weight(3)
    (world.folder / "2").mkdir()
    (world.folder / "2" / "lb.toml").write_text(text(4))
    (world.folder / "..tmp").symlink_to("2")
    (world.folder / "..tmp").replace(world.folder / "..data")
    weight(4)
    path.write_text("= nothing")
    until(lambda: status(world.lab)["daemon"]["reloads_refused"] == 1)
    (world.folder / "2" / "beside").touch()  # an event, and nothing new
    path.write_text(text(5).replace("watch = true", ""))
    weight(5)
    path.write_text(text(6))  # not watched any more
    command(world.lab.lb, "reload")
    weight(6)
    assert status(world.lab)["daemon"]["reloads_refused"] == 1


def test_what_checks_found_out_outlives_the_daemon(world):
    """One that is dead is not brought back by a restart, nor asked from the beginning."""
    path = config(world)
    # Nobody listens there.
    path.write_text(path.read_text().replace("check = []", 'check = ["tcp"]\npanic = 0'))
    daemon = serve(world, path)

    def healthy() -> list[bool | None]:
        return [b["healthy"] for b in said(world, "backends", VIP)]

    until(lambda: healthy() == [False, False], 30)
    with inside(world.lab.lb.netns):
        place = state.place("eth0")
    until(lambda: place.exists() and place.read_text().count('"up":false') == 2, 30)
    daemon.kill()
    daemon.wait()
    serve(world, path)
    assert healthy() == [False, False]
    histories = [check["history"] for b in said(world, "backends", VIP) for check in b["checks"]]
    assert all(history.startswith("---") for history in histories)
