"""The commands' arguments: help, completions and manual pages of all of them, and what is typed wrong."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crablb import __version__
from crablb.cli import COMMANDS, main, make_parser, parsers
from crablb.options import OPTIONS
from docs.manpages import plain, write
from tests.helpers.processes import ROOT

ALL = list(parsers(make_parser()))


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command that is given wrong arguments says."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if not isinstance(a, argparse._HelpAction | argparse._SubParsersAction)]


# ---- help ----


@pytest.mark.parametrize("parser", ALL, ids=lambda parser: parser.prog.replace(" ", "-"))
@pytest.mark.parametrize("columns", ["30", "80", "1000"])
def test_help(parser, columns, monkeypatch):
    """Of any width; every argument is explained, and every default is told."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    shown = " ".join(parser.format_help().split())
    assert shown.startswith(f"usage: {parser.prog}")
    assert "(default: )" not in shown
    for action in actions(parser):
        assert action.help, action.dest
        assert all(flag in shown for flag in action.option_strings)
        if columns == "1000" and action.default not in (None, False, "", [], argparse.SUPPRESS):
            assert f"default: {action.default}" in shown


def test_the_help_of_serve_tells_every_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in OPTIONS:
        if option.flags and option.default_words:
            assert f"default: {option.default_words})" in option.explained
            assert option.explained in shown


def test_version():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from crablb.cli import main; main(['--version'])"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == f"crablb {__version__}\n"


def test_the_version_needs_nothing_compiled():
    """It is what somebody whose crablb does not start is asked for."""
    code = "import sys; sys.modules['crablb._native'] = None; from crablb.cli import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("crablb ")


# ---- typed wrong ----

WRONG = [
    ([], "the following arguments are required: COMMAND (see crablb --help)"),
    (["serve", "--polcy", "random"], "unknown argument '--polcy'; did you mean --policy?"),
    (["serve", "--frobnicate"], "unknown argument '--frobnicate'; see crablb serve --help"),
    (["key", "new", "more"], "unknown argument 'more'; see crablb key --help"),
    (["serve", "--iface"], "argument --iface/--interface: expected one argument (see crablb serve --help)"),
    (["serve", "--config", ""], "'' names no file"),
    (["weight", "10.0.0.11"], "the following arguments are required: N (see crablb weight --help)"),
    (["weight", "10.0.0.11", "many"], "N: 'many' is not a whole number from 0 to 65535"),
    (["drain", "10.0.0.11", "--timeout", "5"], "--timeout goes with --wait"),
    (["drain", "10.0.0.11", "--wait", "--timeout", "x"], "--timeout: 'x' is not a number of seconds from 0 to 86400"),
    (["drain-lb", "--timeout", "-1"], "--timeout: '-1' is not a number of seconds from 0 to 86400"),
    (["drain-lb", "--cancel", "--timeout", "1"], "--cancel stands alone"),
    (["drain-lb", "--cancel", "--withdraw"], "--cancel stands alone"),
    (["flows", "--count", "--vip", "x"], "--count is of all flows: leave --vip, --backend and --client out"),
    (["flows", "--limit", "-"], "--limit: '-' is not a whole number"),
    (["events", "--since", "x"], "--since: 'x' is not the number of an event"),
    (
        ["log-level", "loud"],
        "level: there is no 'loud'; there are debug, info, warning, error (see crablb log-level --help)",
    ),
    (["services", "--iface", ""], "'' is not the name of an interface (see ip link)"),
    (["status", "--iface", ""], "'' is not the name of an interface (see ip link)"),
    (["agent", "server"], "the following arguments are required: --vip (see crablb agent server --help)"),
    (
        ["agent", "server", "--vip", "tcp://10.0.0.100:80", "--dsr", "--interface", ""],
        "--interface : '' is not the name of an interface (see ip link)",
    ),
    (
        ["agent", "server", "--vip", "tcp://10.0.0.100:80", "--report", ""],
        "--report needs --report-key FILE (made where the master key is: crablb key backend ADDRESS)",
    ),
    (
        ["agent", "server", "--vip", "tcp://10.0.0.100:80", "--report-as", ""],
        "--report-as: of use with --report only",
    ),
    (
        ["agent", "client", "--vip", "", "--backends", "x"],
        "--vip : '' has no protocol; write tcp://10.0.0.100:80\n"
        "crablb: --backends x: 'x' is not a prefix (10.0.0.0/8 or fd00::/8)",
    ),
    (
        ["agent", "client", "--vip", "x", "--backends", "10.0.0.0/24", "--flows", "1023", "--retransmission", "0.01"],
        "--vip x: 'x' has no protocol; write tcp://x\n"
        "crablb: --flows 1023: 1023 is not a whole number from 1024 to 16777216\n"
        "crablb: --retransmission 0.01: is neither 0, for the system's own time, nor seconds from 0.05 to less than 1",
    ),
    *(
        (
            ["agent", "client", "--vip", "x", "--backends", "10.0.0.0/24", f"--flows={flows}"],
            f"--vip x: 'x' has no protocol; write tcp://x\n"
            f"crablb: --flows {flows}: {shown} is not a whole number from 1024 to 16777216",
        )
        for flows, shown in (("16777217", "16777217"), ("-5", "-5"), ("many", "'many'"), ("", "''"), ("1e6", "'1e6'"))
    ),
    *(
        (
            ["agent", "client", "--vip", "x", "--backends", "10.0.0.0/24", f"--retransmission={seconds}"],
            "--vip x: 'x' has no protocol; write tcp://x\n"
            f"crablb: --retransmission {seconds}: is neither 0, for the system's own time, nor seconds from 0.05 to"
            " less than 1",
        )
        for seconds in ("1", "-0.2", "nan", "inf", "", "0.049", "250ms")
    ),
    (
        ["agent", "server", "--vip", "tcp://10.0.0.100:80", "--netns", "/nowhere", "--netns", "/proc/self/ns/mnt"],
        "--netns /nowhere: there is no such file\ncrablb: --netns /proc/self/ns/mnt: is not a network namespace",
    ),
    (
        [
            *["agent", "server", "--vip", "x", "--netns", "/proc/self/ns/net", "--netns", "/proc/thread-self/ns/net"],
            *["--report", "10.0.0.2", "--report-key", "/nowhere"],
        ],
        "--vip x: 'x' has no protocol; write tcp://x\n"
        "crablb: --report is one backend's; with it name one network namespace at the most: --netns\n"
        "crablb: --netns /proc/thread-self/ns/net: is the same as /proc/self/ns/net; name it once",
    ),
    (
        ["key", "backend", "10.0.0.11", "--master", "/nowhere/key"],
        "/nowhere/key: cannot be read: No such file or directory; make a key: crablb key new",
    ),
    (
        ["config", "check", "/nowhere.toml"],
        "/nowhere.toml: cannot be read: No such file or directory; make one: crablb quickstart --output /nowhere.toml",
    ),
    (["config", "check", "/proc"], "/proc: cannot be read: Is a directory; name a file in it"),
    (["config", "check", "/proc/self/mem"], "/proc/self/mem: cannot be read: Input/output error"),
    (["config", "check", "a\0b"], "'a\\x00b': cannot be read: embedded null byte"),
]


