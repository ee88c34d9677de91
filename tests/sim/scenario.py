"""Scenarios: of a seed, as text for ``world.c``, played, and made smaller.

A scenario is a farm, and what befalls it: each event has an instant (microseconds), a name and three numbers (see
``play`` in world.c).  The same scenario is always the same run, packet by packet.
"""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/sim"
#: What is compiled of native/: all but what speaks with a kernel.
LEFT_OUT = {"worker.c", "xsk.c"}
POLICIES = ("maglev", "maglev", "round-robin", "weighted-round-robin", "least-connections", "power-of-two", "random")
NEGOTIATED, ALWAYS, NEVER = range(3)
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]

Event = tuple[int, str, int, int, int]


@dataclass(frozen=True)
class Scenario:
    seed: int
    connections: int = 2000
    rate: int = 2000  # new ones a second
    balancers: int = 1
    servers: int = 1
    clients: int = 16
    agents: int = 50  # of 100 clients
    ports: int = 2048  # that a client has: one that is free again is used again
    cache: int = 1 << 18  # entries of a worker's flow cache
    flows: int = 1 << 16  # buckets of map `flows`
    multipath: int = 0  # of 100 clients
    tags: int = 0  # VLAN tags
    split: int = 0  # 1: every other server is on another interface of the load balancers
    apart: int = 0  # 1: the XDP program does not reach every third server
    collide: int = 0  # 1: a client's port is several connections' at once, and again before its server knows
    syn_rate: int = 0  # SYNs a second that each service takes; 0: all
    heal: int = 1_000_000  # when all faults end, microseconds
    services: tuple[tuple[str, int, int, int], ...] = (
        ("maglev", 0, 0, 0),
    )  # policy, mode, fallback, 1: IPv6, 2: reset
    events: tuple[Event, ...] = ()

    def text(self, **more: int) -> str:
        names = (
            "seed",
            "connections",
            "rate",
            "balancers",
            "servers",
            "clients",
            "agents",
            "ports",
            "cache",
            "flows",
            "multipath",
            "tags",
            "split",
            "apart",
            "collide",
            "syn_rate",
            "heal",
        )
        lines = [f"{name} {getattr(self, name)}" for name in names]
        lines += [f"{name} {value}" for name, value in more.items()]
        lines += ["service {} {} {} {}".format(*service) for service in self.services]
        lines += ["event {} {} {} {} {}".format(*event) for event in self.events]
        return "\n".join(lines) + "\n"

    def test(self, found: Iterable[str]) -> str:
        """As a test for test_sim.py."""
        changed = [f for f in self.__dataclass_fields__ if getattr(self, f) != getattr(Scenario(0), f) or f == "seed"]
        own = "".join(f"        {name}={getattr(self, name)!r},\n" for name in changed)
        return (
            f"def test_seed_{self.seed}(world: Path) -> None:\n"
            f'    """Was: {", ".join(sorted(found))}."""\n'
            f"    scenario = Scenario(\n{own}    )\n"
            f"    assert play(world, scenario).found == {{}}\n"
        )


@dataclass
class Played:
    counts: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def found(self) -> dict[str, str]:
        """The invariants that were broken, and how for the first time."""
        return {line.split()[1]: line for line in reversed(self.violations)}


def build(target: Path, sanitize: bool = False) -> Path:
    """Compile the simulator into a folder; the program's path.  Raises :class:`subprocess.CalledProcessError`."""
    how = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else ["-O2"]
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nobody runs what another one has not finished
        objects, program = _compile(ROOT, target, how), target / "world"
        if program.exists() and program.stat().st_mtime > max(made.stat().st_mtime for made in objects):
            return program
        return _link(objects, target, how)


def mutate(whole: Path, target: Path, mutations: Mapping[str, tuple[str, str]]) -> Path:
    """The same with a fault, that is to be found.  ``whole``: the program without; ``mutations``: of a file
    (``native/flows.h``), text in it, and what is there instead.  Raises :class:`ValueError` if there is no such text.
    """
    copy = target / "source"
    for name in ("native", "bpf", "tests/sim"):
        (copy / name).mkdir(parents=True, exist_ok=True)
        for path in (ROOT / name).glob("*.[ch]"):
            (copy / name / path.name).write_bytes(path.read_bytes())
    for name, (old, new) in mutations.items():
        text = (copy / name).read_text()
        if old not in text:
            raise ValueError(f"{name}: there is no {old!r}")
        (copy / name).write_text(text.replace(old, new))
    objects = {made.stem: made for made in whole.parent.glob("*.o")}
    changed = {Path(name).name for name in mutations}
    # What gcc says that it is made of, which has forms like tests/sim/../../bpf/lb.bpf.c.
    again = {
        o.stem for o in objects.values() if changed & {Path(p).name for p in o.with_suffix(".d").read_text().split()}
    }
    objects |= {made.stem: made for made in _compile(copy, target, ["-O0"], again)}
    return _link(list(objects.values()), target, [])


