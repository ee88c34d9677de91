"""What processes have, and what the kernel has in their network namespaces.  Only of those that are named: others'
tests are beside them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from crablb.kernel import pins
from crablb.kernel.bpf.descriptor import open_pin
from crablb.lab import Node
from crablb.lab.lab import REMEMBERED

__all__ = ["of_node", "of_process"]

#: Sockets of a network namespace by kind: where the kernel lists them, and in which column their inode is.
SOCKETS = {"tcp": 9, "tcp6": 9, "udp": 9, "udp6": 9, "raw": 9, "raw6": 9, "unix": 6, "packet": 8, "netlink": 9}
#: Of a BPF object, in /proc/PID/fdinfo.
IDS = re.compile(r"^(map|prog|link)_id:\s*(\d+)", re.MULTILINE)
KINDS = {"map": "maps", "prog": "programs", "link": "links"}

#: What administrators see, and how many of each there are.
SHOWN = """
count() { name=$1; shift; echo "$name $("$@" 2>/dev/null | wc -l)"; }
count links ip -o link
count addresses ip -o addr
count routes ip route show table all
count routes6 ip -6 route show table all
count rules ip rule
count rules6 ip -6 rule
count neighbours ip neigh
count qdiscs tc qdisc
count nftables nft list ruleset
count endpoints ip mptcp endpoint
for link in $(ls /proc/sys/net/ipv4/conf | grep -v -e all -e default); do for way in ingress egress; do
count "filters-$link-$way" tc filter show dev "$link" "$way"; done; done
"""


def _listed(process: str) -> dict[str, str]:
    """The kind of each socket in a process' network namespace, by inode."""
    kinds = {}
    for kind, column in SOCKETS.items():
        with suppress(FileNotFoundError):
            for line in Path(f"/proc/{process}/net/{kind}").read_text().splitlines()[1:]:
                kinds[line.split()[column]] = kind
    return kinds


def _descriptors(pid: int) -> Iterator[tuple[str, str]]:
    """What each is, and what /proc/PID/fdinfo says of it."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            yield os.readlink(f"/proc/{pid}/fd/{fd}"), Path(f"/proc/{pid}/fdinfo/{fd}").read_text()


def of_process(pid: int) -> dict[str, float]:
    found: Counter[str] = Counter()
    sockets, ids = _listed(str(pid)), set()
    for target, info in _descriptors(pid):
        kind, _, rest = target.partition(":")
        if kind == "socket":
            what = f"{sockets.get(rest.strip('[]'), 'other')} socket"
        elif kind == "anon_inode":
            what = rest.strip("[]")
        else:
            what = kind if kind in ("pipe", "net", "mnt") else "file"
        found[f"descriptors, {what}"] += 1
        ids.update(IDS.findall(info))
    for kind, _ in ids:
        found[KINDS[kind]] += 1
    status = dict(line.partition(":")[::2] for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found["threads"] = int(status["Threads"])
    found["children"] = sum(
        len(Path(f"/proc/{pid}/task/{task}/children").read_text().split()) for task in os.listdir(f"/proc/{pid}/task")
    )
    found["mappings"] = Path(f"/proc/{pid}/maps").read_text().count("\n")
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    for name in ("Rss", "Anonymous"):
        size = re.search(rf"^{name}:\s*(\d+)", rollup, re.MULTILINE)
        assert size
        found[f"{name} KiB"] = int(size[1])
    return dict(found)


def _pinned(node: Node) -> dict[str, float]:
    paths = [path for path in node.pins.glob("**/*") if not path.is_dir()]
    found: Counter[str] = Counter({"pins": len(paths)})
    ids = set()
    for path in paths:
        fd = open_pin(path)
        try:
            ids.update(IDS.findall(Path(f"/proc/self/fdinfo/{fd}").read_text()))
        finally:
            os.close(fd)
    for kind, _ in ids:
        found[f"pinned {KINDS[kind]}"] += 1
    return dict(found)


def of_node(node: Node) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in node.run("sh", "-c", SHOWN).stdout.splitlines():
        name, count = line.split()
        found[name] = int(count)
    found |= _pinned(node)
    sockets = Counter(_listed(str(node.processes()[0])).values()) if node.processes() else Counter()
    # Of TCP those that clients have are not among them: they come and go.
    for kind in ("udp", "udp6", "raw", "raw6", "unix", "packet", "netlink"):
        found[f"{kind} sockets"] = sockets[kind]
    found["cgroups"] = sum(1 for path in node.cgroup.rglob("*") if path.is_dir())
    found["processes"] = len(node.processes())
    found["files in /run/crablb"] = sum(1 for _ in pins.RUN.glob(f"*{node.pins.name}-*"))
    found["files in /var/lib/crablb"] = sum(1 for _ in REMEMBERED.glob(f"*netns-{node.netns}-*"))
    return found
