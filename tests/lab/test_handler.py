"""A load balancer's handlers, among real traffic."""

from __future__ import annotations

import asyncio
import socket
import threading
from ipaddress import ip_address

import numpy as np
import pytest

from crablb import Backend, Event, Frames, LoadBalancer, Match, Service, Vip
from crablb.lab import VIP4
from tests.helpers.namespaces import inside
from tests.helpers.world import World

SEED = bytes(16)
VIP = Vip(VIP4, 80)
A = ip_address("10.0.0.11")


def nothing(frames: Frames) -> None:
    return None


def turned_round(frames: Frames) -> np.ndarray:
    """Answer UDP over IPv4 with what it says, and a byte more."""
    for i in range(len(frames)):
        frames.lengths[i] += 1
        frame = frames[i]
        frame[0:12] = np.roll(frame[0:12], 6)
        frame[26:34] = np.roll(frame[26:34], 4)
        frame[34:38] = np.roll(frame[34:38], 2)
        frame[-1] = ord("!")
        frame[38:40] = list((len(frame) - 34).to_bytes(2, "big"))
        frame[40:42] = 0  # no checksum
        total = len(frame) - 14
        frame[16:18], frame[24:26] = list(total.to_bytes(2, "big")), 0
        words = frame[14:34].astype(np.uint32)
        total_sum = int((words[0::2] * 256 + words[1::2]).sum())
        while total_sum >> 16:
            total_sum = (total_sum & 0xFFFF) + (total_sum >> 16)
        frame[24:26] = list((~total_sum & 0xFFFF).to_bytes(2, "big"))
    return np.ones(len(frames), bool)


def test_answers_and_failures(make_world):
    world: World = make_world(servers=1)
    world.servers()
    world.client()
    lb_address = str(world.lab.lb.ip4)

    def broken(frames: Frames) -> None:
        raise RuntimeError("broken")

    def nonsense(frames: Frames) -> list[int]:
        return [1] * (len(frames) + 1)

    def too_long(frames: Frames) -> list[bool]:
        frames.lengths[:] = 5000
        return [True] * len(frames)

    with inside(world.lab.client.netns):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(60)
    lb = LoadBalancer("eth0", [Service(VIP, (Backend(A),))], seed=SEED)
    lb.handle(Match(protocol=17, port=7), turned_round)  # before the start
    failures: list[Event] = []
    with inside(world.lab.lb.netns), lb:
        for port, function in ((8, broken), (9, nonsense), (10, too_long), (11, nothing)):
            lb.handle(Match(protocol=17, port=port), function)

        listening = threading.Event()

        async def follow() -> None:
            asyncio.get_running_loop().call_soon(listening.set)
            async for event in lb.events():
                if event.kind == "handler-failed":
                    failures.append(event)
                if len(failures) == 3:
                    return

        assert lb._loop
        following = asyncio.run_coroutine_threadsafe(follow(), lb._loop)
        assert listening.wait(60)
        sock.sendto(b"hello", (lb_address, 7))
        assert sock.recv(100) == b"hello!"
        for port in (8, 9, 10, 11):
            sock.sendto(b"lost", (lb_address, port))
        sock.sendto(b"again", (lb_address, 7))
        assert sock.recv(100) == b"again!"
        # All of these have passed; services and the kernel's traffic (ARP) go on as before.
        assert world.echo(VIP4, "10")["server"] == "server1"
        counts = lb.statistics()
        assert {name: counts.workers[name] for name in ("handler_sent", "handler_kept", "drop_handler")} == {
            "handler_sent": 2, "handler_kept": 1, "drop_handler": 3,
        }  # fmt: skip
        assert counts.xdp["handler"] == 6
        assert counts.workers["redirected"] == 1
        lb.unhandle(Match(protocol=17, port=7))
        # The kernel has it again, and says that nobody listens there.
        sock.connect((lb_address, 7))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
        following.result(10)
        assert lb.statistics().daemon["handler_failed"] == 3
    sock.close()
    assert [event.reason.split(": ", 2)[:2] for event in failures] == [
        ["protocol 17, port 8", "RuntimeError"],
        ["protocol 17, port 9", "ValueError"],
        ["protocol 17, port 10", "ValueError"],
    ]
    assert "not booleans of shape (1,)" in failures[1].reason
    assert "it made a frame of 5000 bytes, not of 14 to " in failures[2].reason
