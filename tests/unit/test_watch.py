"""What a configuration file is known by."""

from __future__ import annotations

import os
from pathlib import Path

from crablb.control.watch import fingerprint


def test_a_file_is_known_by_what_it_holds(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    one.write_text("a = 1\n")
    same.write_text("a = 1\n")
    other.write_text("a = 2\n")
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_what_is_no_file_is_not_read(tmp_path):
    """One without an end has no room, and a pipe is another reader's."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDWR), "r+b", buffering=0) as both:
        both.write(b"x")
        for path in (Path("/dev/zero"), pipe, tmp_path, tmp_path / "none"):
            assert fingerprint(path) == ""
        assert both.read(1) == b"x"
