"""What both endpoints share: where they are pinned, their state file, installing and removing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import structlog

from crablb.errors import ConfigError, KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.counters import counter_names
from crablb.model import Vip
from crablb.values import counted

log = structlog.get_logger()

#: Seconds between looks at the connections that are waited for.
POLL = 0.1
#: Our clsact filters among those of others: priority and handle.
FILTER = 0x4352


def tool(*args: str) -> str:
    """Output of ip or tc.  Raises :class:`KernelError` with what it says if it fails."""
    try:
        done = subprocess.run(args, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"{args[0]} is not installed; install it: apt-get install iproute2") from None
    if done.returncode:
        raise KernelError(f"{' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def has_clsact(interface: str) -> bool:
    """Whether somebody's filters may be attached there already: whoever makes the qdisc is to remove it."""
    return bool(tool("tc", "qdisc", "show", "dev", interface, "clsact").strip())


def detach_filters(
    interfaces: dict[str, bool], direction: Literal["ingress", "egress"], priority: int = FILTER
) -> None:
    """Remove our clsact filters, and the qdiscs that were made for them (True) if nobody else uses them."""
    for name, made in interfaces.items():
        try:
            index = socket.if_nametoindex(name)
        except OSError:
            continue  # it went with its interface
        filters = bpf.TcFilter(index, direction, FILTER, priority)
        filters.detach()
        if made and not any(tool("tc", "filter", "show", "dev", name, d) for d in ("ingress", "egress")):
            filters.destroy_hook()