@pytest.mark.parametrize(("args", "words"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, list) else "")
def test_typed_wrong(args, words, capsys):
    assert said(capsys, *args) == f"crablb: {words}\n"


@pytest.mark.parametrize(
    ("args", "wrong"),
    [
        (["srve"], "'srve'"),
        (["serve", "--log-level", "loud"], "--log-level"),
        (["lab", "up", "--servers", "many"], "--servers"),
        (["demo", "--topology", "star"], "--topology"),
        (["agent", "client", "--option", "42"], "--option"),
        (["agent", "remove", "both"], "'both'"),
        (["agent", "repair", "both"], "'both'"),
        (["agent", "status", "--netns", "x", "--all-netns"], "--all-netns"),
        (["completion", "sh"], "'sh'"),
        (["bench", "--quick", "--tiny"], "--tiny"),
    ],
)
def test_what_argparse_finds_is_told_in_a_line(args, wrong, capsys):
    """In words that differ from one Python to the next."""
    line = said(capsys, *args)
    assert line.startswith("crablb: ")
    assert line.endswith(" --help)\n")
    assert line.count("\n") == 1
    assert wrong in line


# ---- crablb config ----


def test_check(tmp_path, capsys):
    path = tmp_path / "lb.toml"
    path.write_text('[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n')
    assert main(["config", "check", str(path), "--iface", "eth0"]) == 0
    assert capsys.readouterr() == ("ok\n", "")
    path.write_text('queues = 0\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["x"]\n')
    assert sorted(said(capsys, "config", "check", str(path)).splitlines()) == [
        f"crablb: {path}: interface is missing; add interface = 'eth0', or pass --iface",
        f"crablb: {path}: queues: 0 is not a whole number from 1 to 64",
        f"crablb: {path}: service 1 (line 2): backends[0]: 'x' is not an IP address"
        " (a backend is written 10.0.0.1 or [fd00::1])",
    ]
    path.write_bytes(b"\xff\xfe")
    assert said(capsys, "config", "check", str(path)) == f"crablb: {path}: is not UTF-8 text\n"


# ---- completions ----

