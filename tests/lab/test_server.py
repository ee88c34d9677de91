"""The server endpoint by itself: which SYNs it answers how, what it leaves to others, and how it is changed."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from crablb.agent import ServerAgent, dsr, reporter
from crablb.agent import server as server_module
from crablb.agent.base import FILTER
from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.kernel.rtnetlink import SOCK_DIAG_BY_FAMILY, Netlink
from crablb.lab import VIP4, VIP6
from crablb.lab.demo import VIPS, crablb, start_agent
from tests.helpers.namespaces import inside
from tests.helpers.processes import answer, exchange, until
from tests.helpers.world import World, agent_status, command

VIP = {4: str(VIP4), 6: str(VIP6)}
OTHER = "tcp://10.0.0.101:81"

OFFER, NOPS = "2a02", "0101"
REDIRECT = {4: "2a06" + VIP4.packed.hex(), 6: "2a12" + VIP6.packed.hex()}
EXPERIMENTAL = "fd084352" + VIP4.packed.hex()
UNKNOWN = "2a060a000063"
MSS = "020405b4"
BPF_CGROUP_SOCK_OPS = 3  # linux/bpf.h
COOKIE = "220a" + "11" * 8


def counters(world: World, server: int = 0) -> dict[str, int]:
    found: dict[str, int] = agent_status(world.lab.servers[server])["server"]["counters"]
    return found


def asking(world: World, family: int) -> Callable[[str, str], list[str | None]]:
    """Sends SYNs to the first server; see ``syn_acks`` of tests/helpers/peers.py."""
    server, client = world.lab.servers[0], world.lab.client
    pair = (client.ip4, server.ip4) if family == 4 else (client.ip6, server.ip6)
    child = world.python(client, "syn_acks", *map(str, pair), server.mac(), ready=True)
    return lambda options, data="": json.loads(exchange(child, f"{options},{data}"))


@pytest.mark.parametrize("cookies", [1, 2], ids=["", "syn-cookies"])
@pytest.mark.parametrize("family", [4, 6])
def test_the_whole_list_is_searched(make_world, family, cookies):
    world = make_world()
    world.lab.servers[0].set({"net.ipv4.tcp_syncookies": cookies})
    world.servers()
    ask = asking(world, family)
    redirect = REDIRECT[family]
    echoed = [
        redirect + NOPS,
        OFFER + NOPS + redirect,  # appended
        MSS + NOPS + OFFER + redirect + NOPS,
        NOPS + redirect,
        "0101010101" + redirect,
        "2a05000000" + redirect,  # another kind 42
        redirect + UNKNOWN if family == 4 else redirect + OFFER,
        redirect + "2202",  # a cookie is asked for, and nothing sent: nothing can be executed twice
    ]
    for options in echoed:
        (told, plain) = ask(options)
        assert redirect in told, options
        assert redirect not in plain
    left_alone = [
        OFFER + NOPS,
        MSS + "00" + redirect,  # behind the end
        "2a00" + redirect,
        "2a01" + redirect,
        "ff" + f"{2 + len(redirect) // 2:02x}" + redirect,  # within another option
        redirect[:8],  # cut short
        UNKNOWN + redirect,  # the first counts
        redirect + COOKIE if family == 4 else COOKIE + redirect,
    ]
    for options in left_alone:
        (told, plain) = ask(options)
        # Newer kernels drop a SYN whose list is malformed.
        assert told is None or redirect not in told, options
    told, _ = ask(redirect, b"GET /".hex())
    assert told is not None and redirect not in told
    if family == 4:
        assert EXPERIMENTAL in ask(OFFER + NOPS + EXPERIMENTAL)[0]
    found = counters(world)
    assert found["fast_open"] == 2
    assert found["unknown_vip"] == 1


def test_a_repeated_syn_ack_has_it_too(make_world):
    """The SYN is no more then; what was saved of it is walked."""
    world = make_world()
    world.servers()
    world.lab.client.run(
        "nft",
        "add table inet t; add chain inet t out { type filter hook output priority 0; };"
        " add rule inet t out tcp flags & rst == rst drop",
    )
    ask = asking(world, 4)
    assert REDIRECT[4] in ask(OFFER + NOPS + REDIRECT[4])[0]
    until(lambda: counters(world)["echoed"] >= 2, 20)


def test_behind_a_load_balancer_that_appends(make_world):
    world = make_world()
    world.servers()
    world.client()
    server = world.lab.servers[0]
    world.always_redirect()
    seen = world.echo(VIP4)
    assert seen["intact"]
    assert seen["accepted_on"] == server.ip4
    assert world.client_counters() | {"redirected": 1, "offered": 1} == world.client_counters()


# ---- Fast Open ----

#: Servers: without cookies, for all listeners.  Clients: without cookies.
WITHOUT_COOKIES = {"server": 0x2 | 0x200, "client": 1 | 4}


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "unprepared"])
def test_data_of_a_redirected_syn_is_not_executed(make_world, prepared):
    """A load balancer redirects it all the same.  The client cannot take that up, and sends its data again."""
    world = make_world()
    server, client = world.lab.servers[0], world.lab.client
    server.set({"net.ipv4.tcp_fastopen": WITHOUT_COOKIES["server"]})
    client.set({"net.ipv4.tcp_fastopen": WITHOUT_COOKIES["client"]})
    app = world.python(server, "fast_open_server", "80", ready=True)
    start_agent(server, "server")
    # Fast Open works here: a SYN that is not redirected is executed.
    direct = world.python(client, "fast_open", server.ip4, "80", "direct")
    assert (answer(app), answer(direct)) == ("direct", "direct")
    assert "TcpExtTCPFastOpenPassive" in server.run("nstat", "-as").stdout
    if prepared:
        world.client()
    world.always_redirect()
    asked = world.python(client, "fast_open", VIP[4], "80", "asked")
    until(lambda: counters(world)["fast_open"] == 1)
    until(lambda: counters(world)["echoed"] >= 1, 20)  # its second SYN, which is a plain one
    # A connection made now is executed behind all that was sent before.
    direct = world.python(client, "fast_open", server.ip4, "80", "end")
    assert answer(direct) == "end"
    told = [answer(app)]
    while told[-1] != "end":
        told.append(answer(app))
    assert told.count("asked") <= (asked.poll() is not None)
    assert counters(world)["fast_open"] == 1


# ---- others' sock_ops programs ----

NEIGHBOUR = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 4); __type(key, __u32); __type(value, __u64); }
    seen SEC(".maps");
static void count(__u32 what)
{
    __u64 *n = bpf_map_lookup_elem(&seen, &what);
    if (n)
        __sync_fetch_and_add(n, 1);
}
SEC("sockops") int neighbour(struct bpf_sock_ops *c)
{
    if (c->local_port != 80)
        return 1;
    if (c->op == BPF_SOCK_OPS_TCP_LISTEN_CB)
        bpf_sock_ops_cb_flags_set(c, c->bpf_sock_ops_cb_flags | WANTED);
    else if (c->op == BPF_SOCK_OPS_STATE_CB)
        count(c->args[0] == BPF_TCP_LISTEN);
    else if (c->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB && !(c->skb_tcp_flags & 2))
        count(2);
    return 1;
}
char LICENSE[] SEC("license") = "GPL";
"""
STATE, WRITE = "BPF_SOCK_OPS_STATE_CB_FLAG", "BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG"


