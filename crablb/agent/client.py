"""The client endpoint: offers redirection, checks redirects, translates.  See bpf/client.bpf.c."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any, ClassVar

import structlog

from crablb import lasting
from crablb._native import lib
from crablb.agent import joining, offering, routes
from crablb.agent.base import FILTER, Agent, detach_filters, has_clsact, tool
from crablb.agent.verify import Verifier
from crablb.config import parse_prefix, parse_vip
from crablb.errors import ConfigError, KernelError
from crablb.kernel import bpf, pins, rtnetlink
from crablb.kernel.interface import interface_name
from crablb.kernel.routing import Events
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Network, OptionForm, Vip, lpm_key, mapped

log = structlog.get_logger()

FORMS = {OptionForm.CRAB: lib.CRAB_FORM_CRAB, OptionForm.EXPERIMENTAL: lib.CRAB_FORM_EXPERIMENTAL}
#: Seconds between looks at what changes without an event, and the least time between two looks.
LOOK, LEAST = 10.0, 0.1
#: Priorities that are tried on kernels without tcx: the lowest number is asked first.
PRIORITIES = (*range(1, 9), FILTER)


class ClientAgent(Agent):
    """Let the clients of a cgroup, in this network namespace, be redirected when they connect to ``vips``.

    ``backends``: the prefixes that backends may have; a redirect from elsewhere is refused.  ``interfaces``: where
    their packets come in; by default those that the routes to the VIPs and the prefixes use.  ``flows``: redirected
    connections that there is room for, by default as many as the agent before had, or :data:`offering.FLOWS`.
    ``retransmission``: seconds until a SYN that offered is sent again; 0: as the system does.  ``mptcp``: let MPTCP
    connections take up the addresses that servers tell them; without VIPs, that alone, and no program in the kernel.
    """

    role: ClassVar[str] = "client"
    lasting = ("client_flows", "client_peers")
    in_place = True

    def __init__(
        self,
        vips: Sequence[Vip],
        backends: Sequence[Network],
        *,
        option: OptionForm = OptionForm.CRAB,
        cgroup: Path | str | None = None,
        interfaces: Sequence[str] = (),
        flows: int | None = None,
        retransmission: float = offering.RETRANSMISSION,
        mptcp: bool = False,
    ) -> None:
        super().__init__(vips, cgroup, needed=not mptcp)
        if vips and not backends:
            raise ConfigError("name the prefixes that backends may have: --backends 10.0.0.0/24")
        self.backends = list(backends)
        self.option = option
        self.interfaces = list(interfaces)
        self.flows = flows
        self.sizes = {offering.TABLE: flows or offering.FLOWS}
        self.retransmission = retransmission
        self.mptcp = mptcp

    @staticmethod
    def problems(
        vips: Sequence[Vip], backends: Sequence[Network], interfaces: Sequence[str], *, mptcp: bool = False
    ) -> list[str]:
        """What is wrong with these here, each fault a line."""
        found = joining.problems() if mptcp else []
        if not vips:
            return found
        families = {prefix.version for prefix in backends}
        for version in sorted({vip.address.version for vip in vips} - families if families else set()):
            names = ", ".join(str(vip) for vip in vips if vip.address.version == version)
            example = "10.0.0.0/24" if version == 4 else "fd00::/64"
            found.append(f"{names}: no --backends has IPv{version} addresses; name those of its backends, as {example}")
        with Netlink() as netlink:
            paths = routes.look(netlink, (vip.address for vip in vips), backends)
        found += paths.problems(backends)
        for name in interfaces:
            if name not in paths.links.values():
                found.append(f"interface {name} does not exist; there are: {', '.join(paths.links.values())}")
            elif name == "lo":
                found.append("--interface lo: packets of backends do not come in there")
        return found

    def install(self) -> None:
        problems = self.problems(self.vips, self.backends, self.interfaces, mptcp=self.mptcp)
        if problems:
            raise ConfigError(problems)
        self._check_left_out()
        before = self.state()
        if before is not None and self.vips and not before["vips"]:
            self.remove()  # it has none of what this one could take over
        if self.vips:
            super().install()
            return
        if before is None or before["vips"]:
            self.remove()
            pins.RUN.mkdir(parents=True, exist_ok=True)
            self.remember(backends=[], interfaces=[])
        self._set_up_mptcp(before or {})

    def _check_left_out(self) -> None:
        """A VIP that is not named any more loses its routes, and its redirected connections with them."""
        told = {parse_vip(text) for text in (self.state() or {}).get("vips", ())}
        left_out = told - {*self.vips}
        if used := [str(vip) for vip in sorted(left_out, key=str) if self._live({vip})]:
            raise ConfigError(
                f"redirected connections to {', '.join(used)} need the agent that is installed; name it as well, or let"
                " them end: crablb agent remove client (with --now they break)"
            )

    def _loaded(self) -> bpf.Object:
        """Its tables are as large as asked for, unless connections are in those of the agent before."""
        with suppress(bpf.BpfNotFoundError):
            room = offering.room(self.folder())
            if self.flows not in (None, room):
                if live := self.live():
                    log.warning(
                        "the tables of the agent before are kept, as connections need them: --flows does nothing",
                        room=room, asked_for=self.flows, connections=live,
                        remedy="let them end: crablb agent remove client; then install it again",
                    )  # fmt: skip
                else:
                    log.info("new tables, of another size", room=self.flows, before=room)
                    self.remove()
        return super()._loaded()

    def succeed(self, before: dict[str, Any]) -> None:
        """All of it is taken over, piece by piece."""

    def set_up(self, program: bpf.Object) -> None:
        flows = program.map("client_flows").max_entries
        told = offering.settings(flows, retransmission=self.retransmission)
        program.map("client_settings").update(0, told)
        for vip in self.vips:
            program.map("client_vips").update(vip.key(), FORMS[self.option])
        for prefix in self.backends:
            program.map("client_backends").update(lpm_key(prefix), prefix.version)
        for name in ("crab_ingress", "crab_egress", "crab_offer", "crab_end"):
            pins.put(program.program(name), self.folder() / name)
        before = self.state() or {}
        old = "routes" in before  # of a version that had its routes among the operator's
        mptcp = {"mptcp": before["mptcp"]} if self.mptcp and "mptcp" in before else {}
        # Whatever is done is noted first, so that it can be undone by anyone.
        self.remember(
            backends=[str(p) for p in self.backends],
            option=self.option.value,
            interfaces=self.interfaces,
            retransmission=self.retransmission,
            filters={} if old else before.get("filters", {}),
            **mptcp,
        )
        start_sweeping(program.program("crab_sweep"))
        self.repair()
        if old:
            _undo_old(before, self.folder())
            self.repair()
        self._set_up_mptcp(before)

    def _set_up_mptcp(self, before: dict[str, Any]) -> None:
        if self.mptcp:
            self.write({**(self.state() or {}), "mptcp": {}})
            joining.sync(mend=True)
        elif "mptcp" in before:
            joining.tear_down()

    # ---- what is to be, and what is ----

    @classmethod
    def repair(cls, known: Collection[str] = ()) -> list[str]:
        """Mend what is not as it was installed; what that was.  Raises :class:`KernelError` if something cannot be.

        Where a fault in ``known`` is that others come before the agent, they are let be: they may insist on it as well.
        """
        found = cls._sync(mend=True, known=known)
        cls._end_lost()
        return found

    @classmethod
    def _sync(cls, *, mend: bool, known: Collection[str] = ()) -> list[str]:
        state = cls.state()
        if state is None:
            return []
        lead = joining.sync(mend=mend) if "mptcp" in state else []
        return lead + (cls._sync_programs(state, mend=mend, known=known) if state["vips"] else [])

    @classmethod
    def _sync_programs(cls, state: dict[str, Any], *, mend: bool, known: Collection[str]) -> list[str]:
        addresses = [parse_vip(vip).address for vip in state["vips"]]
        backends = [parse_prefix(prefix) for prefix in state["backends"]]
        with ExitStack() as stack:
            netlink = stack.enter_context(Netlink())
            try:
                ingress, egress, offer = (
                    stack.enter_context(bpf.Program.from_pin(cls.folder() / name))
                    for name in ("crab_ingress", "crab_egress", "crab_offer")
                )
            except bpf.BpfNotFoundError:
                raise cls.pins_gone() from None
            paths = routes.look(netlink, addresses, backends)
            names = ["lo", *(state["interfaces"] or paths.interfaces(backends))]
            found = paths.problems([])
            # Translation inward before outward, and both before the first offer.
            found += cls._sync_filters(ingress, names, mend, known)
            found += paths.sync(netlink, egress.fd, f"{routes.EGRESS}-{egress.id}", mend=mend)
            if not cls.attached(state["cgroup"], offer.id):
                found.append(f"the program that offers is not attached to cgroup {state['cgroup']}")
                if mend:
                    cls.attach(offer, state["cgroup"])
        return found

    @classmethod
    def _sync_filters(cls, program: bpf.Program, names: Sequence[str], mend: bool, known: Collection[str]) -> list[str]:
        found, behind, attached = [], set(), set()
        for pin in cls.folder().glob("ingress-*"):
            with bpf.Link.from_pin(pin) as link:
                index = link.target
                if not index:  # its interface is gone, or somebody has detached it
                    if mend:
                        pin.unlink()
                    continue
                attached.add(index)
                if mend and link.program_id != program.id:
                    link.update(program)
                order, ours = bpf.tcx_programs(index), link.program_id
            if order and order[0] != ours:
                found.append(f"on {interface_name(index)} the tc program with id {order[0]} comes before the agent's")
                if found[-1] not in known:
                    behind.add(index)
        if mend and behind:
            cls._go_in_front(behind)
        for name in dict.fromkeys(names):
            try:
                index = socket.if_nametoindex(name)
            except OSError:
                found.append(f"interface {name} does not exist")
                continue
            if index in attached or cls._clsact(name, index, program, mend):
                continue
            found.append(f"the agent's program is not attached to {name}")
            if mend:
                cls._attach_filter(program, name, index)
        return found

    @classmethod
    def _go_in_front(cls, indices: Collection[int]) -> None:
        """Attach anew, in front of others.

        Not a packet may pass between: it would be lost, and its connection with it.  A program can be attached to an
        interface once, so another one, of the same maps, comes before the one that is there goes.
        """
        folder = cls.folder()
        with ExitStack() as stack:
            maps = {}
            for pin in folder.glob("client_*"):
                maps[pin.name] = stack.enter_context(bpf.Map.from_pin(pin))
            loaded = stack.enter_context(bpf.Object(bpf.object_path(cls.role), reuse=maps))
            program = loaded.program("crab_ingress")
            pins.put(program, folder / "crab_ingress")
            for pin in folder.glob("ingress-*"):
                with bpf.Link.from_pin(pin) as link:
                    if link.target in indices:
                        with program.attach_tcx(link.target) as new:
                            pins.put(new, pin)
                        link.detach()
                    else:
                        link.update(program)

    @classmethod
    def _attach_filter(cls, program: bpf.Program, name: str, index: int) -> None:
        try:
            with program.attach_tcx(index) as link:
                pins.put(link, cls.folder() / f"ingress-{index}")
                return
        except bpf.BpfError as error:
            if error.errno != errno.EINVAL:
                raise
        # Linux before 6.6: a filter of clsact, in front of others as far as these leave room.
        made = not has_clsact(name)
        for priority in PRIORITIES:
            cls._note_filter(name, priority, made)
            try:
                bpf.attach_tc(program, index, "ingress", priority=priority, handle=FILTER)
            except bpf.BpfError:  # filters of another kind have this priority
                if priority == PRIORITIES[-1]:
                    raise
                continue
            return

    @classmethod
    def _note_filter(cls, name: str, priority: int, made: bool) -> None:
        state = cls.state() or {}
        earlier = state.setdefault("filters", {}).get(name, {})
        state["filters"][name] = {"priority": priority, "made": made or earlier.get("made", False)}
        cls.write(state)

    @classmethod
    def _clsact(cls, name: str, index: int, program: bpf.Program, mend: bool) -> bool:
        """Whether our filter of clsact is there; ``mend``: with this program."""
        noted = (cls.state() or {}).get("filters", {}).get(name)
        if not noted:
            return False
        attached = bpf.TcFilter(index, "ingress", FILTER, noted["priority"]).attached
        if attached and attached != program.id and mend:
            bpf.attach_tc(program, index, "ingress", priority=noted["priority"], handle=FILTER)
        return bool(attached)

    @classmethod
    def _end_lost(cls) -> None:
        """End the connections whose socket is no more, though nobody heard of its end: those of another cgroup than the
        agent's now, or whose flags another sock_ops program took away."""
        if not (cls.folder() / "crab_end").exists():  # no agent, or one of a version before
            return
        owned = offering.owned(cls.folder())
        # A socket is there before its entry; and who has the same ports since is another owner.
        if lost := owned.keys() - rtnetlink.tcp_ports():
            with bpf.Program.from_pin(cls.folder() / "crab_end") as end:
                for ports in lost:
                    end.call(offering.ended(ports, owned[ports]))

    @classmethod
    @contextmanager
    def watched(cls, *, verify: bool = True) -> Iterator[None]:
        """While in the context, a thread mends what changes.

        ``verify``: another one finds out whether a backend hears this client, before its first redirect is taken up.
        """
        verify = verify and bool((cls.state() or {}).get("vips"))
        with (
            Verifier(cls.folder()) if verify else nullcontext() as verifier,
            lasting.in_thread("watch", partial(cls._watch, verifier=verifier)),
        ):
            yield

    @classmethod
    def _watch(cls, stop: int, verifier: Verifier | None) -> None:
        state = cls.state()
        if state is None:
            return
        about = [parse_prefix(prefix) for prefix in state["backends"]]
        about += [ip_network(parse_vip(vip).address) for vip in state["vips"]]
        events = Events()
        told: list[str] = []
        vain: dict[str, str] = {}
        due = True  # something may have changed before there were events
        poll = select.poll()
        poll.register(events, select.POLLIN)
        poll.register(stop, select.POLLHUP)
        try:
            while True:
                if due:
                    try:
                        found = cls.repair(told)
                        for what in found:
                            if what not in told:
                                log.warning("found and mended, if it can be", fault=what)
                        told = found
                    except (KernelError, OSError) as error:
                        if [str(error)] != told:
                            log.warning("the agent cannot be mended", reason=str(error))
                        told = [str(error)]
                    # A storm of events is one.
                    ready = dict(_wait(stop, LEAST))
                    if stop in ready:
                        return
                ready = dict(lasting.wait(poll, LOOK))
                if stop in ready:
                    return
                with suppress(bpf.BpfNotFoundError):  # its pins are gone, which is told as a fault
                    vain = cls._tell(vain)
                due = not ready
                if ready and events.concern(about):
                    due = True
                    if verifier:
                        verifier.forget()
        finally:
            events.close()

    @classmethod
    def _tell(cls, before: dict[str, str]) -> dict[str, str]:
        """Log what VIPs' offers have come to since ``before``; what they came to now, by VIP."""
        told = {one["vip"]: offering.in_vain(one) for one in offering.told(cls.folder()) if one["backend"] is None}
        for vip, why in told.items():
            if why and not before.get(vip):
                log.warning("redirects to a VIP come to nothing; the fallback serves", vip=vip, reason=why)
            elif before.get(vip) and not why:
                log.info("redirects to a VIP are taken up again", vip=vip)
        return told

    # ---- the end ----

    @classmethod
    def withdraw(cls) -> None:
        state = cls.state()
        if state is None:
            return
        try:
            with bpf.Map.from_pin(cls.folder() / "client_settings") as settings:
                settings.update(0, offering.withdrawn(settings.lookup(0) or b""))
        except bpf.BpfNotFoundError:  # of a version before
            with suppress(bpf.BpfNotFoundError), bpf.Map.from_pin(cls.folder() / "client_vips") as vips:
                for key in list(vips.keys()):
                    vips.delete(key)
        cls.write({**state, "withdrawn": True})

    @classmethod
    def live(cls) -> int:
        return cls._live({parse_vip(text) for text in (cls.state() or {}).get("vips", ())})

    @classmethod
    def _live(cls, vips: Collection[Vip]) -> int:
        """Connections to VIPs that are translated and have not ended, or that may still be redirected."""
        try:
            translated = offering.translated(cls.folder())
        except bpf.BpfNotFoundError:
            return 0
        keys = {(mapped(vip.address), vip.port) for vip in vips}
        count = 0
        for one in rtnetlink.tcp_connections():
            if (one.remote, int.from_bytes(one.remote_port, "big")) in keys:
                key = one.local + one.local_port + one.remote_port + one.remote
                count += one.connecting or key in translated
        return count

    @classmethod
    def tear_down(cls, state: dict[str, Any]) -> None:
        joining.tear_down()
        with Netlink() as netlink:
            routes.remove(netlink)
        if cls.folder().exists():
            for pin in cls.folder().glob("ingress-*"):
                with bpf.Link.from_pin(pin) as link:
                    link.detach()
        if "routes" in state:
            _undo_old(state, cls.folder())
            return
        for name, noted in state.get("filters", {}).items():
            detach_filters({name: noted["made"]}, "ingress", noted["priority"])

    @classmethod
    def status(cls) -> dict[str, Any] | None:
        status = super().status()
        if status is None:
            return status
        status["mptcp"] = {"asked_for": "mptcp" in status, "hindered": joining.hindered()}
        if not status["counters"]:
            return status
        status["flows"], status["room"] = len(offering.translated(cls.folder())), offering.room(cls.folder())
        with Netlink() as netlink:
            status["routes"] = {text: routes.leads(netlink, parse_vip(text).address) for text in status["vips"]}
        status["redirects"] = offering.told(cls.folder())
        held = {one["vip"] for one in status["redirects"] if one["backend"] is None and one["backing_off"]}
        status["offering"] = {text: not status.get("withdrawn") and text not in held for text in status["vips"]}
        if status.get("withdrawn"):
            if status["pid"] is None:
                status["faults"].append(
                    "it offers no more, and nobody waits for its connections: crablb agent remove client takes it out,"
                    " installing it again lets it offer"
                )
            return status
        for one in status["redirects"]:
            if one["backend"] is None and (why := offering.in_vain(one)):
                status["faults"].append(f"{one['vip']}: {why}")
        return status


