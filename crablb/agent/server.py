"""The server endpoint: SYN-ACKs echo the redirect of their SYN.  See bpf/server.bpf.c."""

from __future__ import annotations

import json
import math
import select
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import structlog

from crablb import lasting
from crablb.agent import dsr, listening, mptcp, sockets
from crablb.agent.base import Agent
from crablb.agent.moved import Moved
from crablb.agent.mptcp import Mptcp
from crablb.agent.paths import PathLeader
from crablb.config import parse_vip
from crablb.errors import ConfigError, KernelError, Problems
from crablb.kernel import bpf, pins
from crablb.kernel.rtnetlink import tcp_addresses
from crablb.model import Address, Network, Vip
from crablb.seldom import Seldom
from crablb.values import counted

log = structlog.get_logger()

#: Seconds between looks at what is attached.
LOOK = 2.0
#: Values of map `server_ports`: see bpf/server.bpf.c.
DISARMED, ARMED, ARMED_BEFORE = range(3)
#: Maps that the next agent goes on with: which listeners were armed, which connections are counted.
NOTES = ("server_armed", "server_shared", "server_redirects", "server_connections", "server_open")
#: The program that arms listeners that are there, pinned under its name, and its maps.
ITERATOR = "crab_arm"
SHARED = ("server_ports", "server_counters", "server_armed", "server_shared")
#: Maps that count by VIP, from 0 on where the entry is made.
COUNTED = ("server_connections", "server_redirects")
FAST_OPEN = Path("/proc/sys/net/ipv4/tcp_fastopen")  # for IPv6 too
FAST_OPEN_SERVER = 2
#: All states in which a connection can still lose something, a bit for each: all but SYN_SENT, TIME_WAIT, CLOSE, LISTEN
#: (include/net/tcp_states.h).
OPEN = 0x1FFF & ~(1 << 2 | 1 << 6 | 1 << 7 | 1 << 10)


def _arm(folder: Path, ports: Collection[int], missing: str) -> None:
    """Arm the listeners on these ports that are there; tell of those that cannot be.  ``missing``: why there is no
    iterator."""
    reason = missing or "the kernel is older than 6.12"
    if not missing:
        try:
            with bpf.Program.from_pin(folder / ITERATOR) as iterator:
                refused = iterator.run_iterator()
            ports = {port for (port,) in struct.iter_unpack("=I", refused)} & set(ports)
        except bpf.BpfError as error:
            reason = str(error)
    if ports:
        log.warning("servers that listen already must be restarted", ports=sorted(set(ports)), reason=reason)


def _fast_open() -> bool:
    """Whether servers of this network namespace take Fast Open."""
    return FAST_OPEN.exists() and bool(int(FAST_OPEN.read_text()) & FAST_OPEN_SERVER)


def _from(sources: Iterable[str]) -> str:
    """How an agent was told where tunnels may come from."""
    told = " ".join(f"--tunnels-from {prefix}" for prefix in sources)
    return f"with {told}" if told else "without --tunnels-from"


def _connections_to(addresses: Collection[Address]) -> int:
    """How many TCP connections local sockets with these addresses have."""
    wanted = {address.packed for address in addresses}
    mapped = {b"\0" * 10 + b"\xff\xff" + packed for packed in wanted if len(packed) == 4}
    found = [a for family in (socket.AF_INET, socket.AF_INET6) for a in tcp_addresses(family, OPEN)]
    return sum(address in wanted | mapped for address in found)


def open_connections(counts: bpf.Map) -> dict[Vip, int]:
    """What map ``server_connections`` says."""
    found = {}
    for key, value in counts.items():
        opened, closed = struct.unpack("=QQ", value)
        found[Vip.from_key(key)] = opened - closed
    return found


def redirects(counts: bpf.Map) -> dict[Vip, tuple[int, int]]:
    """What map ``server_redirects`` says: redirects begun and completed."""
    return {Vip.from_key(key): struct.unpack("=QQ", value) for key, value in counts.items()}


Leave = Callable[[Sequence[Vip]], None]
_never = Seldom(math.inf)


def _stay(_: Sequence[Vip]) -> None:
    if _never.due("leave"):
        log.warning("a load balancer is drained, but its open connections stay, as this agent is without --mptcp")


