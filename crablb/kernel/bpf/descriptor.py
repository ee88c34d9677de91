"""What all that has a file descriptor shares: owning it, pinning it, asking about it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crablb.kernel._libbpf import ffi, lib
from crablb.kernel.bpf.errors import check

__all__ = ["Descriptor", "open_pin"]

#: Processes of other network namespaces remove the folders above when those are empty.
ATTEMPTS = 100


class Descriptor:
    """Owner of one file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def pin(self, path: Path | str) -> None:
        """Pin at ``path`` (its directories are made); it lives there until unlinked."""
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            done = lib.bpf_obj_pin(self.fd, str(path).encode())
            if done != -errno.ENOENT:
                break
        check(done, f"cannot pin at {path}")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _info(self, kind: str) -> Any:
        info = ffi.new(f"struct {kind} *")
        size = ffi.new("uint32_t *", ffi.sizeof(f"struct {kind}"))
        check(
            lib.bpf_obj_get_info_by_fd(self.fd, info, size),
            "cannot ask for an object's information",
        )
        return info


def open_pin(path: Path | str) -> int:
    return check(lib.bpf_obj_get(str(path).encode()), f"cannot open the pinned object {path}")
