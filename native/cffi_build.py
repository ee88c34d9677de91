"""cffi definitions of the two extensions; setup.py runs them.

``crablb._native`` is the hot loop.  Its declarations are read from the C headers themselves, so Python cannot drift
from C.  ``crablb.kernel._libbpf`` is the part of libbpf that the package uses; the compiler checks it against libbpf's
own headers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
# setuptools wants paths relative to setup.py.
NATIVE = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "native").glob("*.c"))

# The kernel's names for fixed-width integers, as bpf/maps.h spells them.  What they are is for <linux/types.h> to say:
# __u64 is unsigned long long where uint64_t is unsigned long, and to a C compiler pointers to these differ.
KERNEL_TYPES = "".join(
    f"typedef int... __{name};" for name in ("u8", "u16", "u32", "u64", "s32", "s64", "be16", "be32")
)

# Errors in gcc 14, so for older ones too: declarations that differ from what they declare.
STRICT = ["-Werror=incompatible-pointer-types", "-Werror=int-conversion"]


def declarations(header: Path) -> str:
    """What cffi can read of a C header: all but includes, guards, conditionals and static assertions.

    Object-like ``#define NAME integer`` lines stay: cffi turns them into constants.
    """
    kept = []
    for line in re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S).splitlines():
        directive = line.startswith("#") and not re.match(r"#define \w+ +(0x[0-9a-fA-F]+|\d+|\.\.\.)\s*$", line)
        if not directive and not line.startswith("_Static_assert"):
            kept.append(line)
    return "\n".join(kept)


# CRABLB_DEBUG=1 pip install -e . builds the hot loop with its assertions: frames are conserved at every batch's end.
DEBUG = ["-DCRAB_DEBUG", "-UNDEBUG"] if os.environ.get("CRABLB_DEBUG") else []

native = FFI()
# Called by workers for services with a policy in Python (crablb/selection/custom.py), and for handlers
# (crablb/dataplane/handlers.py).
CALLBACKS = """
extern "Python" void crab_python_choose(void *, struct crab_choice *, uint32_t);
extern "Python" void crab_python_handle(void *, struct crab_handled *, uint32_t);
"""

native.cdef(KERNEL_TYPES + declarations(ROOT / "bpf/maps.h") + declarations(ROOT / "native/crablb.h") + CALLBACKS)
native.set_source(
    "crablb._native",
    '#include "crablb.h"\n',
    sources=NATIVE,
    include_dirs=["native", "bpf"],
    extra_compile_args=["-std=gnu11", "-O3", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter",
                        "-fno-strict-aliasing", "-fvisibility=hidden", *STRICT, *DEBUG],
    extra_link_args=["-pthread"],
)  # fmt: skip

# libbpf hands its messages to a callback with a va_list, which Python cannot take apart.
LOG = r"""
#include <bpf/libbpf.h>
#include <bpf/bpf.h>
#include <linux/bpf.h>
#include <linux/if_link.h>
#include <stdio.h>
#include <string.h>

static __thread char crab_log[256 * 1024];
static __thread size_t crab_log_len;

static int crab_log_print(enum libbpf_print_level level, const char *format, va_list args)
{
    if (level == LIBBPF_DEBUG)
        return 0;
    int n = vsnprintf(crab_log + crab_log_len, sizeof crab_log - crab_log_len, format, args);
    if (n > 0) {
        crab_log_len += (size_t)n;
        if (crab_log_len >= sizeof crab_log)
            crab_log_len = sizeof crab_log - 1;
    }
    return 0;
}

static void crab_log_install(void)
{
    libbpf_set_print(crab_log_print);
}

static const char *crab_log_take(void)
{
    crab_log[crab_log_len] = 0;
    crab_log_len = 0;
    return crab_log;
}
"""

libbpf = FFI()
libbpf.cdef(KERNEL_TYPES + declarations(ROOT / "native/libbpf.cdef"))
libbpf.cdef('extern "Python" int crab_ring_sample(void *context, void *data, size_t size);')
libbpf.set_source("crablb.kernel._libbpf", LOG, libraries=["bpf"], extra_compile_args=STRICT)
