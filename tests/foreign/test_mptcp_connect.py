"""mptcp_connect, of the kernel's MPTCP selftests, and what mptcp_connect.sh does with it: files both ways at once."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest

from tests.foreign.conftest import LIMIT, ForeignSite, Result, targets
from tests.helpers.processes import until
from tests.stacks.conftest import FETCHED

LINUX = FETCHED / "foreign/linux"
SOURCE = LINUX / "tools/testing/selftests/net/mptcp/mptcp_connect.c"
PORT = 10000
PROTOCOLS = ("MPTCP", "TCP")
#: Its options, on both sides.
HOW = {
    "poll": (),
    "mmap": ("-m", "mmap"),
    "sendfile": ("-m", "sendfile"),
    "saveWithPeek": ("-P", "saveWithPeek"),
    "saveAfterPeek": ("-P", "saveAfterPeek"),
    "small buffers": ("-S", "16384", "-R", "16384"),
    "timestamps": ("-c", "TIMESTAMPNS"),
    "disconnect": ("-I", "3"),  # three times, by one socket of the client
}


@pytest.mark.parametrize("family", [4, 6])
def test_transfers(make_site, way, family, compare):
    site = make_site(PORT, servers=1)
    program = site.folder / "mptcp_connect"
    compiled(SOURCE, program)
    own, vip = targets(site.lab.servers[0])[family]

    def through() -> Result:
        # With MPTCP by IPv6 an offer has no room; that and redirection are in one run here.
        with site.went(only_these=False):
            found = run(site, program, vip)
        return found

    compare(f"mptcp_connect, IPv{family}", way, lambda: run(site, program, own), through)


def compiled(source: Path, program: Path) -> None:
    include = [f"-I{LINUX / folder}" for folder in ("headers", "tools/include")]
    subprocess.run(["gcc", "-O2", "-w", *include, "-o", program, source], check=True)


def run(site: ForeignSite, program: Path, host: str) -> Result:
    found = Result()
    for client, server, how in itertools.product(PROTOCOLS, PROTOCOLS, HOW):
        well = transfer(site, program, host, client, server, HOW[how])
        (found.passed if well else found.failed).add(f"{client} to {server}, {how}")
    return found


def transfer(site: ForeignSite, program: Path, host: str, client: str, server: str, how: tuple[str, ...]) -> bool:
    """Whether both ends end well, and each has the other's file, as often as there were connections."""
    sent, got = ([site.folder / f"{end}.{what}" for end in ("client", "server")] for what in ("sent", "got"))
    for file in sent:
        file.write_bytes(os.urandom(1 << 20) + b"\nMPTCP_TEST_FILE_END_MARKER\n")
    times = int(how[1]) if how[:1] == ("-I",) else 1
    command = [str(program), "-t", "30", "-p", str(PORT), *how]
    node = site.lab.servers[0]
    with open(sent[1]) as source, open(got[1], "w") as sink:
        end = node.popen(
            *command, "-l", "-s", server, *["-i", str(sent[1])] * (times > 1), "::" if ":" in host else "0.0.0.0",
            stdin=source, stdout=sink, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    until(lambda: node.run("ss", "-HltMn", f"sport = :{PORT}").stdout, LIMIT)
    with open(sent[0]) as source, open(got[0], "w") as sink:
        done = site.lab.client.run(
            *command, "-s", client, *["-i", str(sent[0])] * (times > 1), host, check=False, timeout=LIMIT,
            capture_output=False, stdin=source, stdout=sink, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    ended = end.wait(LIMIT)
    arrived = [file.read_bytes() * times for file in sent] == [file.read_bytes() for file in reversed(got)]
    return done.returncode == ended == 0 and arrived
