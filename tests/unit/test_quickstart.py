"""``crablb quickstart``: answers, options, and what it writes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from crablb import lint, reference
from crablb.cli import doctor, main, quickstart
from crablb.config import load_config, parse_config, parse_service
from crablb.doctor.finding import fault, note
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Announce, Config
from tests.helpers.processes import ROOT

LINKS = [quickstart.Link("eth0", True, True, ("192.0.2.2",)), quickstart.Link("eth1", False, False, ())]
GIVEN = ["--iface", "eth0", "--vip", "192.0.2.100:80", "--backend", "192.0.2.11", "--backend", "192.0.2.12*3"]
SILENT = fault("backend-silent", "backend 192.0.2.11: it does not answer", "no connections", "see whether it is up")


@pytest.fixture(autouse=True)
def machine(monkeypatch) -> dict[str, object]:
    """One with an interface, where the VIPs are on its segment and nothing is wrong."""
    there: dict[str, object] = {"state": HopState.UNRESOLVED, "findings": [note("clock", "it is late")]}
    monkeypatch.setattr(quickstart, "_links", lambda: LINKS)
    monkeypatch.setattr(quickstart, "_indices", lambda: [(2, "eth0"), (3, "eth1")])
    monkeypatch.setattr(
        quickstart, "next_hops", lambda wanted: {each: NextHop(there["state"], ifindex=2) for each in wanted}
    )
    monkeypatch.setattr(quickstart, "_running", lambda wanted: None)
    monkeypatch.setattr(doctor, "find", lambda names, settings: (names, there["findings"]))
    return there


class Terminal:
    """In place of standard input and output."""

    def __init__(self) -> None:
        self.ours, self._theirs = pty.openpty()

    def run(self, *args: str) -> int:
        """A command, on it."""
        with (
            pytest.MonkeyPatch.context() as patch,
            open(self._theirs, closefd=False) as stdin,
            open(self._theirs, "w", closefd=False) as stdout,
        ):
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", stdout)
            return main(args)

    def type(self, *lines: str) -> None:
        os.write(self.ours, "".join(f"{line}\n" for line in lines).encode())

    def end(self) -> None:
        os.write(self.ours, b"\x04")

    def close(self) -> None:
        os.close(self.ours)
        os.close(self._theirs)

    def shows(self) -> str:
        """All since the last time, what was typed among it."""
        os.write(self._theirs, b"[end]")  # what is shown comes in pieces, as the kernel finds the time
        said = b""
        while not said.endswith(b"[end]"):
            said += os.read(self.ours, 1 << 16)
        return said.removesuffix(b"[end]").decode().replace("\r\n", "\n")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.close()


def folder_is_as(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


# ---- by options ----


def test_by_options(tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "lb.toml"
    monkeypatch.setattr(quickstart, "PLACE", path)
    before = os.umask(0o077)
    try:
        assert main(["quickstart", *GIVEN, "--output", str(path)]) == 0
    finally:
        os.umask(before)
    out, err = capsys.readouterr()
    assert err == ""
    wanted = load_config(path)
    assert wanted.interfaces == ("eth0",)
    assert wanted.services == (parse_service("tcp://192.0.2.100:80=192.0.2.11,192.0.2.12*3"),)
    assert wanted.announce is Announce.ARP
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o644, 0o755]
    assert folder_is_as(path.parent, "lb.toml")
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr() == ("ok\n", "")
    assert f"crablb doctor --config {path}" in out
    commands = [line.strip() for line in out.splitlines() if line.startswith("    ")]
    assert len(commands) == 3
    assert commands[0].endswith(f"serve --config {path}")
    assert commands[1:] == [
        "crablb agent server --vip tcp://192.0.2.100:80 --dsr --detach",
        "curl -sS --max-time 5 'http://192.0.2.100/'",
    ]


def test_as_json(tmp_path, capsys, machine):
    path = tmp_path / "lb.toml"
    machine["findings"] = [SILENT]
    both = ["--vip", "[2001:db8::100]:5432 192.0.2.100:8443", "--backend", "2001:db8::11,192.0.2.11"]
    assert main(["quickstart", "--json", "--iface", "eth0", *both, "--output", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["file"], told["configuration"], told["sound"]) == (str(path), path.read_text(), False)
    assert [one["id"] for one in told["findings"]] == ["backend-silent"]
    assert [[str(b.address) for b in s.backends] for s in load_config(path).services] == [
        ["2001:db8::11"],
        ["192.0.2.11"],
    ]
    here, servers, client = told["next"]
    assert len(here["commands"]) == 1
    assert "192.0.2.11, 2001:db8::11" in servers["where"]
    assert client["commands"] == [
        "timeout 5 bash -c '</dev/tcp/2001:db8::100/5432' && echo tcp://[2001:db8::100]:5432 answers",
        "curl -sS -k --max-time 5 'https://192.0.2.100:8443/'",
    ]


@pytest.mark.parametrize(
    ("state", "more", "announce"),
    [
        (HopState.UNRESOLVED, [], Announce.ARP),
        (HopState.UNRESOLVED, ["--announce", "none"], Announce.NONE),
        (HopState.NO_ROUTE, ["--announce", "arp"], Announce.ARP),
        (HopState.NOT_A_HOST, [], Announce.NONE),  # keepalived moves it
    ],
)
def test_who_answers_for_the_vip(tmp_path, machine, state, more, announce):
    machine["state"] = state
    assert main(["quickstart", *GIVEN, *more, "--output", str(tmp_path / "lb.toml")]) == 0
    assert load_config(tmp_path / "lb.toml").announce is announce


def test_yes_takes_what_is_suggested(tmp_path, terminal):
    """Also on a terminal nobody is asked."""
    path = tmp_path / "lb.toml"
    assert terminal.run("quickstart", "--yes", *GIVEN[2:], "--output", str(path)) == 0
    assert load_config(path).interfaces == ("eth0",)


WRONG = [
    (
        [],
        "there is no terminal to ask on; say by options what is missing, as --iface eth0, --vip 10.0.0.100:80,"
        " --backend 10.0.0.11",
    ),
    (
        ["--yes", "--vip", "192.0.2.100:80"],
        "nobody is asked (--yes, --json); say by options what is missing, as --backend 10.0.0.11",
    ),
    (
        ["--iface", "eth7", "--vip", "192.0.2.100,192.0.2.101:0", "--backend", "x 192.0.2.11 192.0.2.11"],
        "--iface: there is no Ethernet interface 'eth7'; did you mean eth1?\n"
        "--vip: 'tcp://192.0.2.100' has no port; write tcp://192.0.2.100:80, or whatever port clients connect to\n"
        "--vip: '0' is not a port (1 to 65535)\n"
        "--backend: 'x' is not an IP address (a backend is written 10.0.0.1 or [fd00::1])\n"
        "--backend: 192.0.2.11 is named twice; give it a weight instead: 192.0.2.11*2 (up to 65535)",
    ),
    (["--iface", "wlan7", *GIVEN[2:]], "--iface: there is no Ethernet interface 'wlan7'; there is eth0, eth1"),
    (
        [*GIVEN, "--vip", "[2001:db8::100]:80"],
        "--backend: none is IPv6, as those of tcp://[2001:db8::100]:80 are; name one",
    ),
    ([*GIVEN, "--backend", "2001:db8::11"], "--backend: 2001:db8::11 is IPv6, and no VIP is"),
    ([*GIVEN, "--vip", "tcp://192.0.2.100:80"], "--vip: tcp://192.0.2.100:80 is named twice"),
    ([*GIVEN[:4], "--backend", "192.0.2.11*0"], "tcp://192.0.2.100:80: every backend of tcp://192.0.2.100:80 has"),
    ([*GIVEN, "--backend", "192.0.2.100"], "tcp://192.0.2.100:80: backend 192.0.2.100 is also a VIP"),
    ([*GIVEN, "--output", ""], "--output: '' names no file"),
    ([*GIVEN, "--output", "/nowhere/at/lb.toml"], "there is no folder /nowhere/at; make it: mkdir -p /nowhere/at"),
    ([*GIVEN, "--output", "/proc"], "/proc is a folder; name a file: --output /proc/lb.toml"),
    ([*GIVEN, "--output", "/dev/null"], "/dev/null is no regular file; name another: --output FILE"),
    ([*GIVEN, "--output", "/dev/null/lb.toml"], "/dev/null/lb.toml cannot be written here by this user; name another"),
]


@pytest.mark.parametrize(("args", "words"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, list) else "")
def test_wrong_options(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--output" not in args:
        args = [*args, "--output", "lb.toml"]
    assert main(["quickstart", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("".join(f"crablb: {line}\n" for line in words.splitlines())[:-1])
    assert folder_is_as(tmp_path)


# ---- the file ----


def test_a_file_that_is_there(tmp_path, capsys):
    path = tmp_path / "lb.toml"
    path.write_text("mine")
    path.chmod(0o600)
    assert main(["quickstart", *GIVEN, "--output", str(path)]) == 2
    assert "is there already; replace it: --force" in capsys.readouterr().err
    assert path.read_text() == "mine"
    (tmp_path / "link").symlink_to("lb.toml")
    assert main(["quickstart", *GIVEN, "--output", str(tmp_path / "link"), "--force"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert load_config(path).services
    assert (tmp_path / "lb.toml.bak").read_text() == "mine"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert folder_is_as(tmp_path, "link", "lb.toml", "lb.toml.bak")


def test_a_file_that_somebody_makes_meanwhile(tmp_path, capsys, monkeypatch):
    path = tmp_path / "lb.toml"

    def find(names, settings):
        path.write_text("theirs")
        return names, []

    monkeypatch.setattr(doctor, "find", find)
    assert main(["quickstart", *GIVEN, "--output", str(path)]) == 2
    assert "cannot be written: File exists; nothing is" in capsys.readouterr().err
    assert path.read_text() == "theirs"
    assert folder_is_as(tmp_path, "lb.toml")


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    """Neither a file nor its folders are left."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quickstart.state, "write", full)
    monkeypatch.setattr(quickstart, "PLACE", tmp_path / "a" / "b" / "lb.toml")
    assert main(["quickstart", *GIVEN]) == 2
    assert "lb.toml cannot be written: No space left on device; nothing is; name another" in capsys.readouterr().err
    assert folder_is_as(tmp_path)


