"""libbpf through cffi: open, load, pin and attach BPF programs, and use their maps.

Everything that holds a file descriptor is a context manager and has ``close()``; closing a link that is not pinned
detaches its program, as the kernel does.  Errors are :class:`BpfError` and its subclasses, with the errno and whatever
libbpf and the verifier said (``.log``).

Reference: bpf(2), https://docs.kernel.org/bpf/libbpf/.
"""

from crablb.kernel.bpf.errors import (
    BpfBusyError,
    BpfError,
    BpfLayoutError,
    BpfLoadError,
    BpfNotFoundError,
    BpfPermissionError,
)
from crablb.kernel.bpf.maps import Map
from crablb.kernel.bpf.objects import BPFFS, Object, ensure_bpffs, find_bpffs, object_path, outer, pins_last, take_outer
from crablb.kernel.bpf.programs import Link, Program, TestRun, program_name, programs, tcx_programs, xdp_program
from crablb.kernel.bpf.ring import Ring
from crablb.kernel.bpf.tc import TcFilter, attach_tc

__all__ = [
    "BPFFS",
    "BpfBusyError",
    "BpfError",
    "BpfLayoutError",
    "BpfLoadError",
    "BpfNotFoundError",
    "BpfPermissionError",
    "Link",
    "Map",
    "Object",
    "Program",
    "Ring",
    "TcFilter",
    "TestRun",
    "attach_tc",
    "ensure_bpffs",
    "find_bpffs",
    "object_path",
    "outer",
    "pins_last",
    "program_name",
    "programs",
    "take_outer",
    "tcx_programs",
    "xdp_program",
]
