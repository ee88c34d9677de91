"""The table of options, and what is made of it: files, arguments and the library's settings take the same."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from crablb._native import ffi, lib

from crablb import Backend, LoadBalancer, Service, Vip, options
from crablb.cli import make_parser, parsers
from crablb.cli.serve import read_config
from crablb.config import checked, load_config
from crablb.errors import ConfigError
from crablb.model import (
    CONSISTENT,
    POLICIES,
    Announce,
    Bypass,
    Check,
    CheckKind,
    Closed,
    Config,
    Fallback,
    Hashing,
    Initially,
    Mode,
    OnDead,
    OptionForm,
    Switch,
    XdpMode,
)
from crablb.options import OPTIONS, of, toml
from tests.helpers.secret import secret

SCOPES = (Config, Service, Backend, Check)
ONE = "tcp://10.0.0.100:80=10.0.0.11"
SERVICE = '[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n'
SIX = "tcp://[fd00::100]:80=fd00::11"
SEED = "00112233445566778899aabbccddeeff"


def serve(*args: str) -> argparse.Namespace:
    return make_parser(["serve"]).parse_args(["serve", *args])


@pytest.mark.parametrize("scope", SCOPES)
def test_every_field_has_one_row(scope):
    assert sorted(option.field for option in of(scope)) == sorted(field.name for field in fields(scope))
    assert len({option.name for option in of(scope)}) == len(of(scope))


def test_every_row_has_a_flag_or_says_why_not():
    assert all(bool(option.flags) != bool(option.no_flag) for option in OPTIONS)
    assert all(option.flags for option in of(Config))
    # Of a service only what --service says has none of its own.
    assert [option.name for option in of(Service) if not option.flags] == ["address", "backends"]


def test_the_flags_of_serve_are_those_of_the_table():
    (parser,) = (each for each in parsers(make_parser(["serve"])) if each.prog == "crablb serve")
    there = {flag for action in parser._actions for flag in action.option_strings}
    assert there - {"-h", "--help", "--config", "--log-level", "--takeover"} == {
        flag for o in OPTIONS for flag in o.flags
    }


def test_what_must_be_there_and_what_need_not():
    for option in OPTIONS:
        assert (option.default is MISSING) == (bool(option.missing) or option.field == "backends"), option.name
        assert bool(option.default_words) == (option.default is not MISSING), option.name


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS if not o.kind.nested], ids=lambda o: f"{o.scope.__name__}-{o.name}"
)
def test_a_value_is_what_its_own_check_takes(option, tmp_path):
    """So that files, arguments and the library's settings can be checked by one function."""
    example = option.example
    if option.field == "report_key":
        example = str(tmp_path / "key")
        secret(Path(example), "ab" * 32)
    for given in example if option.kind.each else [example]:
        value = option.kind.parse(given)
        assert option.kind.parse(value) == value
    if option.default not in (MISSING, None, ()):
        assert option.kind.parse(option.default) == option.default


