"""libbpf through cffi: open, load, pin and attach BPF programs, and use their maps.

Everything that holds a file descriptor is a context manager and has ``close()``; closing a link that is not pinned
detaches its program, as the kernel does.  Errors are :class:`BpfError` and its subclasses, with the errno and whatever
libbpf and the verifier said (``.log``).

Reference: bpf(2), https://docs.kernel.org/bpf/libbpf/.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from crablb.errors import KernelError
from crablb.kernel._libbpf import ffi, lib

__all__ = [
    "BpfBusyError",
    "BpfError",
    "BpfLoadError",
    "BpfNotFoundError",
    "BpfPermissionError",
    "Link",
    "Map",
    "Object",
    "Program",
    "TcFilter",
    "TestRun",
    "attach_tc",
    "ensure_bpffs",
    "object_path",
    "xdp_program",
]

XDP_FLAGS_SKB_MODE = 1 << 1
XDP_FLAGS_DRV_MODE = 1 << 2

lib.crab_log_install()


BPF_F_TEST_XDP_LIVE_FRAMES = 1 << 1  # linux/bpf.h


class BpfError(KernelError):
    """The kernel or libbpf refused.  ``errno`` is its number, ``log`` what libbpf and the verifier said."""

    def __init__(self, what: str, number: int = 0, log: str = "") -> None:
        self.errno = number
        self.log = log
        super().__init__(f"{what}: {os.strerror(number)}" if number else what)


class BpfLoadError(BpfError):
    """A program or map did not load; the verifier's words are in ``log``."""


class BpfPermissionError(BpfError):
    """Not privileged: CAP_BPF and CAP_NET_ADMIN are needed, as root has them."""


class BpfNotFoundError(BpfError):
    """No such object, map, program, pin or interface."""


class BpfBusyError(BpfError):
    """The place is taken by another program."""


def _log() -> str:
    return bytes(ffi.string(lib.crab_log_take())).decode(errors="replace")


def _error(what: str, number: int, kind: type[BpfError] = BpfError) -> BpfError:
    log = _log()
    number = abs(number)
    # EACCES from loading is the verifier's no, not a missing privilege.
    if number == errno.EPERM or (number == errno.EACCES and kind is not BpfLoadError):
        return BpfPermissionError(f"{what} (run as root, or with CAP_BPF and CAP_NET_ADMIN)", number, log)
    if number in (errno.ENOENT, errno.ENODEV):
        return BpfNotFoundError(what, number, log)
    if number in (errno.EBUSY, errno.EEXIST):
        return BpfBusyError(what, number, log)
    return kind(what, number, log)


def _check(rc: int, what: str, kind: type[BpfError] = BpfError) -> int:
    """A libbpf return code: negative is an error number."""
    if rc < 0:
        raise _error(what, rc, kind)
    lib.crab_log_take()
    return rc


def ensure_bpffs() -> Path:
    """The mount point of the BPF file system, mounted there if nothing is.

    Raises :class:`BpfPermissionError` without the right to mount.
    """
    path = Path("/sys/fs/bpf")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    if not any(fields[1] == str(path) and fields[2] == "bpf" for fields in mounts):
        c = ctypes.CDLL(None, use_errno=True)
        if c.mount(b"bpf", str(path).encode(), b"bpf", 0, b"mode=0700"):
            raise _error(f"cannot mount the BPF file system on {path}", ctypes.get_errno())
    return path


def object_path(name: str) -> Path:
    """The packaged BPF object of a program: ``object_path("lb")``."""
    return Path(__file__).parent / "objects" / f"{name}.bpf.o"


class _Descriptor:
    """Owner of one file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def pin(self, path: Path | str) -> None:
        """Pin at ``path`` (its directories are made); it lives there until unlinked."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _check(lib.bpf_obj_pin(self.fd, str(path).encode()), f"cannot pin at {path}")

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
        _check(
            lib.bpf_obj_get_info_by_fd(self.fd, info, size),
            "cannot ask for an object's information",
        )
        return info