def start_sweeping(sweep: bpf.Program) -> None:
    """Start the timer of ``crab_sweep``, which forgets closed connections.

    Raises :class:`KernelError` if there is no memory for it: ``bpf_timer_init`` may answer ENOMEM at any moment, as its
    allocation gives way to whoever holds the allocator's locks (see ``client_sweeper``), so it is asked again.
    """
    for _ in range(100):
        if sweep.test_run().retval == 0:
            return
        time.sleep(0.001)
    raise KernelError("the kernel has no memory for the agent's timer; try again")


def _wait(descriptor: int, seconds: float) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP)
    return poll.poll(seconds * 1000)


def _undo_old(state: dict[str, Any], folder: Path) -> None:
    """Take away what versions did that had their routes among the operator's, and their filters behind others'."""
    for route in state["routes"]:
        prefix, before = route["prefix"], route["before"]
        family = "-6" if ":" in prefix else "-4"
        metric = ["metric", "1"] if family == "-6" else []
        undo = ["replace", *before.splitlines()[0].split()] if before else ["del", prefix, *metric]
        try:
            tool("ip", family, "route", *undo)
        except KernelError as error:
            log.debug("route was gone", prefix=prefix, reason=str(error))
    detach_filters(state.get("filters", {}), "ingress")
    (folder / "egress").unlink(missing_ok=True)
