"""The xsk suite runs, as small as it can; what it measures decides nothing here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from bench import machine, xsk
from bench.context import Context
from bench.figures import Results, Row
from tests.conftest import ROOT

DST, SRC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


@pytest.mark.parametrize(("port", "sequence"), [(0, 0), (1024, 7), (65535, 2**32 - 1)])
def test_the_syn_is_right(port, sequence):
    frame = xsk.syn(DST, SRC, port=port, sequence=sequence)
    assert len(frame) == xsk.LENGTH
    sent = Ether(frame)
    assert (sent[TCP].sport, sent[TCP].seq, sent[TCP].flags, sent[IP].dst) == (port, sequence, "S", xsk.VIP)
    del sent[IP].chksum, sent[TCP].chksum  # Scapy works them out anew
    assert bytes(sent) == frame


def test_known_checksum():
    """RFC 1071, 3."""
    assert xsk.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2
    assert xsk.checksum(b"") == 0xFFFF


def rows(**samples: list[float]) -> dict[str, Row]:
    return {name.replace("_", " "): Row(name, values) for name, values in samples.items()}


def test_p2_is_judged_round_by_round():
    found = rows(raw_l2fwd=[1.0, 2.0, 1.0], crablb_serve=[1.2, 2.4, 1.1], raw_send=[1.1, 2.0, 1.0])
    found["raw l2fwd, 256 frames a kick"] = Row("", [1.0, 2.0, 1.0])
    target = xsk.judge(found, {})
    assert (target.reached, target.value, target.why) == (True, "1.20 times (1.20 Mpps)", "")
    found["crablb serve"].samples = [1.0, 2.0, 1.0]
    target = xsk.judge(found, {"crablb serve": Row("", [9.0, 11.0, 10.0])})
    assert target.reached is False
    assert "makes 1.00 of raw l2fwd" in target.why
    assert "in user space is 10 % of its time" in target.why
    assert target.why.endswith("is good for 10 Mpps")


def test_p2_of_disturbed_rows_is_judged_by_the_fastest():
    found = rows(raw_l2fwd=[0.5, 0.5, 1.0], crablb_serve=[1.0, 0.9, 0.9], raw_send=[1.1, 1.1, 1.1])
    found[xsk.MORE_A_KICK] = Row("", [1.0, 1.0, 1.0])
    assert xsk.judge(found, {}).reached is True
    found["raw l2fwd"].disturbed = True
    target = xsk.judge(found, {})
    assert (target.reached, target.value) == (False, "1.00 times (1.00 Mpps; fastest samples, of disturbed rows)")
    assert "makes 1.10 of raw l2fwd, and 256 frames a kick 1.00" in target.why


def test_figure_8_leaves_out_what_was_not_measured():
    found = rows(crablb_serve=[1.0, 3.0], nftables=[0.5, 0.5])
    ours, paper = xsk.figure_8(found).curves
    assert (ours.x, ours.y, ours.low, ours.high) == ([0, 2], [2.0, 0.5], [1.0, 0.5], [3.0, 0.5])
    assert (paper.y, paper.source) == ([14.75, 6.8, 1.5], "paper")


@pytest.fixture(scope="module")
def suite():
    if os.geteuid() != 0:
        pytest.skip("network namespaces and BPF need root")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("it needs two CPUs")
    before = Path("/proc/thread-self/ns/net").stat().st_ino
    found = xsk.run(Context("tiny", say=lambda _: None))
    assert Path("/proc/thread-self/ns/net").stat().st_ino == before
    assert not list(Path("/run/netns").glob("crab-xsk-*"))
    return found


def test_what_it_writes(suite):
    data = Results("tiny", machine.describe(), [suite]).json()
    jsonschema.validate(data, json.loads((ROOT / "bench/schema.json").read_text()))


def test_all_is_there(suite):
    units = {table.key: table.unit for table in suite.tables}
    units.pop("xsk-queues", None)  # with four CPUs
    units.pop("xsk-user", None)  # so short a time may be less than a tick
    assert units == {
        "xsk-raw": "Mpps",
        "xsk-serve": "Mpps",
        "xsk-offered": "Mpps",
        "daemon-start": "s",
        "daemon-memory": "MiB",
        "daemon-idle": "% of a core",
        "xsk-latency": "us",
    }
    assert {plot.key for plot in suite.plots} == {"xsk-mpps", "paper-fig8"}
    assert [target.name for target in suite.targets] == ["P2", "P10"]
    serve = {row.name for row in suite.table("xsk-serve").rows}
    assert {
        "raw l2fwd",
        "crablb serve",
        "crablb serve, generic",
        "XDP redirect",
        "XDP, MAC addresses only",
        "nftables",
    } <= serve
    # Everything forwarded something, in the native and in the generic mode.
    for key in ("xsk-raw", "xsk-serve", "xsk-latency", "daemon-start"):
        assert all(min(row.samples) > 0 for row in suite.table(key).rows), key
    assert all(reason.startswith("two queues: ") for reason in suite.left_out), suite.left_out


@pytest.mark.skipif(os.geteuid() != 0 or len(os.sched_getaffinity(0)) < 2, reason="root and two CPUs are needed")
def test_two_queues_carry_what_comes_by_both():
    """On two CPUs, which their sources share: a rate that means nothing, but nothing is stuck."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    assert xsk.served_by_two(Context("tiny", say=lambda _: None), cpus, cpus) > 0