#: Each option as an argument, as a file has it, and the value that both mean.
SAME = {
    "interface": (["--iface", "eth0", "--interface", "eth1"], ["eth0", "eth1"], ("eth0", "eth1")),
    "service": (
        ["--service", ONE],
        None,
        (Service(Vip(ip_address("10.0.0.100"), 80), (Backend(ip_address("10.0.0.11")),)),),
    ),
    "option": (["--option", "experimental"], "experimental", OptionForm.EXPERIMENTAL),
    "seed": (["--seed-file", "{seed}"], SEED, bytes.fromhex(SEED)),
    "xdp_mode": (["--xdp-mode", "generic"], "generic", XdpMode.GENERIC),
    "queues": (["--queues", "2"], 2, 2),
    "busy_poll": (["--busy-poll", "0"], 0, 0),
    "table": (["--table", "rendezvous"], "rendezvous", Hashing.RENDEZVOUS),
    "table_size": (["--table-size", "655373"], 655373, 655373),
    "flows": (["--flows", "1024"], 1024, 1024),
    "keep": (["--keep", "60"], 60, 60.0),
    "ack_bypass": (["--ack-bypass", "off"], "off", Bypass.OFF),
    "announce": (["--announce", "arp"], "arp", Announce.ARP),
    "allow_own_address": (["--allow-own-address"], True, True),
    "ping": (["--ping", "false"], False, False),
    "closed": (["--closed", "drop"], "drop", Closed.DROP),
    "macs": (
        ["--macs", "00:00:5E:00:01:07, 02:00:00:00:00:09"],
        ["00:00:5e:00:01:07", "02:00:00:00:00:09"],
        ("00:00:5e:00:01:07", "02:00:00:00:00:09"),
    ),
    "report_listen": (["--report-listen", "10.0.0.2"], "10.0.0.2", (ip_address("10.0.0.2"), 7171)),
    "report_key_file": (["--report-key", "{key}"], "{key}", bytes.fromhex("ab" * 32)),
    "mode": (["--mode", "never"], "never", Mode.NEVER),
    "redirect_clients": (
        ["--redirect-clients", "10.0.0.0/8, 192.168.0.0/16"],
        ["10.0.0.0/8", "192.168.0.0/16"],
        (ip_network("10.0.0.0/8"), ip_network("192.168.0.0/16")),
    ),
    "fallback": (["--fallback", "dsr-ipip"], "dsr-ipip", Fallback.DSR_IPIP),
    "on_dead": (["--on-dead", "reset"], "reset", OnDead.RESET),
    "policy": (["--policy", "source-hash"], "source-hash", "source-hash"),
    "source_prefix": (["--source-prefix", "24,56"], [24, 56], (24, 56)),
    "slow_start": (["--slow-start", "2.5"], 2.5, 2.5),
    "syn_rate": (["--syn-rate", "20000"], 20000, 20000),
    "admin": (["--admin", "off"], "off", Switch.OFF),
    "admin_group": (["--admin-group", "adm"], "adm", "adm"),
    "admin_listen": (["--admin-listen", "10.0.0.2"], "10.0.0.2", (ip_address("10.0.0.2"), 7172)),
    "admin_cert": (["--admin-cert", "/a.crt"], "/a.crt", "/a.crt"),
    "admin_key": (["--admin-key", "/a.key"], "/a.key", "/a.key"),
    "admin_token_file": (["--admin-token-file", "/a.token"], "/a.token", "/a.token"),
    "metrics_listen": (["--metrics-listen", "127.0.0.1"], "127.0.0.1", (ip_address("127.0.0.1"), 9117)),
    "persist": (["--persist", "off"], "off", Switch.OFF),
    "watch": (["--watch"], True, True),
    "check": (
        ["--check", "tcp,redirect"],
        ["tcp", "redirect"],
        (Check(CheckKind.TCP), Check(CheckKind.REDIRECT)),
    ),
    "initially": (["--initially", "down"], "down", Initially.DOWN),
    "panic": (["--panic", "30"], 30, 30),
    "quorum": (["--quorum", "2"], 2, 2),
    "quorum_hysteresis": (["--quorum-hysteresis", "1"], 1, 1),
}
TOGETHER = [
    {"report_listen", "report_key_file"},
    {"policy", "source_prefix"},
    {"quorum", "quorum_hysteresis"},
    {"admin_listen", "admin_cert", "admin_key", "admin_token_file"},
]


def test_an_argument_and_a_key_for_every_option():
    assert set(SAME) == {option.name for option in OPTIONS if option.flags}


@pytest.mark.parametrize("name", SAME)
def test_arguments_and_files_mean_the_same(name, tmp_path):
    places = {"key": tmp_path / "key", "seed": tmp_path / "seed"}
    secret(places["key"], "ab" * 32 + "\n")
    secret(places["seed"], f"{SEED}\n")
    names = next((pair for pair in TOGETHER if name in pair), {name}) | {"interface", "service"}
    arguments = [part.format(**places) for each in names for part in SAME[each][0]]
    said: dict[type, list[str]] = {Config: [], Service: []}
    for option in OPTIONS:
        if option.name in names and option.name != "service" and option.scope in said:
            said[option.scope].append(f"{option.name} = {toml(SAME[option.name][1])}".format(**places))
    path = tmp_path / "lb.toml"
    path.write_text("\n".join([*said[Config], SERVICE, *said[Service]]))
    config = load_config(path)
    assert read_config(serve(*arguments)) == config
    option = next(o for o in OPTIONS if o.name == name and o.flags)
    found = getattr(config if option.scope is Config else config.services[0], option.field)
    assert found == SAME[name][2]
    # The library takes the values, and the words that stand for them.
    assert checked(config) == config


