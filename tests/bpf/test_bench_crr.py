"""The load generator."""

from __future__ import annotations

import json
import math
import socket
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.lab import counts, mptcp_counts
from tests.helpers.bench import quiet

pytestmark = pytest.mark.xdist_group("bench-crr")


@pytest.fixture(scope="module")
def crr():
    return str(quiet().make("crr"))


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


@pytest.mark.parametrize("asks", [["--mptcp"], []], ids=["MPTCP", "TCP"])
def test_mptcp(crr, namespace, asks):
    """By MPTCP, and not by TCP in its place; an MPTCP socket serves TCP's clients too."""
    with serving(crr, 7, "--mptcp"):
        found = load(crr, 7, "--samples", "20", "--seconds", "30", "--warmup", "0", *asks, "--bytes", "20000")
        counts = mptcp_counts(Path("/proc/thread-self/net/netstat").read_text())
    assert (found["count"], found["errors"]) == (20, 0)
    # A SYN that was sent again is counted again.
    assert counts["MPCapableSYNRX"] >= counts["MPCapableACKRX"]
    assert (counts["MPCapableSYNRX"] > 0, counts["MPCapableACKRX"] >= 20) == (bool(asks), bool(asks))
    assert counts["MPCapableFallbackACK"] == 0


def test_nobody_listens(crr, namespace):
    found = load(crr, 7, "--seconds", "0.3", "--warmup", "0")
    assert found["count"] == 0
    assert found["errors"] >= 2  # it tries again
    assert found["why"] == {"Connection refused": found["errors"]}


@pytest.mark.parametrize(("first", "hosts"), [("127.0.0.5", {5, 6, 7}), ("127.0.0.255", {255, 256, 257})])
def test_from_addresses_by_turns(crr, namespace, first, hosts):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        port = str(listening.getsockname()[1])
        options = ["--from", first, "--addresses", "3", "--rate", "100", "--seconds", "0.3", "--warmup", "0"]
        child = subprocess.Popen([crr, "load", "127.0.0.1", port, *options], stdout=subprocess.PIPE)
        seen = {int(ip_address(listening.accept()[1][0])) - int(ip_address("127.0.0.0")) for _ in range(6)}
        child.kill()
        child.communicate()
    assert seen == hosts


def test_it_says_why_requests_fail(crr, namespace):
    """In the open loop, each for itself."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor() as pool:
        port = listening.getsockname()[1]
        running = pool.submit(load, crr, port, "--rate", "50", "--seconds", "0.5", "--warmup", "0", "--bytes", "1")
        listening.settimeout(0.05)
        closed = reset = 0
        while not running.done():
            with suppress(TimeoutError):
                sock, _ = listening.accept()
                sock.recv(1)  # what has not been read makes a reset of a close
                if closed > reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                    reset += 1
                else:
                    closed += 1
                sock.close()
        found = running.result()
    assert found["why"] == {"closed without an answer": closed, "Connection reset by peer": reset}
    assert (found["count"], found["errors"]) == (0, closed + reset)
    assert reset > 1


def test_it_ends_when_it_is_told(crr, namespace):
    """And waits for those that it has asked."""
    with serving(crr, 7):
        command = [crr, "load", "127.0.0.1", "7", "--rate", "500", "--seconds", "600", "--warmup", "0"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        begun = time.monotonic()
        while counts(Path("/proc/thread-self/net/snmp").read_text(), "Tcp")["ActiveOpens"] < 50:
            assert time.monotonic() < begun + 60
        child.terminate()
        found = json.loads(child.communicate(timeout=60)[0])
    assert child.returncode == 0
    assert found["count"] >= 50
    assert (found["errors"], found["why"]) == (0, {})
    assert 0 < found["seconds"] < 60


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
        (["load", "127.0.0.1", "7", "--from", "name"], "name: "),
        (["load", "127.0.0.1", "7", "--from", "::1"], "::1: it is of another family than HOST"),
        (["serve", "7", "--service", "-1"], "--service: a number from 1 to"),
        (["serve", "port"], "port: "),
    ],
)  # fmt: skip
def test_bad_arguments(crr, namespace, arguments, says):
    done = subprocess.run([crr, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"crr: {says}")
    assert done.stdout.replace("ready\n", "") == ""