def neighbour(folder: Path, wanted: str) -> bpf.Object:
    multiarch = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    (folder / "n.c").write_text(NEIGHBOUR)
    flags = ["-target", "bpf", "-O2", "-g", "-mcpu=v3", f"-I/usr/include/{multiarch}", f"-DWANTED=({wanted})"]
    subprocess.run(["clang", *flags, "-c", folder / "n.c", "-o", folder / "n.o"], check=True)
    return bpf.Object(folder / "n.o")


@pytest.mark.parametrize("older", [True, False], ids=["listener-first", "agent-first"])
@pytest.mark.parametrize("wanted", [STATE, f"{STATE} | {WRITE}"], ids=["states", "options"])
def test_what_others_asked_for_stays(make_world, tmp_path, wanted, older):
    """Another program's flags, on a listener and on its connections; and none of ours where it asked for none."""
    world = make_world()
    server = world.lab.servers[0]
    with (
        neighbour(tmp_path, wanted) as program,
        program.program("neighbour").attach_cgroup_sockops(server.cgroup),
    ):

        def seen() -> list[int]:
            return [int.from_bytes(program.map("seen").lookup(i) or b"", "little") for i in range(3)]

        if older:
            world.servers(agents=False)
            before = seen()
            assert world.echo(server.ip4)["intact"]
            until(lambda: seen()[0] > before[0])
            start_agent(server, "server")
        else:
            start_agent(server, "server")
            world.servers(agents=False)
        before = seen()
        assert world.echo(server.ip4)["intact"]
        until(lambda: seen()[0] > before[0])
        # Every packet of a connection asks, as long as the flag is set.
        assert (seen()[2] > before[2]) == (WRITE in wanted)
        assert REDIRECT[4] in asking(world, 4)(REDIRECT[4])[0]
        server.run(*crablb("agent", "remove", "server"), check=False)
        for pid in server.processes():
            if "tests.helpers.peers" in server.run("cat", f"/proc/{pid}/cmdline", check=False).stdout:
                server.run("kill", "-9", str(pid))
        until(lambda: seen()[1] == 1)  # the listener's end was heard


