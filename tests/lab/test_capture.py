"""Captures and traces of a load balancer that serves: each packet as the segment had it, with what became of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether
from scapy.utils import rdpcap

from crablb.config import config_from_args
from crablb.control.supervisor import Supervisor
from crablb.errors import KernelError
from crablb.filters import Filter
from crablb.kernel import bpf
from crablb.lab import VIP4, VIP6
from tests.helpers.namespaces import inside
from tests.helpers.pcapng import File, Packet, read
from tests.helpers.processes import exchange, until
from tests.helpers.world import World, command, status


def capture(world: World, path: Path, *more: str) -> subprocess.Popen[str]:
    """``crablb capture``; on return it captures."""
    child = world.program(world.lab.lb, sys.executable, "-m", "crablb", "capture", "-w", str(path), *more)
    assert child.stderr
    line = child.stderr.readline()
    assert "capturing" in line, line + child.stderr.read()
    return child


def ended(child: subprocess.Popen[str], number: int = signal.SIGINT, expected: int = 0) -> str:
    """What it says in the end."""
    if number:
        child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert child.returncode == expected, said
    return said


def program(world: World) -> str:
    """Which program the load balancer's interface has."""
    with inside(world.lab.lb.netns):
        return bpf.program_name(bpf.xdp_program(socket.if_nametoindex("eth0"))[0])


def whole(path: Path) -> File | None:
    """A file that is being written, if what is there are whole blocks."""
    try:
        return read(path)
    except (AssertionError, struct.error):
        return None


def expected(packet: Packet) -> set[str]:
    """What may become of a packet, as whoever knows the protocol tells it: counters.  How soon the XDP program knows a
    connection is a matter of time."""
    tcp = Ether(packet.data)[TCP]
    if tcp.flags == "S":
        return {"redirected" if any(kind == 42 for kind, _ in tcp.options) else "fallback_no_offer"}
    return {"fallback_established"} if tcp.flags & 5 else {"fallback_established", "flow"}


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_every_packet_of_redirected_and_other_clients(make_world, mode):
    world = make_world(servers=2)
    lab = world.lab
    world.servers()
    agent = world.client()
    world.serve("--xdp-mode", mode)
    ours, theirs = world.folder / "ours.pcapng", world.folder / "theirs.pcap"
    trace = world.program(lab.lb, sys.executable, "-m", "crablb", "trace", str(lab.client.ip4), "--json",
                          "--connections", "2", "--timeout", "30")  # fmt: skip
    assert trace.stderr
    assert "tracing" in trace.stderr.readline()
    child = capture(world, ours)
    assert program(world) == "crab_lb_tap"
    with lab.middle.capture(theirs, "tcp", "lb"):
        # Data of a segment alone: of several the switch makes one.
        names = [world.echo(vip, "100")["server"] for vip in (VIP4, VIP6)]
        agent.terminate()
        agent.wait()
        names += [world.echo(vip, "100")["server"] for vip in (VIP4, VIP6)]
    segment = [bytes(p) for p in rdpcap(str(theirs))]
    until(lambda: (file := whole(ours)) and len(file.packets) >= len(segment))
    assert "interrupted" in ended(child)
    file = read(ours)
    assert [i.name for i in file.interfaces] == ["eth0"]
    assert mode in file.interfaces[0].description
    assert not any(p.dropped for p in file.packets)
    # The same frames, those that came and those that went.
    mac = bytes.fromhex(lab.lb.mac().replace(":", ""))
    assert Counter(p.data for p in file.packets if not p.outbound) == Counter(f for f in segment if f[:6] == mac)
    assert Counter(p.data for p in file.packets if p.outbound) == Counter(f for f in segment if f[6:12] == mac)
    # Each with what became of it, and to whom.
    macs = {server.mac(): server for server in lab.servers}
    out = {p.number: p for p in file.packets if p.outbound}
    seen = Counter[str]()
    for packet in file.packets:
        if packet.outbound:
            continue
        counter = packet.comment.rpartition("[")[2].rstrip("]")
        assert counter in expected(packet), packet.comment
        seen[counter] += 1
        went = out.pop(packet.number)
        assert went.comment == packet.comment
        server = macs[went.data[:6].hex(":")]
        address = server.ip4 if Ether(packet.data).type == 0x0800 else server.ip6
        assert f"to {address}; " in packet.comment
        assert ("; XDP program, queue" in packet.comment) == (counter == "flow") == (packet.verdict is not None)
        assert packet.queue is not None
    assert not out
    assert seen["redirected"] == seen["fallback_no_offer"] == 2
    assert seen["flow"] > 0
    counts = status(lab)
    assert seen == {n: counts["xdp" if n == "flow" else "total"][n] for n in seen}
    assert len({p.number for p in file.packets}) == seen.total()
    _check_trace(trace, lab, names)
    # When nobody looks on any more, the other program is back.
    until(lambda: program(world) == "crab_lb")
    assert world.echo(VIP4, "10")["intact"]


