"""The C hot loop against the independent reference and against Scapy."""

from __future__ import annotations

import hashlib
import ipaddress
import sys

import pytest
from crablb._native import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether

from tests.helpers.frames import SEED, VIP4, VIP6, a_hop_less, reference
from tests.helpers.native import Core, mapped
from tests.reference import maglev, packets, rendezvous
from tests.reference.options import offer, parse
from tests.reference.siphash import siphash

# ---- hash ----


def test_the_reference_hash_is_siphash():
    # The paper's own vector (appendix A): SipHash-2-4 of 00..0e under the key 00..0f.
    assert siphash(SEED, bytes(range(15)), 2, 4) == 0xA129CA6149BE45E5


@pytest.mark.skipif(sys.hash_info.algorithm != "siphash13", reason="this Python hashes otherwise")
def test_the_reference_hash_is_pythons():
    # With PYTHONHASHSEED=0 CPython hashes bytes by SipHash-1-3 under the zero key.
    import subprocess

    text = "print([hash(bytes(range(n))) % 2**64 for n in range(1, 40)])"
    out = subprocess.run([sys.executable, "-c", text], env={"PYTHONHASHSEED": "0"}, capture_output=True, check=True)
    assert eval(out.stdout) == [siphash(bytes(16), bytes(range(n))) for n in range(1, 40)]


@given(st.binary(min_size=16, max_size=16), st.binary(max_size=300))
def test_hash(key, data):
    assert lib.crab_siphash13(key, data, len(data)) == siphash(key, data)


@given(st.binary(min_size=16, max_size=16), st.booleans(), st.data())
def test_flow_hash(key, v6, data):
    address = st.binary(min_size=16, max_size=16) if v6 else st.binary(min_size=4, max_size=4)
    source, destination = data.draw(address), data.draw(address)
    ports = data.draw(st.binary(min_size=4, max_size=4))
    low, high = (int.from_bytes(ports[i : i + 2], "little") for i in (0, 2))
    if v6 and all(mapped(a[12:]) == a for a in (source, destination)):
        return
    got = lib.crab_flow_hash(key, mapped(source), mapped(destination), low, high)
    assert got == siphash(key, source + destination + ports)


# ---- tables ----

members = st.lists(
    st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 20), st.integers(0, 30)),
    max_size=12,
    unique_by=lambda m: m[0],
)


@pytest.mark.parametrize("reference", [maglev, rendezvous], ids=["maglev", "rendezvous"])
@given(size=st.sampled_from([7, 61, 251, 1021]), pool=members, seed=st.binary(min_size=16, max_size=16))
def test_table(reference, size, pool, seed):
    listed, full = [(address, weight, i) for i, (address, weight, _) in enumerate(pool)], [full for _, _, full in pool]
    array = ffi.new("struct crab_table_member[]", max(1, len(listed)))
    for entry, (address, weight, backend), most in zip(array, listed, full, strict=False):
        entry.addr, entry.weight, entry.backend, entry.full = address, weight, backend, most
    table = ffi.new("uint16_t[]", size)
    build = {maglev: lib.crab_maglev_build, rendezvous: lib.crab_rendezvous_build}[reference]
    assert build(table, size, array, len(listed), seed) == 0
    assert list(table) == reference.table(size, listed, seed, full)


# ---- options ----

option = st.one_of(
    st.just(b"\x01"),
    st.just(b"\x2a\x02"),
    st.just(b"\xfd\x04\x43\x52"),
    st.just(b"\xfd\x04\x43\x53"),
    st.binary(min_size=4, max_size=4).map(lambda a: b"\x2a\x06" + a),
    st.binary(min_size=16, max_size=16).map(lambda a: b"\x2a\x12" + a),
    st.binary(min_size=4, max_size=4).map(lambda a: b"\xfd\x08\x43\x52" + a),
    st.just(b"\x02\x04\x05\xb4"),
    st.just(b"\x03\x03\x07"),
    st.just(b"\x04\x02"),
    st.binary(min_size=8, max_size=8).map(lambda t: b"\x08\x0a" + t),
    st.sampled_from([b"\x22\x02", b"\xfe\x04\xf9\x89", b"\x13\x12" + bytes(16), b"\x1d\x10" + bytes(14)]),
    st.sampled_from([b"\x1e\x04\x01\x01", b"\x1e\x0c\x10\x01" + bytes(8)]),
    st.builds(
        lambda version, key, more: b"\x1e" + bytes([20 + len(more), version, 1]) + bytes(8) + key + more,
        st.sampled_from([0, 1]),
        st.binary(min_size=8, max_size=8),
        st.sampled_from([b"", b"\0\1", b"\0\1\2\3", b"\0"]),
    ),
    st.binary(max_size=6),
)