def _get(path: Path | str) -> int:
    return _check(lib.bpf_obj_get(str(path).encode()), f"cannot open the pinned object {path}")


class Map(_Descriptor):
    """A BPF map.  Keys and values are bytes of exactly ``key_size`` and ``value_size``."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        info = self._info("bpf_map_info")
        self.type = int(info.type)
        self.id = int(info.id)
        self.name = bytes(ffi.string(info.name)).decode()
        self.key_size = int(info.key_size)
        self.value_size = int(info.value_size)
        self.max_entries = int(info.max_entries)
        self.per_cpu = self.type in (
            lib.BPF_MAP_TYPE_PERCPU_HASH,
            lib.BPF_MAP_TYPE_PERCPU_ARRAY,
            lib.BPF_MAP_TYPE_LRU_PERCPU_HASH,
        )

    @classmethod
    def from_pin(cls, path: Path | str) -> Map:
        return cls(_get(path))

    def _key(self, key: bytes | int) -> bytes:
        if isinstance(key, int):
            key = key.to_bytes(self.key_size, "little")
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name}: a key has {self.key_size} bytes, not {len(key)}")
        return key

    def lookup(self, key: bytes | int) -> bytes | None:
        """The value of ``key`` (all CPUs' values one after the other for a per-CPU map), or None."""
        size = self.value_size
        if self.per_cpu:
            size = (size + 7) // 8 * 8 * lib.libbpf_num_possible_cpus()
        value = ffi.new("uint8_t[]", size)
        rc = lib.bpf_map_lookup_elem(self.fd, self._key(key), value)
        if rc == -errno.ENOENT:
            return None
        _check(rc, f"cannot read map {self.name}")
        return bytes(ffi.buffer(value))

    def lookup_percpu(self, key: bytes | int) -> list[bytes]:
        """One value a possible CPU; raises KeyError for a missing key."""
        value = self.lookup(key)
        if value is None:
            raise KeyError(key)
        stride = (self.value_size + 7) // 8 * 8
        return [value[i : i + self.value_size] for i in range(0, len(value), stride)]

    def sum_u64(self, key: bytes | int) -> int:
        """Sum over the CPUs of a ``__u64`` value."""
        return sum(int.from_bytes(v, "little") for v in self.lookup_percpu(key))

    def update(self, key: bytes | int, value: bytes | int, flags: int = 0) -> None:
        if isinstance(value, int):
            value = value.to_bytes(self.value_size, "little")
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name}: a value has {self.value_size} bytes, not {len(value)}")
        if self.per_cpu:  # the same for every CPU
            value = value.ljust((self.value_size + 7) // 8 * 8, b"\0") * lib.libbpf_num_possible_cpus()
        rc = lib.bpf_map_update_elem(self.fd, self._key(key), value, flags)
        if rc == -errno.E2BIG:
            raise BpfError(f"map {self.name} is full ({self.max_entries} entries)", errno.E2BIG, _log())
        _check(rc, f"cannot write map {self.name}")

    def delete(self, key: bytes | int) -> bool:
        """Delete ``key``; False if it was not there."""
        rc = lib.bpf_map_delete_elem(self.fd, self._key(key))
        if rc == -errno.ENOENT:
            return False
        _check(rc, f"cannot delete from map {self.name}")
        return True

    def keys(self) -> Iterator[bytes]:
        key, following = ffi.NULL, ffi.new("uint8_t[]", self.key_size)
        while lib.bpf_map_get_next_key(self.fd, key, following) == 0:
            found = bytes(ffi.buffer(following))
            yield found
            key = found

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        for key in list(self.keys()):
            value = self.lookup(key)
            if value is not None:  # it may have gone meanwhile
                yield key, value

    def dump(self, batch: int = 16384) -> tuple[bytes, bytes]:
        """Keys and values of a whole hash map, one after the other (BPF_MAP_LOOKUP_BATCH).

        What changes meanwhile may be missing or be there twice.
        """
        place, count = ffi.new("uint32_t *"), ffi.new("__u32 *")
        all_keys, all_values = [], []
        first = True
        while True:
            keys = ffi.new("uint8_t[]", batch * self.key_size)
            values = ffi.new("uint8_t[]", batch * self.value_size)
            count[0] = batch
            rc = lib.bpf_map_lookup_batch(self.fd, ffi.NULL if first else place, place, keys, values, count, ffi.NULL)
            if rc == -errno.ENOSPC:  # a bucket holds more than this
                batch *= 2
                continue
            if rc and rc != -errno.ENOENT:
                _check(rc, f"cannot read map {self.name}")
            all_keys.append(ffi.buffer(keys, count[0] * self.key_size)[:])
            all_values.append(ffi.buffer(values, count[0] * self.value_size)[:])
            first = False
            if rc:  # ENOENT: that was all
                return b"".join(all_keys), b"".join(all_values)

    def mmap(self) -> mmap.mmap:
        """The whole of a ``BPF_F_MMAPABLE`` array, shared with the kernel and writable."""
        length = (self.value_size + 7) // 8 * 8 * self.max_entries
        page = mmap.PAGESIZE
        return mmap.mmap(self.fd, (length + page - 1) // page * page)


@dataclass(frozen=True, slots=True)
class TestRun:
    """Outcome of BPF_PROG_TEST_RUN; ``duration_ns`` is the mean of one repetition."""

    __test__ = False  # not a test class, whatever pytest makes of its name

    retval: int
    data: bytes
    context: bytes
    duration_ns: int


class Program(_Descriptor):
    """A loaded BPF program."""

    def __init__(self, fd: int, name: str = "") -> None:
        super().__init__(fd)
        info = self._info("bpf_prog_info")
        self.id = int(info.id)
        self.type = int(info.type)
        self.name = name or bytes(ffi.string(info.name)).decode()

    @classmethod
    def from_pin(cls, path: Path | str) -> Program:
        return cls(_get(path))

    def run_time(self) -> tuple[int, int]:
        """Nanoseconds that it has run, and how often, while the sysctl ``kernel.bpf_stats_enabled`` was 1."""
        info = self._info("bpf_prog_info")
        return int(info.run_time_ns), int(info.run_cnt)

    def _link(self, target: int, attach_type: int, what: str, flags: int = 0) -> Link:
        opts = ffi.new("struct bpf_link_create_opts *")
        opts.sz = ffi.sizeof("struct bpf_link_create_opts")
        opts.flags = flags
        return Link(_check(lib.bpf_link_create(self.fd, target, attach_type, opts), what))

    def attach_xdp(self, ifindex: int, mode: Literal["auto", "native", "generic"] = "auto") -> Link:
        """Attach to an interface by bpf_link; ``link.mode`` says how: "native" (in the driver) or "generic".

        ``auto`` tries native first.  Raises :class:`BpfBusyError` if the interface has an XDP program.
        """
        modes = {"native": XDP_FLAGS_DRV_MODE, "generic": XDP_FLAGS_SKB_MODE}
        wanted = ["native", "generic"] if mode == "auto" else [mode]
        for name in wanted:
            try:
                link = self._link(ifindex, lib.BPF_XDP, f"cannot attach XDP program ({name} mode)", modes[name])
            except BpfBusyError:
                raise
            except BpfError:
                if name == wanted[-1]:
                    raise
                continue
            link.mode = name
            return link
        raise AssertionError("unreachable")

    def attach_cgroup_sockops(self, cgroup: Path | str) -> Link:
        """Attach a sock_ops program to a cgroup v2 directory."""
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return self._link(fd, lib.BPF_CGROUP_SOCK_OPS, f"cannot attach to cgroup {cgroup}")
        finally:
            os.close(fd)

    def run_iterator(self) -> bytes:
        """Run a BPF iterator once, to its end; returns what it printed."""
        with self._link(0, lib.BPF_TRACE_ITER, f"cannot make iterator {self.name}") as link:
            fd = _check(lib.bpf_iter_create(link.fd), f"cannot run iterator {self.name}")
            with os.fdopen(fd, "rb") as stream:
                return stream.read()

    def test_run(self, data: bytes = b"", *, context: bytes = b"", repeat: int = 0, room: int = 512) -> TestRun:
        """Run the program on a packet (BPF_PROG_TEST_RUN); the result may be ``room`` bytes longer.

        ``repeat`` 0 is once, and the only number that a syscall program takes.
        """
        out = ffi.new("uint8_t[]", len(data) + room)
        ctx_out = ffi.new("uint8_t[]", max(len(context), 1))
        opts = ffi.new("struct bpf_test_run_opts *")
        opts.sz = ffi.sizeof("struct bpf_test_run_opts")
        data_in, ctx_in = ffi.from_buffer(data), ffi.from_buffer(context)
        opts.repeat = repeat
        if data:
            opts.data_in, opts.data_size_in = data_in, len(data)
            opts.data_out, opts.data_size_out = out, len(out)
        if context:
            opts.ctx_in, opts.ctx_size_in = ctx_in, len(context)
            opts.ctx_out, opts.ctx_size_out = ctx_out, len(context)
        _check(lib.bpf_prog_test_run_opts(self.fd, opts), f"cannot test-run program {self.name}")
        return TestRun(
            int(opts.retval),
            bytes(ffi.buffer(out, opts.data_size_out)) if data else b"",
            bytes(ffi.buffer(ctx_out, opts.ctx_size_out)) if context else b"",
            int(opts.duration),
        )

    def run_live(self, data: bytes, ifindex: int, repeat: int) -> None:
        """Run an XDP program ``repeat`` times on a packet as if it came in by an interface, and do what it returns.

        Source: Documentation/bpf/bpf_prog_run.rst, "Running XDP programs in live frame mode".
        """
        context = struct.pack("=6I", 0, len(data), 0, ifindex, 0, 0)  # struct xdp_md
        data_in, ctx_in = ffi.from_buffer(data), ffi.from_buffer(context)
        opts = ffi.new("struct bpf_test_run_opts *")
        opts.sz = ffi.sizeof("struct bpf_test_run_opts")
        opts.repeat, opts.flags = repeat, BPF_F_TEST_XDP_LIVE_FRAMES
        opts.data_in, opts.data_size_in = data_in, len(data)
        opts.ctx_in, opts.ctx_size_in = ctx_in, len(context)
        _check(lib.bpf_prog_test_run_opts(self.fd, opts), f"cannot run program {self.name} on live frames")


def programs() -> Iterator[Program]:
    """Every program that is loaded on this machine, whoever loaded it; close them."""
    found = ffi.new("uint32_t *")
    while lib.bpf_prog_get_next_id(found[0], found) == 0:
        fd = lib.bpf_prog_get_fd_by_id(found[0])
        if fd >= 0:  # else it has been unloaded meanwhile
            yield Program(fd)


class Link(_Descriptor):
    """An attachment.  It ends when its last descriptor is closed, unless it is pinned."""

    def __init__(self, fd: int, mode: str = "") -> None:
        super().__init__(fd)
        self.mode = mode

    @classmethod
    def from_pin(cls, path: Path | str) -> Link:
        return cls(_get(path))

    @property
    def program_id(self) -> int:
        return int(self._info("bpf_link_info").prog_id)

    def update(self, program: Program) -> None:
        """Replace the attached program, without a moment between the two."""
        opts = ffi.new("struct bpf_link_update_opts *")
        opts.sz = ffi.sizeof("struct bpf_link_update_opts")
        _check(lib.bpf_link_update(self.fd, program.fd, opts), "cannot replace the attached program")

    def detach(self) -> None:
        _check(lib.bpf_link_detach(self.fd), "cannot detach")


@dataclass(slots=True)
class TcFilter:
    """A direct-action program on an interface's clsact hook."""

    ifindex: int
    direction: Literal["ingress", "egress"]
    handle: int
    priority: int

    def detach(self) -> None:
        """Remove the filter; nothing happens if the interface or the filter has gone."""
        opts = ffi.new("struct bpf_tc_opts *")
        opts.sz = ffi.sizeof("struct bpf_tc_opts")
        opts.handle, opts.priority = self.handle, self.priority
        lib.bpf_tc_detach(_tc_hook(self.ifindex, self.direction), opts)
        lib.crab_log_take()

    def destroy_hook(self) -> None:
        """Remove the interface's clsact qdisc with everything on it."""
        hook = _tc_hook(self.ifindex, self.direction)
        hook.attach_point = lib.BPF_TC_INGRESS | lib.BPF_TC_EGRESS
        lib.bpf_tc_hook_destroy(hook)
        lib.crab_log_take()


def _tc_hook(ifindex: int, direction: Literal["ingress", "egress"]) -> Any:
    hook = ffi.new("struct bpf_tc_hook *")
    hook.sz = ffi.sizeof("struct bpf_tc_hook")
    hook.ifindex = ifindex
    hook.attach_point = lib.BPF_TC_INGRESS if direction == "ingress" else lib.BPF_TC_EGRESS
    return hook


def attach_tc(
    program: Program,
    ifindex: int,
    direction: Literal["ingress", "egress"] = "ingress",
    *,
    priority: int = 1,
    handle: int = 1,
) -> tuple[TcFilter, bool]:
    """Attach at clsact; returns the filter, and whether the clsact qdisc was made for it.

    A filter of the same priority and handle is replaced.
    """
    hook = _tc_hook(ifindex, direction)
    rc = lib.bpf_tc_hook_create(hook)
    if rc != -errno.EEXIST:
        _check(rc, f"cannot make a clsact qdisc on interface {ifindex}")
    opts = ffi.new("struct bpf_tc_opts *")
    opts.sz = ffi.sizeof("struct bpf_tc_opts")
    opts.handle, opts.priority, opts.prog_fd = handle, priority, program.fd
    opts.flags = lib.BPF_TC_F_REPLACE
    _check(lib.bpf_tc_attach(hook, opts), f"cannot attach to clsact on interface {ifindex}")
    return TcFilter(ifindex, direction, handle, priority), rc == 0


def xdp_program(ifindex: int) -> tuple[int, str]:
    """Id of the XDP program on an interface (0 if there is none) and its mode, "native" or "generic"."""
    opts = ffi.new("struct bpf_xdp_query_opts *")
    opts.sz = ffi.sizeof("struct bpf_xdp_query_opts")
    _check(lib.bpf_xdp_query(ifindex, 0, opts), f"cannot ask interface {ifindex} for its XDP program")
    program = int(opts.prog_id or opts.drv_prog_id or opts.skb_prog_id or opts.hw_prog_id)
    return program, "generic" if opts.attach_mode == lib.XDP_ATTACHED_SKB else "native"


class Object:
    """A BPF object file, loaded: its programs and maps.

    ``reuse`` gives maps (by name) that exist already, ``max_entries`` other sizes than the object's own.

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
            raise _error(f"cannot open BPF object {path}", ffi.errno, BpfLoadError)
        self.path = Path(path)
        self.programs: dict[str, Program] = {}
        self.maps: dict[str, Map] = {}
        try:
            found = dict(self._walk(lib.bpf_object__next_map, lib.bpf_map__name))
            for name, size in (max_entries or {}).items():
                _check(
                    lib.bpf_map__set_max_entries(self._named(found, name), size),
                    f"cannot size map {name}",
                )
            for name, existing in (reuse or {}).items():
                _check(
                    lib.bpf_map__reuse_fd(self._named(found, name), existing.fd),
                    f"cannot reuse map {name}",
                )
            _check(
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