def _check_trace(trace: subprocess.Popen[str], lab, names: list[object]) -> None:
    said, problems = trace.communicate(timeout=60)
    assert trace.returncode == 0, problems
    steps = [json.loads(line) for line in said.splitlines()]
    by_connection: dict[str, list[dict[str, str]]] = {}
    for step in steps[:-1]:
        by_connection.setdefault(step["connection"], []).append(step)
    redirected, fallback = by_connection.values()
    addresses = {server.name: str(server.ip4) for server in lab.servers}
    head = ["in", "service", "flow", "offer", "choice", "decision", "rewritten", "out"]
    for steps_, name in ((redirected, names[0]), (fallback, names[2])):
        assert [step["what"] for step in steps_][:8] == head
        assert steps_[4]["outcome"] == addresses[name]
        assert steps_[7]["outcome"].endswith(lab.node(name).mac())
    assert redirected[3]["outcome"] == "offered"
    assert [step["what"] for step in redirected[8:]] == ["over"]
    assert "success" in redirected[8]["why"]
    assert fallback[3]["outcome"] == "none"
    assert {step["what"] for step in fallback[8:-1]} == {"packet"}
    assert fallback[-1]["outcome"] == "it has ended"
    assert steps[-1]["outcome"] == "2 connections"


@pytest.mark.long
def test_several_at_once(standing):
    """Each sees its own; there are no more than so many; who is stopped keeps nobody else waiting."""
    world = standing(servers=2)
    lab = world.lab
    world.serve()
    paths = [world.folder / f"{i}.pcapng" for i in range(4)]
    server = {str(s.ip4): s for s in lab.servers}
    filters = [["vip", f"{VIP4}:80"], ["vip", str(VIP6)], ["backend", str(lab.servers[0].ip4)], ["port", "81"]]
    children = [
        capture(world, path, *words, "--bytes", str(1 << 28), "--packets", "1000000")
        for path, words in zip(paths, filters, strict=True)
    ]
    refused = lab.lb.popen(
        sys.executable, "-m", "crablb", "capture", "-w", str(world.folder / "none"), stderr=subprocess.PIPE
    )
    assert "4 captures and traces are under way" in refused.communicate(timeout=30)[1]
    assert refused.returncode == 2
    assert not (world.folder / "none").exists()
    children[0].send_signal(signal.SIGSTOP)
    big = world.echo(VIP4, "40000000")
    assert big["intact"]
    small = [world.echo(VIP6, "10"), *(world.echo(VIP4, "10", str(20000 + i)) for i in range(8))]
    assert json.loads(command(lab.lb, "status", "--json", expected=None))
    until(lambda: (file := whole(paths[1])) and any("fallback_no_offer" in p.comment for p in file.packets))
    children[0].send_signal(signal.SIGCONT)
    until(lambda: (file := whole(paths[0])) and any(p.dropped for p in file.packets), 30)
    for child in children:
        ended(child)
    first, second, third, none = map(read, paths)
    assert {Ether(p.data).type for p in first.packets} == {0x0800}
    assert {Ether(p.data).type for p in second.packets} == {0x86DD}
    assert none.packets == []
    mine = {lab.servers[0].mac()}
    assert {p.data[:6].hex(":") for p in third.packets if p.outbound} <= mine
    on_first = [one for one in (big, *small[1:]) if server[str(lab.servers[0].ip4)].name == one["server"]]
    assert bool(third.packets) == bool(on_first)
    until(lambda: program(world) == "crab_lb")


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk(standing):
    world = standing()
    world.serve()
    disk = world.folder / "disk"
    with small_disk(disk, "64k"):
        child = capture(world, disk / "a.pcapng")
        assert world.echo(VIP4, "1000000")["intact"]
        said = ended(child, 0, 2)
        assert "No space left on device" in said
        assert read(disk / "a.pcapng").packets
    until(lambda: program(world) == "crab_lb")