@st.composite
def option_lists(draw, kinds=option):
    """0 to 40 bytes, whole words: well-formed options, and rubbish."""
    joined = b"".join(draw(st.lists(kinds, max_size=10)))[:40]
    return joined + draw(st.sampled_from([b"\0", b"\1"])) * (-len(joined) % 4)


def native_rewrite(options: bytes, experimental: bool, vip: bytes | None) -> bytes | None:
    out = ffi.new("uint8_t[40]")
    n = lib.crab_option_rewrite(options, len(options), experimental, mapped(vip) if vip else ffi.NULL, out)
    return None if n < 0 else bytes(out)[:n]


@settings(max_examples=1000)
@given(option_lists(), st.booleans(), st.sampled_from([None, VIP4, VIP6]))
def test_option_rewrite(options, experimental, vip):
    assert native_rewrite(options, experimental, vip) == packets.rewrite(options, experimental, vip)


@settings(max_examples=1000)
@given(option_lists(), st.booleans())
def test_option_find(options, experimental):
    found = parse(options)[0]
    flags = lib.crab_option_find(options, len(options), experimental)
    assert bool(flags & lib.CRAB_OPTION_OFFER) == (offer(experimental) in found)
    assert bool(flags & lib.CRAB_OPTION_OTHER) == (offer(not experimental) in found)
    assert bool(flags & lib.CRAB_OPTION_FORGED) == any(o.is_forged for o in found)
    assert bool(flags & lib.CRAB_OPTION_UNSAFE) == any(o.is_unsafe for o in found)
    assert bool(flags & lib.CRAB_OPTION_SIGNED) == any(o.is_signature for o in found)
    assert bool(flags & lib.CRAB_OPTION_MPTCP) == any(o.subtype == 0 for o in found)
    assert bool(flags & lib.CRAB_OPTION_JOIN) == any(o.subtype == 1 for o in found)
    memory = ffi.new("uint8_t[]", options or b"\0")
    for found_, length, wanted in (
        (lib.crab_option_key(memory, len(options)), 8, [o.key for o in found if o.key is not None]),
        (lib.crab_option_token(memory, len(options)), 4, [o.token for o in found if o.token is not None]),
    ):
        assert (bytes(ffi.buffer(found_, length)) if found_ else None) == (wanted[0] if wanted else None)


@pytest.mark.parametrize("experimental", [False, True])
@pytest.mark.parametrize("vip", [VIP4, VIP6])
def test_scapy_reads_the_redirect(vip, experimental):
    linux = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
    offer = b"\xfd\x04\x43\x52" if experimental else b"\x2a\x02\x01\x01"
    options = bytes(TCP(options=linux))[20:] + offer
    parsed = TCP(bytes(20)[:12] + b"\xf0" + bytes(7) + native_rewrite(options, experimental, vip)).options
    assert parsed[: len(linux)] == linux
    expected = (253, b"\x43\x52" + vip) if experimental else (42, vip)
    assert parsed[len(linux)] == expected


# ---- whole frames ----


#: MPTCP's: a server's key in the third packet, and the token that is made of it in a SYN that joins.
KEYS = [bytes([i] * 8) for i in range(3)]
known = st.one_of(
    st.sampled_from([b"\x1e\x14\x01\x01" + bytes(8) + key for key in KEYS]),
    st.sampled_from([b"\x1e\x0c\x10\x01" + hashlib.sha256(key).digest()[:4] + bytes(4) for key in KEYS]),
)