def cgroup_root() -> Path:
    """Where the cgroup v2 hierarchy is mounted.  Raises :class:`KernelError` if it is not."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for _, where, kind, *_ in mounts:
        if kind == "cgroup2":
            return Path(where)
    if any(kind == "cgroup" for _, _, kind, *_ in mounts):  # v1: its folders fill /sys/fs/cgroup
        where = "it can be beside cgroup v1: mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2"
    else:
        where = "mount it: mount -t cgroup2 none /sys/fs/cgroup"
    raise KernelError(f"cgroup v2 is not mounted; {where}")


def find_cgroup(directory: Path | str | None) -> Path:
    """A cgroup's directory, by default the root's.  Raises :class:`ConfigError` if it is none, :class:`KernelError`."""
    path = Path(directory) if directory else cgroup_root()
    # Cgroups of version 1 have a file of that name as well, but this one not.
    if not (path / "cgroup.controllers").exists():
        raise ConfigError(f"{path} is not a cgroup v2 directory; the root is {cgroup_root()}")
    return path


class Agent(ABC):
    """An endpoint of this network namespace.

    ``install`` puts it into the kernel, ``remove`` takes it out, ``status`` tells.  What a process that died left
    behind, or a detached agent, is taken over: connections that are open go on.

    Raises :class:`ConfigError` for arguments that cannot be, :class:`KernelError` for what the kernel refuses; nothing
    stays in the kernel then.
    """

    role: ClassVar[str]
    #: Maps that an installation takes over from the one before.  What they hold must mean the same in every version
    #: that has a map of the name and of the same shape.
    lasting: ClassVar[Sequence[str]] = ()
    #: The same, of maps that an agent of before may not have.
    optional: ClassVar[Sequence[str]] = ()
    #: Maps of another size than the object's own.
    sizes: Mapping[str, int] = MappingProxyType({})
    #: What was there works on if an installation in its place fails.
    in_place: ClassVar[bool] = False

    def __init__(self, vips: Sequence[Vip], cgroup: Path | str | None = None, *, needed: bool = True) -> None:
        """``needed``: without VIPs there is nothing to do."""
        if needed and not vips:
            raise ConfigError("name at least one VIP: --vip tcp://10.0.0.100:80")
        self.vips = list(vips)
        self.cgroup = find_cgroup(cgroup)

    @classmethod
    def folder(cls) -> Path:
        return pins.folder(cls.role)

    @classmethod
    def state_path(cls) -> Path:
        return pins.RUN / f"{pins.namespace()}-{cls.role}.json"

    @classmethod
    def state(cls) -> dict[str, Any] | None:
        """What the installed agent was told, None if there is none in this network namespace."""
        try:
            state: dict[str, Any] = json.loads(cls.state_path().read_text())
            return state
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def summary(self) -> str:
        """What it is, in a line."""
        return f"{self.role} endpoint of {counted(len((self.state() or {}).get('vips', self.vips)), 'VIP')}"

    @classmethod
    def present(cls) -> bool:
        """Whether there is anything of an agent."""
        return cls.state() is not None or cls.folder().exists()

    @classmethod
    def left(cls) -> list[str]:
        """What stayed in the kernel when an agent went, as connections live by it; in words."""
        return []

    @classmethod
    def owned(cls, process: int = 0) -> AbstractContextManager[object]:
        return pins.own(cls.role, f"the {cls.role} agent of this network namespace", process)

    def install(self) -> None:
        """Put the agent into the kernel, in place of the one that is there."""
        with self._loaded() as program:
            before = self.state()
            try:
                with self._starting():
                    if before is not None:
                        self.succeed(before)
                    for name, held in program.maps.items():
                        if not name.endswith(("rodata", "bss", "data")):
                            pins.put(held, self.folder() / name)
                    self.set_up(program)
            except BaseException:
                if before is None or not self.in_place:
                    self.remove()
                raise

    @classmethod
    def _starting_path(cls) -> Path:
        return pins.RUN / f"{pins.namespace()}-{cls.role}.starting"

    @classmethod
    @contextmanager
    def _starting(cls) -> Iterator[None]:
        """While in the context, it is not yet as it is to be."""
        pins.RUN.mkdir(parents=True, exist_ok=True)
        cls._starting_path().touch()
        try:
            yield
        finally:
            cls._starting_path().unlink(missing_ok=True)

    @classmethod
    def starting(cls) -> bool:
        """Whether a process is about to put it into the kernel; one that died at that is not."""
        return cls._starting_path().exists() and pins.owner(cls.role) is not None

    def _loaded(self) -> bpf.Object:
        """The programs, with the maps of the agent before: all that last, or none."""
        path = bpf.object_path(self.role)
        reuse = {}
        try:
            with ExitStack() as stack:
                for name in self.lasting:
                    with suppress(bpf.BpfNotFoundError):
                        reuse[name] = stack.enter_context(bpf.Map.from_pin(self.folder() / name))
                if (reuse or self.state() is not None) and len(reuse) < len(self.lasting):
                    raise bpf.BpfLayoutError(f"it has no {', '.join(sorted({*self.lasting} - {*reuse}))}")
                for name in self.optional:
                    with suppress(bpf.BpfNotFoundError):
                        reuse[name] = stack.enter_context(bpf.Map.from_pin(self.folder() / name))
                return bpf.Object(path, reuse=reuse, max_entries=self.sizes)
        except bpf.BpfLayoutError as error:
            if live := self.live():
                raise KernelError(
                    f"the {self.role} agent that is installed is of another version, and has"
                    f" {counted(live, 'connection')}; wait for the end: crablb agent remove {self.role} (with --now"
                    " they break)"
                ) from None
            log.info("the agent of another version goes", reason=str(error))
            self.remove()
            return bpf.Object(path, max_entries=self.sizes)

    def succeed(self, before: dict[str, Any]) -> None:
        """Undo what the agent before noted, if :meth:`set_up` does not take it over."""
        self.tear_down(before)

    @classmethod
    def attach(cls, program: bpf.Program, cgroup: Path | str) -> bool:
        """Attach to the cgroup, in place of what is attached there.  False if it was attached already."""
        pin = cls.folder() / "link"
        try:
            held: bpf.Link | None = bpf.Link.from_pin(pin)
        except bpf.BpfNotFoundError:
            held = None
        try:
            if held and held.target == os.stat(cgroup).st_ino:
                if held.program_id == program.id:
                    return False
                held.update(program)
                return True
            with program.attach_cgroup_sockops(cgroup) as link:
                pins.put(link, pin)
            if held:
                held.detach()
            return True
        except FileNotFoundError:
            raise KernelError(f"cgroup {cgroup} is gone; install the agent again, with another one: --cgroup") from None
        finally:
            if held:
                held.close()

    @classmethod
    def attached(cls, cgroup: Path | str, program: int = 0) -> bool:
        """Whether a program, the one of this id or any, is attached to the cgroup as :meth:`attach` does it."""
        try:
            with bpf.Link.from_pin(cls.folder() / "link") as link:
                return link.target == os.stat(cgroup).st_ino and program in (0, link.program_id)
        except (bpf.BpfNotFoundError, FileNotFoundError):
            return False

    def remember(self, **more: Any) -> None:
        self.write({"vips": [str(v) for v in self.vips], "cgroup": str(self.cgroup), **more})

    @classmethod
    def write(cls, state: dict[str, Any]) -> None:
        """Note the state, whole or not at all."""
        pins.note(cls.state_path(), json.dumps(state))

    @abstractmethod
    def set_up(self, program: bpf.Object) -> None:
        """Fill the maps, attach, and pin what must last."""

    @classmethod
    def withdraw(cls) -> None:
        """From now on, do nothing for new connections; go on for those there are."""
        return

    @classmethod
    def live(cls) -> int:
        """Connections that would break if the agent were removed now."""
        return 0

    @classmethod
    def drain(cls, seconds: float | None, stop: Callable[[float], bool]) -> int:
        """Wait until no connection needs the agent, for so long at the most; how many still do.

        ``stop(s)`` waits for s seconds; true: give up waiting.
        """
        end = time.monotonic() + seconds if seconds is not None else None
        while (left := cls.live()) and (end is None or time.monotonic() < end):
            if stop(POLL if end is None else max(min(POLL, end - time.monotonic()), 0)):
                break
        return left

    @classmethod
    def remove(cls) -> bool:
        """Take the agent out of the kernel.  False if there was none."""
        state, present = cls.state(), cls.present()
        try:
            link = bpf.Link.from_pin(cls.folder() / "link")
        except bpf.BpfNotFoundError:
            pass
        else:
            with link:
                link.detach()
        cls.tear_down(state or {})
        pins.remove(cls.folder())
        pins.forget(cls.state_path())
        cls._starting_path().unlink(missing_ok=True)  # of one that was killed at that
        return present

    @classmethod
    @abstractmethod
    def tear_down(cls, state: dict[str, Any]) -> None:
        """Undo what :meth:`set_up` did beside pins and the cgroup's link."""

    @classmethod
    def faults(cls) -> list[str]:
        """What is not as it was installed, or keeps the agent from its work."""
        try:
            return cls._sync(mend=False)
        except KernelError as error:
            return [str(error)]

    @classmethod
    def repair(cls) -> list[str]:
        """Mend what is not as it was installed; what that was.  Raises :class:`KernelError` if something cannot be."""
        return cls._sync(mend=True)

    @classmethod
    @abstractmethod
    def _sync(cls, *, mend: bool) -> list[str]:
        """What is not as it was installed; ``mend``: make it so."""

    @classmethod
    def pins_gone(cls) -> KernelError:
        return KernelError(f"the {cls.role} agent's pins are gone; install it again: crablb agent {cls.role} --vip ...")

    @classmethod
    def counters(cls) -> dict[str, int]:
        names = counter_names(f"crab_{cls.role}_counter", f"CRAB_{cls.role.upper()}_")
        with bpf.Map.from_pin(cls.folder() / f"{cls.role}_counters") as counters:
            return {name: counters.sum_u64(i) for i, name in enumerate(names)}

    @classmethod
    def status(cls) -> dict[str, Any] | None:
        """What runs here: what it was told, its counters (none if its pins are gone or not there yet), its process
        (:func:`crablb.kernel.pins.owner`; None: detached), whether it is ``starting``, what is wrong (nothing while it
        starts).  None if nothing does."""
        state = cls.state()
        if state is None:
            return None
        starting = cls.starting()
        try:
            counters = {} if starting else cls.counters()
        except bpf.BpfNotFoundError:  # its pins are gone, which is among the faults
            counters = {}
        found = {**state, "pid": pins.owner(cls.role), "starting": starting, "counters": counters}
        return {**found, "faults": [] if starting else cls.faults()}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
