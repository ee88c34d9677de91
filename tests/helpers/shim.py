"""System calls of a program that fail, come short, or are its last: rules for shim.c, which is preloaded.

``shim = Shim.made(folder)``; start the program with ``shim.env``; ``with shim.rule("sendto", of="xdp", does=ENOBUFS)``.
A rule is changed while the program runs, and counts the calls that it is about.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.helpers.namespaces import Pair
from tests.helpers.processes import ROOT

__all__ = ["END", "KILL", "SHORT", "Rule", "Shim", "build", "tried"]

#: What a rule does, beside an errno.
KILL, SHORT, END = -1, -2, -3
ALWAYS = 2**64 - 1
CERTAIN = 2**32 - 1


class Rule(ctypes.Structure):
    """``struct rule``."""

    _fields_ = (
        ("call", ctypes.c_char * 24),
        ("of", ctypes.c_char * 72),
        ("first", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("chance", ctypes.c_uint32),
        ("does", ctypes.c_int32),
        ("calls", ctypes.c_uint64),
        ("hits", ctypes.c_uint64),
        ("on", ctypes.c_uint32),
        ("last", ctypes.c_char * 72),
    )

    def set(self, call: str, of: str = "", does: int = 0, *, first: int = 1, count: int = ALWAYS, chance: float = 1.0):
        """Be about calls of a function (or of a kind: see shim.c) that has ``of`` in its description.

        Of these, counted from now on, those from the ``first`` one on, ``count`` in all, get ``does`` with this
        ``chance``: an errno, SHORT, KILL, END (of the thread); 0: they are merely counted.
        """
        self.on = 0
        self.call, self.of = call.encode(), of.encode()
        self.first, self.count, self.does = first, count, does
        self.chance = round(chance * CERTAIN)
        self.calls = self.hits = 0
        self.last = b""
        self.on = 1

    def end(self) -> None:
        self.on = 0

    def __str__(self) -> str:
        does = {KILL: "killed", SHORT: "short"}.get(self.does) or errno.errorcode.get(self.does, "counted")
        return f"{self.call.decode()} {self.of.decode()}: {does}, {self.hits} of {self.calls}; {self.last.decode()}"


class _Rules(ctypes.Structure):
    _fields_ = (
        ("clock", ctypes.c_int64),
        ("process", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("rules", Rule * 16),
    )


def build(folder: Path) -> Path:
    """The library, compiled."""
    built = folder / "shim.so"
    if not built.exists():
        source = ROOT / "tests" / "helpers" / "shim.c"
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", built, source, "-ldl", "-lpthread"], check=True)
    return built


class Shim:
    """The rules of one program, or of the processes forked from it."""

    def __init__(self, path: Path) -> None:
        """``path``: of the rules, which are made if they are not there.  The library is beside it."""
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(ctypes.sizeof(_Rules)))
        with open(path, "r+b") as file:
            self._rules = _Rules.from_buffer(mmap.mmap(file.fileno(), 0))

    @classmethod
    def made(cls, folder: Path, name: str = "shim", seed: int = 1) -> Self:
        build(folder)
        made = cls(folder / f"{name}.rules")
        made._rules.seed = seed
        return made

    @property
    def env(self) -> Mapping[str, str]:
        """What the program is to be started with, beside what else is in the environment."""
        return {"LD_PRELOAD": str(build(self.path.parent)), "CRAB_SHIM": str(self.path)}

    def only(self, process: int) -> None:
        """Be about this process alone; 0: about all that are forked from the program."""
        self._rules.process = process

    @property
    def struck(self) -> str:
        """The call that the first rule struck last; empty: none."""
        text: str = self._rules.rules[0].last.decode()
        return text

    def forget(self) -> None:
        """Nothing was struck."""
        self._rules.rules[0].last = b""

    def step_clock(self, seconds: float) -> None:
        """CLOCK_REALTIME is by so much later than the machine's, from now on."""
        self._rules.clock = round(seconds * 1e9)

    def add(self, call: str, of: str = "", does: int = 0, **more: float) -> Rule:
        """A rule, until its :meth:`Rule.end`; see :meth:`Rule.set`."""
        rule = next(rule for rule in self._rules.rules if not rule.on)
        rule.set(call, of, does, **more)  # type: ignore[arg-type]
        return rule

    def kill_at(self, process: int, call: str, number: int) -> None:
        """Kill a process at the call of this number, counted from now on; 0: at none.  No other rule is in force."""
        self.end()
        self.only(process)
        if number:
            self.add(call, does=KILL, first=number)

    @contextmanager
    def rule(self, call: str, of: str = "", does: int = 0, **more: float) -> Iterator[Rule]:
        """The same, while in the context."""
        rule = self.add(call, of, does, **more)
        try:
            yield rule
        finally:
            rule.end()

    def end(self) -> None:
        """No rule is in force any more."""
        for rule in self._rules.rules:
            rule.end()
        self.step_clock(0)


def tried(folder: Path, module: str, *args: object, backends: range, seconds: float) -> Any:
    """What a module of ``tests.helpers`` prints as JSON that is run with a shim on veth0, beside these ``backends``
    (10.0.0.N); the shim's place is its last argument."""
    shim = Shim.made(folder)
    with Pair.made() as pair:
        pair.ip("addr", "add", "10.0.0.2/24", "dev", "veth0")
        for n in backends:
            pair.ip("neigh", "add", f"10.0.0.{n}", "lladdr", f"02:00:00:00:00:{n}", "dev", "veth0", "nud", "permanent")
        done = subprocess.run(
            [sys.executable, "-m", f"tests.helpers.{module}", *map(str, args), str(shim.path)],
            env={**os.environ, **shim.env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