def test_prefixes_for_services_of_both_families():
    both = ["--iface", "eth0", "--service", ONE, "--service", SIX]
    four, six = read_config(serve(*both, "--redirect-clients", "10.0.0.0/8,fd00::/8")).services
    assert (four.redirect_clients, six.redirect_clients) == ((ip_network("10.0.0.0/8"),), (ip_network("fd00::/8"),))
    with pytest.raises(ConfigError) as caught:
        read_config(serve(*both, "--redirect-clients", "10.0.0.0/8"))
    assert caught.value.problems == [
        f"--service {SIX}: --redirect-clients names no IPv6 prefix; to redirect none: --mode never"
    ]


@pytest.mark.parametrize("name", sorted(set(SAME) - {"interface"}))
def test_with_a_file_it_is_the_file_that_says_it(name, tmp_path):
    path = tmp_path / "lb.toml"
    path.write_text('[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n')
    arguments = ["--config", str(path), "--iface", "eth5"]
    assert read_config(serve(*arguments)).interfaces == ("eth5",)
    flag = SAME[name][0][0]
    with pytest.raises(ConfigError) as caught:
        read_config(serve(*arguments, *SAME[name][0]))
    called = flag if name == flag[2:].replace("-", "_") else f"{flag} (key: {name})"
    assert caught.value.problems == [f"{called} cannot be given with --config; say it in {path}"]


def test_what_a_reload_may_change():
    """Another list than the table: who changes one of them is to think of it."""
    assert set(options.fixed_fields()) == {
        "interfaces", "seed", "xdp_mode", "queues", "busy_poll", "table", "table_size", "flows", "ack_bypass",
        "announce", "report_listen", "report_key", "admin", "admin_group", "admin_listen", "admin_cert", "admin_key",
        "admin_token_file", "metrics_listen", "persist",
    }  # fmt: skip


def test_policies_are_those_of_c():
    names = []
    while name := lib.crab_policy_name(len(names)):
        names.append(ffi.string(name).decode())
    assert [policy for policy in POLICIES if policy not in CONSISTENT] == names


# ---- arguments that are wrong ----

BAD = {
    "--iface": {name: f"{name!r} is not the name of an interface (see ip link)" for name in ("", "a b", "../x", "a\n")},
    "--option": {"42": "'42' is not one of crab, experimental"},
    "--seed-file": {
        "": "'' names no file; make a seed: openssl rand -hex 16",
        "{none}": "{none}: cannot be read: No such file or directory; make a seed: openssl rand -hex 16",
        "{short}": "{short}: does not hold 32 hexadecimal digits; make a seed: openssl rand -hex 16",
    },
    "--xdp-mode": {"": "'' is not one of auto, native, generic"},
    "--queues": {
        "": "'' is not a whole number from 1 to 64",
        "four": "'four' is not a whole number from 1 to 64",
        "4.0": "4.0 is not a whole number from 1 to 64",
        "-1": "-1 is not a whole number from 1 to 64",
        "9" * 5000: f"'{'9' * 199}... is not a whole number from 1 to 64",
        "\u0663": "'\u0663' is not a whole number from 1 to 64",
    },
    "--table-size": {"65536": "65536 is not prime, as a table's size must be (65537 and 655373 are usual)"},
    "--flows": {"0": "0 is not a whole number from 64 to 67108864"},
    "--report-listen": {
        "lb:7171": "'lb' is not an IP address (an endpoint is written 10.0.0.1 or [fd00::1])",
        "10.0.0.2:0": "'10.0.0.2:0' is not ADDRESS or ADDRESS:PORT (an IPv6 address stands in brackets)",
    },
    "--report-key": {
        "": "'' names no file; make a key: crablb key new",
        "{folder}": "{folder}: cannot be read: Is a directory; make a key: crablb key new",
        "{binary}": "{binary}: is not UTF-8 text; make a key: crablb key new",
        "{short}": "{short}: does not hold 64 hexadecimal digits; make a key: crablb key new",
    },
    "--mode": {"yes": "'yes' is not one of negotiated, always, never"},
    "--redirect-clients": {
        "": "'' is not a prefix (10.0.0.0/8 or fd00::/8)",
        "10.0.0.1/8,x": "10.0.0.1/8 has bits set behind the prefix; write 10.0.0.0/8\n"
        "--redirect-clients: 'x' is not a prefix (10.0.0.0/8 or fd00::/8)",
    },
    "--policy": {
        "": "'' is no policy; there are " + ", ".join(POLICIES) + ", or module:function",
        "rondom": "'rondom' is no policy; did you mean random?",
        "nowhere:f": "module 'nowhere' cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
    },
    "--source-prefix": {
        "24": "[24] is not a pair of prefix lengths, for IPv4 and IPv6: [24, 56]",
        "33,x": "33 is not a whole number from 1 to 32",
        "24,56": "is of use with --policy 'source-hash' only, not with 'maglev'",
    },
    "--slow-start": {
        "nan": "'nan' is not a number of seconds from 0 to 86400",
        "-1": "-1 is not a number of seconds from 0 to 86400",
        "10m": "'10m' is not a number of seconds from 0 to 86400",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "text"),
    [(flag, text) for flag, cases in BAD.items() for text in cases],
    ids=range(sum(map(len, BAD.values()))),
)
def test_bad_arguments(flag, text, tmp_path):
    places = {name: tmp_path / name for name in ("none", "short", "folder", "binary")}
    places["short"].write_text("abcd")
    places["folder"].mkdir()
    places["binary"].write_bytes(b"\xff\xfe")
    rest = [] if flag == "--iface" else ["--iface", "eth0"]
    if flag == "--report-key":
        rest += ["--report-listen", "10.0.0.2"]
    if flag == "--report-listen":
        key = tmp_path / "key"
        secret(key, "ab" * 32)
        rest += ["--report-key", str(key)]
    if flag == "--source-prefix" and text != "24,56":
        rest += ["--policy", "source-hash"]
    with pytest.raises(ConfigError) as caught:
        read_config(serve("--service", ONE, *rest, flag, text.format(**places)))
    assert str(caught.value) == f"{flag}: {BAD[flag][text].format(**places)}"