@pytest.mark.long
def test_into_a_pipe(standing):
    """To tshark, which goes when it has had enough."""
    world = standing()
    world.serve()
    shell = f"{sys.executable} -m crablb capture -w - port 80 | tshark -l -c 2 -r - -T fields -e frame.comment"
    child = world.program(world.lab.lb, "sh", "-c", shell)
    assert child.stderr
    assert any("capturing" in line for line in child.stderr)
    assert world.echo(VIP4, "1000")["intact"]
    out, problems = child.communicate(timeout=60)
    assert out.splitlines()[0].endswith("[fallback_no_offer]"), problems
    assert len(out.splitlines()) == 2


def test_the_daemon_is_killed_in_a_capture(standing):
    """The file is whole; known flows go on by the program that shows, and the next daemon puts its own there."""
    world = standing()
    daemon = world.serve()
    path = world.folder / "a.pcapng"
    child = capture(world, path)
    held = world.python(world.lab.client, "hold", str(VIP4), "80", ready=True)
    assert exchange(held, "one") == "one"
    until(lambda: (file := whole(path)) and any(p.comment.endswith("[flow]") for p in file.packets))
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.wait()
    assert "it is whole" in ended(child, 0, 2)
    assert read(path).packets
    assert program(world) == "crab_lb_tap"
    assert exchange(held, "two") == "two"
    again = world.serve()
    assert program(world) == "crab_lb"
    assert exchange(held, "three") == "three"
    # Nor does a capture keep it from a clean end.
    child = capture(world, path)
    again.terminate()
    assert again.wait() == 0
    assert "the load balancer has gone" in ended(child, 0, 2)
    assert read(path).packets == []
    assert program(world) == ""


def test_a_tap_of_this_process(standing):
    """It outlives a program that is attached once more and a configuration that is served anew, and leaves nothing."""
    world = standing()
    settings = config_from_args(["eth0"], [f"tcp://{VIP4}:80={world.lab.servers[0].ip4}"], check=[])

    async def main() -> None:
        supervisor = Supervisor(settings, bytes(16))
        engine = supervisor.engine
        await supervisor.start()
        try:
            assert engine._program
            tap = await engine.tap(Filter(), 256)
            engine._attachments[0].renew(engine._program)  # as for queues that a veth has got since
            engine.apply(engine.config)
            assert program(world) == "crab_lb_tap"
            assert (await asyncio.to_thread(world.echo, VIP4, "10"))["intact"]
            seen: set[str] = set()
            while not {"fallback_no_offer", "fallback_established", "flow"} <= seen:
                seen |= {name for packet in await tap.take(10) for name in packet.counters}
            tap.close()
            tap.close()
            assert tap.over
            assert program(world) == "crab_lb"
            await engine._sweep_once()
            assert not engine._queues._rings
            opening = asyncio.ensure_future(engine.tap(Filter(), 256))
            await asyncio.sleep(0)  # it has begun to load its program
        finally:
            await supervisor.close()
        with pytest.raises(KernelError, match="the load balancer ends"):
            await opening
        assert program(world) == ""

    with inside(world.lab.lb.netns):
        asyncio.run(main())