@st.composite
def frames(draw, kinds=option):
    """Mostly sound TCP packets to one of the services, made by Scapy, with whatever may go wrong.

    ``kinds``: the options."""
    v6 = draw(st.booleans())
    port = draw(st.sampled_from([80, 80, 80, 443, 81, 9]))
    if v6:
        source = draw(st.sampled_from(["fd00::1", "fd00:5::1", "fd00:5:8000::1", "::1", "::ffff:10.0.0.1", "fd00::14"]))
        vip = draw(st.sampled_from([str(ipaddress.ip_address(VIP6))] * 5 + ["::ffff:10.0.0.100", "::10.0.0.100"]))
    else:
        source, vip = draw(st.sampled_from(["10.0.0.1", "10.1.2.3", "10.3.0.1", "10.0.0.11"])), "10.0.0.100"
    hops = draw(st.sampled_from([64] * 6 + [255, 2, 1, 0]))
    layer = (
        IPv6(src=source, dst=vip, hlim=hops)
        if v6
        else IP(
            src=source,
            dst=vip,
            ttl=hops,
            id=draw(st.integers(0, 65535)),
            flags=draw(st.sampled_from(["DF", 0])),
        )
    )
    flags = draw(st.sampled_from(["S", "S", "S", "S", "SE", "A", "PA", "FA", "R", "SA", "SR", "SF"]))
    options = draw(option_lists(kinds))
    payload = draw(st.sampled_from([b"", b"", b"x", b"payload " * 20]))
    tcp = TCP(
        sport=draw(st.integers(1, 40)), dport=port, flags=flags,
        seq=draw(st.sampled_from([0, 1, 2, 3, 65537, 65538, 2**32 - 1])),
        dataofs=5 + len(options) // 4,
    )  # fmt: skip
    tag = draw(
        st.sampled_from([None] * 8 + [Dot1Q(vlan=5), Dot1AD(vlan=9) / Dot1Q(vlan=5), Dot1Q() / Dot1Q() / Dot1Q()])
    )
    # from a client, or sent back by a backend, which may be a client itself
    sender = draw(st.sampled_from(["02:00:00:00:00:01"] * 6 + ["02:00:00:00:01:00", "02:00:00:00:02:03"]))
    ether = Ether(src=sender, dst="02:00:00:00:00:02")
    packet = (ether / tag if tag else ether) / layer
    # Scapy lays out options itself; ours may be rubbish, so they are put in front of the payload by hand.
    raw = bytearray(bytes(packet / tcp / (options + payload)))
    start = len(bytes(packet))
    # Scapy's checksum is over the whole segment, the options included: it is right.
    damage = draw(st.sampled_from(["none"] * 8 + ["partial", "checksum", "header", "cut", "pad", "byte"]))
    if damage == "partial":
        addresses = raw[start - 32 : start] if v6 else raw[start - 8 : start]
        half = len(addresses) // 2
        sum_ = packets.checksum(packets.pseudo(bytes(addresses[:half]), bytes(addresses[half:]), len(raw) - start))
        raw[start + 16 : start + 18] = (~sum_ & 0xFFFF).to_bytes(2, "big")
    elif damage == "checksum":
        raw[start + 16] ^= 0x10
    elif damage == "header":
        raw[start - 12] ^= 1
    elif damage == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif damage == "pad":
        raw += bytes(draw(st.integers(1, 30)))
    elif damage == "byte" and raw:
        raw[draw(st.integers(12, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(raw)


@settings(max_examples=400)
@given(
    st.lists(frames() | frames(option | known), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from(["negotiated", "always"]),
    st.sampled_from(["auto", "l2", "ipip"]),
    st.booleans(),
)
def test_frames(sequence, experimental, mode, fallback, elsewhere):
    """Frame by frame: the same verdict and the same bytes, state included."""
    expected = reference(experimental, mode, fallback, elsewhere=elsewhere)
    core = Core(expected)
    for frame in sequence:
        assert core.outcome(frame) == expected.handle(frame)
        assert core.elsewhere == expected.elsewhere


MAPPED = {"source": ("::ffff:10.0.0.1", "fd00::100"), "destination": ("fd00:5::1", "::ffff:10.0.0.100"),
          "both": ("::ffff:10.0.0.1", "::ffff:10.0.0.100")}  # fmt: skip


@pytest.mark.parametrize("where", MAPPED)
@pytest.mark.parametrize("mode", ["negotiated", "always", "never"])
@pytest.mark.parametrize("quoted", [False, True])
def test_mapped_addresses_on_the_wire_are_nobodys(where, mode, quoted):
    """An IPv4 service's backends are of either family: in an IPv6 header its address would be one of theirs."""
    expected = reference(mode=mode, fallback="ipip")
    expected.services[0].table = expected.services[2].table  # IPv6 backends
    core = Core(expected)
    client, vip = MAPPED[where]
    head = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    for tags in range(3):
        for port in (80, 443, 9):
            for flags, options in (("S", [*LINUX, *OFFER]), ("S", OFFER), ("A", [])):
                tcp = TCP(sport=7, dport=port, flags=flags, options=options)
                frame = head / IPv6(src=client, dst=vip) / tcp
                if quoted:
                    error = IPv6(src="fd00::fe", dst="fd00::100") / ICMPv6PacketTooBig(mtu=1300)
                    frame = head / error / IPv6(src=vip, dst=client) / TCP(sport=port, dport=7)
                service = port == 80 or (port == 443 and where != "source")
                outcome = "drop_mapped" if service else "drop_not_service"
                assert core.outcome(bytes(frame)) == (outcome, None)
        head /= Dot1Q(vlan=tags)


def test_prefixes_are_of_one_family():
    """::/0 holds the mapped addresses of IPv4 clients; it is no prefix of theirs."""
    expected = reference()
    for backend in expected.backends:
        backend.cr = True
    expected.services[0].prefixes = [ipaddress.ip_network("::/0")]
    core = Core(expected)
    tcp = TCP(sport=7, dport=80, flags="S", options=[*LINUX, *OFFER])
    frame = bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src="10.0.0.1", dst="10.0.0.100") / tcp)
    assert core.outcome(frame) == expected.handle(frame)
    assert core.counts()["fallback_prefix"] == 1


@settings(max_examples=200)
@given(st.lists(frames(), min_size=1, max_size=64), st.booleans())
def test_a_batch_is_its_frames(sequence, experimental):
    one, all_ = Core(reference(experimental)), Core(reference(experimental))
    assert all_.handle(*sequence) == [one.handle(frame)[0] for frame in sequence]
    assert all_.counts() == one.counts()


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=120), min_size=1, max_size=64))
def test_rubbish_is_counted(rubbish):
    core = Core(reference())
    core.handle(*rubbish)
    counts = core.counts()
    assert counts.pop("received") == len(rubbish)
    assert sum(counts.values()) == len(rubbish)


