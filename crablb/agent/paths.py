"""The path manager of ``agent server --mptcp=leave``: connections to VIPs are told this host's own address, and closed
at the VIP once they have come there.

Source: RFC 8684, 3.4.1; Documentation/netlink/specs/mptcp_pm.yaml.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import structlog

from crablb import lasting
from crablb.agent.mptcp import Mptcp, port_of
from crablb.errors import KernelError
from crablb.kernel import mptcp, rtnetlink
from crablb.kernel.mptcp import Endpoint, Event, Events, Happened, PathManager, Subflow
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Network, Vip
from crablb.seldom import Seldom

__all__ = ["Announce", "Close", "PathLeader", "Paths"]

log = structlog.get_logger()

#: Connections that have been told, and have not come yet, that are remembered; the oldest are forgotten first, and
#: found again by a look at all there are.
ROOM = 1 << 16
#: Seconds between looks at all connections, at least, when events are lost; and at most, while it is not clear yet
#: what is to be done of some.
LOOK, LONGEST = 1.0, 10.0
#: Events that are read before something else is looked at.
BATCH = 64
#: Seconds that it may take to begin.
BEGIN = 5.0


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the connection's peer of this endpoint, and that its first subflow is for emergencies."""

    first: Subflow
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Close:
    subflow: Subflow


Command = Announce | Close


class Paths:
    """What is to be done for each connection; without sockets and clock.

    ``vips``: those that are served now; ``choose`` gives the endpoint that a client is told, None: none.
    """

    def __init__(
        self,
        vips: Callable[[], Collection[Vip]],
        choose: Callable[[Address], Endpoint | None],
        clients: Sequence[Network] = (),
    ) -> None:
        self._vips, self._choose, self._clients = vips, choose, clients
        #: The first subflows of connections that have been told, by their token.
        self._told: dict[int, Subflow] = {}
        #: Whether the last :meth:`see` left some as they are that another one may do something for: no event will tell.
        self.unsure = False

    def hear(self, event: Event) -> Command | None:
        """What an event asks for."""
        if event.what == Happened.CLOSED:
            self._told.pop(event.token, None)
        elif event.what == Happened.ESTABLISHED and event.subflow:
            return self._tell(event.subflow, self._places())
        elif event.what == Happened.SUB_ESTABLISHED and event.subflow:
            first = self._told.get(event.token)
            if first and event.subflow.local != first.local:
                return Close(self._told.pop(event.token))
        return None

    def see(
        self,
        subflows: Iterable[Subflow],
        prove: Callable[[Collection[Subflow]], Collection[tuple[Address, int, Address, int]]],
    ) -> Iterator[Command]:
        """What is to be done of all there is, when what happened is not known.  ``prove`` gives the ends of subflows
        that work: of one that has just come about it is known, of others it is not."""
        places, first, others, unsure = self._places(), dict[int, Subflow](), list[Subflow](), set[int]()
        for one in subflows:
            if not one.established:
                unsure.add(one.token)
            if (one.local, one.local_port) in places:
                first[one.token] = one
            elif one.established:
                others.append(one)
        come = {one.token for one in others}  # it is told no more
        others = [one for one in others if one.token in first]
        proven = prove(others) if others else ()
        work = {one.token for one in others if one.ends in proven}
        self.unsure = not first.keys().isdisjoint((unsure | come) - work)
        self._told = {token: one for token, one in self._told.items() if token in first.keys() - come}
        for token, one in first.items():
            if token in work:
                yield Close(one)
            elif one.established and token not in self._told.keys() | come and (told := self._tell(one, places)):
                yield told

    def _places(self) -> set[tuple[Address, int]]:
        return {(vip.address, vip.port) for vip in self._vips()}

    def _tell(self, first: Subflow, places: Collection[tuple[Address, int]]) -> Announce | None:
        """Of what came by redirection the local address is no VIP: nothing is told there."""
        if (first.local, first.local_port) not in places or not self._may(first.remote):
            return None
        endpoint = self._choose(first.remote)
        if endpoint is None:
            return None
        if len(self._told) >= ROOM:
            del self._told[next(iter(self._told))]
        self._told[first.token] = first
        return Announce(first, endpoint)

    def _may(self, client: Address) -> bool:
        return not self._clients or any(client in prefix for prefix in self._clients)