def test_every_wrong_argument_at_once():
    with pytest.raises(ConfigError) as caught:
        read_config(serve("--queues", "0", "--policy", "rondom", "--report-listen", "10.0.0.2", "--service", "x"))
    assert sorted(caught.value.problems) == [
        "--policy: 'rondom' is no policy; did you mean random?",
        "--queues: 0 is not a whole number from 1 to 64",
        "--report-listen and --report-key belong together (make a key: crablb key new)",
        "--service x: 'x' is not VIP=BACKEND,BACKEND,... (tcp://10.0.0.100:80=10.0.0.11,10.0.0.12)",
        "say which interface to serve: --iface eth0",
    ]


# ---- files that are wrong ----

E = "interface = 'e'\n"
REPORTS = f"{E}report_listen = '10.0.0.2'\n"
FIRST = "service 1 (line 2): "
VIP_ONLY = "[[service]]\naddress = 'tcp://10.0.0.100:80'\n"
BAD_FILES = [
    (f"interface = 3\n{SERVICE}", "interface: 3 is not a string"),
    (f"interface = ''\n{SERVICE}", "interface: '' is not the name of an interface (see ip link)"),
    (f'interface = "e\\u0000"\n{SERVICE}', "interface: 'e\\x00' is not the name of an interface (see ip link)"),
    (f"{E}queues = {'9' * 5000}\n{SERVICE}", "Exceeds the limit"),
    (f"{E}flows = {'[' * 5000}{']' * 5000}\n", "is nested too deeply"),
    (f"{E}queues = true\n{SERVICE}", "queues: True is not a whole number from 1 to 64"),
    (f"{E}flows = 1.5\n{SERVICE}", "flows: 1.5 is not a whole number from 64 to 67108864"),
    (
        f'{REPORTS}report_key_file = "a\\u0000"\n{SERVICE}',
        "report_key_file: 'a\\x00': cannot be read: embedded null byte; make a key: crablb key new",
    ),
    (f"{REPORTS}report_key_file = 3\n{SERVICE}", "report_key_file: 3 is not a string"),
    (f"{E}{SERVICE}slow_start = nan\n", f"{FIRST}slow_start: nan is not a number of seconds from 0 to 86400"),
    (f"{E}{SERVICE}policy = 3\n", f"{FIRST}policy: 3 is not a string"),
    (f"{E}{SERVICE}redirect_clients = '10.0.0.0/8'\n", f"{FIRST}redirect_clients: '10.0.0.0/8' is not a list"),
    (f"{E}[[service]]\n", f"{FIRST}address is missing; add address = 'tcp://10.0.0.100:80', the VIP"),
    (f"{E}[service]\n", "service: {} is not a list"),
    (f"{E}service = [3]\n", "service 1: must be a table, written [[service]]"),
    (
        f"{E}{VIP_ONLY}backends = [{{weight = 2}}]\n",
        f"{FIRST}backends[0]: address is missing; add address = '10.0.0.11'",
    ),
    (
        f"{E}{VIP_ONLY}backends = [{{address = '10.0.0.11', weight = -1}}]\n",
        f"{FIRST}backends[0]: weight: -1 is not a weight (0 to 65535)",
    ),
    (
        f"{E}{VIP_ONLY}backends = [{{address = '10.0.0.11', cr = 'no'}}]\n",
        f"{FIRST}backends[0]: cr: 'no' is not true or false",
    ),
]