def test_listeners_are_left_as_they_were(make_world, tmp_path):
    """Removed, and installed again: the flag that others would see is ours, and goes."""
    world = make_world()
    server = world.lab.servers[0]
    install = crablb("agent", "server", "--vip", VIPS[0], "--cgroup", str(server.cgroup), "--detach")
    world.servers(agents=False)
    server.run(*install)
    server.run(*crablb("agent", "remove"))
    with neighbour(tmp_path, "0") as program, program.program("neighbour").attach_cgroup_sockops(server.cgroup):

        def asked() -> int:
            return int.from_bytes(program.map("seen").lookup(2) or b"", "little")

        assert world.echo(server.ip4)["intact"]
        assert asked() == 0
        for _ in range(2):
            server.run(*install)
            assert world.echo(server.ip4)["intact"]
            assert asked() == 0
            assert REDIRECT[4] in asking(world, 4)(REDIRECT[4])[0]


# ---- what stands in its way ----


def test_a_program_that_tolerates_no_other(make_world, tmp_path):
    world = make_world()
    server = world.lab.servers[0]
    install = crablb("agent", "server", "--vip", VIPS[0], "--cgroup", str(server.cgroup), "--detach")
    with neighbour(tmp_path, STATE) as program:
        fd = os.open(server.cgroup, os.O_RDONLY)
        libbpf = ctypes.CDLL("libbpf.so.1")
        assert libbpf.bpf_prog_attach(program.program("neighbour").fd, fd, BPF_CGROUP_SOCK_OPS, 0) == 0
        try:
            done = server.run(*install, check=False)
        finally:
            libbpf.bpf_prog_detach2(program.program("neighbour").fd, fd, BPF_CGROUP_SOCK_OPS)
            os.close(fd)
    assert done.returncode == 2
    assert re.search(
        rf"program neighbour \(id \d+\) is attached to {server.cgroup} without BPF_F_ALLOW_MULTI", done.stderr
    )
    assert "root" not in done.stderr
    assert agent_status(server) == {}
    server.run(*install)


def test_a_kernel_without_btf(make_world, tmp_path):
    """It works, without its iterator: who listens already is told to be restarted."""
    world = make_world()
    server = world.lab.servers[0]
    (tmp_path / "empty").mkdir()
    hidden = ["unshare", "--mount", "sh", "-ec", f'mount --bind {tmp_path}/empty /sys/kernel/btf; exec "$@"', "sh"]
    done = server.run(*hidden, *crablb("agent", "server", "--vip", VIPS[0], "--cgroup", str(server.cgroup), "--detach"))
    assert "servers that listen already must be restarted" in done.stderr
    assert "BTF" in done.stderr
    world.servers(agents=False)
    assert REDIRECT[4] in asking(world, 4)(OFFER + NOPS + REDIRECT[4])[0]
    done = server.run(*hidden, *crablb("agent", "server", "add", OTHER))
    assert '"ports": [81]' in done.stderr


# ---- its VIPs ----


