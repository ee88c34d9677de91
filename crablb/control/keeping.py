"""What a load balancer leaves in the kernel for the next one (``keep``) does not stay there for ever."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

log = structlog.get_logger()

ROOT = Path(__file__).parents[2]  # where this package is found


def remove_later(interfaces: Sequence[str], seconds: float) -> None:
    """Have a process of its own remove it, unless the next load balancer has taken it over by then."""
    ifaces = [word for name in interfaces for word in ("--iface", name)]
    command = [sys.executable, "-P", "-m", "crablb", "remove", *ifaces, "--after", f"{seconds:.0f}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError(errno.ENOENT, "this program has no Python interpreter that could be started")
        # A session and no files of ours: who waits for the end of our output, or our terminal, does not wait for it.
        subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        log.warning(
            "what is kept stays until it is removed", remove=f"crablb remove {' '.join(ifaces)}", reason=str(error)
        )
    else:
        log.info("flows are kept for the next load balancer", interfaces=list(interfaces), seconds=seconds)
