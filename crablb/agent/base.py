"""What both endpoints share: where they are pinned, their state file, installing and removing."""

from __future__ import annotations

import json
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import structlog

from crablb.errors import ConfigError, KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.counters import counter_names
from crablb.model import Vip

log = structlog.get_logger()

#: Our clsact filters among those of others: priority and handle.
FILTER = 0x4352


def tool(*args: str) -> str:
    """Output of ip or tc.  Raises :class:`KernelError` with what it says if it fails."""
    try:
        done = subprocess.run(args, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"{args[0]} is not installed; install iproute2") from None
    if done.returncode:
        raise KernelError(f"{' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def detach_filters(interfaces: dict[str, bool], direction: Literal["ingress", "egress"]) -> None:
    """Remove our clsact filters, and the qdiscs that were made for them (True) if nobody else uses them."""
    for name, made in interfaces.items():
        try:
            index = socket.if_nametoindex(name)
        except OSError:
            continue  # it went with its interface
        filters = bpf.TcFilter(index, direction, FILTER, FILTER)
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


class Agent(ABC):
    """An endpoint of this network namespace.

    ``install`` puts it into the kernel, ``remove`` takes it out, ``status`` tells.  What a process that died left
    behind, or a detached agent, is taken over: connections that are open go on.

    Raises :class:`ConfigError` for arguments that cannot be, :class:`KernelError` for what the kernel refuses; nothing
    stays in the kernel then.
    """

    role: ClassVar[str]
    #: Maps that an installation takes over from the one before.
    lasting: ClassVar[Sequence[str]] = ()
    #: Maps of another size than the object's own.
    sizes: Mapping[str, int] = MappingProxyType({})

    def __init__(self, vips: Sequence[Vip], cgroup: Path | str | None = None) -> None:
        if not vips:
            raise ConfigError("name at least one VIP: --vip tcp://10.0.0.100:80")
        self.vips = list(vips)
        self.cgroup = Path(cgroup) if cgroup else cgroup_root()
        if not (self.cgroup / "cgroup.controllers").exists():  # cgroup v1 has cgroup.procs too
            raise ConfigError(f"{self.cgroup} is not a cgroup v2 directory; the root is {cgroup_root()}")

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

    @classmethod
    def owned(cls) -> AbstractContextManager[None]:
        return pins.own(cls.role, f"the {cls.role} agent of this network namespace")

    def install(self) -> None:
        """Put the agent into the kernel, in place of the one that is there."""
        reuse: dict[str, bpf.Map] = {}
        for name in self.lasting:
            try:
                reuse[name] = bpf.Map.from_pin(self.folder() / name)
            except bpf.BpfNotFoundError:
                reuse.clear()
                break
        try:
            with self._loaded(reuse) as program:
                self.remove()
                try:
                    for name, held in program.maps.items():
                        if not name.endswith(("rodata", "bss", "data")):
                            held.pin(self.folder() / name)
                    pins.RUN.mkdir(parents=True, exist_ok=True)
                    self.set_up(program)
                except BaseException:
                    self.remove()
                    raise
        finally:
            for held in reuse.values():
                held.close()

    def _loaded(self, reuse: Mapping[str, bpf.Map]) -> bpf.Object:
        path = bpf.object_path(self.role)
        try:
            return bpf.Object(path, reuse=reuse, max_entries=self.sizes)
        except bpf.BpfLayoutError as error:
            log.warning("cannot take over from the agent before; its open connections end", reason=str(error))
            return bpf.Object(path, max_entries=self.sizes)

    def remember(self, **more: Any) -> None:
        state = {"vips": [str(v) for v in self.vips], "cgroup": str(self.cgroup), **more}
        self.state_path().write_text(json.dumps(state))

    @abstractmethod
    def set_up(self, program: bpf.Object) -> None:
        """Fill the maps, attach, and pin what must last."""

    @classmethod
    def remove(cls) -> bool:
        """Take the agent out of the kernel.  False if there was none."""
        state = cls.state()
        present = state is not None or cls.folder().exists()
        cls.tear_down(state or {})
        try:
            link = bpf.Link.from_pin(cls.folder() / "link")
        except bpf.BpfNotFoundError:
            pass
        else:
            with link:
                link.detach()
        pins.remove(cls.folder())
        cls.state_path().unlink(missing_ok=True)
        return present

    @classmethod
    @abstractmethod
    def tear_down(cls, state: dict[str, Any]) -> None:
        """Undo what :meth:`set_up` did beside pins and the cgroup's link."""

    @classmethod
    def counters(cls) -> dict[str, int]:
        names = counter_names(f"crab_{cls.role}_counter", f"CRAB_{cls.role.upper()}_")
        with bpf.Map.from_pin(cls.folder() / f"{cls.role}_counters") as counters:
            return {name: counters.sum_u64(i) for i, name in enumerate(names)}

    @classmethod
    def status(cls) -> dict[str, Any] | None:
        """What runs here: what it was told, its counters, its process (None: detached).  None if nothing does."""
        state = cls.state()
        if state is None:
            return None
        try:
            return {**state, "pid": pins.owner(cls.role), "counters": cls.counters()}
        except bpf.BpfNotFoundError:
            return None

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
