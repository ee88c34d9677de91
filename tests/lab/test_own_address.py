"""A VIP that is an address of the machine: the one that it is reached by is refused, what was added beside is not."""

from __future__ import annotations

import json
import re
import signal

import pytest

from crablb.lab.demo import crablb
from tests.helpers.processes import until
from tests.helpers.world import World, status

OWN = {4: "10.0.0.2", 6: "[fd00::2]"}
BACKEND = {4: "10.0.0.11", 6: "fd00::11"}
REFUSED = r"crablb: tcp://{}:22: \S+ is this machine's own address: nobody would reach its port 22 any more; take an"


def serve(world: World, vip: str, *more: str) -> tuple[int, str]:
    """The exit status, or 0 if it serves, and what it said."""
    family = 6 if "[" in vip else 4
    service = f"tcp://{vip}:22={BACKEND[family]}"
    child = world.program(world.lab.lb, *crablb("serve", "--iface", "eth0", "--service", service, *more))
    assert child.stderr
    said = ""
    for line in child.stderr:
        said += line
        if '"serving"' in line:
            child.terminate()
            return child.wait(), said
    return child.wait(), said


@pytest.mark.long
@pytest.mark.parametrize("family", [4, 6])
def test_the_address_that_a_machine_is_reached_by(make_world, family):
    world = make_world()
    ended, said = serve(world, OWN[family])
    assert ended == 2
    assert re.match(REFUSED.format(re.escape(OWN[family])), said), said
    assert serve(world, OWN[family], "--allow-own-address")[0] == 0
    assert serve(world, OWN[family], "--allow-own-address", "false")[0] == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("add", "vip"),
    [
        ("10.0.0.77/32 dev eth0", "10.0.0.77"),
        ("10.0.0.77/24 dev eth0", "10.0.0.77"),
        ("10.0.0.77/24 dev lo", "10.0.0.77"),
        ("fd00::77/128 dev eth0 nodad", "[fd00::77]"),
        ("fd00::77/64 dev eth0 nodad preferred_lft 0", "[fd00::77]"),
        ("fd00::77/64 dev lo nodad", "[fd00::77]"),
    ],
)
def test_addresses_beside(make_world, add, vip):
    """As keepalived has them, or somebody for direct server return."""
    world = make_world()
    world.lab.lb.ip(f"addr add {add}")
    ended, said = serve(world, vip)
    assert ended == 0, said
    warned = '"the kernel answers for a VIP too"'
    assert warned not in said
    ended, said = serve(world, vip, "--announce", "arp")
    assert (ended, said.count(warned)) == (0, 1), said
    config = world.folder / "lb.toml"
    service = f'[[service]]\naddress = "tcp://{vip}:22"\nbackends = ["{BACKEND[6 if "[" in vip else 4]}"]\n'
    for announce, warnings in (("none", 0), ("arp", 1)):
        config.write_text(f'interface = "eth0"\nannounce = "{announce}"\n{service}')
        told = json.loads(world.lab.lb.run(*crablb("check", str(config), "--here", "--json")).stdout)
        assert sum("the kernel answers for it too" in one for one in told["warnings"]) == warnings, told


def test_a_host_address_that_the_machine_sends_from(make_world):
    """As in some clouds: /32, and a route out of it."""
    world = make_world("routed")
    world.lab.lb.ip("addr del 10.2.0.2/24 dev eth0", "addr add 10.2.0.2/32 dev eth0")
    world.lab.lb.ip("route add 10.2.0.254 dev eth0", "route add default via 10.2.0.254")
    assert serve(world, "10.2.0.2")[0] == 2


def test_a_reload_does_not_take_it_either(make_world):
    world = make_world()
    config = world.folder / "lb.toml"
    text = 'interface = "eth0"\n[[service]]\naddress = "tcp://{}:80"\nbackends = ["10.0.0.11"]\n'
    config.write_text(text.format("10.0.0.100"))
    daemon = world.serve(config=config)
    config.write_text(text.format("10.0.0.2"))
    daemon.send_signal(signal.SIGHUP)
    until(lambda: status(world.lab)["daemon"]["reloads_refused"] == 1)
    assert list(status(world.lab)["services"]) == ["tcp://10.0.0.100:80"]


def test_a_service_without_backends_is_told(make_world):
    """At the start, and by a reload; once each."""
    world = make_world()
    config = world.folder / "lb.toml"
    text = 'interface = "eth0"\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = [{}]\n'
    drained = '{address = "10.0.0.11", state = "drain"}, {address = "10.0.0.12", state = "dead"}'
    config.write_text(text.format('"10.0.0.11"'))
    daemon = world.serve(config=config)
    assert status(world.lab)["daemon"]["services_idle"] == 0
    config.write_text(text.format(drained))
    daemon.send_signal(signal.SIGHUP)
    until(lambda: status(world.lab)["daemon"]["services_idle"] == 1)
    log = (world.folder / "serve.log").read_text()
    assert "no backend of a service takes new connections" in log
    assert "all are set so: dead, drain" in log
