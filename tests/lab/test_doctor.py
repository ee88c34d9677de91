"""The doctor, in a lab that is sound at first, and is then broken in one way after the other."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import ARP, Ether

from crablb.api import client, types
from crablb.cli import main
from crablb.doctor.asking import ask
from crablb.kernel import bpf, pins
from crablb.kernel.interface import interface_info
from crablb.lab import VIP4, VIP6, Node
from crablb.lab.demo import crablb
from tests.helpers.namespaces import Pair, inside
from tests.helpers.processes import until
from tests.helpers.world import World, command

FILE = f"""
interface = "eth0"
announce = "arp"
[[service]]
address = "tcp://{VIP4}:80"
backends = ["10.0.0.11", "10.0.0.12"]
check = []
[[service]]
address = "tcp://[{VIP6}]:80"
backends = ["fd00::11", "fd00::12"]
check = []
"""


FILTER = ["protocol", "ip", "u32", "match", "u32", "0", "0", "classid", "1:1"]


class Doctor:
    """``crablb doctor`` in the load balancer's node of a world, with a file that says what it is to serve."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.node = world.lab.lb
        self.file = world.folder / "lb.toml"
        self.file.write_text(FILE)

    def finds(self, *args: str, node: Node | None = None, config: bool = True) -> dict[str, dict[str, Any]]:
        """What is worth reading, the worst of each id; the exit status agrees with it."""
        given = [*(["--config", str(self.file)] if config else []), *args]
        said = json.loads(command(node or self.node, "doctor", "--json", *given, expected=None))
        findings = [one for one in said["findings"] if one["severity"] != "ok"]
        assert said["sound"] == (not any(one["severity"] in ("warning", "fault") for one in findings))
        assert all(one["what"] and one["where"] for one in findings)
        order = ["note", "warning", "fault"]
        return {one["id"]: one for one in sorted(findings, key=lambda one: order.index(one["severity"]))}

    def sick(self, *args: str, **more: Any) -> dict[str, dict[str, Any]]:
        """Warnings and faults."""
        found = self.finds(*args, **more)
        return {name: one for name, one in found.items() if one["severity"] in ("warning", "fault")}


@pytest.fixture
def doctor(make_world: Callable[..., World]) -> Doctor:
    return Doctor(make_world("bridge", 2))


def severities(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: one["severity"] for name, one in found.items()}


@contextmanager
def syns(world: World) -> Iterator[None]:
    """Somebody sends SYNs to the VIP, one after the other, while in the context."""
    lab, over = world.lab, threading.Event()
    frame = bytes(
        Ether(src=lab.client.mac(), dst=lab.lb.mac()) / IP(src=lab.client.ip4, dst=str(VIP4)) / TCP(dport=80, flags="S")
    )
    with inside(lab.client.netns), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))

        def send() -> None:
            while not over.wait(0.01):
                sock.send(frame)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def test_a_sound_one(doctor):
    """Before the first start, while it serves, after its end: nothing worse than notes, exit status 0, and nothing is
    changed by looking."""
    lb = doctor.node
    neighbours, links = lb.run("ip", "neigh").stdout, lb.run("ip", "-d", "link").stdout
    assert main_in(lb, "doctor", "--config", str(doctor.file)) == 0
    assert (lb.run("ip", "neigh").stdout, lb.run("ip", "-d", "link").stdout) == (neighbours, links)
    assert not lb.pins.exists()
    serving = doctor.world.serve(config=doctor.file)
    for config in (True, False):
        assert doctor.sick(config=config) == {}
    with syns(doctor.world):
        found = doctor.finds(config=False)
    assert "vip-unanswered" not in found and "no-traffic" not in found
    serving.terminate()
    assert serving.wait() == 0
    assert doctor.sick() == {}
    assert doctor.finds(config=False).keys() >= {"no-interface"}


def main_in(node: Node, *args: str) -> int:
    with inside(node.netns):
        return main(args)