def _compile(root: Path, target: Path, how: list[str], only: Container[str] | None = None) -> list[Path]:
    """Objects, of all sources or of those alone."""
    target.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (HERE / "shim", root / "tests/sim", root / "bpf", root / "native")]
    sources = [p for p in sorted((root / "native").glob("*.c")) if p.name not in LEFT_OUT]
    sources += sorted((root / "tests/sim").glob("*.c"))
    needed = [*(root / "native").glob("*.h"), *(root / "bpf").glob("*.[ch]"), *HERE.rglob("*.h")]
    newest = max(p.stat().st_mtime for p in needed)

    def compile(source: Path) -> Path:
        made = target / f"{source.stem}.o"
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run(["gcc", *FLAGS, *how, *includes, "-MMD", "-c", str(source), "-o", str(made)], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile, [s for s in sources if only is None or s.stem in only]))


def _link(objects: list[Path], target: Path, how: list[str]) -> Path:
    program, made = target / "world", target / "world.new"
    subprocess.run(["gcc", *how, *map(str, objects), "-pthread", "-o", str(made)], check=True)
    return made.replace(program)


def play(world: Path, scenario: Scenario, **more: int) -> Played:
    """Raises :class:`RuntimeError` if the program fails by itself."""
    done = subprocess.run([world], input=scenario.text(**more), capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or done.stderr:
        raise RuntimeError(f"seed {scenario.seed}: exit status {done.returncode}\n{done.stderr}")
    played = Played()
    for line in done.stdout.splitlines():
        if line.startswith("violation "):
            played.violations.append(line)
        elif line.startswith("count "):
            _, name, value = line.split()
            played.counts[name] = int(value)
        else:
            played.log.append(line)
    return played


def of(seed: int, connections: int = 2000) -> Scenario:
    """The scenario of a seed: a farm, and some tens of faults at arbitrary instants."""
    r = random.Random(seed)
    balancers, servers = r.randint(1, 4), r.randint(1, 8)
    services = tuple(
        (
            r.choice(POLICIES),
            r.choice((NEGOTIATED, NEGOTIATED, NEGOTIATED, ALWAYS, NEVER)),
            r.randint(0, 2),
            r.randint(0, 3),
        )
        for _ in range(r.randint(1, 3))
    )
    rate = r.choice((500, 2000, 10000))
    span = max(2_000_000, connections * 1_000_000 // rate)
    busy = r.randint(0, 30)
    small = not r.randrange(4)
    cache, flows = (r.choice((64, 512, 4096)), r.choice((16, 128, 1024))) if small else (1 << 18, 1 << 16)

    def event() -> Event:
        at, a = r.randrange(span), r.randrange(8)
        name = r.choice(
            ("loss", "dup", "reorder", "corrupt", "cut", "strip", "mtu", "ecmp", "reload", "takeover", "kill", "lose",
             "crash", "bury", "weight", "drain", "member", "back", "hostile", "flood")
        )  # fmt: skip
        lasting = r.choice((1000, 50_000, 500_000, 3_000_000, 20_000_000))
        match name:
            case "loss" | "dup" | "reorder" | "corrupt":
                return at, name, r.choice((10, 100, 500, 2000)), lasting, 0
            case "cut" | "strip":
                return at, name, 1, lasting, 0
            case "mtu":
                return at, name, r.choice((1500, 1400, 1300)), 0, 0
            case "ecmp":
                return at, name, r.randrange(1 << 30), 0, 0
            case "weight":
                return at, name, a, r.randint(1, 10), 0
            case "drain" | "member":
                return at, name, a, r.randint(0, 1), 0
            case "hostile" | "flood":
                return at, name, 0, r.randint(1, 200), r.randint(1, 20)
            case _:
                return at, name, a, lasting, 0

    more = random.Random(f"{seed} more")  # what came later, so that all else stays what it was
    events = [event() for _ in range(busy)]
    for _ in range(more.randint(0, 3)):
        events.append(
            (more.randrange(span), "narrow", more.choice((1000, 800, 600)), more.choice((50_000, 3_000_000)), 0)
        )
    latest = random.Random(f"{seed} limit")
    limit = latest.choice((0, 0, rate // 10, rate // 2, 2 * rate))
    for _ in range(latest.randint(0, 3) if limit else 0):
        events.append((latest.randrange(span), "limit", latest.choice((0, 1, rate // 10, rate)), 0, 0))
    if limit:
        events.append((span, "limit", limit, 0, 0))
    return Scenario(
        seed, connections, rate, balancers, servers, r.choice((1, 16, 64)), r.choice((0, 50, 100)),
        r.choice((50, 500, 2048)),
        cache=cache, flows=flows, multipath=more.choice((0, 30, 100)),
        tags=more.choice((0, 0, 0, 1, 2)), split=more.randint(0, 1),
        apart=more.randint(0, 1), collide=more.randint(0, 1), syn_rate=limit,
        heal=span + 1_000_000, services=services, events=tuple(sorted(events)),
    )  # fmt: skip


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """Fewer events, connections and machines, as long as it fails."""
    step = max(1, len(scenario.events) // 2)
    while scenario.events:
        at = 0
        while at < len(scenario.events):
            less = replace(scenario, events=scenario.events[:at] + scenario.events[at + step :])
            if fails(less):
                scenario = less
            else:
                at += step
        if step == 1:
            break
        step //= 2
    for name in ("connections", "clients", "balancers", "servers"):
        while (half := getattr(scenario, name) // 2) and fails(less := replace(scenario, **{name: half})):
            scenario = less
    for service in scenario.services:
        less = replace(scenario, services=tuple(s for s in scenario.services if s is not service))
        if less.services and fails(less):
            scenario = less
    return scenario
