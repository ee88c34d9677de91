"""BPF object files: find them, load them, and the file system that pins are in."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crablb.kernel._libbpf import ffi, lib
from crablb.kernel.bpf.errors import BpfLoadError, BpfNotFoundError, BpfShapeError, check, error
from crablb.kernel.bpf.maps import Map
from crablb.kernel.bpf.programs import Program

__all__ = ["Object", "ensure_bpffs", "object_path"]


def ensure_bpffs() -> Path:
    """The mount point of the BPF file system, mounted there if nothing is.

    Raises :class:`BpfPermissionError` without the right to mount.
    """
    path = Path("/sys/fs/bpf")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    if not any(fields[1] == str(path) and fields[2] == "bpf" for fields in mounts):
        c = ctypes.CDLL(None, use_errno=True)
        if c.mount(b"bpf", str(path).encode(), b"bpf", 0, b"mode=0700"):
            raise error(f"cannot mount the BPF file system on {path}", ctypes.get_errno())
    return path


def object_path(name: str) -> Path:
    """The packaged BPF object of a program: ``object_path("lb")``."""
    return Path(__file__).parent.parent / "objects" / f"{name}.bpf.o"


class Object:
    """A BPF object file, loaded: its programs and maps.

    ``reuse`` gives maps (by name) that exist already, ``max_entries`` other sizes than the object's own.  A map to
    reuse may have another size, but must be of the same type, and its keys and values as long
    (:class:`BpfShapeError`).

    Raises :class:`BpfNotFoundError` (no such file, or a name that it does not have), :class:`BpfLoadError` with
    the verifier's log, :class:`BpfPermissionError`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        reuse: Mapping[str, Map] | None = None,
        max_entries: Mapping[str, int] | None = None,
    ) -> None:
        self._obj = lib.bpf_object__open_file(str(path).encode(), ffi.NULL)
        if not self._obj:
            raise error(f"cannot open BPF object {path}", ffi.errno, BpfLoadError)
        self.path = Path(path)
        self.programs: dict[str, Program] = {}
        self.maps: dict[str, Map] = {}
        try:
            found = dict(self._walk(lib.bpf_object__next_map, lib.bpf_map__name))
            for name, size in (max_entries or {}).items():
                check(
                    lib.bpf_map__set_max_entries(self._named(found, name), size),
                    f"cannot size map {name}",
                )
            for name, existing in (reuse or {}).items():
                entry = self._named(found, name)
                shape = lib.bpf_map__type(entry), lib.bpf_map__key_size(entry), lib.bpf_map__value_size(entry)
                if shape != (existing.type, existing.key_size, existing.value_size):
                    raise BpfShapeError(f"map {name} that is to be reused has another shape")
                check(lib.bpf_map__reuse_fd(entry, existing.fd), f"cannot reuse map {name}")
            check(
                lib.bpf_object__load(self._obj),
                f"cannot load BPF object {self.path.name}",
                BpfLoadError,
            )
            for name, entry in found.items():
                self.maps[name] = Map(os.dup(lib.bpf_map__fd(entry)))
            for name, entry in self._walk(lib.bpf_object__next_program, lib.bpf_program__name):
                self.programs[name] = Program(os.dup(lib.bpf_program__fd(entry)), name)
        except BaseException:
            self.close()
            raise

    def _walk(self, following: Any, name: Any) -> Iterator[tuple[str, Any]]:
        entry = following(self._obj, ffi.NULL)
        while entry:
            yield bytes(ffi.string(name(entry))).decode(), entry
            entry = following(self._obj, entry)

    def _named(self, found: Mapping[str, Any], name: str) -> Any:
        if name not in found:
            raise BpfNotFoundError(f"{self.path.name} has no map {name}; it has {', '.join(found)}")
        return found[name]

    def program(self, name: str) -> Program:
        try:
            return self.programs[name]
        except KeyError:
            raise BpfNotFoundError(
                f"{self.path.name} has no program {name}; it has {', '.join(self.programs)}"
            ) from None

    def map(self, name: str) -> Map:
        try:
            return self.maps[name]
        except KeyError:
            raise BpfNotFoundError(f"{self.path.name} has no map {name}; it has {', '.join(self.maps)}") from None

    def close(self) -> None:
        for held in (*self.programs.values(), *self.maps.values()):
            held.close()
        if self._obj:
            lib.bpf_object__close(self._obj)
            self._obj = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
