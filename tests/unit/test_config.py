"""Configurations: what they mean, and every fault of a bad one."""

from __future__ import annotations

import os
from ipaddress import ip_address, ip_network

import pytest
from crablb._native import lib
from hypothesis import given
from hypothesis import strategies as st

from crablb.cli import main
from crablb.config import (
    config_from_args,
    load_config,
    parse_backend,
    parse_config,
    parse_prefix,
    parse_service,
    parse_vip,
)
from crablb.errors import ConfigError
from crablb.model import Announce, Backend, Bypass, Fallback, Mode, OnDead, OptionForm, State, Vip, XdpMode
from crablb.values import MAX_MACS, parse_macs

GOOD = """
interface = "eth1"
option = "experimental"
seed = "00112233445566778899aabbccddeeff"
xdp_mode = "generic"
queues = 2
busy_poll = 0
table_size = 655373
flows = 1024
ack_bypass = "off"
announce = "arp"

[[service]]
address = "tcp://10.0.0.100:80"
mode = "always"
fallback = "dsr-ipip"
on_dead = "reset"
redirect_clients = ["10.0.0.0/8", "192.168.0.0/16"]
backends = ["10.0.0.11", "10.0.0.12*3", { address = "10.0.0.13", weight = 2, cr = false, state = "drain" }]

[[service]]
address = "tcp://[fd00::100]:443"
backends = ["fd00::11", "[fd00::12]*0"]
"""


def test_everything(tmp_path):
    path = tmp_path / "lb.toml"
    path.write_text(GOOD)
    config = load_config(path)
    assert config.interfaces == ("eth1",)
    assert config.option is OptionForm.EXPERIMENTAL
    assert config.seed == bytes.fromhex("00112233445566778899aabbccddeeff")
    assert config.xdp_mode is XdpMode.GENERIC
    assert (config.queues, config.busy_poll, config.table_size, config.flows) == (2, 0, 655373, 1024)
    first, second = config.services
    assert first.vip == Vip(ip_address("10.0.0.100"), 80)
    assert first.mode is Mode.ALWAYS
    assert (first.on_dead, second.on_dead) == (OnDead.RESET, OnDead.REASSIGN)
    assert config.ack_bypass is Bypass.OFF
    assert config.announce is Announce.ARP
    assert (first.fallback, second.fallback) == (Fallback.DSR_IPIP, Fallback.AUTO)
    assert first.redirect_clients == (ip_network("10.0.0.0/8"), ip_network("192.168.0.0/16"))
    assert first.backends == (
        Backend(ip_address("10.0.0.11")),
        Backend(ip_address("10.0.0.12"), 3),
        Backend(ip_address("10.0.0.13"), 2, cr=False, state=State.DRAIN),
    )
    assert second.mode is Mode.NEGOTIATED
    assert second.backends == (Backend(ip_address("fd00::11")), Backend(ip_address("fd00::12"), 0))
    assert load_config(path, ("eth9", "eth8")).interfaces == ("eth9", "eth8")


def test_from_arguments_and_from_a_file_are_the_same(tmp_path):
    path = tmp_path / "lb.toml"
    path.write_text(
        'interface = "eth0"\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11", "10.0.0.12*3"]\n'
    )
    assert config_from_args(["eth0"], ["tcp://10.0.0.100:80=10.0.0.11, 10.0.0.12*3"]) == load_config(path)


