"""``make test-disturbed``: ``make test`` on a machine that stands still now and then.

As a virtual machine does whose host has other things to do: a process of real-time priority on each CPU takes it for
moments of up to half a second, at random, some third of the time.  What took for granted that nothing comes between two
steps fails there, and seldom elsewhere.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds, one of which is drawn for each moment; the moment is a part of one and a half times that.
MOMENTS = (0.002, 0.01, 0.05, 0.3)
PR_SET_PDEATHSIG = 1


def disturb(cpu: int, seed: int) -> None:
    """Take this CPU again and again, for ever."""
    os.sched_setaffinity(0, {cpu})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
    drawn = random.Random(f"{seed}.{cpu}")
    while True:
        moment = drawn.choice(MOMENTS) * 1.5 * drawn.random()
        end = time.monotonic() + moment
        while time.monotonic() < end:
            pass
        time.sleep(0.001 + moment * 3.2 * drawn.random())


@contextmanager
def disturbed(seed: int) -> Iterator[None]:
    """The machine, while in the context."""
    parent, children = os.getpid(), []
    try:
        for cpu in sorted(os.sched_getaffinity(0)):
            child = os.fork()
            if not child:
                # It must not outlive us, whatever ends us; nor if that was before this call.
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                if os.getppid() == parent:
                    disturb(cpu, seed)
                os._exit(1)
            children.append(child)
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-disturbed", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the moments (%(default)s)")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    with disturbed(args.seed):
        return subprocess.run(args.command, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PermissionError as error:
        sys.exit(f"make test-disturbed: a real-time priority is not to be had here ({error.strerror}); be root")