class PathLeader:
    """Does what :class:`Paths` asks for, in a thread of its own."""

    def __init__(self, wanted: Mptcp, vips: Callable[[], Collection[Vip]]) -> None:
        # Numbers of addresses within a connection (RFC 8684, 3.4.1); 0 is the first subflow's.
        self._endpoints = [
            Endpoint(address, number, port=port_of(address, wanted.port))
            for number, address in enumerate(wanted.addresses, 1)
        ]
        self._netlink = Netlink()
        self._vips, self._clients = vips, wanted.clients
        self._seldom = Seldom()
        self._wake, self._waker = socket.socketpair()
        self._again = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @contextmanager
    def running(self) -> Iterator[Callable[[], None]]:
        """In the network namespace of the thread that enters it.  Gives what has it look at all connections anew."""
        ready = threading.Event()
        thread = threading.Thread(
            target=lasting.keep_in_thread,
            args=("paths", lambda: self._run(ready), self._wake.fileno()),
            name="crablb-paths",
            daemon=True,
        )
        thread.start()
        ready.wait(BEGIN)  # whatever keeps it from beginning, it has told, and tries again
        try:
            yield self._look
        finally:
            self._waker.send(b"x")
            thread.join()
            self._netlink.close()
            for sock in (self._wake, self._waker):
                sock.close()
            os.close(self._again)

    def _look(self) -> None:
        os.eventfd_write(self._again, 1)

    def _choose(self, client: Address) -> Endpoint | None:
        """Of several addresses the one that this host would send from to the client."""
        mine = [one for one in self._endpoints if one.address.version == client.version]
        if len(mine) > 1:
            try:
                route = rtnetlink.route(self._netlink, client).attributes(rtnetlink.ROUTE)
            except OSError:  # no route
                return mine[0]
            source = rtnetlink.address(route.get(rtnetlink.RTA_PREFSRC))
            mine.sort(key=lambda one: str(one.address) != source)
        return mine[0] if mine else None

    def _run(self, ready: threading.Event) -> None:
        with Events() as events, PathManager() as manager:
            # Who was told by one that failed may have come in vain.
            paths = Paths(self._vips, self._choose, self._clients)
            lost, looked, pause = True, -math.inf, LOOK
            poll = select.poll()
            for sock in (self._wake, self._again, events):
                poll.register(sock, select.POLLIN)
            while True:
                wait = max(looked + pause - time.monotonic(), 0) if lost else math.inf
                found = dict(lasting.wait(poll, wait))
                if self._wake.fileno() in found:
                    return
                if self._again in found:
                    os.eventfd_read(self._again)
                    lost, pause = True, LOOK
                try:
                    more = self._heard(events, paths, manager)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    lost, more, pause = True, True, LOOK
                if lost and time.monotonic() - looked >= pause:
                    for command in paths.see(mptcp.subflows(), mptcp.answering):
                        self._do(manager, command)
                    looked, lost = time.monotonic(), more or paths.unsure
                    pause = min(2 * pause, LONGEST) if paths.unsure else LOOK
                    ready.set()

    def _heard(self, events: Events, paths: Paths, manager: PathManager) -> bool:
        """Do what some events ask for; whether there may be more."""
        for _ in range(BATCH):
            heard = events.read()
            if not heard:
                return False
            for event in heard:
                if command := paths.hear(event):
                    self._do(manager, command)
        return True

    def _do(self, manager: PathManager, command: Command) -> None:
        try:
            if isinstance(command, Announce):
                with suppress(KernelError):  # it goes without
                    # Otherwise the peer fills the first one with what must then be sent by it.
                    manager.set_backup(command.first)
                manager.announce(command.first.token, command.endpoint)
            else:
                manager.destroy(command.subflow)
        except KernelError as error:  # it has ended meanwhile, or the kernel leads it, as it began before
            if n := self._seldom.due(str(error)):
                log.debug("a connection is not led away", reason=str(error), times=n)
