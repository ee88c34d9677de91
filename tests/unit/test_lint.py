"""``crablb check``: what is wrong, and what is legal and odd; and settings that are of no use beside others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crablb import Backend, Service
from crablb.cli import main
from crablb.config import checked, config_from_args, parse_config, parse_vip
from crablb.errors import ConfigError
from crablb.lint import odd, unreadable
from crablb.model import Check, CheckKind, Config, Switch
from crablb.values import parse_address, parse_endpoint

SERVICE = '[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = {}\n'
TWO = '["10.0.0.11", "10.0.0.12"]'


def warnings(more: str = "", backends: str = TWO, before: str = "") -> list[str]:
    return odd(parse_config(f'interface = "eth0"\n{before}\n{SERVICE.format(backends)}{more}\n'))


def test_nothing_is_odd_of_what_is_usual():
    assert warnings() == []
    assert warnings("quorum = 1\nquorum_hysteresis = 1\nredirect_clients = ['10.0.0.0/8', '192.168.0.0/16']") == []
    assert warnings('check = ["tcp", "redirect", "fallback"]\nslow_start = 30\nmode = "always"') == []
    assert warnings(before='metrics_listen = "127.0.0.1"\nkeep = 60') == []
    assert warnings("panic = 0") == []


ODD = [
    ("quorum = 3", TWO, "", "quorum: 3 is above the weight of its backends, 2"),
    ("quorum = 2\nquorum_hysteresis = 1", TWO, "", "never announced again"),
    ("quorum = 1", '[{ address = "10.0.0.11", backup = true }, "10.0.0.12*0"]', "", "the weight of its backends, 0"),
    ("", '[{ address = "10.0.0.11", state = "drain" }]', "", "no backend gets new connections: all are drain"),
    ("", '["10.0.0.11", "10.0.0.12*101"]', "", "weights are far apart: 10.0.0.11 gets one connection for 101"),
    ("", '[{ address = "10.0.0.11", backup = true }]', "", "all backends are backups"),
    ("", TWO, "table_size = 101", "table_size: 101 slots for 2 backends"),
    ("panic = 0", '["10.0.0.11"]', "", "panic: with 0 and one backend"),
    ("check = []\nquorum = 1", TWO, "", "quorum: without checks"),
    ("check = []", '[{ address = "10.0.0.11", check_port = 1 }]', "", "10.0.0.11: check_address, check_port: there"),
    ('check = [{ type = "tcp", timeout = 2 }]', TWO, "", "check tcp: timeout: 2 s, and the next one is due after 2 s"),
    ('check = [{ type = "tcp", fast_interval = 3 }]', TWO, "", "check tcp: fast_interval: 3 s is slower"),
    ('check = ["tcp", "tcp"]', TWO, "", "check tcp: is there twice"),
    ('check = ["redirect"]\nmode = "never"', TWO, "", 'check redirect: with mode = "never"'),
    ('check = ["redirect"]', '[{ address = "10.0.0.11", cr = false }]', "", "no backend is redirected to"),
    ('check = [{ type = "https", verify = true }]', TWO, "", "names 10.0.0.100; say sni, or host"),
    ('check = [{ type = "tls", verify = true }]', TWO, "", "check tls: verify: a certificate seldom names 10.0.0."),
    ('redirect_clients = ["0.0.0.0/0"]', TWO, "", "redirect_clients: 0.0.0.0/0 is everybody"),
    ('redirect_clients = ["10.0.0.0/8", "10.1.0.0/16"]', TWO, "", "10.1.0.0/16 is within 10.0.0.0/8"),
    ('redirect_clients = ["10.0.0.0/8", "10.0.0.0/8"]', TWO, "", "10.0.0.0/8 is there twice"),
    ('redirect_clients = ["10.0.0.0/8"]\nmode = "never"', TWO, "", 'redirect_clients: with mode = "never"'),
    ('fallback = "dsr-ipip"', '["fd00::11"]', "", "no backend is of the VIP's address family"),
    ("slow_start = 7200", TWO, "", "slow_start: 7200 s is more than an hour"),
    ("", TWO, 'metrics_listen = "0.0.0.0"', "metrics_listen: 0.0.0.0 is every address of this machine"),
    ("", TWO, 'metrics_listen = "[::]:9117"', "metrics_listen: :: is every address"),
    ("", TWO, 'keep = 60\nack_bypass = "off"', "there is nothing to keep"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "backends", "before", "told"), ODD, ids=range(len(ODD)))
def test_what_is_odd_is_told(more, backends, before, told):
    found = warnings(more, backends, before)
    assert [words for words in found if told in words], found


def test_files_that_are_not_there():
    config = parse_config(
        'interface = "e"\nadmin_listen = "10.0.0.2"\nadmin_cert = "/no/c"\nadmin_key = "/no/k"\n'
        + 'admin_token_file = "/no/t"\n'
        + SERVICE.format(TWO)
        + 'check = [{ type = "exec", command = ["/no/check"] },'
        + '{ type = "tls", verify = true, sni = "a", ca_file = "/no/a" }]'
    )
    assert [words.rpartition(": ")[2].split()[0] for words in unreadable(config)] == [
        "/no/c", "/no/k", "/no/t", "/no/check", "/no/a",
    ]  # fmt: skip


# ---- the command ----


@pytest.mark.parametrize("command", [["check"], ["config", "check"]])
def test_the_command_tells_all_of_it(command, tmp_path: Path, capsys):
    path = tmp_path / "lb.toml"
    path.write_text('interface = "eth0"\n' + SERVICE.format(TWO))
    assert main([*command, str(path)]) == 0
    assert capsys.readouterr() == ("ok\n", "")
    path.write_text('interface = "eth0"\n' + SERVICE.format(TWO) + "quorum = 3\n")
    assert main([*command, str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == "ok, with 1 warning\n"
    assert err.startswith("crablb: warning: tcp://10.0.0.100:80: quorum: 3")
    assert main([*command, str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["problems"], len(told["warnings"])) == ([], 1)
    path.write_text("queues = 0\nflow = 1\n")
    assert main([*command, str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4  # with those that are missing
    assert main([*command, str(path), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 4
    assert main([*command, str(tmp_path / "none.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


# ---- what is of no use beside what else is said ----

CHECKS = [
    ('type = "tcp", path = "/"', "path: is of use with type http, https only, not with tcp"),
    ('type = "tcp", method = "GET"', "method: is of use"),
    ('type = "agent", port = 1, status = [200]', "status: is of use"),
    ('type = "tls", host = "a"', "host: is of use"),
    ('type = "tls", body = "a"', "body: is of use"),
    ('type = "http", sni = "a"', "sni: is of use with type https, tls only, not with http"),
    ('type = "tls", sni = "a.example:443"', "sni: 'a.example:443' has a port, which no certificate has"),
    ('type = "tls", sni = "a.example."', "sni: 'a.example.' has a trailing dot, which no certificate has"),
    ('type = "http", verify = false', "verify: is of use"),
    ('type = "tcp", ca_file = "/a"', "ca_file: is of use"),
    ('type = "https", ca_file = "/a"', "ca_file: is of use with verify = true only"),
    ('type = "redirect", port = 1', "port: is of use with type tcp, http, https, tls, exec, agent only"),
    ('type = "fallback", port = 1', "port: is of use"),
    ('type = "tcp", command = ["/a"]', "command: is of use with type exec only"),
    ('type = "http", method = "HEAD", body = "a"', "body: is of no use with method = 'HEAD'"),
    ('type = "exec"', "command is missing"),
    ('type = "agent"', "port is missing"),
]


@pytest.mark.parametrize(("check", "told"), CHECKS)
def test_keys_of_a_check_that_are_of_no_use(check, told):
    text = f'interface = "eth0"\n{SERVICE.format(TWO)}check = [{{ {check} }}]\n'
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"service 1 (line 2): check[0]: {told}")


def test_and_the_library_s():
    service = Service(parse_vip("tcp://10.0.0.100:80"), (Backend(parse_address("10.0.0.11")),))
    for check, told in [
        (Check(CheckKind.TCP, path="/x"), "path: is of use"),
        (Check(CheckKind.EXEC), "command is missing"),
        (Check("tcp", sni="a"), "sni: is of use"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(ConfigError, match=told):
            checked(Service(service.vip, service.backends, checks=(check,)))
    assert checked(Service(service.vip, service.backends, checks=(Check(CheckKind.HTTP, path="/x"),)))
    with pytest.raises(ConfigError, match="quorum_hysteresis: is of use with quorum only"):
        checked(Service(service.vip, service.backends, quorum_hysteresis=1))
    with pytest.raises(ConfigError, match="admin_listen: needs admin_cert, admin_key, admin_token_file"):
        checked(Config(("eth0",), (), admin_listen=parse_endpoint("10.0.0.2", 7172)))
    with pytest.raises(ConfigError, match="admin_group: is of no use with admin off"):
        checked(Config(("eth0",), (), admin=Switch.OFF, admin_group="adm"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"admin_listen": "10.0.0.2"}, "--admin-listen: needs --admin-cert, --admin-key, --admin-token-file as well"),
        ({"admin_cert": "/c"}, "--admin-cert: is of use with --admin-listen only"),
        ({"admin": "off", "admin_group": "adm"}, "--admin-group: is of no use with --admin off"),
        ({"quorum_hysteresis": "2"}, "--quorum-hysteresis: is of use with --quorum only"),
    ],
)
def test_and_those_of_arguments(given, told):
    with pytest.raises(ConfigError) as caught:
        config_from_args("eth0", ["tcp://10.0.0.100:80=10.0.0.11"], **given)
    assert [told in problem for problem in caught.value.problems] == [True]


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ('admin_listen = "10.0.0.2"\nadmin_cert = "/c"', "admin_listen: needs admin_key, admin_token_file as well"),
        ('admin_key = "/k"', "admin_key: is of use with admin_listen only"),
        ('admin = "off"\nadmin_group = "adm"', "admin_group: is of no use with admin off"),
    ],
)
def test_and_those_of_files(before, told):
    with pytest.raises(ConfigError) as caught:
        parse_config(f'interface = "eth0"\n{before}\n{SERVICE.format(TWO)}')
    assert [told in problem for problem in caught.value.problems] == [True]