@pytest.mark.long
def test_a_load_balancer_that_is_ill(doctor):
    """Its process, its program, its pins, its log."""
    world, lb = doctor.world, doctor.node
    serving = world.serve(config=doctor.file)

    serving.send_signal(signal.SIGSTOP)
    found = doctor.sick(config=False)
    assert severities(found) == {"daemon-stopped": "fault", "vip-unanswered": "warning"}
    assert found["daemon-stopped"]["remedy"].startswith(f"kill -CONT {serving.pid}")
    serving.send_signal(signal.SIGCONT)

    (world.folder / "serve.log").unlink()
    assert severities(doctor.sick()) == {"log-deleted": "warning"}

    serving.kill()
    serving.wait()
    with syns(world):
        found = doctor.sick(config=False)
    assert severities(found) == {"daemon-dead": "fault", "counter-rises": "warning", "vip-unanswered": "warning"}
    assert found["counter-rises"]["what"].startswith("drop_no_socket rises")
    assert "crablb remove --iface eth0" in found["daemon-dead"]["remedy"]

    # Its pins are removed by somebody, and so is its program.
    shutil.rmtree(lb.pins)
    assert severities(doctor.sick()) == {"offloads-left": "warning"}
    command(lb, "remove", "--iface", "eth0")
    assert doctor.sick() == {}

    # Detached, while it lives.
    serving = world.serve(config=doctor.file)
    with bpf.Link.from_pin(lb.pins / "lb-eth0" / "link") as link:
        link.detach()
    (lb.pins / "lb-eth0" / "flows").unlink()
    assert severities(doctor.sick()) == {"program-detached": "fault", "pins-missing": "warning"}
    serving.terminate()
    serving.wait()

    # Of an interface that has another name since.
    serving = world.serve(config=doctor.file)
    serving.kill()
    serving.wait()
    lb.ip("link set eth0 down", "link set eth0 name lan0", "link set lan0 up")
    found = doctor.sick(config=False)
    assert {name: found[name]["severity"] for name in ("interface-missing", "left-interface", "daemon-dead")} == {
        "interface-missing": "fault",
        "left-interface": "warning",
        "daemon-dead": "fault",
    }
    assert found["left-interface"]["remedy"] == "crablb remove --iface eth0"


def test_what_it_says_of_itself(doctor):
    """Its configuration is what it serves; its services and backends are as it sees them."""
    lb = doctor.node
    serving = doctor.world.serve(config=doctor.file)
    with inside(lb.netns):
        until(client.found)
    assert doctor.sick(config=False) == {}
    for backend in ("10.0.0.11", "10.0.0.12"):
        command(lb, "maint", backend)
    found = doctor.finds(config=False)
    assert found["service-down"]["severity"] == "fault"
    assert found["service-down"]["what"] == f"tcp://{VIP4}:80: no backend serves"
    assert found["service-down"]["why"] == "maint"
    assert found["changes"]["what"].endswith(f"are not in {doctor.file}")
    serving.terminate()
    serving.wait()

    doctor.file.write_text(f'admin = "off"\n{FILE}')
    doctor.world.serve(config=doctor.file)
    assert doctor.finds(config=False)["api-none"]["severity"] == "note"


def test_a_server_that_dies(doctor):
    """The checks that failed are told, with what they were answered."""
    world, lb = doctor.world, doctor.node
    world.servers()
    doctor.file.write_text(FILE.replace("check = []", 'check = ["tcp", "redirect"]'))
    world.serve(config=doctor.file)

    def backends() -> list[types.Backend]:
        with inside(lb.netns), client.Client(client.discover()) as asked:
            return asked.get("/v1/backends", list[types.Backend])

    until(lambda: all(check.ok for backend in backends() for check in backend.checks))
    assert doctor.sick(config=False) == {}
    world.lab.servers[0].end()
    until(lambda: [backend.address for backend in backends() if backend.healthy is False] == ["10.0.0.11", "fd00::11"])
    found = doctor.sick(config=False)
    assert found["backend-unhealthy"]["severity"] == "warning"
    assert " is unhealthy: tcp: " in found["backend-unhealthy"]["what"]
    assert "service-down" not in found


