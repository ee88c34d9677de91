"""What is killed, in the midst of what, and what has to hold then."""

from __future__ import annotations

import random
import select
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.deaths.farm import KINDS, LONG, Farm
from tests.helpers.processes import until

__all__ = ["ACTS", "BARE", "UNKEPT", "Act", "Tally", "acts", "first", "play"]

#: New connections of each kind, three times a round.
FRESH = 2
#: Copies of a SYN after the first that a new connection may need from when it can be served.
COPIES = 1


@dataclass
class Act:
    """``steps``: calls that somebody notices (the shim's ``step``) while it goes on, about; one of them is the last.

    ``stands_still``: its own way of going on is taken away on purpose, until the next start.
    """

    name: str
    work: Callable[[Farm, str, int], bool]
    steps: int = 0
    still: bool = False


@dataclass
class Tally:
    """What was measured."""

    rounds: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    fresh: Counter[str] = field(default_factory=Counter)
    copies: Counter[int] = field(default_factory=Counter)
    #: Rounds whose victim was killed at a call that was chosen; which that was in the last one.
    struck: Counter[str] = field(default_factory=Counter)
    last: str = ""
    faults: list[str] = field(default_factory=list)
    sums: Counter[str] = field(default_factory=Counter)

    def end(self, farm: Farm) -> None:
        """End all of a farm, and look what is left."""
        packets = farm.packets()
        state = farm.tell("finish")
        self.note("at the end", state)
        self.sums.update({name: state[name] for name in ("made", "ended", "exchanges")}, packets=packets)
        farm.stop()
        self.faults += [f"left behind: {line}" for line in farm.left()]

    def note(self, what: str, state: dict[str, Any]) -> list[str]:
        """What has broken."""
        self.lost.update(line.split()[0] for line in state["broken"])
        found = [f"{what}: broken: {line}" for line in state["broken"]]
        self.faults += found
        return found

    def told(self) -> str:
        """All of it, in lines."""
        late = sum(count for copies, count in self.copies.items() if copies > COPIES)
        copies = ", ".join(f"{n}: {count}" for n, count in sorted(self.copies.items()))
        lines = [
            f"==> {count} x {name}, {self.struck[name]} of them at a call"
            for name, count in sorted(self.rounds.items())
        ]
        lines.append(
            f"==> {self.rounds.total()} rounds, {self.sums['made']} connections, {self.sums['exchanges']} exchanges,"
            f" {self.sums['packets']} packets; {self.lost.total()} connections lost {dict(self.lost) or ''};"
            f" of {self.fresh.total()} new ones {late} needed more than {COPIES} retransmission ({copies})"
        )
        return "\n".join(lines + [f"fault: {one}" for one in self.faults])


def _pause(seconds: float) -> None:
    """So long, whatever happens: a part of what is tried, not a wait for something."""
    select.select([], [], [], seconds)


# ---- what is killed; each says whether a start is needed, and returns when the victim is dead ----


def serving(farm: Farm, role: str, at: int) -> bool:
    """At any instant."""
    _pause(at / 1000)
    farm.processes[role].kill()
    return True


def starting(farm: Farm, role: str, at: int) -> bool:
    """The one before was killed; the next is, at its start."""
    farm.processes[role].kill()
    child = farm.begin(role, kill=at)
    if child.ready():  # that was no call of its start
        child.kill()
    child.close()
    return True


def ending(farm: Farm, role: str, at: int) -> bool:
    """It is told to end."""
    child = farm.processes[role]
    child.kill_at(at)
    child.signal(signal.SIGTERM)
    assert child.ended(), f"{role} does not end"
    return True


def reloading(farm: Farm, role: str, at: int) -> bool:
    child = farm.processes[role]
    farm.write()
    child.kill_at(at)
    child.signal(signal.SIGHUP)
    child.ended(2)
    child.kill()
    return True


def successor(farm: Farm, role: str, at: int) -> bool:
    """The new process of a takeover: the old one serves on."""
    farm.write()
    child = farm.begin(role, "--takeover", kill=at)
    if child.ready():  # it serves, and the old one has ended
        assert farm.processes[role].ended()
        child.kill()
        farm.keep(role, child)
        return True
    child.close()
    # Between its word to the old one that it serves and its word to the service manager nobody is left.
    return not farm.processes[role].alive()


def predecessor(farm: Farm, role: str, at: int) -> bool:
    """The old process of a takeover: the new one serves, whatever it has been given."""
    old = farm.processes[role]
    farm.write()
    old.kill_at(at)
    child = farm.begin(role, "--takeover")
    assert child.ready(), f"the successor of one that was killed did not start:\n{farm.said(role)}"
    old.kill()
    farm.keep(role, child)
    return False