BAD_VIPS = {
    "10.0.0.100:80": "'10.0.0.100:80' has no protocol; write tcp://10.0.0.100:80",
    "udp://10.0.0.100:80": "protocol 'udp' is not supported; connection redirection is made for tcp",
    "tcp://10.0.0.100": "'tcp://10.0.0.100' has no port; write tcp://10.0.0.100:80, or"
    " whatever port clients connect to",
    "tcp://[fd00::100]": "'tcp://[fd00::100]' has no port; write tcp://[fd00::100]:80, or"
    " whatever port clients connect to",
    "tcp://fd00::100:80": "'tcp://fd00::100:80' is not tcp://ADDRESS:PORT"
    " (an IPv6 address stands in brackets: tcp://[fd00::100]:80)",
    "tcp://10.0.0.100:0": "'0' is not a port (1 to 65535)",
    "tcp://10.0.0.100:65536": "'65536' is not a port (1 to 65535)",
    "tcp://10.0.0.100:http": "'http' is not a port (1 to 65535)",
    "tcp://10.0.0.256:80": "'10.0.0.256' is not an IP address (a VIP is written 10.0.0.1 or [fd00::1])",
    "tcp://127.0.0.1:80": "127.0.0.1 is a loopback address and cannot be a VIP",
    "tcp://0.0.0.0:80": "0.0.0.0 is an unspecified address and cannot be a VIP",
    "tcp://224.0.0.1:80": "224.0.0.1 is a multicast address and cannot be a VIP",
    "tcp://[fe80::1]:80": "[fe80::1] is a link-local address and cannot be a VIP",
    "tcp://[fe80::1%eth0]:80": "[fe80::1%eth0] has a zone; give an address that is unique without one",
    "tcp://[::ffff:10.0.0.1]:80": "[::ffff:10.0.0.1] is an IPv4-mapped address; write 10.0.0.1",
    "tcp://255.255.255.255:80": "255.255.255.255 is the broadcast address and cannot be a VIP",
}
BAD_BACKENDS = {
    "": "'' is not an IP address (a backend is written 10.0.0.1 or [fd00::1])",
    "10.0.0.11:80": "'10.0.0.11:80' has a port; redirection and direct server return keep the VIP's port,"
    " so leave it out",
    "[fd00::11]:80": "'[fd00::11]:80' has a port; redirection and direct server return keep the VIP's port,"
    " so leave it out",
    "10.0.0.11*x": "'x' is not a weight (0 to 65535)",
    "10.0.0.11*-1": "'-1' is not a weight (0 to 65535)",
    "10.0.0.11*65536": "65536 is not a weight (0 to 65535)",
    "server1": "'server1' is not an IP address (a backend is written 10.0.0.1 or [fd00::1])",
}


@pytest.mark.parametrize("text", BAD_VIPS)
def test_bad_vips(text):
    with pytest.raises(ConfigError) as caught:
        parse_vip(text)
    assert str(caught.value) == BAD_VIPS[text]


@pytest.mark.parametrize("text", BAD_BACKENDS)
def test_bad_backends(text):
    with pytest.raises(ConfigError) as caught:
        parse_backend(text)
    assert str(caught.value) == BAD_BACKENDS[text]


@pytest.mark.parametrize(
    ("macs", "fault"),
    [
        (["10.0.0.1"], r"^'10.0.0.1' is not a MAC address \(00:00:5e:00:01:07\)$"),
        ([7], "^7 is not a string$"),
        ("00:00:5e:00:01:07", "is not a list$"),
        (["ff:ff:ff:ff:ff:ff"], "^ff:ff:ff:ff:ff:ff is nobody's MAC address$"),
        ([f"02:00:00:00:00:{i:02x}" for i in range(15)], "^15 MAC addresses; the limit is 14$"),
    ],
)
def test_bad_macs(macs, fault):
    with pytest.raises(ConfigError, match=fault):
        parse_macs(macs)


def test_there_is_room_for_all_macs():
    assert MAX_MACS + 2 == lib.CRAB_MAX_MACS


def test_bad_prefixes():
    with pytest.raises(ConfigError, match=r"^10.0.0.1/24 has bits set behind the prefix; write 10.0.0.0/24$"):
        parse_prefix("10.0.0.1/24")
    for mapped in ("::ffff:10.0.0.0/104", ip_network("::ffff:10.0.0.0/104")):
        with pytest.raises(ConfigError, match=r"is a prefix of IPv4-mapped addresses; write 10.0.0.0/8$"):
            parse_prefix(mapped)
    with pytest.raises(ConfigError, match=r"^'here' is not a prefix \(10.0.0.0/8 or fd00::/8\)$"):
        parse_prefix("here")


def test_every_fault_of_a_service_at_once():
    with pytest.raises(ConfigError) as caught:
        config_from_args(
            "eth0",
            [
                "tcp://10.0.0.100:http=10.0.0.11,10.0.0.300",
                "tcp://10.0.0.101:80",
                "tcp://10.0.0.102:80=10.0.0.11,10.0.0.11,fd00::1,10.0.0.103",
                "tcp://10.0.0.102:80=10.0.0.12",
                "tcp://10.0.0.103:80=10.0.0.12*0",
            ],
        )
    first, second, third, fourth, fifth = (
        "--service tcp://10.0.0.100:http=10.0.0.11,10.0.0.300",
        "--service tcp://10.0.0.101:80",
        "--service tcp://10.0.0.102:80=10.0.0.11,10.0.0.11,fd00::1,10.0.0.103",
        "--service tcp://10.0.0.102:80=10.0.0.12",
        "--service tcp://10.0.0.103:80=10.0.0.12*0",
    )
    assert caught.value.problems == [
        f"{first}: VIP: 'http' is not a port (1 to 65535)",
        f"{first}: backend 2: '10.0.0.300' is not an IP address (a backend is written 10.0.0.1 or [fd00::1])",
        f"{second}: 'tcp://10.0.0.101:80' is not VIP=BACKEND,BACKEND,... (tcp://10.0.0.100:80=10.0.0.11,10.0.0.12)",
        f"{third}: backend 10.0.0.11 is named twice; use a weight instead",
        f"{third}: backend fd00::1 is IPv6 and 10.0.0.102:80 is IPv4; only a tunnel leads from one"
        " to the other: fallback = 'dsr-ipip'",
        f"{third}: backend 10.0.0.103 is also a VIP ({fifth}); give it an own address",
        f"{fourth}: tcp://10.0.0.102:80 is served already by {third}; put all its backends there",
        f"{fifth}: every backend of tcp://10.0.0.103:80 has weight 0; give one a weight",
    ]


