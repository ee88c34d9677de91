"""A client's side of Multipath TCP: whether its connections take up the address that a server tells them.

Source: Documentation/networking/mptcp-sysctl.rst; ip-mptcp(8); RFC 8684, 3.4.1.
"""

from __future__ import annotations

from contextlib import suppress

from crablb.agent import limits
from crablb.agent.limits import short
from crablb.errors import KernelError
from crablb.kernel import mptcp
from crablb.kernel.mptcp import Flag, Limits, PathManager, Unsupported

ROLE = "client"
#: A connection takes up an address of the server's, and opens a subflow to it.
LEAST = Limits(add_addr_accepted=1, subflows=1)
#: What the kernel begins with is not lowered; and there is room for a second way of the client's own.
ROOM = Limits(add_addr_accepted=1, subflows=2)


def _words(now: Limits) -> str:
    return f"add_addr_accepted {now.add_addr_accepted} subflows {now.subflows}"


def _led_by_others() -> list[str]:
    """The kernel's limits are for connections that the kernel leads."""
    with suppress(Unsupported):
        name, kernel, _ = mptcp.manager_sysctl()
        if (now := mptcp.sysctl(name).read_text().strip()) != kernel:
            return [
                f"MPTCP connections are led by another program (net.mptcp.{name} is {now}; mptcpd?), which decides"
                f" whether they take up a server's address; to let the kernel: sysctl -w net.mptcp.{name}={kernel}"
            ]
    return []


def problems() -> list[str]:
    """Why connections of this network namespace cannot be prepared; empty if they can."""
    try:
        mptcp.require()
        with PathManager() as manager:
            manager.limits()
    except KernelError as error:
        return [f"--mptcp: {error}"]
    return []


def hindered() -> str:
    """Why MPTCP connections of this network namespace do not take up a server's address; nothing if they do."""
    try:
        mptcp.require()
        if others := _led_by_others():
            return others[0]
        with PathManager() as manager:
            now, own = manager.limits(), manager.endpoints()
    except KernelError as error:
        return str(error)
    # With the C flag, newer kernels take it up for these endpoints whatever the limit (4b1ff850e0c1, Linux 6.18).
    if not short(now, LEAST) or (now.subflows and any(Flag.FULLMESH in one.flags for one in own)):
        return ""
    return f"the kernel's limits let them take up none ({_words(now)}); let them: crablb agent client --mptcp"


def sync(*, mend: bool) -> list[str]:
    """What is not as it is to be; ``mend``: make it so, where it is not another program's, until :func:`tear_down`.
    Never lowers a limit.

    Raises :class:`KernelError`.
    """
    mptcp.require()
    found = _led_by_others()
    with PathManager() as manager:
        now = manager.limits()
    if short(now, ROOM):
        found.append(f"MPTCP connections may not take up a server's address: limits are {_words(now)}")
    if mend:
        limits.ask(ROLE, ROOM)
    return found


def tear_down() -> None:
    """Put the limits back, but for those that somebody has changed since, and as far as nobody else needs them."""
    with suppress(KernelError):
        limits.release(ROLE)
