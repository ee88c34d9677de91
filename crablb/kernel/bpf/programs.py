"""BPF programs, loaded; to attach and to run them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crablb.kernel._libbpf import ffi, lib
from crablb.kernel.bpf.descriptor import Descriptor, open_pin
from crablb.kernel.bpf.errors import BpfBusyError, BpfError, BpfPermissionError, check, take_log
from crablb.kernel.interface import interfaces_above

__all__ = ["Link", "Program", "TestRun", "program_name", "programs", "tcx_programs", "xdp_program"]

XDP_FLAGS_SKB_MODE = 1 << 1
XDP_FLAGS_DRV_MODE = 1 << 2
# linux/bpf.h; tcx came with Linux 6.6, later than the headers of some distributions.
BPF_F_TEST_XDP_LIVE_FRAMES = 1 << 1
BPF_F_BEFORE = 1 << 3
BPF_TRACE_RAW_TP, BPF_MODIFY_RETURN, BPF_TCX_INGRESS = 23, 26, 46
BPF_LINK_TYPE_XDP, BPF_LINK_TYPE_TCX = 6, 11


@dataclass(frozen=True, slots=True)
class TestRun:
    """Outcome of BPF_PROG_TEST_RUN; ``duration_ns`` is the mean of one repetition."""

    __test__ = False  # not a test class, whatever pytest makes of its name

    retval: int
    data: bytes
    context: bytes
    duration_ns: int


class Program(Descriptor):
    """A loaded BPF program."""

    def __init__(self, fd: int, name: str = "") -> None:
        super().__init__(fd)
        info = self._info("bpf_prog_info")
        self.id = int(info.id)
        self.type = int(info.type)
        self.name = name or bytes(ffi.string(info.name)).decode()

    @classmethod
    def from_pin(cls, path: Path | str) -> Program:
        return cls(open_pin(path))

    def run_time(self) -> tuple[int, int]:
        """Nanoseconds that it has run, and how often, while the sysctl ``kernel.bpf_stats_enabled`` was 1."""
        info = self._info("bpf_prog_info")
        return int(info.run_time_ns), int(info.run_cnt)

    @property
    def verified(self) -> int:
        """Instructions that the verifier followed when it was loaded; the limit is 1,000,000.  0 before Linux 5.16."""
        return int(self._info("bpf_prog_info").verified_insns)

    def _link(self, target: int, attach_type: int, what: str, flags: int = 0) -> Link:
        opts = ffi.new("struct bpf_link_create_opts *")
        opts.sz = ffi.sizeof("struct bpf_link_create_opts")
        opts.flags = flags
        return Link(check(lib.bpf_link_create(self.fd, target, attach_type, opts), what))

    def attach_xdp(self, ifindex: int, mode: Literal["auto", "native", "generic"] = "auto") -> Link:
        """Attach to an interface by bpf_link; ``link.mode`` says how: "native" (in the driver) or "generic".

        ``auto`` tries native first.  Raises :class:`BpfBusyError` if the interface has an XDP program, or one that lies
        on it: that is only taken above another, not the other way round.
        """
        modes = {"native": XDP_FLAGS_DRV_MODE, "generic": XDP_FLAGS_SKB_MODE}
        wanted = ["native", "generic"] if mode == "auto" else [mode]
        for name in wanted:
            try:
                link = self._link(ifindex, lib.BPF_XDP, f"cannot attach XDP program ({name} mode)", modes[name])
            except BpfBusyError:
                if xdp_program(ifindex)[0]:
                    raise
                above = [name for name, i in interfaces_above(ifindex).items() if xdp_program(i)[0]]
                what = f"interface {socket.if_indextoname(ifindex)} takes no XDP program: one above it has one"
                raise BpfBusyError(f"{what} ({', '.join(above) or 'see bpftool net'})") from None
            except BpfError:
                if name == wanted[-1]:
                    raise
                continue
            link.mode = name
            return link
        raise AssertionError("unreachable")

    def attach_cgroup_sockops(self, cgroup: Path | str) -> Link:
        """Attach a sock_ops program to a cgroup v2 directory, beside others.

        Raises :class:`BpfBusyError` if there is one, or above it, that tolerates no others.
        """
        return self._attach_cgroup(cgroup, lib.BPF_CGROUP_SOCK_OPS)

    def attach_cgroup_ingress(self, cgroup: Path | str) -> Link:
        """Attach a cgroup_skb program to what comes in for sockets; see :meth:`attach_cgroup_sockops`."""
        return self._attach_cgroup(cgroup, lib.BPF_CGROUP_INET_INGRESS)

    def _attach_cgroup(self, cgroup: Path | str, kind: int) -> Link:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        what = f"cannot attach program {self.name} to cgroup {cgroup}"
        try:
            return self._link(fd, kind, what)
        except BpfPermissionError:
            for folder in (Path(cgroup).resolve(), *Path(cgroup).resolve().parents):
                alone = _alone(folder, kind)
                if alone:
                    raise BpfBusyError(
                        f"{what}: program {alone} is attached to {folder} without BPF_F_ALLOW_MULTI, so it tolerates no"
                        " other of its kind there and below; attach it with that flag, or detach it (bpftool cgroup)",
                    ) from None
            raise
        finally:
            os.close(fd)

    def attach_tcx(self, ifindex: int) -> Link:
        """Attach to an interface's ingress in front of what is there, clsact filters included.

        Raises :class:`BpfError` with EINVAL if the kernel is older than 6.6.
        """
        return self._link(ifindex, BPF_TCX_INGRESS, f"cannot attach to interface {ifindex}", BPF_F_BEFORE)

    def attach_modify_return(self) -> Link:
        """Attach a tracing program to the kernel's function that it was loaded for: it says what that returns."""
        return self._link(0, BPF_MODIFY_RETURN, f"cannot attach program {self.name}")

    def attach_tracepoint(self) -> Link:
        """Attach a tracing program to the kernel's tracepoint that it was loaded for (``tp_btf``)."""
        return self._link(0, BPF_TRACE_RAW_TP, f"cannot attach program {self.name}")

    def run_iterator(self) -> bytes:
        """Run a BPF iterator once, to its end; returns what it printed."""
        with self._link(0, lib.BPF_TRACE_ITER, f"cannot make iterator {self.name}") as link:
            fd = check(lib.bpf_iter_create(link.fd), f"cannot run iterator {self.name}")
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
        check(lib.bpf_prog_test_run_opts(self.fd, opts), f"cannot test-run program {self.name}")
        return TestRun(
            int(opts.retval),
            bytes(ffi.buffer(out, opts.data_size_out)) if data else b"",
            bytes(ffi.buffer(ctx_out, opts.ctx_size_out)) if context else b"",
            int(opts.duration),
        )

    def call(self, context: bytes) -> int:
        """Run a program of type syscall on a context; what it returned."""
        opts = ffi.new("struct bpf_test_run_opts *")
        opts.sz = ffi.sizeof("struct bpf_test_run_opts")
        ctx_in = ffi.from_buffer(context)
        opts.ctx_in, opts.ctx_size_in = ctx_in, len(context)
        check(lib.bpf_prog_test_run_opts(self.fd, opts), f"cannot run program {self.name}")
        return int(opts.retval)

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
        check(lib.bpf_prog_test_run_opts(self.fd, opts), f"cannot run program {self.name} on live frames")


