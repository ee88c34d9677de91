"""The xsk suite's frames, its target and its figure."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from bench import veth, xsk
from bench.figures import Row

DST, SRC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


@pytest.mark.parametrize(("port", "sequence"), [(0, 0), (1024, 7), (65535, 2**32 - 1)])
def test_the_syn_is_right(port, sequence):
    frame = veth.syn(DST, SRC, port=port, sequence=sequence)
    assert len(frame) == veth.LENGTH
    sent = Ether(frame)
    assert (sent[TCP].sport, sent[TCP].seq, sent[TCP].flags, sent[IP].dst) == (port, sequence, "S", veth.VIP)
    del sent[IP].chksum, sent[TCP].chksum  # Scapy works them out anew
    assert bytes(sent) == frame


def test_known_checksum():
    """RFC 1071, 3."""
    assert veth.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2
    assert veth.checksum(b"") == 0xFFFF


def rows(**samples: list[float]) -> dict[str, Row]:
    return {name.replace("_", " "): Row(name, values) for name, values in samples.items()}


def test_p2_is_judged_round_by_round():
    found = rows(raw_l2fwd=[1.0, 2.0, 1.0], crablb_serve=[1.2, 2.4, 1.1], raw_send=[1.1, 2.0, 1.0])
    found["raw l2fwd, 256 frames a kick"] = Row("", [1.0, 2.0, 1.0])
    target = xsk.judge(found, {})
    assert (target.reached, target.value, target.why) == (True, "1.20 times (1.20 Mpps)", "")
    found["crablb serve"].samples = [0.9, 1.8, 0.9]
    target = xsk.judge(found, {"crablb serve": Row("", [9.0, 11.0, 10.0])})
    assert target.reached is False
    assert "makes 1.00 of raw l2fwd" in target.why
    assert "in user space is 10 % of its time" in target.why
    assert target.why.endswith("is good for 9 Mpps")


def test_p2_of_disturbed_rows_is_judged_by_the_fastest():
    found = rows(raw_l2fwd=[0.5, 0.5, 1.0], crablb_serve=[0.9, 0.9, 0.9], raw_send=[1.1, 1.1, 1.1])
    found[xsk.MORE_A_KICK] = Row("", [1.0, 1.0, 1.0])
    assert xsk.judge(found, {}).reached is True
    found["raw l2fwd"].disturbed = True
    target = xsk.judge(found, {})
    assert (target.reached, target.value) == (False, "0.90 times (0.90 Mpps; fastest samples, of disturbed rows)")
    assert "makes 1.10 of raw l2fwd, and 256 frames a kick 1.00" in target.why


def test_figure_8_leaves_out_what_was_not_measured():
    found = rows(crablb_serve=[1.0, 3.0], nftables=[0.5, 0.5])
    ours, paper = xsk.figure_8(found).curves
    assert (ours.x, ours.y, ours.low, ours.high) == ([0, 2], [2.0, 0.5], [1.0, 0.5], [3.0, 0.5])
    assert (paper.y, paper.source) == ([14.75, 6.8, 1.5], "paper")
