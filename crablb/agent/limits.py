"""The kernel's MPTCP limits of a network namespace, raised for agents that ask for it: the highest counts, and what was
found is put back when the last goes.  Each limit is judged by itself; what somebody has changed since stays so.

Source: ip-mptcp(8).
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog

from crablb.kernel import pins
from crablb.kernel.mptcp import Limits, PathManager

log = structlog.get_logger()

NAMES = ("add_addr_accepted", "subflows")


@dataclass
class _Notes:
    """By limit: what agents ask for, by role; what was found, and what it was raised to."""

    asked: dict[str, dict[str, int]] = field(default_factory=dict)
    raised: dict[str, tuple[int, int]] = field(default_factory=dict)

    def need(self, name: str) -> int:
        return max((each[name] for each in self.asked.values()), default=0)


def short(now: Limits, least: Limits) -> bool:
    return any(getattr(now, name) < getattr(least, name) for name in NAMES)


def ask(role: str, least: Limits) -> None:
    """Have limits that are no lower, until :func:`release`.  Raises :class:`KernelError`."""
    with _noted() as notes, PathManager() as manager:
        notes.asked[role] = asdict(least)
        now = asdict(manager.limits())
        wanted = {name: max(value, notes.need(name)) for name, value in now.items()}
        for name, value in now.items():
            if wanted[name] > value:
                found, set_ = notes.raised.get(name, (value, None))
                notes.raised[name] = (found if set_ == value else value), wanted[name]
        _write(notes)  # first, as somebody may end us
        if wanted != now:
            manager.set_limits(**wanted)


def release(role: str) -> None:
    """Ask no more.  Raises :class:`KernelError`."""
    if not _path().exists():
        pins.forget(_path())
        return
    with _noted() as notes, PathManager() as manager:
        notes.asked.pop(role, None)
        now = asdict(manager.limits())
        wanted = dict(now)
        for name, (found, set_) in list(notes.raised.items()):
            if now[name] == set_:
                wanted[name] = max(found, notes.need(name))
            if now[name] != set_ or wanted[name] == found:
                del notes.raised[name]
            else:
                notes.raised[name] = found, wanted[name]
        if wanted != now:
            manager.set_limits(**wanted)
        _write(notes)


def _path() -> Path:
    return pins.RUN / f"{pins.namespace()}-mptcp-limits.json"


@contextmanager
def _noted() -> Iterator[_Notes]:
    """What agents have noted, for one of them at a time."""
    pins.RUN.mkdir(parents=True, exist_ok=True)
    with open(pins.RUN / "mptcp-limits.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _read()


def _read() -> _Notes:
    try:
        told = json.loads(_path().read_text())
        asked = {role: {name: int(least[name]) for name in NAMES} for role, least in told["asked"].items()}
        raised = {name: (int(found), int(set_)) for name, (found, set_) in told["raised"].items() if name in NAMES}
        return _Notes(asked, raised)
    except FileNotFoundError:
        return _Notes()
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # somebody else's writing
        log.warning("what the MPTCP limits were before is not known", file=str(_path()), reason=str(error))
        return _Notes()


def _write(notes: _Notes) -> None:
    if notes.asked:
        pins.note(_path(), json.dumps(asdict(notes)))
    else:
        pins.forget(_path())
