"""Kills load balancers at each call that changes something (shim.c, which is preloaded), and looks what is left.

``python -m tests.helpers.killed SCENARIO RULES``, on veth0 of the network namespace; SCENARIO: see :data:`SCENARIOS`;
RULES: the shim's.  Each load balancer is a child, forked from here because a new interpreter takes longer to start than
it does.  Prints what it found, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import structlog

from crablb.config import config_from_args
from crablb.dataplane.engine import Engine
from crablb.dataplane.flows import Inherited
from crablb.errors import KernelError
from crablb.kernel import bpf, pins
from crablb.model import Bypass, Config
from tests.helpers.shim import Shim

SEED, OTHER_SEED = bytes(16), bytes([1]) * 16
VIP = "tcp://10.0.0.100:80"
FLOWS = 60
shim = Shim(Path(sys.argv[2]))


def config(*backends: int, **settings: Any) -> Config:
    service = f"{VIP}={','.join(f'10.0.0.{n}' for n in backends)}"
    return config_from_args(["veth0"], [service], ack_bypass=Bypass.ON, flows=256, **settings)


def kill_at(number: int) -> None:
    """This process, at the call of this number from now on; 0: at none."""
    shim.kill_at(os.getpid(), "change", number)


def child(work: Callable[[], Awaitable[None]]) -> bool:
    """Whether it came to the end, in place of being killed."""
    pid = os.fork()
    if not pid:
        asyncio.run(work())  # type: ignore[arg-type]
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return status == 0


async def first() -> None:
    """One that has flows, to a backend too that is none of the next's."""
    engine = Engine(config(11, 12), SEED)
    await engine.start()
    assert engine._program and engine._program.flows
    table = engine._program.flows
    if not table.count():
        assert all(table.add((n + 1) * 0x9E3779B97F4A7C15 % 2**64, n % 2, 0) for n in range(FLOWS))
    assert table.count() == FLOWS
    os.kill(os.getpid(), signal.SIGKILL)


async def start(number: int, settings: Config, seed: bytes) -> None:
    engine = Engine(settings, seed)
    kill_at(number)
    await engine.start()
    os._exit(0)  # an end is another scenario


async def reload(number: int) -> None:
    engine = Engine(config(11, 12), SEED)
    await engine.start()
    kill_at(number)
    engine.apply(config(12, 13))
    engine.apply(config(11, 14))
    os._exit(0)


async def stop(number: int) -> None:
    engine = Engine(config(11, 12), SEED)
    await engine.start()
    kill_at(number)
    await engine.close()
    kill_at(0)


#: What is killed; whether a program is attached, by a link that is pinned, and the flows are there, at each instant.
SCENARIOS: dict[str, tuple[Callable[[int], Awaitable[None]], bool, bool]] = {
    "start": (lambda n: start(n, config(11), SEED), False, False),
    "takeover": (lambda n: start(n, config(12, 13), SEED), True, True),
    "other-seed": (lambda n: start(n, config(11, 12), OTHER_SEED), True, False),
    "reload": (reload, True, True),
    "stop": (stop, False, False),
}


def fault(attached: bool, flows: bool) -> str:
    """What is wrong with what is left; empty if nothing is."""
    folder = pins.folder("lb-veth0")
    program, _ = bpf.xdp_program(socket.if_nametoindex("veth0"))
    try:
        with bpf.Link.from_pin(folder / "link") as link:
            pinned = link.program_id if link.target else 0
    except bpf.BpfNotFoundError:
        pinned = 0
    if program != pinned:
        return f"program {program} is attached, and the pinned link is of {pinned}"
    if attached and not program:
        return "no program is attached"
    if flows:
        try:
            left = Inherited.open(folder, SEED)
        except (KernelError, ValueError) as error:
            return f"no flows can be adopted: {error}"
        there = len(set(left.backends.values()))
        left.close()
        if there != 2:
            return f"the flows' backends are {left.backends}"
    return ""


def main(name: str) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    work, attached, flows = SCENARIOS[name]
    faults = {}
    for number in count(1):
        if name != "start":
            assert not child(first)
        ended = child(lambda number=number: work(number))  # type: ignore[misc]
        if wrong := fault(attached, flows):
            faults[number] = wrong
        if ended:
            break
    # Whatever was left, the next one serves and ends clean.
    assert child(lambda: stop(0))
    left = [str(path) for path in pins.folder("lb-veth0").glob("*")]
    program = bpf.xdp_program(socket.if_nametoindex("veth0"))[0]
    print(json.dumps({"points": number - 1, "faults": faults, "left": left, "program": program}))


if __name__ == "__main__":
    main(sys.argv[1])
