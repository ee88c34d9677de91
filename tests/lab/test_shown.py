"""Programs that pages show, run as they stand there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from crablb.lab import VIP4
from tests.helpers.pages import snippets
from tests.helpers.processes import ROOT, answer, until
from tests.helpers.world import command

VIP = f"tcp://{VIP4}:80"


def program(page: str, start: str, folder: Path) -> str:
    """A file of the page's program that has this in it."""
    [shown] = [s for s in snippets(ROOT / page) if s.language == "python" and start in s.text]
    file = folder / "shown.py"
    file.write_text(shown.text)
    return str(file)


def test_a_program_that_asks_the_api(standing, tmp_path):
    world = standing(servers=2)
    world.serve("--check", "none", what=[f"{VIP}=10.0.0.11,10.0.0.12"])
    done = world.lab.lb.run(sys.executable, program("docs/api.md", "discover(", tmp_path))
    assert done.stdout == ""
    assert [b["state"] for b in json.loads(command(world.lab.lb, "backends", "--json"))] == ["drain", "up"]


def test_a_load_balancer_inside_of_a_program(standing, tmp_path):
    world = standing(servers=2)
    world.client()
    child = world.program(world.lab.lb, sys.executable, program("docs/library.md", "asyncio.run(main())", tmp_path))
    until(lambda: {seen["server"] for seen in world.echoes(VIP4, 6)} == {"server2"})
    assert answer(child)  # an event


SENDER = """
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
s.bind(('eth0', 0x0806))
s.settimeout(0.1)
frame = b'\\xff' * 6 + s.getsockname()[4] + b'\\x08\\x06' + b'hello, mirror' + bytes(40)
for _ in range(600):  # until the program is there
    s.send(frame)
    try:
        while s.recv(100) != frame:
            pass
        sys.exit()
    except TimeoutError:
        pass
sys.exit('nothing came back')
"""


def test_a_mirror_of_arp(make_world, tmp_path):
    lab = (world := make_world()).lab
    world.program(lab.lb, sys.executable, program("docs/xsk.md", "types = batch", tmp_path))
    lab.client.run(sys.executable, "-c", SENDER)
