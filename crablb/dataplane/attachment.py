"""The XDP program on one interface: attach it, take it over from a daemon that died, detach it, leave it for the next.

A daemon that dies leaves its link and its maps (:data:`.program.PINNED`), pinned in the interface's folder
(:mod:`crablb.kernel.pins`): its program goes on forwarding the flows that it knows, and drops SYNs.

A takeover may fail, on this interface or another one: until :meth:`Attachment.settle` what was left can be put back.
For that the program is pinned as well, as the kernel gives out programs by their ids to CAP_SYS_ADMIN alone.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import structlog

from crablb._native import lib
from crablb.dataplane.flows import Inherited, Numbered
from crablb.dataplane.paths import Ways, backends
from crablb.dataplane.program import NAMES, PINNED, Program
from crablb.errors import KernelError
from crablb.kernel import bpf, ethtool, pins, virtio
from crablb.kernel.interface import Interface, interface_info
from crablb.kernel.netlink import NextHop, release_managed
from crablb.model import XdpMode

__all__ = ["Attachment", "abandoned", "inherited", "left", "remove", "reunite", "ways"]

log = structlog.get_logger()

GOING = 2.0  # seconds that a dead process's program is waited for to go
#: Features that take VLAN tags out of the frames; ethtool shows the first as rx-vlan-offload.
VLAN_OFFLOADS = ("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse")


def _role(name: str) -> str:
    return f"lb-{name}"


def _offloads(name: str) -> Path:
    """Where stands what the end switches on again, be it another daemon's."""
    return pins.RUN / f"{pins.namespace()}-{_role(name)}.offloads"


def _put_back(name: str) -> None:
    offloads = _offloads(name)
    if not offloads.exists():
        return
    failed = []
    for feature in offloads.read_text().split():
        try:
            ethtool.switch(name, feature, on=True)
        except OSError as error:
            if error.errno != errno.ENODEV:  # it is there still: crablb remove tries again
                failed.append(feature)
                log.warning("an offload cannot be put back", interface=name, feature=feature, reason=str(error))
    if failed:
        offloads.write_text(" ".join(failed))
    else:
        offloads.unlink()


