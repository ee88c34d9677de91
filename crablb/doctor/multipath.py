"""MPTCP on this host: whether its connections would leave a load balancer's way, and what agents have left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crablb.agent import ServerAgent, joining, mptcp
from crablb.doctor.finding import Finding, note


@dataclass(frozen=True, slots=True)
class Mptcp:
    """``hindered``: why connections of this host take up no address that servers tell them, empty: they do; ``left``:
    endpoints that stayed when a server's agent went."""

    hindered: str
    left: tuple[str, ...]


def read() -> Mptcp:
    gone = () if ServerAgent.state() else sorted({str(one.address) for one in mptcp.staying()})
    return Mptcp(joining.hindered(), tuple(gone))


def judge(found: Mptcp, *, client: bool) -> Iterator[Finding]:
    """``client``: the host may be one."""
    if client and found.hindered:
        yield note(
            "mptcp-client",
            f"MPTCP connections of this host stay with the load balancer: {found.hindered}",
            "of a client: servers that lead MPTCP clients away cannot lead this one",
        )
    if found.left:
        yield note(
            "mptcp-left",
            f"MPTCP endpoints stay of a server's agent that has gone: {', '.join(found.left)}",
            "connections had no other way when it went",
            "crablb agent remove server, when these have ended; or start the agent again, which takes them over",
        )