class ServerAgent(Agent):
    """Let the servers of a cgroup, in this network namespace, answer redirected connections to ``vips``.

    Listeners that are there already are prepared too.  With ``dsr`` the namespace also serves clients that are not
    redirected: it gets the VIPs, silently, and takes packets for them out of tunnels that come in on ``interfaces`` (by
    default every Ethernet interface that is up) from addresses of ``tunnels_from`` (by default any).  With ``mptcp``
    such clients are led past the load balancer, if they use MPTCP; with ``sockets`` programs of the cgroup that make
    TCP sockets get MPTCP ones.
    """

    role: ClassVar[str] = "server"
    optional: ClassVar[Sequence[str]] = NOTES

    def __init__(
        self,
        vips: Sequence[Vip],
        cgroup: Path | str | None = None,
        *,
        dsr: bool = False,
        interfaces: Sequence[str] = (),
        tunnels_from: Sequence[Network] = (),
        mptcp: Mptcp | None = None,
        sockets: bool = False,
    ) -> None:
        super().__init__(vips, cgroup)
        self.sockets = sockets
        self.dsr = dsr
        self.interfaces = list(interfaces)
        self.tunnels_from = list(tunnels_from)
        self.mptcp = mptcp
        self._new = ARMED
        #: What was noted for each part, by the agent before if this one takes it over.
        self._parts: dict[str, Any] = {}

    def differs(self) -> list[str]:
        """What the installed agent does otherwise, in words; empty if nothing, or if there is none."""
        state = self.state()
        if state is None:
            return []
        before, now = state["vips"], [str(vip) for vip in self.vips]
        changes = [f"{vip} would not be served any more" for vip in before if vip not in now]
        changes += [f"{vip} would be new" for vip in now if vip not in before]
        if state["cgroup"] != str(self.cgroup):
            changes.append(f"its cgroup is {state['cgroup']}, not {self.cgroup}")
        asked, wanted = self._asked(state), self._wanted()
        if asked["dsr"] != wanted["dsr"]:
            changes.append(f"it was installed with{'' if asked['dsr'] else 'out'} --dsr")
        elif asked["sources"] != wanted["sources"]:
            changes.append(f"it was installed {_from(asked['sources'])}")
        if asked["mptcp"] != wanted["mptcp"]:
            changes.append(f"it was installed with{' ' + asked['mptcp'] if asked['mptcp'] else 'out --mptcp'}")
        if asked["sockets"] != wanted["sockets"]:
            changes.append(f"it was installed with{'' if asked['sockets'] else 'out'} --mptcp-listeners")
        return changes

    def _wanted(self) -> dict[str, Any]:
        return {
            "dsr": self.dsr,
            "sources": [str(prefix) for prefix in self.tunnels_from],
            "mptcp": str(self.mptcp or ""),
            "sockets": self.sockets,
        }

    @staticmethod
    def _asked(state: Mapping[str, Any]) -> Mapping[str, Any]:
        """What :meth:`_wanted` was; of one that died at its start not all of it is there.  Versions of before noted
        what there was alone."""
        there = {
            "dsr": "dsr" in state,
            "sources": state.get("dsr", {}).get("sources", []),
            "mptcp": str(mptcp.of(state["mptcp"])) if "mptcp" in state else "",
            "sockets": "sockets" in state,
        }
        return {**there, **state.get("asked", {})}

    def remember(self, **more: Any) -> None:
        super().remember(asked=self._wanted(), **more)

    def install(self) -> None:
        """Put the agent into the kernel, in place of the one that is there, which the log tells if it was another."""
        changes = self.differs()
        # One of before did not note which listeners it had armed.
        if self.state() is not None and not (self.folder() / "server_armed").exists():
            self._new = ARMED_BEFORE
        # One of before kept in its sockets which of them it counted; nobody hears of their ends.
        uncounted = self.folder() / "server_counted"
        if uncounted.exists():
            for path in (uncounted, self.folder() / "server_connections"):
                path.unlink()
        super().install()
        if changes:
            log.warning("replaced the agent that was there", changes=changes)

    def succeed(self, before: dict[str, Any]) -> None:
        """Connections live by what direct server return has, and by the kernel's MPTCP endpoints: what is the same
        stays."""
        taken = {name for name, asked in (("dsr", self.dsr), ("mptcp", self.mptcp)) if asked and name in before}
        self._parts |= {name: before[name] for name in taken}
        self._undo({name: value for name, value in before.items() if name not in taken})
        # Versions of before did not note which listeners they had armed.
        self._disarm(keep=[vip.port for vip in self.vips] if self._new == ARMED else ())

    def _note(self, part: str) -> Callable[[dict[str, Any]], None]:
        def note(state: dict[str, Any]) -> None:
            self._parts[part] = state
            self.remember(**self._parts)

        return note

    def set_up(self, program: bpf.Object) -> None:
        self.remember(**self._parts)
        program.map("server_netns").update(0, pins.cookie())
        for vip in self.vips:
            program.map("server_vips").update(vip.key(), 1)
            program.map("server_ports").update(vip.port, self._new)
            for name in COUNTED:
                if program.map(name).lookup(vip.key()) is None:
                    program.map(name).update(vip.key(), bytes(16))
        if self.dsr:
            before = self._parts.get("dsr")
            dsr.set_up(self.vips, self.interfaces, self.tunnels_from, self.folder(), self._note("dsr"), before)
        if _fast_open():
            self._attach_fast_open(program, self.cgroup)
        else:
            self._detach_fast_open()
        self.attach(program.program("crab_server"), self.cgroup)
        missing = ""
        try:
            with bpf.Object(bpf.object_path("listeners"), reuse={n: program.map(n) for n in SHARED}) as listeners:
                pins.put(listeners.program(ITERATOR), self.folder() / ITERATOR)
        except bpf.BpfError as error:  # as without BTF
            missing = str(error)
        _arm(self.folder(), [vip.port for vip in self.vips], missing)
        for vip in self.vips:  # armed from now on: what is found so is somebody else's doing
            program.map("server_ports").update(vip.port, ARMED)
        sockets.tear_down(self.folder())
        if self.sockets:
            self._note("sockets")({})
            sockets.set_up(self.cgroup, self.folder())
        if self.mptcp:  # the last, as it tells clients of this host
            mptcp.set_up(self.vips, self.mptcp, self._parts.get("mptcp"), self._note("mptcp"))

    @classmethod
    def present(cls) -> bool:
        return super().present() or bool(mptcp.left())

    @classmethod
    def left(cls) -> list[str]:
        return mptcp.left_in_words() if cls.state() is None else []

    @classmethod
    def tear_down(cls, state: dict[str, Any]) -> None:
        cls._undo(state)
        cls._detach_fast_open()
        cls._disarm()

    @classmethod
    def _undo(cls, state: dict[str, Any]) -> None:
        """Parts of an agent, as they were noted."""
        if "mptcp" in state or mptcp.left():
            mptcp.tear_down(state.get("mptcp", {}))
        if "dsr" in state:
            dsr.tear_down(state["dsr"], cls.folder())

    @classmethod
    def _disarm(cls, keep: Collection[int] = ()) -> None:
        """Listeners on ports that are served, but for these."""
        with suppress(bpf.BpfNotFoundError), bpf.Map.from_pin(cls.folder() / "server_ports") as ports:
            gone = [key for key in list(ports.keys()) if int.from_bytes(key, sys.byteorder) not in keep]
            for key in gone:
                ports.update(key, DISARMED)
            if gone:
                with suppress(bpf.BpfError), bpf.Program.from_pin(cls.folder() / ITERATOR) as iterator:
                    iterator.run_iterator()

    @classmethod
    def _detach_fast_open(cls) -> None:
        with suppress(bpf.BpfNotFoundError), bpf.Link.from_pin(cls.folder() / "fast_open") as link:
            link.detach()
            (cls.folder() / "fast_open").unlink()

    @classmethod
    def _attach_fast_open(cls, program: bpf.Object, cgroup: Path | str) -> None:
        with program.program("crab_fast_open").attach_cgroup_ingress(cgroup) as link:
            pins.put(link, cls.folder() / "fast_open")

    # ---- what is to be, and what is ----

    @classmethod
    def faults(cls) -> list[str]:
        found = super().faults()
        try:
            found += cls._lacking().values()
            if "mptcp" in (state := cls.state() or {}):
                if state["mptcp"]["mode"] == "leave" and pins.owner(cls.role) is None:
                    found.append("the process that leads MPTCP clients away has ended; start the agent again")
                found += mptcp.lacking(map(parse_vip, state["vips"])).values()
            return found
        except KernelError as error:  # who listens is not known
            return [*found, str(error)]

    @classmethod
    def _lacking(cls) -> dict[Vip, str]:
        vips = cls.vips_served()
        port = (cls.state() or {}).get("mptcp", {}).get("port", 0)
        return listening.lacking(vips, [vip for vip in vips if mptcp.port_of(vip.address, port)])

    @classmethod
    def repair(cls) -> list[str]:
        with cls._changing():
            return super().repair()

    @classmethod
    def _sync(cls, *, mend: bool) -> list[str]:
        state = cls.state()
        if state is None:
            return []
        if not (cls.folder() / "server_vips").exists():
            raise cls.pins_gone()
        found, refused = [], Problems()
        attached, guarded = cls._is_attached(state)
        if not attached:
            found.append(f"the program that answers redirects is not attached to cgroup {state['cgroup']}")
        if not guarded:
            found.append("servers take Fast Open, and the program that keeps redirected data from them is not attached")
        if mend and not (attached and guarded):
            refused.attempt("", cls._attach_again, state, attached, guarded)
        if "dsr" in state:
            addresses = dict.fromkeys(parse_vip(text).address for text in state["vips"])
            sync = partial(dsr.sync, addresses, state["dsr"], cls.folder(), lambda _: cls.write(state), mend=mend)
            found += refused.attempt("", sync) or []
        if "sockets" in state and not sockets.attached(cls.folder()):
            found.append("the program that gives programs MPTCP sockets is not attached")
            if mend:
                refused.attempt("", sockets.set_up, state["cgroup"], cls.folder())
        if "mptcp" in state:
            vips = [parse_vip(text) for text in state["vips"]]
            lead = partial(mptcp.sync, vips, state["mptcp"], lambda _: cls.write(state), mend=mend)
            found += refused.attempt("", lead) or []
        if refused.found:
            raise KernelError("\n".join(refused.found))
        return found

    @classmethod
    def _attach_again(cls, state: dict[str, Any], attached: bool, guarded: bool) -> None:
        """The programs that are not attached, loaded once more, of the same maps."""
        with ExitStack() as stack:
            maps = {pin.name: stack.enter_context(bpf.Map.from_pin(pin)) for pin in cls.folder().glob("server_*")}
            try:
                program = stack.enter_context(bpf.Object(bpf.object_path(cls.role), reuse=maps))
            except (bpf.BpfLayoutError, bpf.BpfNotFoundError) as error:
                raise KernelError(
                    f"the server agent here is of another crablb ({error}); install it again: crablb agent server --vip"
                    " ..."
                ) from None
            if not guarded:
                cls._attach_fast_open(program, state["cgroup"])
            if not attached:
                cls.attach(program.program("crab_server"), state["cgroup"])
                # Nobody prepared what has begun to listen meanwhile.
                cls._arm_all(parse_vip(text).port for text in state["vips"])
                if "sockets" in state:  # they are of a cgroup that is gone
                    sockets.set_up(state["cgroup"], cls.folder())

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[None]:
        """While in the context, a thread attaches what is not attached any more: a service's cgroup goes with it, and
        is another one when its manager starts it again."""
        with lasting.in_thread("watch", cls._watch):
            yield

    @classmethod
    def _watch(cls, stop: int) -> None:
        poll = select.poll()
        poll.register(stop, select.POLLHUP)
        told = ""
        while not lasting.wait(poll, LOOK):
            try:
                if all(cls._is_attached(cls.state())):
                    continue
                with cls._changing() as state:
                    cls._attach_again(state, *cls._is_attached(state))
                    log.warning("attached to a cgroup that was made anew", cgroup=state["cgroup"])
                told = ""
            except (KernelError, ConfigError, OSError) as error:
                if str(error) != told:
                    log.warning("the agent cannot be mended", reason=str(error))
                told = str(error)

    @classmethod
    def _is_attached(cls, state: dict[str, Any] | None) -> tuple[bool, bool]:
        """Whether the program that answers redirects is, and the one that drops SYNs with data, if it is needed."""
        if state is None:
            return True, True
        return cls.attached(state["cgroup"]), not _fast_open() or cls._guarded()

    @classmethod
    def _guarded(cls) -> bool:
        """Whether the program that drops SYNs with data is attached."""
        try:
            with bpf.Link.from_pin(cls.folder() / "fast_open") as link:
                return link.target != 0
        except bpf.BpfNotFoundError:
            return False

    @classmethod
    def _arm_all(cls, ports: Iterable[int]) -> None:
        missing = "" if (cls.folder() / ITERATOR).exists() else "the agent was installed without its iterator"
        _arm(cls.folder(), list(ports), missing)

    # ---- changes of the installed agent ----

    @classmethod
    @contextmanager
    def _changing(cls) -> Iterator[dict[str, Any]]:
        """The state of the installed agent, to be changed, by one process at a time."""
        with pins.own("server-vips", "a change of the server agent's VIPs"):
            state = cls.state()
            if state is None or not cls.folder().exists():
                raise KernelError(
                    "there is no server agent in this network namespace; install one: crablb agent server --vip ..."
                )
            if not (cls.folder() / "server_armed").exists():
                raise KernelError(
                    "the server agent here is of an older crablb; install it again: crablb agent server --vip ..."
                )
            yield state

    @classmethod
    def add(cls, vips: Sequence[Vip]) -> list[Vip]:
        """Let the installed agent serve more VIPs; those that it did not serve yet."""
        with cls._changing() as state:
            new = [vip for vip in dict.fromkeys(vips) if str(vip) not in state["vips"]]
            if "mptcp" in state:
                mptcp.check([*map(parse_vip, state["vips"]), *new], state["mptcp"])
            state["vips"] += [str(vip) for vip in new]
            cls.write(state)
            try:
                with (
                    bpf.Map.from_pin(cls.folder() / "server_vips") as told,
                    bpf.Map.from_pin(cls.folder() / "server_ports") as ports,
                    bpf.Map.from_pin(cls.folder() / COUNTED[0]) as connections,
                    bpf.Map.from_pin(cls.folder() / COUNTED[1]) as redirects,
                ):
                    if "dsr" in state:
                        addresses = dict.fromkeys(vip.address for vip in new)
                        dsr.add(addresses, state["dsr"], cls.folder(), lambda _: cls.write(state))
                    if "mptcp" in state:
                        vips = [parse_vip(text) for text in state["vips"]]
                        mptcp.sync(vips, state["mptcp"], lambda _: cls.write(state), mend=True)
                    for vip in new:
                        for counts in (connections, redirects):
                            if counts.lookup(vip.key()) is None:
                                counts.update(vip.key(), bytes(16))
                        ports.update(vip.port, ARMED)
                        told.update(vip.key(), 1)
            except BaseException:
                cls._drop(new, state)
                raise
            if new:
                cls._arm_all(vip.port for vip in new)
            return new

    @classmethod
    def drop(cls, vips: Sequence[Vip], *, now: bool = False) -> None:
        """Let the installed agent serve these VIPs no more.  Redirected connections go on.

        With ``dsr`` a VIP's address goes too; connections to it, those of clients that were not redirected, would end:
        raises :class:`KernelError` if there are any, unless ``now``.
        """
        with cls._changing() as state:
            unknown = [vip for vip in vips if str(vip) not in state["vips"]]
            if unknown:
                raise ConfigError([f"{vip} is not served; served are: {', '.join(state['vips'])}" for vip in unknown])
            if set(state["vips"]) == {str(vip) for vip in vips}:
                raise ConfigError("these are all its VIPs; to take the agent out: crablb agent remove server")
            if "dsr" in state and not now:
                stay = {vip.address for vip in map(parse_vip, state["vips"]) if vip not in vips}
                open_ = _connections_to({vip.address for vip in vips} - stay)
                if open_:
                    raise KernelError(
                        f"{counted(open_, 'connection')} of clients that were not redirected would end;"
                        " take the VIP from the load balancer first and wait for them, or end them: --now"
                    )
            cls._drop(vips, state)

    @classmethod
    def _drop(cls, vips: Sequence[Vip], state: dict[str, Any]) -> None:
        gone = {str(vip) for vip in vips}
        left = [parse_vip(text) for text in state["vips"] if text not in gone]
        with (
            bpf.Map.from_pin(cls.folder() / "server_vips") as told,
            bpf.Map.from_pin(cls.folder() / "server_ports") as ports,
        ):
            for vip in vips:
                told.delete(vip.key())
                if vip.port not in {v.port for v in left}:
                    ports.update(vip.port, DISARMED)
        with suppress(bpf.BpfError), bpf.Program.from_pin(cls.folder() / ITERATOR) as iterator:
            iterator.run_iterator()
        addresses = {vip.address for vip in vips} - {vip.address for vip in left}
        if "mptcp" in state:
            mptcp.remove(addresses, state["mptcp"], lambda _: cls.write(state))
        if "dsr" in state:
            dsr.remove(addresses, state["dsr"], cls.folder(), lambda _: cls.write(state))
        state["vips"] = [str(vip) for vip in left]
        cls.write(state)

    @classmethod
    def connections(cls) -> dict[Vip, int]:
        """Open connections by VIP, those established while an agent was there; with ``mptcp`` also those that have left
        the load balancer.

        Raises :class:`crablb.kernel.bpf.BpfNotFoundError` if there is no agent.
        """
        state = cls.state() or {}
        told = state.get("vips", ())
        with bpf.Map.from_pin(cls.folder() / "server_connections") as counts:
            # A VIP that was removed is there as long as it has connections.
            found = open_connections(counts)
            if "mptcp" in state:
                found = Moved().added(found)
            return {vip: n for vip, n in found.items() if n or str(vip) in told}

    @classmethod
    def status(cls) -> dict[str, Any] | None:
        status = super().status()
        if status:
            status.pop("asked", None)
            if "mptcp" in status:
                with suppress(KernelError):
                    status["mptcp"] = mptcp.status([parse_vip(text) for text in status["vips"]], status["mptcp"])
            with suppress(KernelError):  # which is among the faults
                lacking = map(str, cls._lacking())
                status["listening"] = dict.fromkeys(status["vips"], True) | dict.fromkeys(lacking, False)
            if status["counters"]:
                status["connections"] = {str(vip): n for vip, n in cls.connections().items()}
                with suppress(bpf.BpfNotFoundError), bpf.Map.from_pin(cls.folder() / COUNTED[1]) as counts:
                    found = redirects(counts).items()
                    status["redirected"] = {str(vip): {"begun": n, "completed": m} for vip, (n, m) in found}
        return status

    @classmethod
    @contextmanager
    def leading(cls) -> Iterator[Leave]:
        """Lead MPTCP clients past the load balancer while in the context, where that takes a process.

        Gives what a load balancer's wish that open connections to VIPs leave it is told to, again and again as long as
        it lasts.
        """
        state = (cls.state() or {}).get("mptcp")
        if state is None:
            yield _stay
        elif state["mode"] == "backup":
            yield mptcp.Leaving()
        else:
            with PathLeader(mptcp.of(state), cls._served()).running() as look:
                yield lambda _: look()

    @classmethod
    def _served(cls) -> Callable[[], list[Vip]]:
        """Gives the VIPs that are served now, which may be asked for with every connection."""
        path, read, vips = cls.state_path(), (0, 0), list[Vip]()

        def served() -> list[Vip]:
            nonlocal read, vips
            with suppress(FileNotFoundError, json.JSONDecodeError):  # the agent goes
                found = path.stat()
                if read != (found.st_ino, found.st_mtime_ns):
                    vips = [parse_vip(text) for text in json.loads(path.read_text())["vips"]]
                    read = found.st_ino, found.st_mtime_ns
            return vips

        return served

    @classmethod
    def vips_served(cls) -> list[Vip]:
        """Those of the installed agent."""
        return [parse_vip(text) for text in (cls.state() or {}).get("vips", ())]

    @classmethod
    def counters(cls) -> dict[str, int]:
        own = super().counters()
        return own | dsr.counters(cls.folder()) if "dsr" in (cls.state() or {}) else own
