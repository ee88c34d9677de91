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
from structlog.testing import capture_logs

from crablb import ConfigError, values
from crablb.control import seed
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


# ---- what is no file with an end ----


@pytest.mark.parametrize("read", [read_master_key, read_backend_key, read_seed, seed.load])
def test_what_has_no_end(read, monkeypatch, tmp_path):
    """A device, a pipe that nobody writes to: it is told what is wrong, soon."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    monkeypatch.setattr(values, "SILENT", 0.05)
    for path, why in ((Path("/dev/zero"), "it has more than 64 MiB"), (pipe, "nothing was written to it for 0.05 s")):
        if read in (read_master_key, read_backend_key, read_seed):
            with pytest.raises(ConfigError, match=f"{path}.*: cannot be read: {why}"):
                read(path)
            continue
        with capture_logs() as said:
            assert len(read(path)) == 16
        assert why in said[0]["reason"]


def test_a_pipe_that_is_written_to_late(tmp_path):
    """Whole, in whatever parts it comes."""
    pipe, key = tmp_path / "pipe", new_master().hex()
    os.mkfifo(pipe, 0o600)
    writer = subprocess.Popen(["sh", "-c", 'exec >"$0"; printf %s "$1"; printf "%s\\n" "$2"', pipe, key[:10], key[10:]])
    assert read_master_key(pipe).hex() == key
    assert writer.wait() == 0
    command = 'exec "$0" -m crablb key backend 10.0.0.11 --master <(sleep 0.1; echo "$1")'
    done = subprocess.run(["bash", "-c", command, sys.executable, key], capture_output=True, text=True, check=True)
    assert bytes.fromhex(done.stdout) == derive(bytes.fromhex(key), A)