BAD_FILES = {
    'interface = ["eth0", "eth1", "eth0"]\n[[service]]\naddress = "tcp://10.0.0.100:80"\npolicy = "least-conections"\n'
    'slow_start = -1\nsource_prefix = [33]\nbackends = ["10.0.0.11"]\n': [
        "interface: eth0 is named twice",
        "service 1 (line 2): policy: 'least-conections' is no policy; did you mean least-connections?",
        "service 1 (line 2): slow_start: -1 is not a number of seconds from 0 to 86400",
        "service 1 (line 2): source_prefix: [33] is not a pair of prefix lengths, for IPv4 and IPv6: [24, 56]",
    ],
    'interface = []\n[[service]]\naddress = "tcp://10.0.0.100:80"\nsource_prefix = [24, 56]\n'
    'backends = ["10.0.0.11"]\n': [
        "interface: names no interface",
        "service 1 (line 2): source_prefix: is of use with policy = 'source-hash' only, not with 'maglev'",
    ],
    "interface = ": ["Invalid value (at end of document)"],
    "": [
        "interface is missing; add interface = 'eth0', or pass --iface",
        "no [[service]]; add one with address and backends",
    ],
    'interface = "eth0"\nqueue = 3\nbusy_poll = -1\ntable_size = 100\nseed = "x"\nxdp_mode = "fast"\nservice = 3': [
        "unknown key 'queue'; did you mean queues?",
        "busy_poll: -1 is not a whole number from 0 to 1000000",
        "xdp_mode: 'fast' is not one of auto, native, generic",
        "seed: must be 32 hexadecimal digits (make one: openssl rand -hex 16)",
        "table_size: 100 is not prime, as a table's size must be (65537 and 655373 are usual)",
        "service: 3 is not a list",
    ],
    'interface = "eth0"\n\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackend = ["10.0.0.11"]\nmode = "yes"\n': [
        "service 1 (line 3): unknown key 'backend'; did you mean backends?",
        "service 1 (line 3): mode: 'yes' is not one of negotiated, always, never",
    ],
    'interface = "eth0"\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = [7, {address="10.0.0.1", w=1}]\n'
    'redirect_clients = ["10.0.0.1/8"]\n[[service]]\naddress = "tcp://10.0.0.101:80"\n'
    'backends = ["10.0.0.1"]\nredirect_clients = []\n': [
        "service 1 (line 2): backends[0]: 7 is neither an address nor a table"
        " {address=..., weight=..., cr=..., state=..., backup=..., check_address=..., check_port=...}",
        "service 1 (line 2): backends[1]: unknown key 'w'; known are address, backup, check_address,"
        " check_port, cr, state, weight",
        "service 1 (line 2): redirect_clients[0]: 10.0.0.1/8 has bits set behind the prefix; write 10.0.0.0/8",
        "service 2 (line 6): redirect_clients: is empty; leave it out to mean all, or set mode = 'never' for none",
    ],
    'interface = "eth0"\ntable_size = 7\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.1.1",'
    '"10.0.1.2","10.0.1.3","10.0.1.4","10.0.1.5","10.0.1.6","10.0.1.7","10.0.1.8"]\n'
    'redirect_clients = ["fd00::/8"]\n[[service]]\naddress = "tcp://10.0.0.101:80"\nbackends = []\n': [
        "service 1 (line 3): redirect_clients: fd00::/8 can hold no client of tcp://10.0.0.100:80",
        "service 1 (line 3): 8 backends do not fit a table of 7 slots; set table_size to a prime above 800",
        "service 2 (line 7): tcp://10.0.0.101:80 has no backends; name at least one",
    ],
}


@pytest.mark.parametrize("text", BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files(tmp_path, text):
    path = tmp_path / "lb.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    found = [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]
    assert sorted(found) == sorted(BAD_FILES[text])


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "binary.toml")


texts = st.text("0123456789abcdef:.[]/*=,tcp %-x" + "\u0665é", max_size=40)


