"""BPF object files: find them, load them, and the file system that pins are in."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crablb.kernel._libbpf import ffi, lib
from crablb.kernel.bpf.errors import BpfLayoutError, BpfLoadError, BpfNotFoundError, check, error
from crablb.kernel.bpf.maps import Map
from crablb.kernel.bpf.programs import Program

__all__ = ["BPFFS", "Object", "ensure_bpffs", "find_bpffs", "object_path", "outer", "pins_last", "take_outer"]

BPFFS = Path("/sys/fs/bpf")


def find_bpffs() -> Path | None:
    """The mount point of the BPF file system; None if it is not mounted.

    In a mount namespace with a /sys of its own, as ``ip netns exec`` makes one for its command, it is that of the world
    outside: what is pinned in the other one would go with the command.
    """
    own = _is_bpffs("self")
    outside = _outside()
    if outside and not (own and os.stat(BPFFS).st_dev == os.stat(outside).st_dev):
        return outside
    return BPFFS if own else None


def ensure_bpffs() -> Path:
    """The same, mounted there if nothing is.  Raises :class:`BpfPermissionError` without the right to mount."""
    if found := find_bpffs():
        return found
    c = ctypes.CDLL(None, use_errno=True)
    if c.mount(b"bpf", str(BPFFS).encode(), b"bpf", 0, b"mode=0700"):
        raise error(f"cannot mount the BPF file system on {BPFFS}", ctypes.get_errno())
    return BPFFS


def pins_last() -> bool:
    """Whether what is pinned outlives this process's mount namespace."""
    path, outermost = ensure_bpffs(), _outermost()
    if path == _outside() or not outermost:
        return True
    try:
        return os.stat(path).st_dev == os.stat(f"/proc/{outermost}/root{BPFFS}").st_dev
    except OSError:  # that process has ended
        return True


def _is_bpffs(process: str) -> bool:
    """Whether a process has the BPF file system where it is usually mounted."""
    mounts = [line.split() for line in Path(f"/proc/{process}/mounts").read_text().splitlines()]
    return any(fields[1] == "/sys/fs/bpf" and fields[2] == "bpf" for fields in mounts)


def _outermost() -> str:
    """Of this process's ancestors the first that it may look at: in the best case, process 1."""
    process, found = "self", ""
    while process != "0":
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except FileNotFoundError:  # it is hidden (hidepid), and so are those above it
            break
        process = status.partition("\nPPid:")[2].split(maxsplit=1)[0]
        with suppress(OSError):
            os.stat(f"/proc/{process}/root/sys")
            found = process
    return found


def _outside() -> Path | None:
    """The BPF file system as the outermost ancestor has it; it may end, this path stays."""
    return Path(f"/proc/self/fd/{descriptor}") if (descriptor := outer()) >= 0 else None


@cache
def outer() -> int:
    """A descriptor of that one (O_PATH), which stays open: for :func:`take_outer` of a process that this one starts and
    that may look less far; -1: this one sees none itself."""
    if _taken >= 0:
        return _taken
    with suppress(OSError):
        outermost = _outermost()
        if outermost and _is_bpffs(outermost):
            return os.open(f"/proc/{outermost}/root/sys/fs/bpf", os.O_PATH | os.O_CLOEXEC)
    return -1


def take_outer(descriptor: int) -> None:
    """Have it from the process that has started this one: :func:`outer`."""
    global _taken  # noqa: PLW0603 - a process has one
    _taken = descriptor
    outer.cache_clear()


_taken = -1


def object_path(name: str) -> Path:
    """The packaged BPF object of a program: ``object_path("lb")``."""
    return Path(__file__).parent.parent / "objects" / f"{name}.bpf.o"


class Object:
    """A BPF object file, loaded: its programs and maps.

    ``reuse`` gives maps (by name) that exist already, ``max_entries`` other sizes than the object's own.  ``frags``:
    the programs are XDP ones that take frames of several buffers, as there are when the MTU exceeds a page.

    Raises :class:`BpfNotFoundError` (no such file, or a name that it does not have), :class:`BpfLoadError` with
    the verifier's log, :class:`BpfPermissionError`, :class:`BpfLayoutError` for maps that cannot be reused.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        reuse: Mapping[str, Map] | None = None,
        max_entries: Mapping[str, int] | None = None,
        frags: bool = False,
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
                sizes = lib.bpf_map__key_size(entry), lib.bpf_map__value_size(entry)
                if sizes != (existing.key_size, existing.value_size):  # libbpf would take it, and the verifier not
                    raise BpfLayoutError(
                        f"map {name} has keys and values of {existing.key_size} and {existing.value_size} bytes, "
                        f"not {sizes[0]} and {sizes[1]}: it is another version's"
                    )
                check(
                    lib.bpf_map__reuse_fd(entry, existing.fd),
                    f"cannot reuse map {name}",
                )
            for name, entry in self._walk(lib.bpf_object__next_program, lib.bpf_program__name):
                if frags:
                    check(lib.bpf_program__set_flags(entry, lib.BPF_F_XDP_HAS_FRAGS), f"cannot set flags of {name}")
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
