"""Programs of others that labs, the demo and the benchmarks run, and what brings them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable

from crablb.errors import KernelError

__all__ = ["missing", "remedy", "require"]

#: Where Debian and Ubuntu have them.
PACKAGES = {
    "bash": "bash",
    "callgrind_annotate": "valgrind",
    "curl": "curl",
    "ethtool": "ethtool",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "iperf3": "iperf3",
    "make": "make",
    "mptcpize": "mptcpize",
    "nft": "nftables",
    "nginx": "nginx-light",
    "nsenter": "util-linux",
    "sysctl": "procps",
    "tcpdump": "tcpdump",
    "tshark": "tshark",
    "valgrind": "valgrind",
    "wrk": "wrk",
}


def missing(names: Iterable[str]) -> list[str]:
    """Those of these that are not there, in their order."""
    return [name for name in dict.fromkeys(names) if not shutil.which(name)]


def remedy(names: Collection[str]) -> str:
    """The command that brings them, or what else does."""
    packages = " ".join(sorted({PACKAGES.get(name, name) for name in names}))
    if shutil.which("apt-get"):
        return f"apt-get install {packages}"
    return f"install what Debian calls {packages}, by this system's package manager"


def require(what: str, names: Iterable[str]) -> None:
    """Raises :class:`KernelError` that names all which are not there; ``what``: the command that needs them."""
    if lacking := missing(names):
        verb = "is" if len(lacking) == 1 else "are"
        raise KernelError(f"{what} needs {', '.join(lacking)}, which {verb} not installed: {remedy(lacking)}")