@pytest.mark.long
def test_vips_are_added_and_removed_in_place(make_world):
    world = make_world()
    server = world.lab.servers[0]
    world.servers(dsr=True)
    world.python(server, "serve", "other", "81", ready=True)  # it listens before its VIP is told
    pid = agent_status(server)["server"]["pid"]

    def change(*args: str, rc: int = 0) -> str:
        done = server.run(*crablb("agent", "server", *args), check=False)
        assert done.returncode == rc, done.stderr
        return str(done.stdout + done.stderr)

    def addresses() -> str:
        return str(server.run("ip", "addr", "show", "dev", "lo").stdout)

    world.serve(what=[f"tcp://{VIP4}:80={server.ip4}", f"{OTHER}={server.ip4}"])
    world.lab.client.ip(f"route add 10.0.0.101/32 via {world.lab.lb.ip4}")
    held = world.python(world.lab.client, "hold_many", VIP[4], "80", "3", ready=True)
    assert change("add", OTHER, VIPS[0]) == f"{OTHER}: added\n{VIPS[0]}: was served already\n"
    assert "10.0.0.101/32" in addresses()
    assert agent_status(server)["server"]["vips"] == [*VIPS, OTHER]
    assert agent_status(server)["server"]["pid"] == pid
    world.client("--vip", OTHER)
    assert world.echo("10.0.0.101", port=81)["accepted_on"] == server.ip4
    assert exchange(held, "one") == "3"
    # Its address goes with a VIP, and what is connected to it.
    assert "3 connections of clients that were not redirected would end" in change("remove", VIPS[0], rc=2)
    assert exchange(held, "two") == "3"
    assert "not served; served are" in change("remove", "tcp://10.0.0.102:80", rc=2)
    assert "crablb agent remove server" in change("remove", OTHER, *VIPS, rc=2)
    assert change("remove", OTHER) == f"{OTHER}: removed\n"
    assert "10.0.0.101/32" not in addresses()
    assert exchange(held, "three") == "3"
    assert agent_status(server)["server"]["vips"] == list(VIPS)
    assert change("remove", "--now", VIPS[0]) == f"{VIPS[0]}: removed\n"
    assert "10.0.0.100/32" not in addresses()
    told, plain = asking(world, 4)(REDIRECT[4])
    assert told == plain  # it is not known any more
    assert change("add", VIPS[0])
    assert REDIRECT[4] in asking(world, 4)(REDIRECT[4])[0]


@pytest.mark.long
def test_another_set_replaces_only_if_asked(make_world):
    world = make_world()
    server = world.lab.servers[0]
    cgroup = ["--cgroup", str(server.cgroup)]

    def install(*args: str, rc: int = 0) -> str:
        done = server.run(*crablb("agent", "server", *args, "--detach"), check=False)
        assert done.returncode == rc, done.stderr
        return str(done.stderr)

    none = server.run(*crablb("agent", "server", "add", OTHER), check=False)
    assert (none.returncode, "install one: crablb agent server --vip" in none.stderr) == (2, True)
    assert install("--vip", VIPS[0], *cgroup) == ""
    assert install("--vip", VIPS[0], *cgroup) == ""  # the same: nothing to ask
    said = install("--vip", OTHER, *cgroup, rc=2)
    assert f"{VIPS[0]} would not be served any more" in said
    assert f"{OTHER} would be new" in said
    assert "--replace" in said
    assert "--dsr" in install("--vip", VIPS[0], *cgroup, "--dsr", rc=2)
    assert agent_status(server, 1)["server"]["vips"] == [VIPS[0]]
    assert "replaced the agent that was there" in install("--vip", OTHER, *cgroup, "--replace")
    assert agent_status(server, 1)["server"]["vips"] == [OTHER]
    dsr = ("--vip", OTHER, *cgroup, "--dsr")
    install(*dsr, "--tunnels-from", "192.0.2.7/32", "--tunnels-from", "fd00::/64", "--replace")
    told = "it was installed with --tunnels-from 192.0.2.7/32 --tunnels-from fd00::/64"
    assert told in install(*dsr, rc=2)
    assert agent_status(server, 1)["server"]["dsr"]["sources"] == ["192.0.2.7/32", "fd00::/64"]
    install(*dsr, "--replace")
    assert "it was installed without --tunnels-from" in install(*dsr, "--tunnels-from", "192.0.2.7/32", rc=2)
    assert "of use with --dsr only" in install("--vip", OTHER, *cgroup, "--tunnels-from", "192.0.2.7/32", rc=2)


