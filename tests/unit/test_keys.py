"""Keys of reports, and the files that they are in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from ipaddress import ip_address
from pathlib import Path

import pytest

from crablb import ConfigError
from crablb.selection.reports import derive, new_master
from crablb.values import parse_key, read_backend_key, read_master_key, read_seed
from tests.helpers.secret import secret

A, B = ip_address("10.0.0.11"), ip_address("fd00::12")


def test_keys_of_both_kinds(tmp_path):
    """None is taken for the other; those of versions before, of which nothing is known, are taken for either."""
    master = new_master()
    assert master != new_master() and len(master) == 32
    own = derive(master, A)
    assert own != derive(master, B) and own != derive(new_master(), A) and len(own) == 32
    files = {name: secret(tmp_path / name, key.hex()) for name, key in (("master", master), ("own", own))}
    assert read_master_key(files["master"]) == parse_key(str(files["master"])) == master
    assert read_backend_key(files["own"]) == own
    with pytest.raises(ConfigError, match="is the master key, which speaks for every backend"):
        read_backend_key(files["master"])
    with pytest.raises(ConfigError, match="is a backend's key; here belongs the master key"):
        parse_key(str(files["own"]))
    before = bytes(range(32))
    old = secret(tmp_path / "old", before.hex())
    assert read_master_key(old) == read_backend_key(old) == before


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o622, 0o644, 0o666, 0o777])
def test_a_secret_that_others_can_read(tmp_path, mode):
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))  # tmp_path lies in one that is private
    try:
        folder.chmod(0o755)
        refused(folder / "key", mode)
    finally:
        shutil.rmtree(folder)
    private = secret(tmp_path / "key", "ab" * 32)
    private.chmod(mode)
    if mode & 0o022:
        with pytest.raises(ConfigError, match="holds a secret"):
            parse_key(private)
    else:
        assert parse_key(private) == b"\xab" * 32


def refused(path: Path, mode: int) -> None:
    secret(path, "ab" * 32)
    path.chmod(mode)
    for read in (read_master_key, read_backend_key, parse_key):
        with pytest.raises(ConfigError, match=f"{path}: holds a secret, and others can .*; chmod 600 {path}"):
            read(path)
    path.write_text("ab" * 16)
    with pytest.raises(ConfigError, match="holds a secret"):
        read_seed(path)
    for good in (0o600, 0o400, 0o640):
        path.chmod(good)
        assert read_seed(path) == b"\xab" * 16


def test_what_is_printed_into_a_file_is_private(tmp_path: Path):
    """And what is printed elsewhere is printed."""
    before = os.umask(0)
    try:
        crablb = [sys.executable, "-m", "crablb", "key"]
        with open(tmp_path / "master", "w") as file:
            subprocess.run([*crablb, "new"], stdout=file, check=True)
        with open(tmp_path / "own", "w") as file:
            subprocess.run([*crablb, "backend", str(A), "--master", tmp_path / "master"], stdout=file, check=True)
        told = subprocess.run([*crablb, "new"], capture_output=True, check=True).stdout
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("master", "own")} == {0o600}
    assert read_backend_key(tmp_path / "own") == derive(read_master_key(tmp_path / "master"), A)
    assert len(bytes.fromhex(told.decode())) == 32