LINUX = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
OFFER = [(42, b""), ("NOP", None), ("NOP", None)]
COOKIE = [("TFO", (1, 2)), ("NOP", None), ("NOP", None)]
NOPS = [("NOP", None), ("NOP", None)]
BARE = [*LINUX[:1], ("NOP", None), ("WScale", 7)]  # no SACK, no timestamps
HARD = {
    # name: family, options and data of the SYN, and what becomes of it
    "Fast Open, data, IPv4": (4, [*LINUX[:1], *COOKIE, *OFFER], b"GET / HTTP/1.0\r\n" * 60, "fallback_unsafe"),
    "Fast Open, data, IPv6": (6, [*COOKIE, *OFFER], b"x" * 1200, "fallback_unsafe"),
    "Fast Open, no data yet": (4, [*LINUX, *COOKIE, *OFFER], b"", "fallback_unsafe"),
    "Fast Open, a cookie is asked for": (4, [*LINUX[:1], (34, b""), *NOPS, *OFFER], b"", "fallback_unsafe"),
    "Fast Open, RFC 6994": (4, [*LINUX[:1], (254, b"\xf9\x89" + bytes(8)), *OFFER], b"", "fallback_unsafe"),
    "data and nothing else": (4, [*LINUX, *OFFER], b"x", "fallback_unsafe"),
    "jumbo": (4, [*LINUX, *OFFER], bytes(8900), "fallback_unsafe"),
    "MD5, IPv4": (4, [(19, bytes(range(16))), *NOPS, *OFFER], b"", "fallback_unsafe"),
    "MD5, IPv6": (6, [*LINUX[:1], (19, bytes(16)), *NOPS, *OFFER], b"", "fallback_unsafe"),
    "TCP-AO": (4, [*LINUX[:1], (29, bytes(range(14))), *OFFER], b"", "fallback_unsafe"),
    "MP_JOIN": (4, [*LINUX, (30, b"\x10\x01" + bytes(8)), *OFFER], b"", "fallback_unsafe"),
    "MP_CAPABLE": (4, [*LINUX, (30, b"\x01\x01"), *OFFER], b"", "redirected"),
    "MP_CAPABLE, no room in the SYN": (6, [*LINUX, (30, b"\x01\x01"), *OFFER], b"", "fallback_no_room"),
    "MP_CAPABLE, no room in the SYN-ACK": (
        6,
        [*BARE, ("SAckOK", b""), *NOPS, (30, b"\x01\x01"), *OFFER],
        b"",
        "fallback_no_room",
    ),
    "MP_CAPABLE, just room in the SYN-ACK": (6, [*BARE, (30, b"\x01\x01"), *OFFER], b"", "redirected"),
    "40 bytes, no offer": (4, [*LINUX, (31, bytes(18))], b"", "fallback_no_offer"),
    "40 bytes and an offer": (4, [*LINUX, (31, bytes(14)), *OFFER], b"", "fallback_no_room"),
}
SIGNED = {19, 29}