@pytest.mark.long
def test_a_vip_that_is_withdrawn(doctor):
    """And of a load balancer that is stopped or dead since, whatever came in before."""
    world, lb = doctor.world, doctor.node
    world.servers()
    doctor.file.write_text(FILE.replace("check = []", 'check = ["tcp"]\nquorum = 2'))
    serving = world.serve(config=doctor.file)

    def services() -> list[types.Service]:
        with inside(lb.netns), client.Client(client.discover()) as asked:
            return asked.get("/v1/services", list[types.Service])

    assert world.echo(VIP4, "10")["intact"]
    until(lambda: "vip-unanswered" not in doctor.sick(config=False))
    world.lab.servers[0].end()
    until(lambda: not any(service.announced for service in services()))
    for config in (True, False):
        found = doctor.sick(config=config)
        assert severities(found) == {
            "quorum-lost": "fault",
            "backend-unhealthy": "warning",
            "vip-unanswered": "warning",
        }
        assert found["vip-unanswered"]["what"].endswith(" on eth0: it is withdrawn")
    serving.send_signal(signal.SIGSTOP)
    found = doctor.sick()
    assert severities(found) == {"daemon-stopped": "fault", "vip-unanswered": "warning"}
    assert found["vip-unanswered"]["what"].endswith("its load balancer is stopped")
    serving.kill()
    serving.wait()
    for config in (True, False):
        found = doctor.finds(config=config)
        assert found["vip-unanswered"]["what"].endswith("its load balancer does not run")
        assert {"daemon-dead", "counter"} <= found.keys()
        assert "service-down" not in found and "quorum-lost" not in found
        text = lb.run(*crablb("doctor"), check=False).stdout
        assert "above" not in text and "announced" not in text and "come in" not in text


def test_two_load_balancers(doctor):
    """Each is looked at by its own configuration; an interface that is gone is told once, and others are as they
    were."""
    world, lb = doctor.world, doctor.node
    world.servers()
    world.serve(config=doctor.file)
    lb.ip("link add one0 type veth peer name other0", "link set one0 up", "link set other0 up")
    lb.ip("addr add 10.7.0.1/24 dev one0")
    other = world.folder / "other.toml"
    other.write_text('interface = "one0"\n[[service]]\naddress = "tcp://10.7.0.100:80"\nbackends = ["10.7.0.11"]\n')
    serving = lb.popen(*crablb("serve", "--config", str(other)))

    def finds() -> list[dict[str, Any]]:
        return json.loads(command(lb, "doctor", "--json", expected=None))["findings"]

    def about(vip: object) -> list[tuple[str, str]]:
        told = [one for one in finds() if one["what"].startswith("nobody") and str(vip) in one["what"]]
        return [(one["id"], one["what"]) for one in told]

    announced = [("vip", f"nobody else answers for {VIP4}, and it is announced")]
    try:
        with inside(lb.netns):
            until(lambda: client.found().keys() == {"eth0", "one0"})
        assert about(VIP4) == announced
        assert about("10.7.0.100") == [("vip-unanswered", "nobody answers for 10.7.0.100 on one0")]
        lb.ip("link del one0")
        found = finds()
        assert [one["what"] for one in found if one["id"] == "interface-missing"] == ["interface one0 is gone"]
        assert f"process {serving.pid} waits for one0, since it is gone" in [one["what"] for one in found]
        assert about(VIP4) == announced
    finally:
        serving.terminate()
        serving.wait()


def test_what_was_kept(doctor):
    doctor.file.write_text(f"keep = 600\n{FILE}")
    serving = doctor.world.serve(config=doctor.file)
    serving.terminate()
    assert serving.wait() == 0
    found = doctor.finds()
    assert "daemon-dead" not in found
    assert found["kept"]["severity"] == "note"
    keeper = re.search(r"until process (\d+)", found["kept"]["what"])
    assert keeper
    os.kill(int(keeper[1]), signal.SIGTERM)
    command(doctor.node, "remove", "--iface", "eth0")