def test_where_it_is_written(tmp_path, monkeypatch):
    """Where the unit reads it if this user may, else here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "PLACE", tmp_path / "etc" / "crablb" / "lb.toml")
    assert main(["quickstart", *GIVEN]) == 0
    assert folder_is_as(tmp_path / "etc" / "crablb", "lb.toml")
    monkeypatch.setattr(quickstart, "PLACE", Path("/dev/null/crablb/lb.toml"))
    assert main(["quickstart", *GIVEN]) == 0
    assert folder_is_as(tmp_path, "etc", "lb.toml")


@pytest.mark.parametrize("backends", [1, 3, 700, 3000])
def test_what_is_written_is_what_is_meant(backends):
    """Whatever is in it, and check has nothing to say of it."""
    names = [f"10.1.{i // 250}.{i % 250 + 1}" for i in range(backends)]
    service = parse_service(f"tcp://192.0.2.100:80={','.join(names)}")
    table = quickstart.SMALL_TABLE if backends < 656 else quickstart.LARGE_TABLE
    wanted = Config(('a"b\\c', "eth1"), (service, parse_service("tcp://[2001:db8::1]:1=2001:db8::2*7")))
    wanted = replace(wanted, table_size=table, announce=Announce.ARP, allow_own_address=True)
    text = reference.described(wanted, "made")
    assert parse_config(text) == wanted
    assert lint.odd(wanted) == []
    assert all(len(line) <= 120 for line in text.splitlines())
    # What stands behind a # is an example that is as good.
    for line in re.findall(r"^#(\w.*)", text, re.M):
        assert parse_config(text.replace(f"#{line}", line)) != wanted


# ---- on a terminal ----


def test_a_conversation(tmp_path, terminal, capsys):
    """What is wrong with an answer is told, and it is asked for again."""
    path = tmp_path / "lb.toml"
    terminal.type(
        *("eth7", ""),  # the interface
        *("", "192.0.2.100", "192.0.2.100:80 192.0.2.101:81,[2001:db8::100]:80"),  # VIPs
        *("192.0.2.100", "2001:db8::11", "192.0.2.11*0", "192.0.2.11 192.0.2.12*3"),  # backends of the first
        *("", "2001:db8::11"),  # the second has the same; the third
        *("perhaps", ""),  # write it
    )
    assert terminal.run("quickstart", "--output", str(path)) == 0
    shown = terminal.shows()
    assert "eth0            192.0.2.2; default route\n" in shown
    assert "eth1            no address; down (ip link set eth1 up)\n" in shown
    assert "Interface that clients' packets come in by [eth0]: " in shown
    assert (
        "Backends of tcp://192.0.2.101:81 (10.0.0.11 10.0.0.12*3: with a weight) [192.0.2.11 192.0.2.12*3]: " in shown
    )
    told = capsys.readouterr().err
    for words in (
        "did you mean eth1?",
        "name one, as 10.0.0.100:80",
        "has no port",
        "is also a VIP",
        "is IPv6 and",
        "has weight 0",
        "say y or n",
    ):
        assert told.count(words) == 1, words
    assert load_config(path).services == tuple(
        map(
            parse_service,
            (
                "tcp://192.0.2.100:80=192.0.2.11,192.0.2.12*3",
                "tcp://192.0.2.101:81=192.0.2.11,192.0.2.12*3",
                "tcp://[2001:db8::100]:80=2001:db8::11",
            ),
        )
    )


def test_only_what_is_missing_is_asked_for(tmp_path, terminal):
    terminal.type("192.0.2.11", "y")
    assert terminal.run("quickstart", *GIVEN[:4], "--output", str(tmp_path / "lb.toml")) == 0
    shown = terminal.shows()
    assert "Backends of" in shown
    assert "Interface that" not in shown


@pytest.mark.parametrize(
    ("findings", "answer", "written"),
    [([SILENT], "", False), ([SILENT], "y", True), ([], "", True), ([], "n", False), ([], "\x04", False)],
)
def test_who_is_told_decides(tmp_path, terminal, machine, findings, answer, written):
    machine["findings"] = findings
    if answer == "\x04":
        terminal.end()
    else:
        terminal.type(answer)
    assert terminal.run("quickstart", *GIVEN, "--output", str(tmp_path / "lb.toml")) == int(not written)
    assert folder_is_as(tmp_path, *(["lb.toml"] if written else []))
    shown = terminal.shows()
    assert ("all the same? [y/N]" in shown) == bool(findings)
    assert ("[backend-silent]" in shown) == bool(findings)
    assert ("nothing was written" in shown) != written


@pytest.mark.parametrize(("answers", "left"), [(["n"], "mine"), ([""], "mine"), (["y", "y"], None)])
def test_a_file_that_is_there_is_asked_about_first(tmp_path, terminal, answers, left):
    path = tmp_path / "lb.toml"
    path.write_text("mine")
    terminal.type(*answers)
    assert terminal.run("quickstart", *GIVEN, "--output", str(path)) == int(left is not None)
    assert (path.read_text() == "mine") == (left is not None)


def test_interrupted(tmp_path):
    """By Ctrl-C at a question: one line, and nothing is written."""
    pid, ours = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        output = str(tmp_path / "lb.toml")
        os.execv(sys.executable, [sys.executable, "-m", "crablb", "quickstart", "--output", output])
    said = b""
    while True:
        # Again, as one types who is not heard: Python may look for signals just before one comes, and then wait.
        if b"come in by" in said and b"nothing" not in said and not select.select([ours], [], [], 2)[0]:
            os.write(ours, b"\x03")
        try:
            said += os.read(ours, 4096)
        except OSError:  # its end has gone
            break
    os.close(ours)
    # The second: the last one was typed when it had ended by the first.
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (130, -signal.SIGINT)
    assert b"crablb: nothing was written\r\n" in said
    assert b"Traceback" not in said
    assert folder_is_as(tmp_path)


# ---- what to run next ----


@pytest.mark.parametrize(
    ("running", "place", "command"),
    [
        ((7, "same"), None, " reload"),
        ((7, None), None, " plan {path}"),
        (None, None, " serve --config {path}"),
        (None, "place", "systemctl enable --now crablb"),
    ],
)
def test_what_is_next_here(tmp_path, monkeypatch, running, place, command):
    path = tmp_path / "lb b.toml"
    quoted = f"'{path}'"
    if place:
        monkeypatch.setattr(quickstart, "PLACE", path)
        monkeypatch.setattr(quickstart, "UNITS", (str(tmp_path),))
        monkeypatch.setattr(quickstart.os.path, "isdir", lambda _: True)
        monkeypatch.setattr(quickstart, "_same_network_as_init", lambda: True)
        (tmp_path / "crablb.service").touch()
    if running:
        found = running[0], path if running[1] else None
        monkeypatch.setattr(quickstart, "_running", lambda wanted: found)
    wanted = Config(("eth0",), (parse_service("tcp://192.0.2.100:80=192.0.2.11"),))
    said, *more = quickstart._here(wanted, path).commands
    assert [each.endswith(f" serve --config {quoted} --takeover") for each in more] == [True] * (" plan " in said)
    assert said.endswith(command.format(path=quoted))


@pytest.mark.parametrize(
    ("argv", "on_path", "euid", "called"),
    [
        ("/opt/v/bin/crablb", "/opt/v/bin/crablb", 0, "crablb"),
        ("/opt/v/bin/crablb", None, 0, "/opt/v/bin/crablb"),
        ("/opt/v/bin/crablb", "/opt/v/bin/crablb", 1000, "/opt/v/bin/crablb"),  # sudo has another PATH
        ("/opt/v/crablb/__main__.py", None, 0, f"{sys.executable} -m crablb"),
    ],
)
def test_what_the_program_is_called_by(monkeypatch, argv, on_path, euid, called):
    monkeypatch.setattr(sys, "argv", [argv])
    monkeypatch.setattr(quickstart.shutil, "which", lambda name: on_path if name == "crablb" else name)
    monkeypatch.setattr(quickstart.os, "geteuid", lambda: euid)
    monkeypatch.setattr(quickstart.os.path, "samefile", lambda one, other: one == other)
    assert quickstart._program() == called
