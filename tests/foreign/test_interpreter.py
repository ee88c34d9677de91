"""The interpreter of packetdrill's scripts sees what differs, and the wire between does what it is for."""

from __future__ import annotations

import pytest

from tests.foreign.drill import OTHERS, Balancer
from tests.foreign.packetdrill import FAMILIES, Segment, Unsupported, dissect, parse, written
from tests.foreign.test_packetdrill import verdicts

SCRIPT = """// A server, and all that is looked at.
--ip_version=ipv4
    0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
   +0 setsockopt(3, SOL_SOCKET, SO_REUSEADDR, [1], 4) = 0
   +0 bind(3, ..., ...) = 0
   +0 listen(3, 1) = 0
   +0 < S 0:0(0) win 32792 <mss 1000,sackOK,TS val 100 ecr 0,nop,wscale 7>
   +0 > S. 0:0(0) ack 1 win 65160 <mss 1460,sackOK,TS val 700 ecr 100,nop,wscale 10>
   +0 < . 1:1(0) ack 1 win 257 <nop,nop,TS val 101 ecr 700>
   +0 accept(3, ..., ...) = 4
   +0 fcntl(4, F_SETFL, O_RDWR|O_NONBLOCK) = 0
   +0 read(4, ..., 100) = -1 EAGAIN (Resource temporarily unavailable)
   +0 write(4, ..., 1000) = 1000
   +0 > P. 1:1001(1000) ack 1 <nop,nop,TS val 700 ecr 101>
   +0 %{ assert tcpi_snd_mss == 988, tcpi_snd_mss }%
   +0 < . 1:1(0) ack 1001 win 257 <nop,nop,TS val 102 ecr 700>
   +0 close(4) = 0
   +0 `true`
   +0 > F. 1001:1001(0) ack 1 <nop,nop,TS val 700 ecr 102>
"""
#: What is changed, into what, and what is to be said.
WRONG = {
    "flags": ("> P. 1:1001", "> . 1:1001", "flags"),
    "numbers": ("> F. 1001:1001", "> F. 1002:1002", "sequence number"),
    "size": ("> P. 1:1001(1000)", "> P. 1:1000(999)", "size"),
    "acknowledgement": ("> S. 0:0(0) ack 1", "> S. 0:0(0) ack 2", "acknowledgement"),
    "window": ("win 65160", "win 65161", "window"),
    "option": ("<mss 1460,", "<mss 1459,", "options"),
    "echoed": ("ecr 101>\n   +0 %{", "ecr 99>\n   +0 %{", "options"),
    "another": ("sackOK,TS val 700 ecr 100,nop,wscale 10>", "sackOK,TS val 700 ecr 100>", "options"),
    "error": ("-1 EAGAIN", "-1 EPIPE", "result"),
    "result": ("write(4, ..., 1000) = 1000", "write(4, ..., 1000) = 999", "result"),
    "statement": ("tcpi_snd_mss == 988", "tcpi_snd_mss == 987", "line 15"),
    "command": ("`true`", "`false`", "status"),
    "early": ("+0 > F.", "+3 > F.", "early"),
    "nothing": ("+0 close(4) = 0", "+0 listen(3, 2) = 0", "nothing came"),
}


def test_what_differs_is_seen(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "right.pkt").write_text(SCRIPT)
    for name, (old, new, _) in WRONG.items():
        assert SCRIPT.count(old) == 1, name
        (folder / f"{name}.pkt").write_text(SCRIPT.replace(old, new))
    found = verdicts(tmp_path, folder, "none")
    assert set(found) == {f"{name}, ipv4" for name in (*WRONG, "right")}
    for said, (verdict, why) in found.items():
        name = said.partition(",")[0]
        if name == "right":
            assert verdict == "passed", (said, why)
        else:
            assert verdict == "failed", (said, verdict)
            assert WRONG[name][2] in why, (said, why)


def test_what_is_not_known_is_said():
    for line in ("+0 < udp", "+0 > S 0:0(0) <mss 1460", "+0 socket(..., SOCK_NEW, 0) = 3", "maybe"):
        with pytest.raises(Unsupported):
            parse(f"{line}\n")
    with pytest.raises(Unsupported):
        written("mss 1460,new")


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("redirecting", [False, True])
def test_wire(family, redirecting):
    """Both directions: a client's connection is moved to a backend and back, a server's names a VIP."""
    ends = FAMILIES["ipv4" if family == 4 else "ipv6"]
    _, backend, named = OTHERS[family]
    wire = Balancer(ends, backend, named, redirecting)
    plain = written("mss 1460,nop,nop,sackOK")

    def segment(out: bool, flags: int, options: bytes = b"") -> Segment:
        ports = (5000, 8080) if out else (8080, 5000)
        return Segment(
            *((ends.local, ends.remote) if out else (ends.remote, ends.local)), *ports, 7, 8, flags, 9, options
        )

    assert wire.out(segment(True, 2, plain + b"\x2a\x02\1\1")).options == plain
    answer = wire.back(segment(False, 18, plain))
    data = segment(True, 16)
    if not redirecting:
        assert (answer.source, answer.options) == (ends.remote, plain)
        assert wire.counts == {"offers": 1, "redirects": 0, "echoes": 0, "padded": 0}
        return
    assert answer.source == backend
    assert answer.options[len(plain)] == 42
    assert len(answer.options) == len(plain) + (8 if family == 4 else 20)
    data.dest = backend
    assert wire.out(data).dest == ends.remote
    assert wire.back(segment(False, 16)).source == backend
    syn = wire.back(segment(False, 2, plain))
    assert syn.options[: len(plain)] == plain
    assert len(syn.options) > len(plain)
    assert wire.out(segment(True, 18, syn.options)).options == plain
    assert wire.counts == {"offers": 1, "redirects": 2, "echoes": 1, "padded": 0}


def test_packets_are_read_as_they_are_written():
    for ends in (FAMILIES["ipv4"], FAMILIES["ipv6"]):
        options = written("mss 1460,sackOK,TS val 100 ecr 0,nop,wscale 8")
        sent = Segment(ends.local, ends.remote, 5000, 8080, 2**32 - 1, 7, 0x1C2, 300, options, b"xyz", 0, 2)
        kind = b"\x08\0" if ends.family == "ipv4" else b"\x86\xdd"
        found = dissect(bytes(12) + kind + sent.packed())
        assert found == sent
