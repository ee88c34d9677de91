"""The peers suite runs, as small as it can; what it measures decides nothing here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import lab, peers
from bench.placement import pollers, tell, two_cpus
from crablb.kernel import bpf
from tests.helpers.bench import quiet, written

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("bpf-stats")]


COSTS = [key for key, *_ in peers.COSTS.values()]
needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="there is one CPU")


@pytest.fixture(scope="module")
def suite():
    allowed = os.sched_getaffinity(0)
    found = peers.run(quiet())
    assert os.sched_getaffinity(0) == allowed
    assert not list(Path("/run/netns").glob(f"crab-bench-peers-{os.getpid()}-*"))
    return found


def test_what_it_writes(suite):
    written(suite)


def test_all_ways_are_measured(suite):
    if len(os.sched_getaffinity(0)) == 1:
        (reason,) = suite.left_out
        assert reason.startswith("the load balancer on a CPU of its own: it takes two CPUs")
        return
    assert suite.left_out == []
    both = {key for key, *_ in peers.TABLES.values()}
    both |= {key.replace("peers-", "peers-apart-") for key in both - {"peers-cpu"}}
    assert {table.key for table in suite.tables} == {*both, *(key for key, *_ in peers.COSTS.values()), "peers-bpf"}
    for table in suite.tables:
        # Of what is as good as nothing there may be none.
        if not table.key.endswith("-packets") and table.key not in ("peers-bpf", *COSTS):
            assert [row.name for row in table.rows] == list(lab.WAYS), table.key
            assert all(min(row.samples) > 0 for row in table.rows), table.key
    for key in COSTS:
        assert [row.name for row in suite.table(key).rows] == list(lab.WAYS), key
    for name, row in ((row.name, row) for row in suite.table("peers-cost-connection").rows):
        assert name in peers.DIRECT or row.median > 0
    assert [target.name for target in suite.targets] == ["P3", "P4", "P6"]


def test_redirected_connections_pass_the_load_balancer_by(suite):
    packets = {row.name: row.median for row in suite.table("peers-packets").rows}
    # A SYN for 16 MiB, as many as that is for a GiB; and ARP.
    assert packets["direct"] == 0
    assert packets["crablb, redirect"] <= 4 * 64
    assert packets["nginx stream"] > 100 * 64
    assert packets["MPTCP, direct"] == 0
    assert packets["crablb, MPTCP"] > 0
    programs = {row.name: row.median for row in suite.table("peers-bpf").rows}
    ours = {f"crablb, redirect: crab_{name}" for name in ("server", "offer", "ingress", "egress", "lb")}
    assert {*ours, "XDP redirect: redirect"} <= programs.keys()
    # Its server has no agent: whatever other servers' agents of this machine do meanwhile is theirs.
    assert "crablb, DSR: crab_server" not in programs
    p6 = suite.targets[-1]
    assert p6.value.startswith("0 packets beside ")


def test_what_is_not_installed_is_left_out(monkeypatch, tmp_path):
    """And the others are measured."""
    there = lab.Context.tool

    def tool(self, name):
        if name == "haproxy":
            raise lab.Unavailable("haproxy is not installed (make bench installs it)")
        return there(self, name)

    monkeypatch.setattr(lab.Context, "tool", tool)
    with lab.Peers(quiet(), tmp_path, ("direct", "HAProxy")) as world:
        assert list(world.ways) == ["direct"]
        assert world.left_out == {"HAProxy": "haproxy is not installed (make bench installs it)"}
        assert world.crr("direct", "--samples", "5")["count"] == 5
        # A way on which nothing gets through.
        world.lab.servers[2].ip("link set eth0 down")
        with pytest.raises(lab.Unavailable, match=r"direct: .* failed"):
            world.crr("direct", "--seconds", "0.2")


def test_programs_are_the_labs_own(tmp_path):
    """Whatever else of the same names is loaded on the machine, and run."""
    with bpf.Object(bpf.object_path("server")) as other, lab.Peers(quiet(), tmp_path, ("crablb, redirect",)) as world:
        own = world.programs()
        assert other.program("crab_server").id not in own
        names = []
        for program in bpf.programs():
            with program:
                names += [program.name] * (program.id in own)
        ours = {f"crab_{name}" for name in ("server", "offer", "ingress", "egress", "lb")}
        assert ours <= set(names)
        assert names.count("crab_server") == 2  # of two servers


def test_programs_speak_mptcp(tmp_path):
    """Where it is MPTCP that is measured, and by TCP they do not."""
    with lab.Peers(quiet(), tmp_path, ("direct", "MPTCP, direct", "crablb, MPTCP")) as world:
        assert world.left_out == {}
        world.big(1 << 20)

        def begun(name: str) -> int:
            counts = lab.mptcp_counts(world.ways[name].client.run("cat", "/proc/net/netstat").stdout)
            assert counts["MPCapableFallbackSYNACK"] == 0
            return counts["MPCapableSYNTX"]

        for name in world.ways:
            for run in (
                lambda name: world.crr(name, "--samples", "2", "--warmup", "0", "--seconds", "20"),
                world.download,
                lambda name: world.wrk(name, "/8", 1, 2, close=False),
            ):
                before = begun(name)
                assert run(name)
                assert (begun(name) > before) == (name != "direct"), name


def test_what_falls_back_to_tcp_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "mptcp_counts", lambda text: {"MPCapableSYNACKRX": 1, "MPCapableFallbackSYNACK": 1})
    with lab.Peers(quiet(), tmp_path, ("MPTCP, direct",)) as world:
        assert world.left_out == {"MPTCP, direct": "connections fell back to TCP"}
        assert world.ways == {}


@needs_two
def test_everything_is_on_its_cpu(tmp_path):
    """By the counts of packets and of softirqs; and what is taken from its CPU is found out."""
    ways = ("direct", "crablb, redirect", "XDP redirect", "nftables DNAT", "HAProxy")
    with two_cpus() as cpus, lab.Peers(quiet(), tmp_path, ways, cpus) as world:
        assert world.left_out == {}
        placed = world.placement

        def load(name: str) -> None:
            world.crr(name, "--samples", "100", "--seconds", "20", "--warmup", "0")

        with placed.accounts() as accounts:
            for name in ways:
                by = world.ways[name].by
                before = accounts.used(by)
                load(name)
                used = accounts.used(by) - before
                assert used.endpoints > 0
                # Who has a program, or a thread that polls, has run there.
                assert name == "direct" or used.balancer > used.program - 1e-6 >= -1e-6
                assert (used.program > 0) == (name in ("crablb, redirect", "HAProxy")), name

        def refused(name: str) -> str:
            with pytest.raises(lab.Unavailable) as reason:
                placed.check(world.ways[name].by, lambda: load(name))
            return str(reason.value)

        nft, xdp = world.ways["nftables DNAT"].by, world.ways["XDP redirect"].by
        tell(nft, "eth0/queues/rx-0/rps_cpus", "0")
        assert "packets of the load balancer were not on CPU" in refused("nftables DNAT")
        (thread,) = pollers(xdp)
        os.sched_setaffinity(thread, {cpus.endpoints})
        assert f"thread {thread} of {xdp.netns} may be on CPU {cpus.endpoints}" in refused("XDP redirect")
        os.sched_setaffinity(thread, {cpus.balancer})
        tell(world.lab.middle, f"{world.lab.lb.name}/queues/rx-0/rps_cpus", "0")
        assert "packets on the bridge were not on CPU" in refused("crablb, redirect")
        for other in ("XDP redirect", "HAProxy", "direct"):
            placed.check(world.ways[other].by, lambda other=other: load(other))
        os.sched_setaffinity(world.ways["HAProxy"].by.processes()[0], {cpus.endpoints, cpus.balancer})
        assert f"may be on CPU {cpus.endpoints}, not {cpus.balancer} alone" in refused("HAProxy")


@needs_two
def test_a_kernel_that_does_not_tell_is_told(monkeypatch, tmp_path):
    """A way that cannot be placed is left out with the reason, and the others are measured."""

    def refuse(node, place, value):
        if node.name == "server5":
            raise lab.Unavailable("the kernel steers nothing")
        tell(node, place, value)

    monkeypatch.setattr("bench.placement.tell", refuse)
    with two_cpus() as cpus, lab.Peers(quiet(), tmp_path, ("direct", "nftables DNAT", "HAProxy"), cpus) as world:
        assert world.left_out == {"nftables DNAT": "the kernel steers nothing"}
        assert list(world.ways) == ["direct", "HAProxy"]