def test_a_vip_that_is_somebody_elses(doctor):
    world, lb = doctor.world, doctor.node
    server = world.lab.servers[0]

    server.set({"net.ipv4.conf.all.arp_ignore": 0})
    found = doctor.sick()
    assert severities(found) == {"vip-at-backend": "fault"}
    assert found["vip-at-backend"]["what"] == f"backend 10.0.0.11, fd00::11 ({server.mac()}) answers for {VIP4} on eth0"
    server.set({"net.ipv4.conf.all.arp_ignore": 1})

    world.lab.client.ip(f"addr add {VIP4}/32 dev lo", f"addr add {VIP6}/128 dev lo")
    world.lab.client.ip(f"route del {VIP6}/128")
    found = doctor.sick()
    assert severities(found) == {"vip-elsewhere": "warning"}
    assert found["vip-elsewhere"]["what"].startswith(f"{world.lab.client.mac()} answers for ")
    world.lab.client.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")

    doctor.file.write_text(FILE.replace('announce = "arp"', ""))
    assert severities(doctor.sick()) == {"vip-unanswered": "warning"}

    lb.ip(f"addr add {VIP4}/32 dev eth0")
    with inside(lb.netns), socket.create_server((str(VIP4), 80)):
        found = doctor.finds()
        assert found["vip-local"]["severity"] == "note"
        assert found["vip-listener"]["severity"] == "warning"
    lb.ip(f"addr del {VIP4}/32 dev eth0", f"addr add {VIP4}/24 dev eth0")
    lb.ip(f"addr del {lb.ip4}/24 dev eth0")
    if f"{VIP4}/24" not in lb.run("ip", "addr").stdout:  # it was secondary, and went with the first
        lb.ip(f"addr add {VIP4}/24 dev eth0")
    assert doctor.sick()["vip-own-address"]["severity"] == "fault"


def test_who_answers():
    """Of those that are asked for, and in a flood of other packets; what this machine itself says is no answer."""
    with Pair.made() as pair:
        pair.ip("addr", "add", "10.0.0.2/24", "dev", "veth0")
        macs = {VIP4: "02:00:00:00:00:09", ip_address("10.0.0.7"): mac_of("veth1")}
        over = threading.Event()

        def answers(wire: socket.socket) -> None:
            while not over.is_set():
                wire.send(bytes(Ether(dst=mac_of("veth0"), type=0x88B5) / bytes(1400)))
                for address, mac in macs.items():
                    reply = ARP(op=2, hwsrc=mac, psrc=str(address), hwdst=mac_of("veth0"), pdst="10.0.0.2")
                    wire.send(bytes(Ether(src=mac, dst=mac_of("veth0")) / reply))
                over.wait(0.001)

        with pair.wire() as wire:
            thread = threading.Thread(target=answers, args=(wire,))
            thread.start()
            try:
                found = ask("veth0", [*macs, ip_address("10.0.0.8"), VIP6])
            finally:
                over.set()
                thread.join()
        assert {str(address): macs for address, macs in found.items()} == {
            str(VIP4): {"02:00:00:00:00:09"},
            "10.0.0.7": set(),  # it is an interface's of this machine
            "10.0.0.8": set(),
            str(VIP6): set(),
        }
        pair.ip("link", "set", "veth0", "down")
        assert ask("veth0", [VIP4]) == {VIP4: set()}


def mac_of(name: str) -> str:
    return interface_info(name).mac.hex(":")


