"""The server endpoint: SYN-ACKs echo the redirect of their SYN.  See bpf/server.bpf.c."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import structlog

from crablb.agent import dsr
from crablb.agent.base import Agent
from crablb.kernel import bpf
from crablb.model import Vip

log = structlog.get_logger()


def open_connections(counts: bpf.Map) -> dict[Vip, int]:
    """What map ``server_connections`` says."""
    found = {}
    for key, value in counts.items():
        opened, closed = struct.unpack("=QQ", value)
        found[Vip.from_key(key)] = opened - closed
    return found


class ServerAgent(Agent):
    """Let the servers of a cgroup, in this network namespace, answer redirected connections to ``vips``.

    Listeners that are there already are prepared too.  With ``dsr`` the namespace also serves clients that are not
    redirected: it gets the VIPs, silently, and takes packets for them out of tunnels that come in on ``interfaces`` (by
    default every Ethernet interface that is up).
    """

    role: ClassVar[str] = "server"
    #: Sockets of the agent before are counted on.
    lasting: ClassVar[Sequence[str]] = ("server_connections", "server_counted")

    def __init__(
        self,
        vips: Sequence[Vip],
        cgroup: Path | str | None = None,
        *,
        dsr: bool = False,
        interfaces: Sequence[str] = (),
    ) -> None:
        super().__init__(vips, cgroup)
        self.dsr = dsr
        self.interfaces = list(interfaces)

    def set_up(self, program: bpf.Object) -> None:
        self.remember()
        for vip in self.vips:
            program.map("server_vips").update(vip.key(), 1)
            program.map("server_ports").update(vip.port, 1)
            if program.map("server_connections").lookup(vip.key()) is None:
                program.map("server_connections").update(vip.key(), bytes(16))
        if self.dsr:
            dsr.set_up(self.vips, self.interfaces, self.folder(), lambda state: self.remember(dsr=state))
        self.attach(program.program("crab_server"), self.cgroup)
        try:
            refused = program.program("crab_arm").run_iterator()
            ports = sorted({port for (port,) in struct.iter_unpack("=I", refused)})
            reason = "the kernel is older than 6.12"
        except bpf.BpfError as error:
            ports, reason = sorted({vip.port for vip in self.vips}), str(error)
        if ports:
            log.warning("servers that listen already must be restarted", ports=ports, reason=reason)

    @classmethod
    def tear_down(cls, state: dict[str, Any]) -> None:
        if "dsr" in state:
            dsr.tear_down(state["dsr"], cls.folder())

    @classmethod
    def connections(cls) -> dict[Vip, int]:
        """Open connections by VIP, those established while an agent was there.

        Raises :class:`crablb.kernel.bpf.BpfNotFoundError` if there is no agent.
        """
        with bpf.Map.from_pin(cls.folder() / "server_connections") as counts:
            return open_connections(counts)

    @classmethod
    def status(cls) -> dict[str, Any] | None:
        status = super().status()
        if status:
            status["connections"] = {str(vip): n for vip, n in cls.connections().items()}
        return status

    @classmethod
    def counters(cls) -> dict[str, int]:
        more = dsr.counters(cls.folder()) if "dsr" in (cls.state() or {}) else {}
        return super().counters() | more