def programs() -> Iterator[Program]:
    """Every program that is loaded on this machine, whoever loaded it; close them."""
    found = ffi.new("uint32_t *")
    while lib.bpf_prog_get_next_id(found[0], found) == 0:
        fd = lib.bpf_prog_get_fd_by_id(found[0])
        if fd >= 0:  # else it has been unloaded meanwhile
            yield Program(fd)


def program_name(id_: int) -> str:
    """Of the program with this id; empty if there is none any more."""
    fd = lib.bpf_prog_get_fd_by_id(id_)
    if fd < 0:
        take_log()
        return ""
    with Program(fd) as program:
        return program.name


class Link(Descriptor):
    """An attachment.  It ends when its last descriptor is closed, unless it is pinned."""

    def __init__(self, fd: int, mode: str = "") -> None:
        super().__init__(fd)
        self.mode = mode

    @classmethod
    def from_pin(cls, path: Path | str) -> Link:
        return cls(open_pin(path))

    @property
    def program_id(self) -> int:
        return int(self._info("bpf_link_info").prog_id)

    @property
    def target(self) -> int:
        """What it is attached to: an interface's index, or the id (the inode number) of a cgroup.  0: that has gone."""
        # The union behind prog_id begins with it for all kinds, those too that the installed headers do not know.
        info = self._info("bpf_link_info")
        return int.from_bytes(ffi.buffer(info)[16 : 20 if self.of_interface else 24], "little")

    @property
    def of_interface(self) -> bool:
        return int(self._info("bpf_link_info").type) in (BPF_LINK_TYPE_XDP, BPF_LINK_TYPE_TCX)

    def update(self, program: Program) -> None:
        """Replace the attached program, without a moment between the two."""
        opts = ffi.new("struct bpf_link_update_opts *")
        opts.sz = ffi.sizeof("struct bpf_link_update_opts")
        check(lib.bpf_link_update(self.fd, program.fd, opts), "cannot replace the attached program")

    def detach(self) -> None:
        check(lib.bpf_link_detach(self.fd), "cannot detach")


def _alone(cgroup: Path, kind: int) -> str:
    """Name and id of the program that tolerates no other beside it; empty if there is none, or it is no cgroup."""
    try:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return ""
    flags, ids, count = ffi.new("uint32_t *"), ffi.new("uint32_t[64]"), ffi.new("uint32_t *", 64)
    try:
        if lib.bpf_prog_query(fd, kind, 0, flags, ids, count) or not count[0] or flags[0] & lib.BPF_F_ALLOW_MULTI:
            return ""
    finally:
        os.close(fd)
        lib.crab_log_take()
    with Program(check(lib.bpf_prog_get_fd_by_id(ids[0]), f"cannot open program {ids[0]}")) as program:
        return f"{program.name} (id {program.id})"


def tcx_programs(ifindex: int) -> list[int]:
    """Ids of the tcx programs on an interface's ingress, in the order in which they run; empty before Linux 6.6."""
    ids, count = ffi.new("uint32_t[64]"), ffi.new("uint32_t *", 64)
    if lib.bpf_prog_query(ifindex, BPF_TCX_INGRESS, 0, ffi.NULL, ids, count):
        take_log()
        return []
    return [int(ids[i]) for i in range(count[0])]


def xdp_program(ifindex: int) -> tuple[int, str]:
    """Id of the XDP program on an interface (0 if there is none) and its mode, "native" or "generic"."""
    opts = ffi.new("struct bpf_xdp_query_opts *")
    opts.sz = ffi.sizeof("struct bpf_xdp_query_opts")
    check(lib.bpf_xdp_query(ifindex, 0, opts), f"cannot ask interface {ifindex} for its XDP program")
    program = int(opts.prog_id or opts.drv_prog_id or opts.skb_prog_id or opts.hw_prog_id)
    return program, "generic" if opts.attach_mode == lib.XDP_ATTACHED_SKB else "native"
