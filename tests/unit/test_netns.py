"""crablb.kernel.netns: how network namespaces are named.  tests/lab/test_netns.py enters them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crablb.errors import ConfigError
from crablb.kernel import netns
from crablb.kernel.netns import Namespace

OWN = os.stat("/proc/self/ns/net").st_ino


def test_by_a_path():
    found = netns.find("/proc/self/ns/net")
    assert found == Namespace("/proc/self/ns/net", Path("/proc/self/ns/net"), OWN)
    assert found.stands
    assert str(found) == "netns /proc/self/ns/net"
    assert not Namespace("gone", Path("/proc/self/ns/gone"), OWN).stands
    assert not Namespace("another", Path("/proc/self/ns/mnt"), OWN).stands


def test_what_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(netns, "NAMED", tmp_path)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    for text, words in {
        "": "is not a network namespace",
        ".": "is not a network namespace",
        "fifo": "is not a network namespace",  # and is not waited for
        "empty": "is not a network namespace",  # as ip netns leaves it where it cannot be mounted
        "loop": "cannot be opened: Too many levels of symbolic links",
        "red": "there is no such name; there are: empty, fifo, loop (without a name: /proc/PID/ns/net)",
        f"{tmp_path}/x/y": "there is no such file",
        "a\0b": "cannot be opened: embedded null byte",
        "/proc/self/ns/user": "is not a network namespace",
        "/dev/null": "is not a network namespace",
    }.items():
        with pytest.raises(ConfigError) as caught:
            netns.find(text)
        assert str(caught.value) == words


def test_ones_own_is_among_all(tmp_path, monkeypatch):
    """Without a name it is the process's own; with one it is called so; and nothing else is taken for one."""
    monkeypatch.setattr(netns, "NAMED", tmp_path)
    (tmp_path / "empty").touch()
    own = [one for one in netns.every() if one.inode == OWN]
    assert own == [Namespace("/proc/self/ns/net", Path("/proc/self/ns/net"), OWN)]
    (tmp_path / "red").symlink_to("/proc/self/ns/net")
    (named,) = (one for one in netns.every() if one.inode == OWN)
    assert named.name == "red"
    assert "empty" not in [one.name for one in netns.every()]


def test_processes_that_do_not_count():
    own = Path(f"/proc/{os.getpid()}/ns/net")
    assert own in netns.places()
    assert own not in netns.places(but={os.getpid()})