def test_a_cgroup_that_is_made_anew(make_world: Callable[..., World]):
    """As a service's is whose manager starts it again: its agent goes there, too."""
    world = make_world(servers=1)
    (server,) = world.lab.servers
    service = server.cgroup / "service"

    @contextmanager
    def served() -> Iterator[None]:
        service.mkdir()
        enter = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(service))
        try:
            child = world.program(
                server, *enter, sys.executable, "-m", "tests.helpers.peers", "serve", server.name, "80"
            )
            assert answer(child) == "ready"
            yield
        finally:
            for pid in (service / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            until(lambda: not (service / "cgroup.procs").read_text())
            service.rmdir()

    with served():
        agent = start_agent(server, "server", "--cgroup", str(service))
        world.client()
        world.serve()
        assert world.echo(VIP4, "10")["accepted_on"] == server.ip4
    for _ in range(2):
        assert "not attached" in command(server, "agent", "status", expected=1)
        with served():
            until(lambda: not agent_status(server, None)["server"]["faults"])
            assert world.echo(VIP4, "10")["accepted_on"] == server.ip4
    agent.terminate()
    assert agent.wait(60) == 0


def test_agents_of_namespaces_that_share_a_cgroup(make_world: Callable[..., World]):
    """Each knows the connections of its own network namespace, though its program hears of all."""
    world = make_world(servers=2)
    for server in world.lab.servers:
        world.python(server, "serve", server.name, "80", ready=True)
        start_agent(server, "server", "--cgroup", str(server.cgroup.parent))
    world.client()
    world.serve()
    for family in (4, 6):
        seen = world.echoes(VIP[family], 8)
        assert {one["server"] for one in seen} == {server.name for server in world.lab.servers}
    assert sum(counters(world, i)["echoed"] for i in range(2)) == 16
    assert world.client_counters()["redirected"] == 16
    for i in range(2):
        told = counters(world, i)
        assert (told["no_room"], told["unknown_vip"]) == (0, 0)


def test_a_kernel_that_lists_no_sockets(make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch):
    """It has no tcp_diag: what is not known is said, and the rest of the status is there."""
    world = make_world()
    world.servers()
    client, (server,) = world.lab.client, world.lab.servers
    agent = world.client()
    dump = Netlink.dump

    def refuse(self: Netlink, kind: int, body: bytes) -> object:
        if kind == SOCK_DIAG_BY_FAMILY:
            raise FileNotFoundError(2, "No such file or directory")
        return dump(self, kind, body)

    monkeypatch.setattr(Netlink, "dump", refuse)
    why = "the kernel lists no TCP sockets (sock_diag); load its module: modprobe tcp_diag"
    now = agent_status(server, 1)["server"]
    assert now["faults"] == [why]
    assert now["counters"] and set(now["connections"]) == set(VIPS)
    assert "listening" not in now
    assert why in command(server, "agent", "status", expected=1)
    assert agent_status(client)["client"]["counters"]
    agent.kill()
    agent.wait()
    assert command(client, "agent", "remove", "client", expected=2) == ""  # how long would it wait?
    assert command(client, "agent", "remove", "client", "--now") == "client: removed\n"
    with pytest.raises(KernelError, match="modprobe"):
        reporter.queues()


def test_one_that_follows_another_serves_all_the_while(make_world, monkeypatch):
    """What the one before has put into the kernel is exchanged there: at no step is a client redirected no more, or is
    the VIP gone, or what takes its packets out of tunnels."""
    world = make_world()
    (server,) = world.lab.servers
    world.servers(agents=False)
    server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
    world.client()
    world.serve()
    vips = [word for vip in VIPS for word in ("--vip", vip)]
    install = ("agent", "server", *vips, "--cgroup", str(server.cgroup), "--dsr", "--detach")

    def there() -> tuple[str, int, int]:
        with inside(server.netns):
            index = socket.if_nametoindex("eth0")
            clamp = bpf.TcFilter(index, "egress", FILTER, FILTER).attached
            return server.run("ip", "-o", "addr", "show", "dev", "lo").stdout, bpf.xdp_program(index)[0], clamp

    seen = []

    def look(step: Callable[..., object], *args: object, **more: object) -> object:
        seen.append((there(), world.echo(VIP4, "10")["accepted_on"]))
        return step(*args, **more)

    command(server, *install)
    before = there()
    assert str(VIP4) in before[0] and str(VIP6) in before[0] and all(before[1:])
    for where, name in ((dsr, "set_up"), (dsr, "sync"), (ServerAgent, "attach"), (server_module, "_arm")):
        monkeypatch.setattr(where, name, partial(look, getattr(where, name)))
    command(server, *install)
    monkeypatch.undo()
    assert [at for _, at in seen] == [server.ip4] * 4
    assert seen[0][0] == before
    assert all(vips == before[0] and decap and clamp for (vips, decap, clamp), _ in seen)
    after = there()
    assert after[0] == before[0] and all(after[1:])
    assert before[1] != after[1] and before[2] != after[2]
    assert world.echo(VIP4, "10")["accepted_on"] == server.ip4
    # One without the VIPs, and one without tunnels, leave nothing of that.
    command(
        server, "agent", "server", "--vip", VIPS[0], "--cgroup", str(server.cgroup), "--dsr", "--detach", "--replace"
    )
    assert str(VIP4) in there()[0] and str(VIP6) not in there()[0]
    command(server, "agent", "server", "--vip", VIPS[0], "--cgroup", str(server.cgroup), "--detach", "--replace")
    assert str(VIP4) not in there()[0] and there()[1:] == (0, 0)