def test_ways_to_backends(doctor):
    world, lb = doctor.world, doctor.node
    server, other = world.lab.servers

    other.ip("link set eth0 down")
    found = doctor.sick()
    assert severities(found) == {"backend-silent": "fault"}
    assert "10.0.0.12" in found["backend-silent"]["what"] or "fd00::12" in found["backend-silent"]["what"]
    other.ip("link set eth0 up", f"addr add {other.ip6}/64 dev eth0 nodad")  # which went with the link

    lb.ip(f"route add 10.0.0.12/32 via {server.ip4}", f"route add fd00::12/128 via {server.ip6} mtu 1300")
    assert severities(doctor.sick()) == {"tunnel-narrow": "warning"}
    doctor.file.write_text(FILE.replace("backends", 'fallback = "dsr-l2"\nbackends'))
    found = doctor.sick()
    assert severities(found) == {"backend-behind-gateway": "fault"}
    assert "it is behind " in found["backend-behind-gateway"]["what"]
    lb.ip("route del 10.0.0.12/32", "route del fd00::12/128")

    doctor.file.write_text(FILE.replace('"10.0.0.12"', '"192.0.2.9"').replace('"fd00::12"', '"fd00::2"'))
    assert severities(doctor.sick()) == {"backend-route": "fault", "backend-own": "fault"}

    doctor.file.write_text(FILE)
    lb.ip("rule add from all lookup 100", "route add 10.0.0.12/32 dev eth0 table 100")
    assert doctor.finds()["backend-table"]["what"].startswith("the route to 10.0.0.12 stands in table 100")


def test_other_programs(doctor, other_xdp_program):
    lb = doctor.node
    lb.run("ip", "link", "set", "eth0", "xdp", "obj", str(other_xdp_program), "sec", "xdp")
    found = doctor.sick()
    assert severities(found) == {"xdp-other": "fault"}
    assert "pass (id " in found["xdp-other"]["what"]
    lb.ip("link set eth0 xdp off")

    lb.ip("link add link eth0 name mac0 type macvlan", "link set mac0 up")
    lb.run("ip", "link", "set", "mac0", "xdpgeneric", "obj", str(other_xdp_program), "sec", "xdp")
    found = doctor.sick()
    assert severities(found) == {"xdp-above": "fault"}
    assert found["xdp-above"]["what"].startswith("mac0, which lies on eth0, has an XDP program")
    lb.ip("link del mac0")

    lb.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    lb.run("tc", "filter", "add", "dev", "eth0", "ingress", *FILTER)
    rules = f"table ip t {{ chain c {{ type filter hook prerouting priority 0; ip daddr {VIP4} drop; }}; }}"
    lb.run("nft", rules)
    found = doctor.finds()
    assert found["tc"]["what"] == "eth0 has tc programs or filters (u32)"
    assert found["netfilter"]["what"] == f"netfilter's ip t c names {VIP4}"
    assert not doctor.sick()


def test_interfaces(doctor):
    lb = doctor.node
    found = doctor.sick("--iface", "eth7")
    assert found["interface-missing"]["what"] == "interface eth7 does not exist; there are: lo, eth0"

    # A bridge has generic mode alone, and packets go through tunnels.
    doctor.file.write_text(FILE.replace("backends", 'fallback = "dsr-ipip"\nbackends'))
    lb.ip("link add br9 type bridge", "link add p9 type veth peer name q9", "link set p9 master br9")
    lb.ip("link set br9 up", "link set p9 up", "link set q9 up")
    lb.run("tc", "qdisc", "add", "dev", "p9", "clsact")
    lb.run("tc", "filter", "add", "dev", "p9", "ingress", *FILTER)
    found = doctor.finds("--iface", "br9")
    assert found["xdp-generic"]["remedy"] == "serve its ports: --iface p9"
    assert found["gro-generic"]["severity"] == "warning"
    assert found["tc-port"]["severity"] == "warning"
    doctor.file.write_text(f'xdp_mode = "native"\n{FILE}')
    assert doctor.sick("--iface", "br9")["xdp-native"]["severity"] == "fault"
    lb.ip("link del br9", "link del p9")

    lb.ip("link set eth0 down")
    found = doctor.sick()
    assert found["interface-down"]["remedy"] == "ip link set eth0 up"
    lb.ip("link set eth0 up")
    doctor.world.lab.middle.ip("link set lb down")
    assert doctor.sick()["interface-carrier"]["severity"] == "fault"


