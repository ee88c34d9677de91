"""A limit of memory for some processes: a cgroup of version 2, or of version 1 where that has the memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from crablb.agent.base import cgroup_root
from tests.helpers.namespaces import unique
from tests.helpers.processes import until

PLENTY = 1 << 40


class Limit:
    def __init__(self, path: Path, limit: str, used: str, hits: tuple[str, str]) -> None:
        """``limit``, ``used``: its files; ``hits``: the file that says how often it was reached, and where in it."""
        self.path = path
        self._limit, self._used, self._hits = limit, used, hits

    def of(self, command: Sequence[str]) -> list[str]:
        """The command, which is subject to it from its first instruction on."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh", *command]

    def set(self, size: int = PLENTY) -> None:
        """Processes may have so much together.  Raises ``OSError`` if they cannot do with that any more (version 1)."""
        (self.path / self._limit).write_text(str(size))

    def used(self) -> int:
        """Bytes that are not to be had back: pages of files are, and whoever reads a file first has them."""
        words = (self.path / "memory.stat").read_text().split()
        stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        return int((self.path / self._used).read_text()) - stat["active_file"] - stat["inactive_file"]

    def hits(self) -> int:
        """How often more was asked for."""
        file, key = self._hits
        words = (self.path / file).read_text().split()
        return int(words[words.index(key) + 1] if key else words[0])

    def _processes(self) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def end(self) -> None:
        """Kill those that are left."""
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self._processes())

    @classmethod
    @contextmanager
    def made(cls) -> Iterator[Self]:
        name = f"crab-{unique()}"
        if "memory" in (cgroup_root() / "cgroup.controllers").read_text().split():
            (cgroup_root() / "cgroup.subtree_control").write_text("+memory")
            made = cls(cgroup_root() / name, "memory.max", "memory.current", ("memory.events", "max"))
        else:
            (root,) = (
                line.split()[1]
                for line in Path("/proc/mounts").read_text().splitlines()
                if line.split()[2] == "cgroup" and "memory" in line.split()[3].split(",")
            )
            made = cls(Path(root) / name, "memory.limit_in_bytes", "memory.usage_in_bytes", ("memory.failcnt", ""))
        os.mkdir(made.path)
        try:
            yield made
        finally:
            made.end()
            os.rmdir(made.path)
