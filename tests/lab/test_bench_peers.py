"""The load generator, and the peers suite, which runs as small as it can; what it measures decides nothing here."""

from __future__ import annotations

import json
import math
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import lab, machine, peers
from bench.context import Context
from bench.figures import Results, Row, Table
from tests.conftest import ROOT


def quiet() -> Context:
    return Context("tiny", say=lambda _: None)


@pytest.fixture(scope="module")
def crr():
    return str(quiet().make("crr"))


# ---- the generator ----


@settings(max_examples=60)
@given(st.lists(st.integers(0, 10**11), min_size=1, max_size=300))
def test_percentiles(crr, values):
    """As NumPy has them, to half a step of the histogram."""
    done = subprocess.run(
        [crr, "percentiles"], input=" ".join(map(str, values)), capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["count"] == len(values)
    for key, q in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
        exact = float(np.quantile(values, q, method="inverted_cdf"))
        assert math.isclose(found[key] * 1e3, exact, rel_tol=1 / 512, abs_tol=1), key
    assert math.isclose(found["max"] * 1e3, max(values), abs_tol=1)
    assert math.isclose(found["mean"] * 1e3, np.mean(values), rel_tol=1e-6, abs_tol=1)


@contextmanager
def serving(crr, port, *more):
    child = subprocess.Popen([crr, "serve", str(port), *more], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        yield
    finally:
        child.terminate()
        child.communicate()


def load(crr, port, *more):
    done = subprocess.run([crr, "load", "127.0.0.1", str(port), *more], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("mode", "connections", "size"), [("crr", 1, 8), ("crr", 5, 20000), ("rr", 1, 8), ("rr", 4, 100000)]
)
def test_requests_are_answered(crr, namespace, mode, connections, size):
    with serving(crr, 7):
        options = ["--mode", mode, "--connections", str(connections), "--bytes", str(size), "--samples", "200"]
        found = load(crr, 7, *options, "--warmup", "0", "--seconds", "30")
    assert (found["count"], found["errors"]) == (200, 0)
    assert found["bytes"] == 200 * 2 * size
    assert 0 < found["p50"] <= found["p99"] <= found["p999"] <= found["max"] * 1.004
    assert math.isclose(found["rate"], 200 / found["seconds"], rel_tol=0.01)


def test_a_time_begins_when_the_request_was_due(crr, namespace):
    """An overloaded server's line is in the times: in the open loop nobody waits politely."""
    with serving(crr, 7, "--service", "20000"):
        found = load(crr, 7, "--rate", "200", "--seconds", "0.5", "--warmup", "0")
    assert found["errors"] == 0
    # Some hundred come within half a second, and take two seconds, one after the other.
    assert 60 <= found["count"] <= 140
    assert found["max"] >= (found["count"] * 20e3 - 500e3) * 0.99
    assert found["p50"] >= 20e3


def test_a_service_time_is_kept(crr, namespace):
    with serving(crr, 7, "--service", "3000"):
        found = load(crr, 7, "--samples", "20", "--seconds", "30", "--warmup", "0")
    assert found["p50"] >= 3000


def test_nobody_listens(crr, namespace):
    found = load(crr, 7, "--seconds", "0.3", "--warmup", "0")
    assert found["count"] == 0
    assert found["errors"] >= 2  # it tries again


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage: load, serve or percentiles"),
        (["load", "127.0.0.1"], "load: HOST and PORT were expected"),
        (["load", "name", "7"], "name: "),
        (["load", "127.0.0.1", "7", "--seconds"], "--seconds: a number from 0.01 to 600 was expected"),
        (["load", "127.0.0.1", "7", "--rate", "fast"], "--rate: a number from 0.1 to 1e+06 was expected"),
        (["load", "127.0.0.1", "7", "--mode", "udp"], "--mode: no such option"),
        (["load", "127.0.0.1", "7", "--mode", "rr", "--rate", "5"], "--rate: it is for connections that do not stay"),
        (["load", "127.0.0.1", "7", "--get", "/", "--mode", "rr"], "--get: it is for connections that do not stay"),
        (["serve", "7", "--service", "-1"], "--service: a number from 1 to"),
        (["serve", "port"], "port: "),
    ],
)  # fmt: skip
def test_bad_arguments(crr, namespace, arguments, says):
    done = subprocess.run([crr, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"crr: {says}")
    assert done.stdout.replace("ready\n", "") == ""


# ---- the suite ----


@pytest.fixture(scope="module")
def suite():
    if os.geteuid() != 0:
        pytest.skip("network namespaces and BPF need root")
    allowed = os.sched_getaffinity(0)
    found = peers.run(quiet())
    assert os.sched_getaffinity(0) == allowed
    assert not list(Path("/run/netns").glob(f"crab-bench-peers-{os.getpid()}-*"))
    return found


def test_what_it_writes(suite):
    data = Results("tiny", machine.describe(), [suite]).json()
    jsonschema.validate(data, json.loads((ROOT / "bench/schema.json").read_text()))


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
    programs = {row.name: row.median for row in suite.table("peers-bpf").rows}
    ours = {f"crablb, redirect: crab_{name}" for name in ("server", "offer", "ingress", "egress", "lb")}
    assert {*ours, "XDP redirect: redirect"} <= programs.keys()
    assert "crablb, DSR: crab_server" not in programs
    p6 = suite.targets[-1]
    assert p6.value.startswith("0 packets beside ")


def row(*samples: float) -> Row:
    return Row("", list(samples))


def found(ours: float, p99: float, setup: float) -> dict[str, dict[str, Row]]:
    same = {"direct": row(10.0, 10.0, 10.0)}
    return {
        "connections": {**same, "crablb, redirect": row(ours, ours, ours), "nginx stream": row(5.0, 6.0, 5.0),
                        "XDP redirect": row(9.0, 9.0, 9.0)},
        "cpu": {**same, "crablb, redirect": row(14.0, 14.0, 14.0), "XDP redirect": row(11.0, 11.0, 11.0)},
        "rr p50": {**same, "crablb, redirect": row(10.1, 10.1, 10.1)},
        "rr p99": {**same, "crablb, redirect": row(p99, p99, p99)},
        "setup p50": {**same, "crablb, redirect": row(setup, setup, setup), "crablb, DSR": row(20.0, 20.0, 20.0)},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "p99", "setup", "reached"),
    [(9.6, 10.2, 14.0, [True, True]), (9.4, 10.4, 14.0, [False, False]), (9.6, 10.2, 16.0, [True, False])],
)
def test_targets(ours, p99, setup, reached):
    programs = Table(
        "peers-bpf", "", "us", [Row("crablb, redirect: crab_server", [2.0]), Row("XDP redirect: x", [9.0])]
    )
    targets = peers.targets(found(ours, p99, setup), programs)
    assert [target.reached for target in targets] == reached
    assert all(bool(target.why) != target.reached for target in targets)


def test_what_is_not_installed_is_left_out(monkeypatch, tmp_path):
    """And the others are measured."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces and BPF need root")
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
