"""Whatever is typed: each argument of each command is given what it cannot be; no traceback, nothing hangs, and what a
person can mend is told in a line that says how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

#: In a network namespace, in folders, and by a user of its own: what is right by chance does nothing.
PROGRAM = r"""
import argparse, contextlib, io, json, os, signal, sys, traceback
from crablb.cli import main, make_parser, parsers

WRONG = json.loads(sys.argv[1])
FITTING = {"BACKEND": "10.0.0.11", "N": "3", "VIP": "tcp://10.0.0.100:80", "PREFIX": "10.0.0.0/8",
           "tcp://ADDRESS:PORT": "tcp://10.0.0.100:80", "IF": "eth0"}
every = list(parsers(make_parser()))
for name in ("bench.run", "bench.compare", "bench.report"):
    __import__(name)
os.chdir(sys.argv[2])
os.seteuid(65534)
found = []

def hangs(*_):
    raise RuntimeError("it hangs, or serves")

signal.signal(signal.SIGALRM, hangs)
cases = 0
for parser in every:
    actions = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction) and a.nargs != 0]
    for action in actions:
        for wrong in WRONG:
            words, places = parser.prog.split()[1:], []
            for other in actions:
                value = wrong if other is action else FITTING.get(other.metavar, "x")
                if other.option_strings:
                    if other is action or other.required:
                        words.append(f"{other.option_strings[0]}={value}")
                elif other is action or other.nargs not in ("?", "*", argparse.REMAINDER):
                    places.append(value)
            cases += 1
            out, err = io.StringIO(), io.StringIO()
            signal.alarm(30)
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    status = main([*words, *places])
            except SystemExit as ended:
                status = ended.code
            except BaseException:
                found.append([words + places, traceback.format_exc()[-600:]])
                continue
            finally:
                signal.alarm(0)
            # Of a status that is none of the documented ones, or words without their program's name.
            lines = err.getvalue().splitlines()
            if status not in (0, 1, 2, 3) or not all(line.startswith("crablb: ") for line in lines):
                found.append([words + places, status, err.getvalue()[-300:]])
os.seteuid(0)
print(json.dumps({"cases": cases, "found": found}))
"""

#: Empty, of another kind, too long, bytes that are no text, digits that are none of ASCII's, files without an end.
WRONG = [
    *("", " ", "-1", "nan", "1e999", "9" * 26, "x" * 3000, "a\0b", "caf\udce9", "٣", "%s", "{}", "="),
    *("tcp://[", "tcp://[::", "tcp://10.0.0.100:٣", "10.0.0.1/33", "10.0.0.1*٣", "fe80::1%eth0", "10.0.0.1 ->"),
    *("/proc", "/proc/self/mem", "/dev/zero"),
]


@pytest.mark.long
@pytest.mark.parametrize("part", range(3))
def test_nothing_that_is_typed_makes_a_traceback(tmp_path, part):
    tmp_path.chmod(0o755)
    # Nor is /tmp the machine's, if the project itself is not there.
    hidden = "" if Path("/tmp") in ROOT.parents else "mount -t tmpfs none /tmp; "
    own = hidden + "mount -t tmpfs none /run/crablb; ip link add eth0 type veth peer name eth1"
    done = subprocess.run(
        [
            *("unshare", "--net", "--mount", "sh", "-ec", f'mkdir -p /run/crablb; {own}; exec "$@"', "sh"),
            *(sys.executable, "-c", PROGRAM, json.dumps(WRONG[part::3]), "/"),
        ],
        capture_output=True, text=True, check=False, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=500,
        env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["cases"] > 1000
    assert told["found"] == []