def test_an_agent_and_what_lies_about(doctor):
    server = doctor.world.lab.servers[0]
    doctor.world.servers()
    assert doctor.sick(node=server, config=False) == {}
    assert "the kernel's limits" in doctor.finds(node=server, config=False)["mptcp-client"]["what"]
    with inside(server.netns):
        pins.remove(pins.folders()["server"])
        stale = pins.RUN / f"{pins.namespace()}-eth9.sock"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(stale))
        (pins.RUN / f"{pins.namespace()}-lb-eth9.lock").touch()
    try:
        found = doctor.finds(node=server, config=False)
    finally:
        stale.unlink()
    assert found["agent"]["severity"] == "warning"
    assert found["agent"]["remedy"] == "crablb agent repair server"
    assert found["socket-stale"]["what"] == f"nobody listens at {stale}"
    assert found["lock-stale"]["what"] == "a lock that nobody holds: lb-eth9"


#: What is in the way of looking, and what is found by it.
MASKED = {
    "no /sys": ("mount -t tmpfs none /sys", None),
    "no list of locks": ("mount --bind /dev/null /proc/locks", None),
    "no /proc": ("mount -t tmpfs none /proc", "proc"),
    "no sysctls": ("mount -t tmpfs none /proc/sys", None),
    "no programs": ("export PATH=/nowhere", None),
    "a full /run": ("mount -t tmpfs -o size=4k none /run && head -c 4096 /dev/zero >/run/x", "run-folder"),
    "few files": ("ulimit -n 64", "limit-files"),
    "no capabilities": (":", "rights"),
}


@pytest.mark.long
def test_whatever_is_masked(doctor):
    """It is told, and so is the rest, and nothing ends by a traceback."""
    doctor.world.serve(config=doctor.file)
    tool = [*crablb("doctor", "--json", "--config", str(doctor.file))]

    def masked(what: str) -> subprocess.CompletedProcess[str]:
        rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if what == "no capabilities" else []
        script = f'{MASKED[what][0]} && exec "$@"'
        return doctor.node.run("unshare", "-m", "bash", "-c", script, "bash", *rights, *tool, check=False)

    with ThreadPoolExecutor(4) as pool:
        ended = dict(zip(MASKED, pool.map(masked, MASKED), strict=True))
    for what, done in ended.items():
        assert done.returncode in (0, 1), (what, done.stderr)
        assert "Traceback" not in done.stderr, what
        found = {one["id"]: one["severity"] for one in json.loads(done.stdout)["findings"]}
        assert found.keys() & {"xdp-mode", "interface-missing", "unread"}, what
        expected = MASKED[what][1]
        assert expected is None or found[expected] in ("warning", "fault"), what
        if what == "a full /run":
            assert "daemon-elsewhere" in found
        if what != "no /proc":  # where its lock is to be found
            assert not {"daemon-dead", "kept"} & set(found), what


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--iface", ""], "'' is not the name of an interface"),
        (["--iface", "lo"], "no client's packets come in by lo"),
        (["--iface", "eth0", "--iface", "eth0"], "eth0 is named twice"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
        (["--ifaces", "eth0"], "did you mean --iface?"),
        (["eth0"], "unknown argument 'eth0'"),
    ],
)
def test_wrong_arguments(args, said, capsys):
    assert main(["doctor", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_very_many(doctor):
    """It is told in time, and by few lines."""
    backends = ", ".join(f'"10.9.{i // 250}.{i % 250 + 1}"' for i in range(1000))
    services = (
        f'[[service]]\naddress = "tcp://10.8.{i // 250}.{i % 250 + 1}:80"\nbackends = [{backends}]\n' for i in range(10)
    )
    doctor.file.write_text("interface = 'eth0'\n" + "".join(services))
    doctor.node.ip("route add 10.9.0.0/16 dev eth0")
    done = subprocess.run(
        doctor.node.command(crablb("doctor", "--config", str(doctor.file))),
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "and 236 more like these [backend-silent]" in done.stdout
    assert "and 724 more like these [backend-unasked]" in done.stdout
    assert len(done.stdout.splitlines()) < 200
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\033" not in done.stdout and done.stderr == ""  # it is no terminal