@pytest.mark.parametrize("name", HARD)
def test_hard_syns(name):
    """Scapy lays out what goes in and what must come out, to the byte."""
    family, options, payload, outcome = HARD[name]
    expected = reference()
    for backend in expected.backends:
        backend.cr = backend.on_link = True
    core = Core(expected)
    layer, source, vip = (IPv6, "fd00:5::1", "fd00::100") if family == 6 else (IP, "10.0.0.1", "10.0.0.100")

    def frame(src: str, dst: str, to: str, listed: list[object]) -> bytes:
        tcp = TCP(sport=7, dport=80, flags="S", options=listed) / payload
        return bytes(Ether(src=src, dst=dst) / layer(src=source, dst=to) / tcp)

    told, out = core.outcome(frame("02:00:00:00:00:01", "02:00:00:00:00:02", vip, options))
    assert told == outcome
    (backend,) = [b for b in expected.backends if b.mac == out[:6]]
    packed = ipaddress.ip_address(vip).packed
    rest = options
    if (42, b"") in options and not SIGNED & {o[0] for o in options}:
        rest = options[: options.index((42, b""))]
        if outcome == "redirected":
            rest = [*rest, (42, packed), ("NOP", None), ("NOP", None)]
    to = str(ipaddress.ip_address(backend.address)) if outcome == "redirected" else vip
    there = frame("02:00:00:00:00:02", backend.mac.hex(":"), to, rest)
    assert out == (there if outcome == "redirected" else a_hop_less(there))


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("fallback", ["l2", "ipip"])
@pytest.mark.parametrize("tags", [0, 1, 2])
def test_icmp_errors_go_where_the_packets_go(v6, fallback, tags):
    """An error that quotes a packet from the VIP reaches the backend that the connection's own packets reach."""
    expected = reference(fallback=fallback)
    core = Core(expected)
    layer = IPv6 if v6 else IP
    vip, client, router = ("fd00::100", "fd00:5::1", "fd00::fe") if v6 else ("10.0.0.100", "10.0.0.1", "10.0.0.254")
    head = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    for _ in range(tags):
        head /= Dot1Q(vlan=5)
    compared = 0
    for port in range(1, 30):
        (data,) = core.handle(bytes(head / layer(src=client, dst=vip) / TCP(sport=port, dport=80, flags="A")))
        quoted = bytes(layer(src=vip, dst=client) / TCP(sport=80, dport=port))[: (48 if v6 else 28)]
        error = ICMPv6PacketTooBig(mtu=1300) if v6 else ICMP(type=3, code=4, nexthopmtu=1300)
        frame = bytes(head / layer(src=router, dst=vip) / error / quoted)
        (out,) = core.handle(frame)
        if data is None:  # its backend is behind a gateway
            assert out is None
            continue
        compared += 1
        assert out[:12] == data[:12]
        inner = 14 + 4 * tags
        assert out.endswith(frame[inner:] if fallback == "ipip" else a_hop_less(frame)[inner:])
        assert len(out) - len(frame) == {"l2": 0, "ipip": 40 if v6 else 20}[fallback]
    assert compared > 10
    assert core.counts()["fallback_icmp"] == compared


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("mtu", [0, 552, 1280, 1300])
def test_nobody_is_told_less_than_his_family_takes(inner, outer, mtu):
    """Whatever a tunnel's way is said to carry, perhaps by a forger: who is told less sends nothing any more."""
    expected = reference(fallback="ipip")
    for backend in expected.backends:
        backend.mtu = mtu
    service = expected.services[0 if inner == 4 else 2]
    service.table = expected.services[0 if outer == 4 else 2].table
    core = Core(expected)
    layer = IP(src="10.0.0.1", dst="10.0.0.100", flags="DF") if inner == 4 else IPv6(src="fd00:5::1", dst="fd00::100")
    head = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / layer / TCP(dport=80, flags="A")
    fits = max(mtu - (20 if outer == 4 else 40), 552 if inner == 4 else 1280)
    data = fits - len(head[1])
    (short,) = core.handle(bytes(head / bytes(data)))
    assert len(short) == len(head) + data + (20 if outer == 4 else 40)
    (long,) = core.handle(bytes(head / bytes(data + 1)))
    answer = Ether(long)[ICMP if inner == 4 else ICMPv6PacketTooBig]
    assert (answer.nexthopmtu if inner == 4 else answer.mtu) == fits
    assert core.counts()["too_big"] == 1


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("size", [10, 1400, 1461])
def test_scapy_agrees_with_the_tunnel(inner, outer, size):
    """What is encapsulated is what was sent; what does not fit is answered by an error that Scapy finds right."""
    expected = reference(fallback="ipip")
    for backend in expected.backends:
        backend.mtu = 1500
    service = expected.services[0 if inner == 4 else 2]
    service.table = expected.services[0 if outer == 4 else 2].table
    core = Core(expected)
    layer = IP(src="10.0.0.1", dst="10.0.0.100", flags="DF") if inner == 4 else IPv6(src="fd00:5::1", dst="fd00::100")
    frame = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / layer / TCP(dport=80, flags="A") / bytes(size)
    (out,) = core.handle(bytes(frame))
    got, again = Ether(out), Ether(out)
    if size == 1461:
        answer = got[ICMP if inner == 4 else ICMPv6PacketTooBig]
        assert (answer.nexthopmtu if inner == 4 else answer.mtu) == 1500 - (20 if outer == 4 else 40)
        assert (got.src, got.dst, got[1].src, got[1].dst) == (frame.dst, frame.src, layer.dst, layer.src)
        assert bytes(answer.payload)[:64] == bytes(frame[1])[:64]
        if inner == 4:
            del again[ICMP].chksum
        else:
            del again[ICMPv6PacketTooBig].cksum
    else:
        assert isinstance(got[1], IP if outer == 4 else IPv6)
        assert bytes(got[1].payload) == bytes(frame[1])
    if isinstance(again[1], IP):
        del again[1].chksum
    assert bytes(again) == out


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_scapy_agrees_with_the_redirected_frame(v6, partial):
    """Scapy makes the SYN, and computes the checksums of what comes out anew."""
    expected = reference()
    core = Core(expected)
    layer = IPv6(src="fd00:5::1", dst="fd00::100") if v6 else IP(src="10.0.0.1", dst="10.0.0.100")
    linux = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
    redirected = 0
    for sport in range(1, 40):
        tcp = TCP(sport=sport, dport=80, flags="S", options=[*linux, (42, b""), ("NOP", None), ("NOP", None)])
        raw = bytearray(bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / layer / tcp))
        if partial:
            l4 = 54 if v6 else 34
            addresses = bytes(raw[l4 - 32 : l4] if v6 else raw[l4 - 8 : l4])
            half = len(addresses) // 2
            sum_ = packets.checksum(packets.pseudo(addresses[:half], addresses[half:], len(raw) - l4))
            raw[l4 + 16 : l4 + 18] = (~sum_ & 0xFFFF).to_bytes(2, "big")
        (out,) = core.handle(bytes(raw))
        if out is None:
            continue
        got = Ether(out)
        again = Ether(out)
        del again[TCP].chksum
        if not v6:
            del again[IP].chksum
        assert bytes(again) == out
        if core.counts().get("redirected", 0) > redirected:
            redirected += 1
            assert got[TCP].options[: len(linux)] == linux
            assert got[TCP].options[len(linux)] == (42, VIP6 if v6 else VIP4)
            assert got[IPv6 if v6 else IP].dst in {
                str(ipaddress.ip_address(b.address)) for b in expected.backends if len(b.address) == (16 if v6 else 4)
            }
    assert redirected > 10
