"""The XDP program on one interface: attach it, take it over from a daemon that died, detach it, leave it for the next.

A daemon that dies leaves its link and its maps (:data:`.program.PINNED`), pinned in the interface's folder
(:mod:`crablb.kernel.pins`): its program goes on forwarding the flows that it knows, and drops SYNs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import structlog

from crablb.dataplane.flows import Inherited
from crablb.dataplane.program import PINNED, Program
from crablb.errors import KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.interface import Interface, interface_info
from crablb.kernel.netlink import NextHop
from crablb.model import XdpMode

__all__ = ["Attachment", "inherited", "ways"]

log = structlog.get_logger()


class Attachment:
    """An interface that clients' packets come in by.

    Raises :class:`KernelError` if there is no such interface, or it is down.
    """

    def __init__(self, name: str) -> None:
        self.info: Interface = interface_info(name)
        if not self.info.up:
            raise KernelError(f"interface {name} is down; bring it up: ip link set {name} up")
        self.name = name  # as the configuration has it
        self.role = f"lb-{name}"
        self.pins = pins.folder(self.role)
        self.mode = ""  # "native" or "generic" while attached
        self._owned = ExitStack()
        self._left: bpf.Link | None = None  # of a daemon that died
        self._link: bpf.Link | None = None

    @contextmanager
    def own(self) -> Iterator[None]:
        """Be the one process that serves the interface.  Raises :class:`KernelError` if another one does."""
        try:
            self._own()
            yield
        finally:
            self._owned.close()

    def _own(self) -> None:
        self._owned.enter_context(pins.own(self.role, f"the load balancer of {self.info.name}"))

    @property
    def left(self) -> bool:
        """Whether a daemon that died has left its program there."""
        return self._left is not None

    def find(self) -> None:
        """Look for what a daemon that died left.  Raises :class:`BpfBusyError` if the program is somebody else's."""
        try:
            link = bpf.Link.from_pin(self.pins / "link")
        except bpf.BpfNotFoundError:
            link = None
        attached, mode = bpf.xdp_program(self.info.index)
        if link and attached == link.program_id:
            link.mode = mode
            self._left = link
            return
        if link:  # of an interface that is gone
            link.close()
            pins.remove(self.pins)
        if attached:
            raise bpf.BpfBusyError(
                f"interface {self.info.name} has an XDP program already (id {attached}, see bpftool net);"
                f" remove it: ip link set {self.info.name} xdp off"
            )

    def attach(self, program: Program, want: XdpMode) -> None:
        """Attach, in place of what was left there, and pin link and maps."""
        link, self._left = self._left, None
        if link and want.value in ("auto", link.mode):
            link.update(program.main)
            log.info("took over from a load balancer that had died", interface=self.info.name)
        else:
            if link:
                link.detach()
                link.close()
            link = program.main.attach_xdp(self.info.index, want.value)
        self._link, self.mode = link, link.mode
        pins.remove(self.pins)
        link.pin(self.pins / "link")
        for name in PINNED:
            program.maps[name].pin(self.pins / name)

    def renew(self, program: Program) -> None:
        """Attach once more what is attached: a veth has no program on queues that it got since (veth_set_channels)."""
        assert self._link
        with program.again() as again:  # the kernel takes the same one for no change
            self._link.update(again.program(program.main.name))

    def leave_name(self) -> None:
        """The interface has another name now, and perhaps another one has this."""
        self._owned.close()
        aside = pins.folder(f"lb of {self.info.index}")
        self.pins.rename(aside)
        self.pins = aside

    def take_name(self, name: str) -> None:
        """Be known by it; raises :class:`KernelError` if another process is."""
        self.info = replace(self.info, name=name)
        self.role = f"lb-{name}"
        self._own()
        folder = pins.folder(self.role)
        pins.remove(folder)
        self.pins.rename(folder)
        self.pins = folder

    def detach(self) -> None:
        """Leave nothing on the interface; what another daemon had left and was not taken over stays.  Idempotent."""
        if self._link:
            self._link.detach()
            self._link.close()
            pins.remove(self.pins)
            self._link, self.mode = None, ""
        if self._left:
            self._left.close()
            self._left = None


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


def inherited(attachments: Sequence[Attachment], seed: bytes) -> Inherited | None:
    """The flows that a daemon that died left on one of these interfaces, if they are of use."""
    for attachment in attachments:
        if not attachment.left:
            continue
        try:
            return Inherited.open(attachment.pins, seed)
        except bpf.BpfNotFoundError:  # it died before it had pinned them, or it was of another version
            continue
        except ValueError as error:
            log.warning("fallback flows are given up", interface=attachment.info.name, reason=str(error))
    return None


def ways(attachments: Sequence[Attachment], hop: NextHop, *, forced: bool) -> tuple[bool, bool]:
    """How the XDP program can send on the interface of a next hop: by XDP_TX what came in there, by a redirect.

    ``forced``: redirect also where the kernel does not say that the interface takes it.
    """
    attachment = {a.info.index: a for a in attachments}.get(hop.ifindex)
    # XDP_TX into a veth wakes its other end only if that has an XDP program too (veth_xdp_flush); a redirect wakes it
    # always, if it polls.
    tx = (
        attachment is not None
        and bool(attachment.mode)
        and (attachment.mode == "generic" or attachment.info.kind != "veth")
    )
    generic = all(a.mode == "generic" for a in attachments if a.mode)
    return tx, hop.redirect or generic or forced
