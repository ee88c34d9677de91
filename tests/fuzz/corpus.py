"""The inputs that are kept, a line each in hexadecimal; and the programs that replay them.

``corpus/NAME.txt`` is what libFuzzer found to reach everything that it reached; ``found.txt`` what failed once.
"""

from __future__ import annotations

import fcntl
import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parents[1]
BUILD = PROJECT / "build/fuzz"
TARGETS = ("packet", "option", "parse")


def kept(target: str) -> list[bytes]:
    return [bytes.fromhex(line) for line in (FOLDER / "corpus" / f"{target}.txt").read_text().split()]


def found() -> dict[str, tuple[str, bytes]]:
    """Inputs that failed once: what was wrong, its target, the input."""
    lines = [line.split(maxsplit=2) for line in (FOLDER / "found.txt").read_text().splitlines() if line[:1] not in "#"]
    return {name: (target, bytes.fromhex(data)) for target, data, name in lines}


def build(goal: str = "all") -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "-s", "-C", FOLDER, goal], check=True)


def replay(target: str, inputs: list[bytes], *args: str, program: Path | None = None) -> str:
    """What a target prints of inputs.  Raises :class:`AssertionError`, with what it complains of."""
    lines = "".join(data.hex() + "\n" for data in inputs)
    done = subprocess.run([program or BUILD / target, *args], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{len(inputs)} inputs\n"
    return done.stdout


def mutate(target: str, folder: Path, name: str, old: str, new: str) -> Path:
    """A target that replays, with a fault: of native/ a text, and what is there instead.  ``name``: the C file that
    is compiled anew.  Raises :class:`ValueError` if there is no such text."""
    native = PROJECT / "native"
    for path in native.glob("*.[ch]"):
        (folder / path.name).write_text(path.read_text().replace(old, new))
    if old not in "".join(path.read_text() for path in native.glob("*.[ch]")):
        raise ValueError(f"there is no {old!r}")
    flags = subprocess.run(["make", "-s", "-C", FOLDER, "flags"], check=True, capture_output=True, text=True).stdout
    sources = [FOLDER / f"{source}.c" for source in (f"target_{target}", "replay", "world", "oracle")]
    objects = [
        o
        for o in (native / "build").glob("*.o")
        if o.stem not in (name, "xsk", "worker") and (native / f"{o.stem}.c").exists()
    ]
    command = ["gcc", f"-I{folder}", *shlex.split(flags), *sources, folder / f"{name}.c", *objects, "-pthread"]
    subprocess.run([*command, "-o", folder / target], cwd=FOLDER, check=True)
    return folder / target


def scripts(inputs: list[bytes]) -> Iterator[dict[str, Any]]:
    """The packet target's inputs as it understands them: a configuration, and frames with what becomes of each.

    A frame is: its bytes, the number of the counter, whether it is an ICMP error that quotes a service's packet, the
    bytes that are sent, whether by another interface."""
    for line in replay("packet", inputs, "-p").splitlines():
        yield json.loads(line)
