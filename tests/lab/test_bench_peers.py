"""The peers suite runs, as small as it can; what it measures decides nothing here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import lab, peers
from crablb.kernel import bpf
from tests.helpers.bench import quiet, written

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("bpf-stats")]


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
    assert suite.left_out == []
    assert {table.key for table in suite.tables} >= {key for key, *_ in peers.TABLES.values()}
    for table in suite.tables:
        if table.key not in ("peers-packets", "peers-bpf"):
            assert [row.name for row in table.rows] == list(lab.WAYS), table.key
            assert all(min(row.samples) > 0 for row in table.rows), table.key
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
