"""cffi definitions of the two extensions; setup.py runs them.

``crablb._native`` is the hot loop.  Its declarations are read from the C headers themselves, so Python cannot drift
from C.  ``crablb.kernel._libbpf`` is the part of libbpf that the package uses; the compiler checks it against libbpf's
own headers.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
# setuptools wants paths relative to setup.py.
NATIVE = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "native").glob("*.c"))

# The kernel's names for fixed-width integers, as bpf/maps.h spells them.
KERNEL_TYPES = """
typedef uint8_t __u8; typedef uint16_t __u16; typedef uint32_t __u32; typedef uint64_t __u64;
typedef uint16_t __be16; typedef uint32_t __be32; typedef int32_t __s32; typedef int64_t __s64;
"""


def declarations(header: Path) -> str:
    """What cffi can read of a C header: all but includes, guards, conditionals and static assertions.

    Object-like ``#define NAME integer`` lines stay: cffi turns them into constants.
    """
    kept = []
    for line in re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S).splitlines():
        directive = line.startswith("#") and not re.match(r"#define \w+ +(0x[0-9a-fA-F]+|\d+)\s*$", line)
        if not directive and not line.startswith("_Static_assert"):
            kept.append(line)
    return "\n".join(kept)


native = FFI()
native.cdef(KERNEL_TYPES + declarations(ROOT / "bpf/maps.h") + declarations(ROOT / "native/crablb.h"))
native.set_source(
    "crablb._native",
    '#include "crablb.h"\n',
    sources=NATIVE,
    include_dirs=["native", "bpf"],
    extra_compile_args=["-std=gnu11", "-O3", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter",
                        "-fno-strict-aliasing", "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
)  # fmt: skip

libbpf = FFI()
libbpf.cdef(KERNEL_TYPES + declarations(ROOT / "crablb/kernel/libbpf.h"))
libbpf.set_source(
    "crablb.kernel._libbpf",
    "#include <bpf/libbpf.h>\n#include <bpf/bpf.h>\n#include <bpf/btf.h>\n#include <linux/bpf.h>\n",
    libraries=["bpf"],
)
