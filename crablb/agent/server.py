"""The server endpoint: SYN-ACKs echo the redirect of their SYN.  See bpf/server.bpf.c."""

from __future__ import annotations

from typing import Any, ClassVar

import structlog

from crablb.agent.base import Agent
from crablb.kernel import bpf

log = structlog.get_logger()


class ServerAgent(Agent):
    """Let the servers of a cgroup, in this network namespace, answer redirected connections to ``vips``.

    Listeners that are there already are prepared too.
    """

    role: ClassVar[str] = "server"

    def set_up(self, program: bpf.Object) -> None:
        for vip in self.vips:
            program.map("server_vips").update(vip.key(), 1)
            program.map("server_ports").update(vip.port, 1)
        with program.program("crab_server").attach_cgroup_sockops(self.cgroup) as link:
            link.pin(self.folder() / "link")
        self.remember()
        try:
            program.program("crab_arm").run_iterator()
        except bpf.BpfError as error:
            log.warning("servers that listen already must be restarted", reason=str(error))

    @classmethod
    def tear_down(cls, state: dict[str, Any]) -> None:
        pass