def _asked(farm: Farm, role: str, at: int, *, successor: bool) -> bool:
    """``crablb takeover``: the old process starts the new one, and either is killed.

    As where a service manager watches, the new one ends if the old one has died before all was told."""
    old, new = farm.processes[role], None
    farm.write()
    farm.nursery.kill_next(at if successor else 0)
    if not successor:
        old.kill_at(at)
    asking = farm.nursery.start(farm.lab.node(role), "takeover")
    assert asking.ended(), "crablb takeover does not end"
    asking.close()

    def known() -> bool:
        """Who is left."""
        nonlocal new
        new, serving = old.succeeded() or new, farm.serving()
        if old.alive():
            return serving == old.pid and not (new and new.alive())
        return serving is None or bool(new and serving == new.pid)

    until(known, LONG, every=0.1)
    farm.nursery.kill_next(0)
    if new and new.alive():
        farm.keep(role, new)
        return False
    if new:
        new.close()
    return not old.alive()


def asked_successor(farm: Farm, role: str, at: int) -> bool:
    return _asked(farm, role, at, successor=True)


def asked_predecessor(farm: Farm, role: str, at: int) -> bool:
    return _asked(farm, role, at, successor=False)


def everybody(farm: Farm, role: str, at: int) -> bool:
    """All processes at once."""
    _pause(at / 1000)
    for child in farm.processes.values():
        child.signal(signal.SIGKILL)
    for child in farm.processes.values():
        child.kill()
    return True


#: By what is killed: the load balancer, the client's agent, servers' agents that lead MPTCP clients (one by its path
#: manager), all.  Steps are as counted, and a few more.
ACTS: dict[str, list[Act]] = {
    "lb": [
        Act("serving", serving, 1000),
        Act("starting", starting, 280),
        Act("reloading", reloading, 180),
        Act("successor", successor, 280),
        Act("predecessor", predecessor, 15),
        Act("asked successor", asked_successor, 300),
        Act("asked predecessor", asked_predecessor, 40),
        Act("ending", ending, 130),
    ],
    "client": [Act("serving", serving, 1000), Act("starting", starting, 245), Act("ending", ending, 60)],
    "server1": [
        Act("serving", serving, 1000),
        Act("starting", starting, 325),
        Act("ending", ending, 70, still=True),
    ],
    "server2": [
        Act("serving", serving, 1000),
        Act("starting", starting, 315),
        Act("ending", ending, 125, still=True),
    ],
    "all": [Act("serving", everybody, 1000)],
}
#: Where nothing is kept: what ends on purpose takes all away, and until the next start connections by the fallback
#: stand still; the hash alone leads them then, so that the configuration stays as it is.
UNKEPT = Act("ending unkept", ending, 150, still=True)
#: Whose first start is tried too.
BARE = ("server1", "server2", "client", "lb")


def acts(seed: int) -> Iterator[tuple[int, str, Act, int]]:
    """Rounds: number, whose, what, and at which step (a millisecond, while it merely serves).

    Each comes as often as the others.
    """
    number = 0
    while True:
        order = [(role, act) for role, several in ACTS.items() for act in several]
        random.Random(f"{seed}:{number}").shuffle(order)
        for role, act in order:
            yield number, role, act, random.Random(f"{seed}:{number}:at").randint(1, act.steps)
            number += 1


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def play(farm: Farm, tally: Tally, role: str, act: Act, at: int) -> list[str]:
    """One round; what was wrong."""
    what = f"{role} {act.name} at {at}"
    farm.nursery.last()
    tally.rounds[f"{role} {act.name}"] += 1
    with _told(what):
        farm.tell("fresh", FRESH)  # some are on their way when it dies
        start = act.work(farm, role, at)
        farm.tell("fresh", FRESH)  # and some begin while nobody serves
        if not act.still:
            farm.tell("beat")
        if start:
            for one in farm.roles if role == "all" else [role]:
                farm.start(one)
        farm.remember()
        farm.tell("mark")
        farm.tell("fresh", FRESH)
        fresh = farm.tell("settle")["fresh"]
        farm.tell("beat")
        state = farm.tell("state")
    for one in fresh:
        tally.fresh[one["kind"]] += 1
        tally.copies[one["after"]] += 1
    late = [
        f"{what}: {one['kind']} to {one['server']}: {one['after']} more copies of a SYN, of {one['copies']}"
        for one in fresh
        if one["after"] > COPIES
    ]
    tally.faults += late
    faults = tally.note(what, state) + late
    tally.last = farm.nursery.last()
    tally.struck[f"{role} {act.name}"] += bool(tally.last)
    if missing := {kind: count for kind in KINDS if (count := farm.wanted[kind] - state["held"].get(kind, 0)) > 0}:
        farm.tell("open", missing)
    return faults


def first(farm: Farm, tally: Tally, role: str, at: int) -> list[str]:
    """The first one of its node is killed at its start, and what it has left is removed.  ``farm``: one where nothing
    runs.  What was wrong."""
    what = f"{role} first"
    farm.nursery.last()
    child = farm.begin(role, kill=at)
    if child.ready():
        child.kill()
    child.close()
    tally.last = farm.nursery.last()
    tally.rounds[what] += 1
    tally.struck[what] += bool(tally.last)
    farm.remember()
    farm.remove(role)
    faults = [f"{what} at {at}, {tally.last}: left behind: {line}" for line in farm.left(farm.lab.node(role))]
    tally.faults += faults
    return faults
