"""What the server endpoint looks for in a SYN (bpf/syn.h), compiled for this machine, against a reading of its own."""

from __future__ import annotations

import ctypes
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crablb.control.health.segments import SYN, options_of_syn, segment
from crablb.model import OptionForm
from tests.helpers.processes import ROOT

SOURCE = """
#include "syn.h"
int walk(const __u8 *tcp, __u8 out[3])
{
    struct crab_walk walk;
    crab_walk(tcp, &walk);
    out[0] = walk.at, out[1] = walk.length, out[2] = walk.cookie;
    return 0;
}
int is_check(const __u8 *tcp)
{
    return crab_is_check(tcp);
}
"""
ROOM = 80
V4, V6 = bytes.fromhex("2a060a000064"), bytes.fromhex("2a12") + bytes(15) + b"\x64"
EXPERIMENTAL = bytes.fromhex("fd0843520a000064")
OFFER, NOP, END = b"\x2a\x02", b"\x01", b"\x00"
MSS, SCALE = bytes.fromhex("020405b4"), bytes.fromhex("030301")
COOKIE, ASKING, OLD_COOKIE = b"\x22\x0a" + bytes(8), b"\x22\x02", bytes.fromhex("fe0cf989") + bytes(8)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("syn")
    (folder / "syn.c").write_text(SOURCE)
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "bpf")]
    subprocess.run(["gcc", *flags, "-o", folder / "syn.so", folder / "syn.c"], check=True)
    return ctypes.CDLL(str(folder / "syn.so"))


@pytest.fixture(scope="session")
def walk(library):
    """``walk(options)``: the redirect found (None: none), and whether there is a cookie."""

    def call(options: bytes, length: int | None = None) -> tuple[bytes | None, bool]:
        header = bytearray(20)
        header[12] = (5 + (len(options) + 3) // 4 if length is None else length) << 4
        tcp = bytes(header) + options
        out = ctypes.create_string_buffer(3)
        library.walk(tcp.ljust(ROOM, b"\0"), out)
        at, n, cookie = out.raw
        return (options.ljust(40, b"\0")[at : at + n] if n else None), bool(cookie)

    return call


def read(options: bytes) -> tuple[bytes | None, bool]:
    """The same, as RFC 9293, 3.1, has it."""
    redirect, cookie, rest = None, False, options
    while rest and rest[0] != 0:
        if rest[0] == 1:
            rest = rest[1:]
            continue
        if len(rest) < 2 or not 2 <= rest[1] <= len(rest):
            break
        option, rest = rest[: rest[1]], rest[rest[1] :]
        kind, data = option[0], option[2:]
        cookie |= (kind == 34 and len(data) > 0) or (kind == 254 and data[:2] == b"\xf9\x89" and len(data) > 2)
        ours = (kind == 42 and len(data) in (4, 16)) or (kind == 253 and data[:2] == b"CR" and len(data) in (6, 18))
        if ours and redirect is None:
            redirect = option
    return redirect, cookie


pieces = st.sampled_from([V4, V6, EXPERIMENTAL, OFFER, NOP, END, MSS, SCALE, COOKIE, ASKING, OLD_COOKIE])
lists = st.lists(pieces | st.binary(min_size=1, max_size=4), max_size=20).map(b"".join)


@given(lists | st.binary(max_size=40))
@example(OFFER + NOP * 2 + V4 + NOP * 2)  # as load balancers do that append
@example(SCALE[:2] + V4[:1] + OFFER)
@example(bytes.fromhex("020405b4010303012a06"))  # cut short
@example(MSS * 9 + b"\x2a")  # a kind in the last byte
@example(END + V4)
@example(b"\x2a\x00" + V4)
@example(b"\x2a\x01" + V4)
@example(b"\xff\x06" + V4[:4] + V4)  # within another option
def test_what_is_found(walk, options):
    options = options[:40].ljust(min(40, (len(options) + 3) // 4 * 4), b"\0")
    assert walk(options) == read(options)


@given(st.binary(min_size=40, max_size=40), st.integers(0, 15))
def test_any_length_of_header(walk, options, words):
    assert walk(options, words) == read(options[: max(0, 4 * words - 20)])


def test_the_first_of_either_form(walk):
    assert walk(OFFER + V4 + EXPERIMENTAL)[0] == V4
    assert walk(EXPERIMENTAL + V4)[0] == EXPERIMENTAL
    assert walk(b"\xfd\x08CS\x0a\x00\x00\x64" + V4)[0] == V4  # another's experiment


def test_it_reads_no_further(tmp_path: Path):
    """The whole of what it is given is enough, whatever is in it (address sanitizer)."""
    main = """
    #include <stdlib.h>
    #include <string.h>
    int main(void)
    {
        volatile unsigned sum = 0;
        for (int kind = 0; kind < 256; kind++)
            for (int length = 0; length < 256; length++) {
                __u8 *tcp = malloc(CRAB_SYN_ROOM), out[3];
                memset(tcp, 0, CRAB_SYN_ROOM);
                tcp[12] = 0xf0;
                for (int i = 20; i < 60; i++)
                    tcp[i] = (__u8)(i % 2 ? length : kind);
                walk(tcp, out);
                for (int i = 0; i < CRAB_REDIRECT; i++)
                    sum += tcp[CRAB_TCP_HEADER + out[0] + i];
                free(tcp);
            }
        return 0;
    }
    """
    (tmp_path / "main.c").write_text(SOURCE + main)
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-I", str(ROOT / "bpf")]
    subprocess.run(["gcc", *flags, "-o", tmp_path / "main", tmp_path / "main.c"], check=True)
    assert subprocess.run([tmp_path / "main"], check=False).returncode == 0


@pytest.mark.parametrize("form", OptionForm)
@pytest.mark.parametrize("vip", ["10.0.0.100", "fd00::100"])
def test_checks_are_known(library, vip, form):
    """By what the load balancer puts into them, and by nothing else: clients' SYNs have zeros there."""
    address = ip_address(vip)
    options = options_of_syn(1500, address.version, address, form)
    check = segment(address, address, (1, 2), 3, SYN, options).ljust(ROOM, b"\0")
    assert library.is_check(check)
    for at in (26, 27, 32, 33, 34, 35):
        assert not library.is_check(check[:at] + b"\0" + check[at + 1 :])
    assert not library.is_check(check[:12] + b"\x80" + check[13:])  # its header ends before
