"""crablb.kernel.pathmtu: which ICMP errors are about packets of IP in IP."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6

from crablb.kernel.pathmtu import too_big

INNER = [IP(src="10.0.0.1", dst="10.0.0.100") / TCP(), IPv6(src="fd00::1", dst="fd00::100") / TCP()]


def received4(quoted, kind=3, code=4):
    return bytes(IP(src="10.2.0.254", dst="10.2.0.2") / ICMP(type=kind, code=code, nexthopmtu=1400) / quoted)


def outer4(inner):
    return IP(src="10.2.0.2", dst="10.3.0.11", flags="DF") / inner


def outer6(inner):
    return IPv6(src="fd00:2::2", dst="fd00:3::11") / inner


@pytest.mark.parametrize("inner", INNER, ids=["IPv4", "IPv6"])
def test_what_concerns_us(inner):
    four, six = outer4(inner), outer6(inner)
    assert too_big(received4(four), socket.AF_INET) == (ip_address("10.3.0.11"), 1400)
    # Routers may quote eight bytes behind the header, no more.
    assert too_big(received4(bytes(four)[:28]), socket.AF_INET) == (ip_address("10.3.0.11"), 1400)
    message = bytes(ICMPv6PacketTooBig(mtu=1400) / six)
    assert too_big(message, socket.AF_INET6) == (ip_address("fd00:3::11"), 1400)


def test_what_does_not():
    four, six = outer4(INNER[0]), outer6(INNER[1])
    assert too_big(received4(four, code=1), socket.AF_INET) is None
    assert too_big(received4(four, kind=11), socket.AF_INET) is None
    assert too_big(received4(INNER[0]), socket.AF_INET) is None
    assert too_big(bytes(ICMPv6DestUnreach() / six), socket.AF_INET6) is None
    assert too_big(bytes(ICMPv6PacketTooBig(mtu=1400) / INNER[1]), socket.AF_INET6) is None


@pytest.mark.parametrize(
    ("family", "whole"),
    [
        (socket.AF_INET, received4(bytes(outer4(INNER[0]))[:28])),
        (socket.AF_INET6, bytes(ICMPv6PacketTooBig(mtu=1400) / outer6(INNER[1]))[:48]),
    ],
)
def test_what_is_cut_short(family, whole):
    needed = len(whole) - 8 if family == socket.AF_INET else len(whole)
    assert all(too_big(whole[:n], family) is None for n in range(needed))
    assert too_big(whole[:needed], family)


@given(st.binary(max_size=100), st.sampled_from([socket.AF_INET, socket.AF_INET6]))
def test_rubbish(data, family):
    too_big(data, family)