@given(text=texts)
def test_garbage_is_a_config_error_or_a_value(text):
    for parse in (parse_vip, parse_backend, parse_prefix, parse_service):
        try:
            parse(text)
        except ConfigError as error:
            assert str(error)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
keys = st.sampled_from(["interface", "option", "seed", "xdp_mode", "queues", "table_size", "flows", "other"])
entry_keys = st.sampled_from(["address", "mode", "redirect_clients", "backends", "other"])


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "nan" if value is None else str(value)


@given(table=st.dictionaries(keys, values), entries=st.lists(st.dictionaries(entry_keys, values), max_size=3))
def test_garbage_files_are_config_errors(tmp_path_factory, table, entries):
    lines = [f"{k} = {toml(v)}" for k, v in table.items()]
    for entry in entries:
        lines += ["[[service]]", *(f"{k} = {toml(v)}" for k, v in entry.items())]
    path = tmp_path_factory.mktemp("config") / "lb.toml"
    path.write_text("\n".join(lines))
    try:
        load_config(path)
    except ConfigError as error:
        assert all(problem.startswith(str(path)) for problem in error.problems)


@pytest.mark.parametrize("digits", [6000, 300])
@pytest.mark.parametrize(
    "line", ["flows = {}", "table_size = {}", "queues = {}", "report_listen = {}", "option = {}", "interface = [{}]"]
)
def test_numbers_that_python_has_no_words_for(tmp_path, line, digits):
    path = tmp_path / "lb.toml"
    path.write_text(
        line.format("0x" + "f" * digits) + "\n[[service]]\naddress = 'tcp://10.0.0.100:80'\nbackends = []\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["eth0"])
    assert any(line.split()[0] in problem for problem in caught.value.problems)
    assert all(len(problem) < 1000 for problem in caught.value.problems)


def test_a_file_that_never_ends(tmp_path):
    os.mkfifo(tmp_path / "lb.toml")
    with pytest.raises(ConfigError, match="is a pipe"):
        load_config(tmp_path / "lb.toml", ["eth0"])


def test_what_is_named_twice_is_told_beside_other_faults():
    """Also where the services that name it have faults of their own."""
    text = """
interface = "eth0"
table_size = 4
[[service]]
address = "tcp://10.0.0.100:80"
mode = "sometimes"
backends = ["10.0.0.11", "10.0.0.11*2", { address = "10.0.0.12", wight = 3 }, "10.0.0.12*many"]
[[service]]
address = "tcp://10.0.0.100:80"
backends = []
[[service]]
address = "tcp://10.0.0.300:80"
backends = ["10.0.0.13", 5, "10.0.0.13", "10.0.0.100"]
"""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, where="lb.toml")
    told = caught.value.problems
    first, second, third = (f"lb.toml: service {n} (line {line})" for n, line in ((1, 4), (2, 8), (3, 11)))
    for where, words in (
        ("lb.toml: table_size", "is not"),
        (first, "mode: 'sometimes'"),
        (first, "backend 10.0.0.11 is named twice"),
        (first, "backends[2]: unknown key 'wight'"),
        (first, "backends[3]: "),
        (first, "backend 10.0.0.12 is named twice"),
        (second, "tcp://10.0.0.100:80 is served already by service 1 (line 4)"),
        (second, "has no backends"),
        (third, "address: "),
        (third, "backends[1]: "),
        (third, "backend 10.0.0.13 is named twice"),
        (third, "backend 10.0.0.100 is also a VIP (service 2 (line 8))"),
    ):
        assert [line for line in told if line.startswith(where) and words in line], (where, words, told)
    assert len(told) == 12, told
    with pytest.raises(ConfigError, match=r"10\.0\.0\.11 is named twice"):
        config_from_args("eth0", ["tcp://10.0.0.100:http=10.0.0.11,10.0.0.11"])


def test_what_this_machine_says_of_it(tmp_path, capsys, monkeypatch):
    """By ``crablb check --here``: what would have a start refused."""
    monkeypatch.setattr("crablb.kernel.rtnetlink.reached_by", lambda _: {"10.0.0.100"})
    path = tmp_path / "lb.toml"
    path.write_text(
        'interface = "crab-none"\nadmin_group = "crab-nobody"\n'
        '[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n'
    )
    assert main(["check", str(path)]) == 0
    assert "admin_group" not in capsys.readouterr().err
    assert main(["check", str(path), "--here"]) == 0
    told = capsys.readouterr().err
    assert "admin_group: there is no group 'crab-nobody'; make it: groupadd" in told
    assert "10.0.0.100 is this machine's own address" in told
    assert "interface: " in told