COMPLETE = """
set -eu
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
complete=$(complete -p crablb)
function=${complete##*-F }
"${function% crablb}" crablb "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    done = subprocess.run(["bash", "-c", COMPLETE, "bash", script, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.fixture
def completion(tmp_path, capsys):
    """The completion script of a shell, in a file."""

    def script(shell: str):
        assert main(["completion", shell]) == 0
        path = tmp_path / shell
        path.write_text(capsys.readouterr().out)
        return path

    return script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["crablb", ""], set(COMMANDS)),
        (["crablb", "config", ""], {"check", "example", "openapi", "reference", "schema"}),
        (["crablb", "serve", "--xdp-mode", ""], {"auto", "native", "generic"}),
        (["crablb", "serve", "--policy", "least"], {"least-connections", "least-loaded"}),
        (["crablb", "serve", "--iface", "lo", "--sour"], {"--source-prefix"}),
        (["crablb", "agent", "client", "--option", ""], {"crab", "experimental"}),
        (["crablb", "config", "check", "/proc/sel"], {"/proc/self"}),
    ],
)
def test_bash_completes(completion, words, expected):
    assert completed(completion("bash"), *words) == expected


def test_bash_completes_interfaces(completion):
    names = completed(completion("bash"), "crablb", "status", "--iface", "l")
    assert "lo" in names
    assert all(name.startswith("l") for name in names)


@pytest.mark.parametrize(
    ("words", "line", "expected"),
    [
        (["drain", ""], None, {"10.0.0.11", "10.0.0.12", "fd00::11"}),
        (["drain", "10.0.0.12"], None, {"10.0.0.12"}),
        (["drain", "11"], "crablb drain fd00::11", {"11"}),  # bash ends a word at a colon
        (["weight", "10.0.0.11", "3", "--vip", ""], None, {"tcp://10.0.0.100:80"}),
        (["lab", "down", "--name", "m"], None, {"mine"}),
        (["lab", "exec", "--name", "o"], None, {"other"}),
        (["lab", "exec", "s"], None, {"server1"}),
        (["lab", "exec", "--name", "mine", ""], None, {"client", "server1"}),
        (["lab", "exec", "client", "--name", ""], None, {"mine", "other"}),
    ],
)
def test_bash_completes_what_there_is(completion, tmp_path, monkeypatch, words, line, expected):
    """By asking ``crablb completion --list``."""
    there = {"backends": "10.0.0.11 10.0.0.12 fd00::11", "vips": "tcp://10.0.0.100:80", "labs": "mine other"}
    there["nodes"] = "client server1"
    cases = "".join(f'{kind}) printf "%s\\n" {names};; ' for kind, names in there.items())
    (tmp_path / "crablb").write_text(f'#!/bin/sh\ncase "$3" in {cases}esac\n')
    (tmp_path / "crablb").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if line:
        monkeypatch.setenv("COMP_LINE", line)
    assert completed(completion("bash"), "crablb", *words) == expected


def test_what_there_is_to_complete(monkeypatch, capsys, tmp_path):
    """Silent where nobody answers, and soon where somebody does not."""
    monkeypatch.setattr("crablb.api.client.found", dict)
    monkeypatch.setattr("crablb.lab.lab.STATE", tmp_path)
    (tmp_path / "mine.json").write_text('{"topology": "bridge", "servers": 1}')
    (tmp_path / "other.json").write_text("half")
    assert main(["completion", "--list", "labs"]) == 0
    assert capsys.readouterr() == ("mine\nother\n", "")
    assert main(["completion", "--list", "nodes"]) == 0
    assert capsys.readouterr() == ("client\nlb\nserver1\nswitch\n", "")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        deaf.listen()
        monkeypatch.setattr("crablb.api.client.found", lambda: {"eth0": tmp_path / "deaf", "eth1": tmp_path / "none"})
        for kind in ("backends", "vips"):
            assert main(["completion", "--list", kind]) == 0
            assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completions_know_every_argument(completion, shell):
    text = completion(shell).read_text()
    for parser in ALL:
        for action in actions(parser):
            # tcsh is told a flag by its name alone.
            assert all(flag.lstrip("-") in text for flag in action.option_strings)


def test_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert said(capsys, "completion", "bash") == (
        "crablb: completions are made by shtab, which is not installed: pip install shtab\n"
    )


# ---- manual pages ----


def test_manual_pages(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    pages = {path.name: path.read_text().replace("\\", "") for path in write(tmp_path)}
    assert set(pages) == {"crablb.1", *(f"crablb-{command}.1" for command in COMMANDS)}
    assert all(f"crablb-{command} (1)" in pages["crablb.1"] for command in COMMANDS)
    for parser in ALL:
        name = "-".join(parser.prog.split()[:2])
        for action in actions(parser):
            assert all(f"fB{flag}fR" in pages[f"{name}.1"] for flag in action.option_strings), action
    done = subprocess.run([sys.executable, "docs/manpages.py"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (1, "usage: python docs/manpages.py FOLDER\n")


def test_manual_pages_are_what_groff_takes(tmp_path):
    """All of them, and what of a help text would be a request."""
    groff = ["groff", "-man", "-ww", "-Wbreak", "-Tutf8"]  # not of lines that cannot be filled
    for path in write(tmp_path):
        done = subprocess.run([*groff, str(path)], capture_output=True, text=True, check=True)
        assert done.stderr == "", path.name
    assert plain(".SH NAME\n... and more\n.toml\n'tis\na.b") == ".SH NAME\n\\&... and more\n\\&.toml\n\\&'tis\na.b"