class _Before:
    """What a daemon that died had left in a folder, held open to be put back there."""

    def __init__(self, folder: Path, link: bpf.Link | None) -> None:
        """``link``: of its program, if that is attached still."""
        self.maps: dict[str, bpf.Map] = {}
        self.program: bpf.Program | None = None
        self.mode = link.mode if link else ""
        for name in PINNED:
            with suppress(bpf.BpfNotFoundError):
                self.maps[name] = bpf.Map.from_pin(folder / name)
        if link:
            with suppress(bpf.BpfNotFoundError):  # versions of before did not pin it
                program = bpf.Program.from_pin(folder / "program")
                if program.id == link.program_id:
                    self.program = program
                else:
                    program.close()

    def pin(self, folder: Path) -> None:
        for name in PINNED:
            if name in self.maps:
                pins.put(self.maps[name], folder / name)
            else:
                (folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        for held in (*self.maps.values(), *([self.program] if self.program else [])):
            held.close()


class Attachment:
    """An interface that clients' packets come in by.

    Raises :class:`KernelError` if there is no such interface, or it is down.
    """

    def __init__(self, name: str) -> None:
        self.info: Interface = interface_info(name)
        if not self.info.up:
            raise KernelError(f"interface {name} is down; bring it up: ip link set {name} up")
        self.name = name  # as the configuration has it
        self.role = _role(name)
        self.pins = pins.folder(self.role)
        self.mode = ""  # "native" or "generic" while attached
        self.sums = False  # whether the interface does checksums of any packet, wherever in it they are
        self._offloads = _offloads(name)
        self._owned = ExitStack()
        self.lock = -1  # the descriptor by which another process can inherit
        self._begun = False
        self._nameless = False  # another interface that is served has its name
        self._left: bpf.Link | None = None  # of a daemon that died
        self._link: bpf.Link | None = None
        self._pinned = False  # whether what is in the folder is this process's
        self._before: _Before | None = None  # what was in the folder, until settled

    @contextmanager
    def own(self, *, later: bool = False) -> Iterator[None]:
        """Be the one process that serves the interface.  Raises :class:`KernelError` if another one does.

        ``later``: when it is taken from that one, which lives: :meth:`inherit`.
        """
        self._begun = False
        try:
            if not later:
                self._own()
            yield
        finally:
            self._disown()

    def _disown(self) -> None:
        self._owned.close()
        self.lock = -1

    def inherit(self, lock: int) -> None:
        """Be it from now on in place of the process that gave its :attr:`lock`."""
        self.lock = self._owned.enter_context(pins.take(self.role, lock))

    def give(self) -> None:
        """Another process owns the interface, or did before: leave to it what is there."""
        pins.give(self.lock)

    def reclaim(self, program: Program) -> list[str]:
        """Have all be as it was before another process, which is gone, tried to take over.

        What of that cannot be, and why; the rest is.  May be asked again.
        """
        failed = list[str]()

        def attempt(do: Callable[[], None]) -> None:
            try:
                do()
            except (KernelError, OSError) as error:
                failed.append(str(error))

        attempt(lambda: self._exchange(program))  # first, as packets go by it
        for name in PINNED if self._link else ():
            attempt(lambda name=name: self._pin(program.maps[name], name))  # type: ignore[misc]
        if self._link:
            attempt(lambda: self._pin(program.main, "program"))
        if self.lock >= 0:
            attempt(lambda: pins.claim(self.lock))
        if self._begun:
            pins.begun(self.role)
        return failed

    def _exchange(self, program: Program) -> None:
        if self._link and self._link.program_id != program.main.id:
            self._link.update(program.main)

    def _pin(self, held: bpf.Map | bpf.Program, name: str) -> None:
        with suppress(bpf.BpfError):
            if self._is(self.pins / name, held):
                return
        pins.put(held, self.pins / name)

    def _own(self) -> None:
        self._nameless = False
        self.lock = self._owned.enter_context(pins.own(self.role, f"the load balancer of {self.info.name}"))
        if self._begun:  # by another name
            pins.begun(self.role)

    def begun(self) -> None:
        """Have it known that packets are served, and who may be asked can be (:func:`pins.has_begun`)."""
        self._begun = True
        pins.begun(self.role)

    def find(self, *, living: bool = False) -> None:
        """Look for what a daemon that died left, or one that is taken over (``living``).

        Raises :class:`BpfBusyError` if the program is somebody else's.
        """
        try:
            link = bpf.Link.from_pin(self.pins / "link")
        except bpf.BpfNotFoundError:
            link = None
        attached, mode = bpf.xdp_program(self.info.index)
        if attached and not link and living:
            raise bpf.BpfBusyError(
                f"what serves {self.info.name} is pinned in another BPF file system than {bpf.BPFFS} here; have this"
                f" process in its mount namespace, or see that one (-v {bpf.BPFFS}:{bpf.BPFFS} of a container)"
            )
        end = time.monotonic() + GOING
        while attached and not link and bpf.program_name(attached) in NAMES and time.monotonic() < end:
            # Its process was killed before it had pinned the link, and the kernel takes its time to end that.
            time.sleep(0.01)
            attached, mode = bpf.xdp_program(self.info.index)
        if link and attached == link.program_id:
            link.mode = mode
            self._left = link
            return
        if link:  # of an interface that is gone, or somebody has detached it: there are the flows still
            link.close()
        if attached:
            name = self.info.name
            raise bpf.BpfBusyError(
                f"interface {name} has an XDP program already (id {attached}, see bpftool net); remove it: ip link set"
                f" {name} xdp off, or if that is refused, as of a link: bpftool link detach"
            )
        (self.pins / "link").unlink(missing_ok=True)

    def attach(self, program: Program, want: XdpMode, *, living: bool = False) -> None:
        """Attach, in place of what was left there, and pin link, maps and program.

        The process may be killed between any two steps.  A pin is replaced, never missing; and the maps come before the
        program that learns flows into them.  ``living``: what is there is a process's that lives.  Raises
        :class:`KernelError`.
        """
        if self.info.kind == "bond":
            # A native program runs on its ports, whose queues have no sockets: every packet would be lost.
            if want is XdpMode.NATIVE:
                raise KernelError(
                    f"interface {self.info.name} is a bond: AF_XDP sockets get its packets in generic mode alone;"
                    " serve its ports in its place, or leave xdp_mode at auto"
                )
            want = XdpMode.GENERIC
        self._before = _Before(self.pins, self._left)
        self._pinned = True
        flows = self.pins / "flows"
        if not self._is(flows, program.maps["flows"]):
            flows.unlink(missing_ok=True)  # given up; without them, a mixture of old and new is not taken for a whole
        for name in PINNED:
            pins.put(program.maps[name], self.pins / name)
        if self._left and want.value in ("auto", self._left.mode):
            self._left.update(program.main)
            self._link, self._left = self._left, None
            if not living:
                log.info("took over from a load balancer that had died", interface=self.info.name)
        else:
            if self._left:  # the kernel does not have a program in either mode at once
                self._left.detach()
                self._left.close()
                self._left = None
            if want is not XdpMode.GENERIC:
                virtio.refuse_to_overrun(interface_info(self.info.name))
            self._link = program.main.attach_xdp(self.info.index, want.value)
            (self.pins / "link").unlink(missing_ok=True)
            self._link.pin(self.pins / "link")
        pins.put(program.main, self.pins / "program")
        self.mode = self._link.mode
        self.sums = ethtool.features(self.info.name).get("tx-checksum-ip-generic", ethtool.OFF).active
        self._keep_tags()

    @property
    def attached(self) -> bool:
        """Whether the interface has the program still that was attached."""
        return self._link is not None and bpf.xdp_program(self.info.index)[0] == self._link.program_id

    @property
    def found(self) -> str:
        """How the program is attached that was there: ``native``, ``generic``, or empty."""
        return self._left.mode if self._left else ""

    def settle(self) -> None:
        """What was there before will not be wanted any more."""
        if self._before:
            self._before.close()
            self._before = None

    def _return(self, before: _Before) -> None:
        """Leave what a daemon that died had left, as it was."""
        if before.mode and not before.program and self._link:
            return  # of its program there is nothing left; this process's forwards the same flows, and stays
        before.pin(self.pins)
        link = self._link or self._left
        if not before.program:
            if self._link:
                self._link.detach()
                (self.pins / "link").unlink(missing_ok=True)
        elif link and link.mode == before.mode:
            if link.program_id != before.program.id:
                link.update(before.program)
        else:
            if link:
                link.detach()
            with before.program.attach_xdp(self.info.index, before.mode) as again:  # type: ignore[arg-type]
                pins.put(again, self.pins / "link")
        if before.program:
            pins.put(before.program, self.pins / "program")
        else:
            (self.pins / "program").unlink(missing_ok=True)

    @staticmethod
    def _is(path: Path, held: bpf.Map | bpf.Program) -> bool:
        """Whether it is what is pinned there."""
        try:
            with type(held).from_pin(path) as there:
                return there.id == held.id
        except bpf.BpfNotFoundError:
            return False

    def _keep_tags(self) -> None:
        """Have VLAN tags stay in the frames: the program does not see those beside, and what it sends has none."""
        found = ethtool.features(self.info.name)
        active = [name for name in VLAN_OFFLOADS if found.get(name, ethtool.OFF) == ethtool.ON]
        if not active:
            return
        left = self._offloads.read_text().split() if self._offloads.exists() else []
        self._offloads.write_text(" ".join({*active, *left}))
        for name in active:
            with suppress(OSError):
                ethtool.switch(self.info.name, name, on=False)
        log.info("rx-vlan-offload is off until the end: VLAN tags stay in the frames", interface=self.info.name)

    @property
    def tags_beside(self) -> bool:
        """Whether VLAN tags may lie beside the frames all the same, which then go out without."""
        found = ethtool.features(self.info.name)
        return self.info.kind == "veth" or any(found.get(name, ethtool.OFF).active for name in VLAN_OFFLOADS)

    def renew(self, program: Program) -> None:
        """Attach once more what is attached: a veth has no program on queues that it got since (veth_set_channels)."""
        assert self._link
        with program.again() as again:  # the kernel takes the same one for no change
            self._link.update(again.program(program.main.name))
            pins.put(again.program(program.main.name), self.pins / "program")

    def exchange(self, program: Program) -> None:
        """Have there what is the main program now, in place of what was until now."""
        assert self._link
        self._link.update(program.main)
        pins.put(program.main, self.pins / "program")

    def lend_name(self) -> None:
        """It is gone, and another interface has its name now.  Idempotent."""
        self._disown()
        self._nameless = True

    def regain_name(self) -> None:
        """It is there again; raises :class:`KernelError` if another process is known by its name."""
        if self._nameless:
            self._own()

    def leave_name(self) -> None:
        """The interface has another name now, and perhaps another one has this."""
        self._disown()
        aside = pins.folder(f"lb of {self.info.index}")
        self.pins.rename(aside)
        self.pins = aside

    def take_name(self, name: str) -> None:
        """Be known by it; raises :class:`KernelError` if another process is."""
        self.info = replace(self.info, name=name)
        self.role = _role(name)
        self._own()
        with suppress(FileNotFoundError):
            self._offloads.rename(_offloads(name))
        self._offloads = _offloads(name)
        folder = pins.folder(self.role)
        pins.remove(folder)
        self.pins.rename(folder)
        self.pins = folder

    def detach(self) -> None:
        """Leave nothing on the interface but what another daemon had left, which is as it was.  Idempotent."""
        before, self._before = self._before, None
        if before and before.maps:
            try:
                self._return(before)
            except (KernelError, OSError) as error:  # the interface has gone, or somebody else has it
                log.warning("what was left cannot be put back", interface=self.info.name, reason=str(error))
        elif self._link:
            self._link.detach()
        if before:
            before.close()
        if self._pinned and not (before and before.maps):
            pins.remove(self.pins)
            _put_back(self.info.name)
        self.leave()

    def back_out(self) -> None:
        """All is another process's, which lives, and has it as it was by :meth:`reclaim`.  Idempotent."""
        if self.lock >= 0:
            self.give()
        self.leave()

    def leave(self) -> None:
        """Leave the program there, and the flows, as a daemon that is killed does."""
        self.settle()
        for link in (self._link, self._left):
            if link:
                link.close()
        self._link = self._left = None
        self.mode, self._pinned = "", False


def reunite() -> dict[str, str]:
    """What dead load balancers left of interfaces that have been renamed since has the names of now.

    Returns those, by the names of before.
    """
    moved = []
    for folder in (pins.root() / pins.namespace()).glob("lb-*"):
        try:
            with bpf.Link.from_pin(folder / "link") as link:
                index = link.target
            name = socket.if_indextoname(index)
        except (bpf.BpfNotFoundError, OSError):  # it is gone
            continue
        was = pins.unescape(folder.name).removeprefix("lb-")
        if name != was and all(pins.owner(_role(n)) in (None, os.getpid()) for n in (name, was)):
            aside = pins.folder(f"lb of {index}")
            folder.rename(aside)
            moved.append((aside, was, name))
    # What they switched off stands beside; of two that exchanged their names neither overwrites the other's.
    noted = {name: _offloads(was).read_text() for _, was, name in moved if _offloads(was).exists()}
    for _, was, _ in moved:
        _offloads(was).unlink(missing_ok=True)
    for aside, _, name in moved:
        folder = pins.folder(_role(name))
        shutil.rmtree(folder, ignore_errors=True)  # of one that is gone
        aside.rename(folder)
        if name in noted:
            _offloads(name).write_text(noted[name])
    return {was: name for _, was, name in moved}


def abandoned() -> list[str]:
    """The interfaces of which dead load balancers of this network namespace have left something."""
    names = (pins.unescape(path.name).removeprefix("lb-") for path in (pins.root() / pins.namespace()).glob("lb-*"))
    return sorted(name for name in names if pins.owner(_role(name)) is None)


def left(name: str) -> int | None:
    """The id of the program that the last load balancer of an interface has there or had; None if there is none."""
    try:
        with bpf.Link.from_pin(pins.folder(_role(name)) / "link") as link:
            return link.program_id
    except bpf.BpfNotFoundError:
        return None


def remove(name: str) -> bool:
    """Take out of the kernel what a load balancer has left that does not live any more.  False if there is nothing.

    Raises :class:`KernelError` if it lives.
    """
    with pins.own(_role(name), f"the load balancer of {name}"):
        folder = pins.folder(_role(name))
        there = folder.exists()
        try:
            with bpf.Link.from_pin(folder / "link") as link:
                link.detach()
        except bpf.BpfNotFoundError:
            pass
        try:
            with bpf.Map.from_pin(folder / "paths") as held:
                release_managed(backends(held))
        except bpf.BpfNotFoundError:
            pass
        pins.remove(folder)
        _put_back(name)
    return there


def rename(names: Mapping[Attachment, str]) -> list[tuple[Attachment, str]]:
    """These interfaces have these names now; some may have exchanged theirs.

    Those that had another one, which is told.
    """
    renamed = [(attachment, attachment.info.name) for attachment, name in names.items() if name != attachment.info.name]
    for attachment, _ in renamed:
        attachment.leave_name()
    for attachment, _ in renamed:
        try:
            attachment.take_name(names[attachment])
        except KernelError as error:
            name = names[attachment]
            log.warning("crablb status does not know an interface by its name", interface=name, reason=str(error))
    return renamed


def inherited(
    attachments: Sequence[Attachment], seed: bytes, numbers: Numbered | None = None, *, counting: bool = False
) -> Inherited | None:
    """The flows that a daemon that died left on one of these interfaces, if they are of use.

    ``numbers``: of one that lives, whose they are still; ``counting``: with the maps that it counts in.
    """
    for attachment in attachments:
        try:
            return Inherited.open(attachment.pins, seed, numbers, counting=counting)
        except bpf.BpfNotFoundError:  # there are none, or of another version
            continue
        except ValueError as error:
            log.warning("fallback flows are given up", interface=attachment.info.name, reason=str(error))
    return None


def ways(attachments: Sequence[Attachment], hop: NextHop, *, forced: bool, room: bool) -> Ways:
    """How the XDP program can send on the interface of a next hop.

    ``forced``: redirect also where the kernel does not say that the interface takes it; ``room``: frames may lie in
    zero-copy memory.
    """
    attachment = {a.info.index: a for a in attachments}.get(hop.ifindex)
    # XDP_TX into a veth wakes its other end only if that has an XDP program too (veth_xdp_flush); a redirect wakes it
    # always, if it polls.
    tx = (
        attachment is not None
        and bool(attachment.mode)
        and (attachment.mode == "generic" or attachment.info.kind != "veth")
    )
    modes = {a.mode for a in attachments if a.mode}
    generic = modes == {"generic"}
    partial = lib.CRAB_PARTIAL_ASK
    if modes == {"native"}:
        partial = lib.CRAB_PARTIAL_FINISH
    elif generic and attachment and attachment.sums:
        partial = lib.CRAB_PARTIAL_KEEP
    return Ways(tx, hop.redirect or generic or forced, partial, hop.frags or generic, room)