@pytest.mark.parametrize(("text", "problem"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files(text, problem, tmp_path):
    path = tmp_path / "lb.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [p for p in caught.value.problems if p.startswith(f"{path}: {problem}")], caught.value.problems
    assert all("\n" not in p for p in caught.value.problems)


def test_faults_of_arguments_and_of_the_file_together(tmp_path):
    path = tmp_path / "lb.toml"
    path.write_text(f"queues = 0\n{SERVICE}")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["eth0", "eth0"])
    assert caught.value.problems == [
        "--iface: eth0 is named twice",
        f"{path}: queues: 0 is not a whole number from 1 to 64",
    ]


def test_a_policy_that_ends_its_own_process(tmp_path, monkeypatch):
    (tmp_path / "ending_policy.py").write_text("raise SystemExit(3)\n")
    path = tmp_path / "lb.toml"
    path.write_text(f"interface = 'e'\n{SERVICE}policy = 'ending_policy:choose'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="module 'ending_policy' cannot be imported: SystemExit: 3"):
        load_config(path)


# ---- the library ----

A = ip_address("10.0.0.11")
VIP = Vip(ip_address("10.0.0.100"), 80)


def test_settings_of_the_library():
    lb = LoadBalancer("eth0", [Service(VIP, (Backend(A),), mode="never", slow_start=3)], announce="arp", queues=None)
    assert lb._config.announce is Announce.ARP
    assert lb.services == (Service(VIP, (Backend(A),), Mode.NEVER, slow_start=3.0),)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"queues": 0}, "queues: 0 is not a whole number from 1 to 64"),
        ({"flows": "many"}, "flows: 'many' is not a whole number from 64 to 67108864"),
        ({"flows": None}, "flows: None is not a whole number from 64 to 67108864"),
        ({"announce": "loudly"}, "announce: 'loudly' is not one of none, arp"),
        ({"table_size": 100}, "table_size: 100 is not prime"),
        ({"report_listen": (A, 7171)}, "report_listen and report_key belong together"),
        ({"report_listen": (A, 0), "report_key": bytes(32)}, "report_listen: '10.0.0.11:0' is not ADDRESS"),
        ({"report_listen": (A, 7171), "report_key": bytes(3)}, "report_key: a key has 32 bytes, not 3"),
        ({"interfaces": ()}, "interfaces: names no interface"),
        ({"interfaces": [3]}, "interfaces: 3 is not a string"),
        ({"services": [Service(Vip(A, 0), (Backend(A),))]}, r"tcp://10.0.0.11:0: vip: '0' is not a port"),
        (
            {"services": [Service(VIP, (Backend(A, -1),))]},
            r"tcp://10.0.0.100:80: backends\[0\]: weight: -1 is not a weight",
        ),
        ({"services": [Service(VIP, (Backend("x"),))]}, r"backends\[0\]: address: 'x' is not an IP address"),
        ({"services": [Service(VIP, ("10.0.0.11",))]}, r"backends\[0\]: '10.0.0.11' is no crablb.Backend"),
        (
            {"services": [Service(VIP, (Backend(A),), on_dead="laugh")]},
            "on_dead: 'laugh' is not one of reassign, reset",
        ),
    ],
)
def test_bad_settings_of_the_library(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        LoadBalancer(**{"interfaces": "eth0", **settings})


def test_addresses_as_text_become_addresses():
    assert checked(Service(VIP, (Backend("10.0.0.11", 3),))) == Service(VIP, (Backend(A, 3),))
